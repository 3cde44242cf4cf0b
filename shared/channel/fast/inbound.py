"""The receiving half of an association: messages in order, and what to acknowledge. Pure: no socket or clock.

What comes in order is taken at once, in constant time; what comes early is held by its number until the gap
before it closes. aiortc sorts and searches everything held for each packet, a third of its receiver's time.

TSN order is used for all streams, since it is stricter than the order within each: a channel that asked for
unordered delivery gets ordered delivery.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from shared.channel.fast.chunks import FIRST, LAST, MAX_DUPLICATES, MAX_GAPS, WHOLE, Data, unwrapped

# What aiortc and we say in a=max-message-size; whoever exceeds it was told.
MAX_MESSAGE_BYTES = 256 * 1024
# Each held piece costs some 200 bytes beside its payload, so their number is bounded too. A window full of
# our own pieces are 904.
MAX_HELD = 8192
# A gap is reported by two 16-bit offsets.
_FURTHEST = 0xFFFF

Deliver = Callable[[int, int, bytes], None]


class TooLong(ValueError):
    """The other side sends a message longer than what we take."""


class Inbound:
    """Takes DATA chunks in any order and hands over (stream, protocol, message) in theirs.

    `cumulative` is the TSN before the first one expected; `window_bytes` bounds what is held.
    """

    def __init__(self, cumulative: int, window_bytes: int, deliver: Deliver) -> None:
        self.cumulative = cumulative
        """Everything up to this TSN has come; it counts on beyond 32 bits."""
        self.acknowledgement_due = False
        self._window_bytes = window_bytes
        self._deliver = deliver
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._parts_of = (0, 0)
        self._held: dict[int, Data] = {}
        self._held_bytes = 0
        self._islands: list[tuple[int, int]] = []
        self._duplicates: list[int] = []

    @property
    def room_bytes(self) -> int:
        """How much more may be sent to us."""
        return max(0, self._window_bytes - self._held_bytes - self._parts_bytes)

    def receive(self, piece: Data) -> None:
        """Take a piece. Raises TooLong; whatever the handler of a message raises comes out here too."""
        self.acknowledgement_due = True
        tsn = unwrapped(piece.tsn, self.cumulative)
        if tsn != self.cumulative + 1:
            self._early(tsn, piece)
            return
        self.cumulative = tsn
        self._take(piece)
        if self._held:
            self._take_held()

    def forward(self, tsn: int) -> None:
        """The other side gave up what is missing up to `tsn` (RFC 3758 §3.6)."""
        self.acknowledgement_due = True
        target = unwrapped(tsn, self.cumulative)
        if target > self.cumulative + _FURTHEST:
            return
        while self.cumulative < target:
            self.cumulative += 1
            piece = self._held.pop(self.cumulative, None)
            if piece is None:
                self._forget_parts()
            else:
                self._held_bytes -= len(piece.payload)
                self._take(piece)
        self._take_held()

    def acknowledged(self) -> tuple[int, int, list[tuple[int, int]], list[int]]:
        """What to say in a SACK: cumulative TSN, room, gaps, duplicates. Says the latter once."""
        self.acknowledgement_due = False
        base = self.cumulative
        while self._islands and self._islands[0][0] <= base:
            self._islands.pop(0)
        gaps = [(first - base, last - base) for first, last in self._islands[:MAX_GAPS]]
        duplicates, self._duplicates = self._duplicates, []
        return base, self.room_bytes, gaps, duplicates

    def _take(self, piece: Data) -> None:
        """The next piece in order: a message, or a part of one."""
        flags = piece.flags
        if flags & FIRST:
            if self._parts:
                self._forget_parts()
            if flags & WHOLE == WHOLE:
                self._deliver(piece.stream, piece.protocol, piece.payload)
                return
            self._parts_of = (piece.stream, piece.protocol)
        elif not self._parts or self._parts_of != (piece.stream, piece.protocol):
            # A part of a message that was given up; or nonsense.
            return
        self._parts.append(piece.payload)
        self._parts_bytes += len(piece.payload)
        if self._parts_bytes > MAX_MESSAGE_BYTES:
            raise TooLong(f"a message on stream {piece.stream} exceeds {MAX_MESSAGE_BYTES} bytes")
        if flags & LAST:
            message = b"".join(self._parts)
            self._forget_parts()
            self._deliver(piece.stream, piece.protocol, message)

    def _forget_parts(self) -> None:
        self._parts = []
        self._parts_bytes = 0

    def _early(self, tsn: int, piece: Data) -> None:
        """Seen before, or ahead of a gap. What exceeds our window is dropped, and comes again."""
        if tsn <= self.cumulative or tsn in self._held:
            if len(self._duplicates) < MAX_DUPLICATES:
                self._duplicates.append(tsn)
        elif (
            len(self._held) < MAX_HELD
            and len(piece.payload) <= self.room_bytes
            and tsn - self.cumulative <= _FURTHEST
        ):
            self._held[tsn] = piece
            self._held_bytes += len(piece.payload)
            self._grow_islands(tsn)

    def _grow_islands(self, tsn: int) -> None:
        """Note `tsn` among the runs of numbers that came early; mostly it prolongs the last one."""
        islands = self._islands
        place = bisect_right(islands, (tsn, tsn))
        first = last = tsn
        if place and islands[place - 1][1] == tsn - 1:
            place -= 1
            first = islands.pop(place)[0]
        if place < len(islands) and islands[place][0] == tsn + 1:
            last = islands.pop(place)[1]
        islands.insert(place, (first, last))

    def _take_held(self) -> None:
        """Hand over what was held, as far as it is whole."""
        held = self._held
        while (piece := held.pop(self.cumulative + 1, None)) is not None:
            self.cumulative += 1
            self._held_bytes -= len(piece.payload)
            self._take(piece)
