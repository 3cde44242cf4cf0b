"""Which tokens may come next when the text must follow a grammar.

The grammar travels with the request, and the last hop reads it by llguidance, on bytes: however a text is cut
into tokens. What is allowed depends on the grammar and the tokens drawn so far alone, so a hop that takes
over allows what the lost one would have allowed.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from peer.model.errors import BadGrammar, first_line

END = "<|corolla-end-of-grammar|>"


class Grammars:
    """Makes the constraints of one model. Its tokenizer is read when the first grammar comes.

    Reading it and a grammar takes up to a second or so: call `constraint` in a thread.
    """

    def __init__(self, tokenizer_files: Mapping[str, bytes], vocab_size: int) -> None:
        self._files = tokenizer_files
        self._vocab_size = vocab_size
        self._read: _Tokenizer | None = None
        self._reading = threading.Lock()

    def constraint(self, grammar: str, stop_tokens: Sequence[int]) -> Constraint:
        """Raises BadGrammar."""
        # One at a time: a grammar may be made to take as long as the limits allow.
        with self._reading:
            if self._read is None:
                self._read = _read_tokenizer(self._files, self._vocab_size)
            matcher = LLMatcher(self._read.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise BadGrammar(f"the grammar cannot be used: {matcher.get_error().partition(chr(10))[0]}")
        return Constraint(matcher, self._vocab_size, self._read.end, stop_tokens)


class _Tokenizer(msgspec.Struct, frozen=True):
    tokenizer: LLTokenizer
    end: int
    """A token behind those of the model, by which llguidance says that the text may end."""


class Constraint:
    """One session's grammar, and how far the tokens have come in it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, end: int, stop_tokens: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end = end
        self._stop_tokens = [token for token in stop_tokens if token < vocab_size]
        self._consumed: list[int] = []

    def allowed(self, generated: Sequence[int]) -> torch.Tensor:
        """Which tokens [vocab] may follow those generated so far. Raises BadGrammar when none may."""
        self._follow(list(generated))
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise BadGrammar(f"the grammar cannot be followed: {self._reason()}")
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))
        mask[self._end :] = False
        if self._matcher.is_accepting():
            mask[self._stop_tokens] = True
        if not mask.any():
            raise BadGrammar("the grammar is at its end, and the asker named no stop token")
        return mask

    def _follow(self, generated: list[int]) -> None:
        known = len(self._consumed)
        if generated[:known] != self._consumed:
            self._matcher.reset()
            known = 0
        if known < len(generated) and not self._matcher.consume_tokens(generated[known:]):
            raise BadGrammar(f"the tokens so far do not follow the grammar: {self._reason()}")
        self._consumed = generated

    def _reason(self) -> str:
        return self._matcher.get_error().partition("\n")[0][:200]


def _read_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> _Tokenizer:
    """The tokenizer with an end of our own, since the asker says which tokens of the model stand for it."""
    try:
        backend = Tokenizer.from_str(_tokenizer_json(files))
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([END])
        end, count = backend.token_to_id(END), backend.get_vocab_size()
        assert end is not None
        return _Tokenizer(LLTokenizer(backend.to_str(), n_vocab=max(count, vocab_size), eos_token=end), end)
    except Exception as error:  # whatever these libraries raise, without a tokenizer there is no grammar
        raise BadGrammar(
            f"this model's tokenizer cannot be used with grammars ({first_line(error)})"
        ) from error


def _tokenizer_json(files: Mapping[str, bytes]) -> str:
    """The file that most repositories have; where there is only an older kind, transformers makes it."""
    if "tokenizer.json" in files:
        return files["tokenizer.json"].decode()
    # Here and not above: the import takes seconds.
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="corolla-grammar-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text: str = tokenizer.backend_tokenizer.to_str()
    return text
