"""Contexts of 32 000 and 131 072 positions: in chunks, in memory that grows with them and no faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from peer.model.checkpoint import open_checkpoint
from peer.model.errors import CacheFull
from peer.model.kv_cache import GROWTH
from peer.model.span import Span
from tests.peer.model.families import VOCAB, Model, config_of, random_model, random_tokens, save

LENGTH = 32_000
CHUNK = 1024
LAYERS = 1
MOST = 1 << 17
"""Positions of the longest contexts in use."""


def long_llama(directory: Path) -> Model:
    """One narrow layer, saved in a directory."""
    torch.manual_seed(3)
    config = config_of(
        "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=MOST,
    )
    whole = random_model(config)
    save(whole, directory)
    return whole


@pytest.mark.slow
def test_32_000_positions_in_chunks_end_as_the_whole_text_in_one_piece(tmp_path: Path) -> None:
    whole = long_llama(tmp_path)
    span = Span.load(open_checkpoint(str(tmp_path)), 0, LAYERS)
    text = random_tokens(1, LENGTH)
    cache = span.new_cache(0, LAYERS, LENGTH)

    for start in range(0, LENGTH, CHUNK):
        wanted = 1 if start + CHUNK >= LENGTH else 0
        row = span.row(text[:, start : start + CHUNK], cache, start, wanted=wanted)
        (last,) = span.forward_rows([row])

    assert last is not None
    with torch.inference_mode():
        expected = whole(text, logits_to_keep=1, use_cache=False).logits[:, -1]
    torch.testing.assert_close(last[:, -1], expected, rtol=1e-3, atol=1e-4)
    assert cache.bytes <= (LENGTH + GROWTH) * span.kv_bytes_per_token(0, LAYERS)


@pytest.mark.slow
def test_the_last_of_131_072_positions_are_computed_as_by_the_whole_model(tmp_path: Path) -> None:
    """To compute all of them takes a minute, so the caches of both begin with the same random numbers."""
    whole, last = long_llama(tmp_path), 20
    span = Span.load(open_checkpoint(str(tmp_path)), 0, LAYERS)
    cache, theirs = span.new_cache(0, LAYERS, MOST), DynamicCache(config=whole.config)
    for start in range(0, MOST - last, CHUNK):
        count = min(CHUNK, MOST - last - start)
        keys, values = torch.randn(2, 1, 1, count, 8)
        cache.update(keys, values, 0)
        cache.commit(1, count)
        theirs.update(keys, values, 0)
    text = random_tokens(1, last)

    for start in range(0, last, 5):
        row = span.row(text[:, start : start + 5], cache, MOST - last + start)
        (logits,) = span.forward_rows([row])

    assert logits is not None and cache.length == MOST
    with torch.inference_mode():
        expected = whole(text, past_key_values=theirs, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits[:, -1], expected, rtol=1e-3, atol=1e-4)
    assert cache.bytes == MOST * span.kv_bytes_per_token(0, LAYERS)
    with pytest.raises(CacheFull):
        span.row(text[:, :1], cache, MOST)
