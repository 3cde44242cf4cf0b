"""Runs of layers: what a span is, what a set of spans covers. Values only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from shared.errors import SettingsError


class Span(msgspec.Struct, frozen=True, order=True):
    """Layers [start, end) of a model; layer 0 is the first."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}–{self.end}"

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.end

    def holds(self, other: Span) -> bool:
        """True when every layer of `other` is in this span."""
        return self.start <= other.start and other.end <= self.end


def coverage(spans: Iterable[Span], layer_count: int) -> list[int]:
    """How many spans hold each layer, in layer order."""
    counts = [0] * layer_count
    for span in spans:
        for layer in range(max(0, span.start), min(layer_count, span.end)):
            counts[layer] += 1
    return counts


def layer_sums(held: Iterable[tuple[Span, float]], layer_count: int) -> list[float]:
    """What spans of some worth amount to together at each layer, in layer order."""
    sums = [0.0] * layer_count
    for span, worth in held:
        for layer in range(max(0, span.start), min(layer_count, span.end)):
            sums[layer] += worth
    return sums


def gaps(counts: Sequence[int]) -> list[Span]:
    """The runs of layers that nobody holds, from the counts of `coverage`."""
    found: list[Span] = []
    for layer, count in enumerate(counts):
        if count:
            continue
        if found and found[-1].end == layer:
            found[-1] = Span(found[-1].start, layer + 1)
        else:
            found.append(Span(layer, layer + 1))
    return found


def parse_layers(text: str, layer_count: int) -> Span:
    """Read `0:8` (layers 0 to 7), `8:` (from 8 on), `2/3` (the second of three equal parts) or `all`.

    Raises SettingsError when the text is something else or leaves the model.
    """
    try:
        span = _read_layers(text.strip(), layer_count)
    except ValueError:
        raise SettingsError(
            f"--layers {text!r} is not a range: write 0:8 for layers 0 to 7, 2/3 for the second third, or all"
        ) from None
    if not 0 <= span.start < span.end <= layer_count:
        raise SettingsError(f"--layers {text} is outside this model, which has layers 0:{layer_count}")
    return span


def _read_layers(text: str, layer_count: int) -> Span:
    if text == "all":
        return Span(0, layer_count)
    if "/" in text:
        part, parts = (int(number) for number in text.split("/"))
        if not 1 <= part <= parts:
            raise ValueError(text)
        return Span(layer_count * (part - 1) // parts, layer_count * part // parts)
    start, end = text.split(":")
    return Span(int(start or 0), int(end or layer_count))
