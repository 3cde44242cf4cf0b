"""Which frame goes next, which must go again, and which came already. Pure: no links, no clocks.

A channel numbers its frames once, whatever path carries them. The sender keeps every frame until the receiver
says that it was consumed, so a frame lost with its path goes again on another one. The receiver puts frames
back in order and drops what it has, so a message arrives once, and after those that were sent before it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from shared.channel.path_choice import WINDOW_MOST_BYTES, WINDOW_START_BYTES
from shared.errors import ProtocolError
from shared.framing import (
    CHUNK_BYTES,
    HEADER_BYTES,
    PEER_WIRE,
    SEQUENCE_MASK,
    WHOLE_BYTES,
    Header,
    Joiner,
    Message,
    Priority,
    Splitter,
    whole_frame,
)
from shared.protocol import Path

WINDOW_FRAMES = 512
"""Frames sent but not consumed, at most, however small; the bytes are for `path_choice` to measure."""
# The urgent may use more of the window: a prefill that fills its share never keeps a token waiting. Any share
# of the least window holds a whole frame of the longest kind, or such a message would wait for ever.
_SHARES = {
    Priority.CONTROL: 1.0,
    Priority.DECODE: 0.875,
    Priority.PREFILL: 0.75,
    Priority.BACKGROUND: 0.625,
}
_PRIORITIES = tuple(Priority)
_LIMIT_FRAMES = tuple(int(WINDOW_FRAMES * _SHARES[priority]) for priority in _PRIORITIES)
# A message given up half way is told in a frame beyond the window, at most one for each priority.
_TOLERATED_FRAMES = WINDOW_FRAMES + len(_PRIORITIES)
_TOLERATED_BYTES = WINDOW_MOST_BYTES + len(_PRIORITIES) * HEADER_BYTES

CREDIT_BYTES = 32 * 1024
CREDIT_FRAMES = 32
# Credit costs both ends and a relay a frame. A window has room for what comes in CREDIT_SOON_S: `path_choice`
# counts with TURN_S. Without traffic the sender learns of it all the same.
CREDIT_SOON_S = 0.002
CREDIT_DELAY_S = 0.05
_MUCH = 4


class Carrier(Protocol):
    """What carries frames, with its own account of them."""

    delivered: int


class Sent:
    """A frame that was given to a link and is not known to be consumed."""

    __slots__ = ("data", "link", "place", "sequence")

    def __init__(self, sequence: int, data: bytes) -> None:
        self.sequence = sequence
        self.data = data
        self.link: Carrier | None = None
        """The link that carried it last; None when it has to go again."""
        self.place = 0
        """How many frames that link had carried when it carried this one."""


class Outbound:
    """The sending half of a channel: messages waiting by priority, and frames not yet consumed.

    `waiting` holds one entry for each `send` in progress, whose caller waits with it: the callers bound it.
    `unconsumed` is bounded by the window.
    """

    def __init__(self) -> None:
        self.waiting: tuple[deque[Splitter], ...] = tuple(deque() for _ in _PRIORITIES)
        self.unconsumed: deque[Sent] = deque()
        self.last = 0
        """The number of the newest frame."""
        self.window = 0
        """Bytes that may be sent and not consumed: what bounds the memory of both ends and of a relay between
        them, and the time for which a prefill can keep the queues on the way filled."""
        self.resize(WINDOW_START_BYTES)
        self._bytes = 0
        self._again: deque[Sent] = deque()

    def resize(self, window_bytes: int) -> None:
        """How much may be under way from now on."""
        self.window = window_bytes
        self._limit_bytes = tuple(int(window_bytes * _SHARES[priority]) for priority in _PRIORITIES)

    @property
    def idle(self) -> bool:
        """True when nothing waits for a link or for the window."""
        return not self._again and not any(self.waiting)

    def straight(self, priority: Priority, meta: bytes, body: bytes | bytearray | memoryview) -> Sent | None:
        """A whole message as one frame, if it fits in one and nothing is ahead of it; else None."""
        size = len(meta) + len(body)
        longest = CHUNK_BYTES if priority >= Priority.PREFILL else WHOLE_BYTES
        if size > longest or self._again or not self._fits(priority, size + HEADER_BYTES):
            return None
        for urgent in range(priority + 1):
            if self.waiting[urgent]:
                return None
        return self._number(whole_frame(PEER_WIRE, priority, self.last + 1, meta, body, priority))

    def take(self, chunk_bytes: int = CHUNK_BYTES) -> tuple[Sent, Splitter | None] | None:
        """The next frame for a link, and the message it finished or goes on with. None when none may go.

        `chunk_bytes` is how much of a message the link likes to carry in one frame.
        """
        while self._again:
            sent = self._again.popleft()
            if sent.link is None and self._is_unconsumed(sent):
                return sent, None
        for priority in _PRIORITIES:
            queue = self.waiting[priority]
            if queue and self._fits(priority, queue[0].next_bytes(chunk_bytes)):
                message = queue[0]
                sent = self._number(message.take(self.last + 1, chunk_bytes))
                if message.finished:
                    queue.popleft()
                return sent, message
        return None

    def give_up(self, message: Splitter) -> None:
        """Forget a message whose sender no longer waits; if it had begun, the receiver is told to as well."""
        self.waiting[message.priority].remove(message)
        if message.started:
            self._again.append(self._number(message.abandon(self.last + 1)))

    def consumed(self, received: int) -> None:
        """The receiver has used every frame up to `received`. Raises ProtocolError if it cannot have."""
        if received > self.last:
            raise ProtocolError(f"frame {received} was acknowledged, but only {self.last} were sent")
        while self.unconsumed and self.unconsumed[0].sequence <= received:
            sent = self.unconsumed.popleft()
            self._bytes -= len(sent.data)
            if sent.link is not None:
                sent.link.delivered += len(sent.data)

    def link_lost(self, link: Carrier) -> None:
        """Everything this link carried that was not consumed goes again."""
        self._repeat(sent for sent in self.unconsumed if sent.link is link)

    def answered(self, link: Carrier, place: int, received: int) -> None:
        """A ping, sent on `link` after `place` frames, was answered: `received` was the newest in order.

        A link keeps the order, so if the first frame that is missing went there before the ping, it is lost
        there, and so may be those after it. If it went elsewhere, that link's own ping will tell.
        """
        if not self.unconsumed:
            return
        first = received + 1 - self.unconsumed[0].sequence
        if not 0 <= first < len(self.unconsumed):
            return
        missing = self.unconsumed[first]
        if missing.link is link and missing.place <= place:
            later = itertools.islice(self.unconsumed, first, None)
            self._repeat(sent for sent in later if sent.link is link and sent.place <= place)

    def _repeat(self, frames: Iterable[Sent]) -> None:
        lost = list(frames)
        for sent in lost:
            sent.link = None
        self._again = deque(sorted((*self._again, *lost), key=lambda sent: sent.sequence))

    def _is_unconsumed(self, sent: Sent) -> bool:
        return bool(self.unconsumed) and self.unconsumed[0].sequence <= sent.sequence

    def _fits(self, priority: Priority, size: int) -> bool:
        return (
            self._bytes + size <= self._limit_bytes[priority]
            and len(self.unconsumed) < _LIMIT_FRAMES[priority]
        )

    def _number(self, data: bytes) -> Sent:
        self.last += 1
        sent = Sent(self.last, data)
        self.unconsumed.append(sent)
        self._bytes += len(data)
        return sent


class Arrived(NamedTuple):
    """A whole message, the number of its last frame, and what carried that."""

    message: Message
    sequence: int
    path: Path


class Inbound:
    """The receiving half: frames back in order, messages put together, consumption told back.

    `inbox` and what came too early are bounded by the window, which a sender that oversteps it learns.
    """

    def __init__(self) -> None:
        self.inbox: deque[Arrived] = deque()
        self.received = 0
        """Every frame up to this one is here."""
        self.repeated = 0
        """Frames that came again; they cost nothing but their transport."""
        self._joiner = Joiner()
        self._early: dict[int, tuple[Header, bytes | memoryview, Path]] = {}
        self._early_bytes = 0
        self._in_hand: Arrived | None = None
        self._sizes: deque[int] = deque()
        """The lengths of the frames after `_counted`."""
        self._counted = 0
        self._due_bytes = 0
        self._held_bytes = 0
        self._credited = 0

    def push(self, header: Header, frame: bytes | memoryview, path: Path) -> None:
        """Take one frame of the peer wire, in whatever order it came. Raises ProtocolError."""
        ahead = (header.sequence - self.received - 1) & SEQUENCE_MASK
        if ahead == 0:
            self._accept(header, frame, path)
            while self._early and (early := self._early.pop(self.received + 1, None)):
                self._early_bytes -= len(early[1])
                self._accept(*early)
        elif ahead > SEQUENCE_MASK // 2 or self.received + 1 + ahead in self._early:
            self.repeated += 1
        else:
            self._keep_early(self.received + 1 + ahead, header, frame, path)

    def next(self) -> Arrived | None:
        """The oldest message, for the handler; its memory stays the channel's until `handled`."""
        self._in_hand = self.inbox.popleft() if self.inbox else None
        return self._in_hand

    def handled(self) -> None:
        """The handler is done with the message that `next` gave: it counts as consumed."""
        self._in_hand = None

    @property
    def consumed(self) -> int:
        """Every frame up to this one was used, and its memory is free or has been handed on."""
        if self._in_hand is not None:
            return self._in_hand.sequence - 1
        return self.inbox[0].sequence - 1 if self.inbox else self.received

    def credit_wait_s(self) -> float:
        """For how long the sender need not hear what was consumed since the last credit."""
        self._count()
        much = max(self._due_bytes / CREDIT_BYTES, (self._counted - self._credited) / CREDIT_FRAMES)
        return CREDIT_DELAY_S if much < 1 else CREDIT_SOON_S if much < _MUCH else 0.0

    def credit(self) -> int | None:
        """What to tell the sender as consumed, if it is more than it was told."""
        before = self._credited
        return told if (told := self.settle()) != before else None

    def settle(self) -> int:
        """What to tell the sender as consumed: from now on it counts on that much room."""
        self._count()
        self._held_bytes -= self._due_bytes
        self._due_bytes = 0
        self._credited = self._counted
        return self._credited

    def _count(self) -> None:
        for _ in range(self.consumed - self._counted):
            self._due_bytes += self._sizes.popleft()
            self._counted += 1

    def _accept(self, header: Header, frame: bytes | memoryview, path: Path) -> None:
        self._sizes.append(len(frame))
        self._held_bytes += len(frame)
        self.received += 1
        if self._held_bytes > _TOLERATED_BYTES or self.received - self._credited > _TOLERATED_FRAMES:
            raise ProtocolError(
                f"more than the {WINDOW_MOST_BYTES} bytes or {WINDOW_FRAMES} frames of credit came"
            )
        message = self._joiner.push(header, frame)
        if message is not None:
            self.inbox.append(Arrived(message, self.received, path))

    def _keep_early(self, sequence: int, header: Header, frame: bytes | memoryview, path: Path) -> None:
        self._early[sequence] = (header, frame, path)
        self._early_bytes += len(frame)
        if self._early_bytes > _TOLERATED_BYTES or len(self._early) > _TOLERATED_FRAMES:
            raise ProtocolError("more frames came ahead of a missing one than credit allows")
