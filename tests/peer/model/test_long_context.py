"""A context of 32 000 positions goes through in chunks, in memory that grows with it and no faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer.model.checkpoint import open_checkpoint
from peer.model.kv_cache import GROWTH
from peer.model.span import Span
from tests.peer.model.families import VOCAB, config_of, random_model, random_tokens, save

LENGTH = 32_000
CHUNK = 1024
LAYERS = 1


@pytest.mark.slow
def test_32_000_positions_in_chunks_end_as_the_whole_text_in_one_piece(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = config_of(
        "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=1 << 17,
    )
    whole = random_model(config)
    save(whole, tmp_path)
    span = Span.load(open_checkpoint(str(tmp_path)), 0, LAYERS)
    text = random_tokens(1, LENGTH)
    cache = span.new_cache(0, LAYERS, LENGTH)

    for start in range(0, LENGTH, CHUNK):
        row = span.row(text[:, start : start + CHUNK], cache, start, wants_logits=start + CHUNK >= LENGTH)
        (last,) = span.forward_rows([row])

    assert last is not None
    with torch.inference_mode():
        expected = whole(text, logits_to_keep=1, use_cache=False).logits[:, -1]
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)
    assert cache.bytes <= (LENGTH + GROWTH) * span.kv_bytes_per_token(0, LAYERS)
