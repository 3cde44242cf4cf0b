"""The two halves of an association over a simulated path, on virtual time: minutes pass in seconds.

The same `Outbound` and `Inbound` that carry real links. What is not simulated is how long computing takes.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from itertools import count

from shared.channel.fast.chunks import DATA, Envelope, chunks, read_data, read_sack, sack_chunk
from shared.channel.fast.congestion import Congestion
from shared.channel.fast.inbound import Inbound
from shared.channel.fast.outbound import Outbound

WINDOW_BYTES = 1 << 20
# DTLS, UDP and IP around each packet.
OVERHEAD_BYTES = 65


class SimulatedAssociation:
    """One way for messages, the other for acknowledgements.

    `delay_s` is that of one direction, `bytes_per_s` the rate of the way there with a queue of `queue_bytes`
    before it, `loss` the share of packets lost in each direction.
    """

    def __init__(
        self,
        *,
        delay_s: float,
        bytes_per_s: float,
        queue_bytes: float,
        loss: float = 0.0,
        seed: int = 1,
        jitter_s: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.received: list[tuple[float, bytes]] = []
        """When each message arrived, and what it was."""
        self.sent_packets = 0
        self.dropped_packets = 0
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._bytes_per_s = bytes_per_s
        self._queue_s = queue_bytes / bytes_per_s
        self._loss = loss
        self._chance = random.Random(seed)
        self._free_at = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._wakes_at: float | None = None
        self._to_send: list[bytes] = []
        envelope = Envelope(5000, 5000, 7)
        self.outbound = Outbound(envelope, 2**32 - 100, WINDOW_BYTES, Congestion(WINDOW_BYTES))
        self.inbound = Inbound(2**32 - 101, WINDOW_BYTES, self._arrived)
        self._back = Envelope(5000, 5000, 8)

    def send(self, *messages: bytes) -> None:
        self._to_send += messages
        self._pump()

    def run_until(self, done: Callable[[], bool], limit_s: float = 600.0) -> float:
        """Go on until `done`; the time it took."""
        started = self.now
        while not done():
            assert self._events, "nothing will ever happen again"
            self.now, _, event = heapq.heappop(self._events)
            assert self.now - started < limit_s, f"not done after {limit_s:.0f} s"
            event()
        return self.now - started

    def deliver_all(self, *messages: bytes) -> float:
        """Send messages and wait until the last has come; the time it took."""
        wanted = len(self.received) + len(messages)
        self.send(*messages)
        return self.run_until(lambda: len(self.received) >= wanted)

    def _arrived(self, stream: int, protocol: int, message: bytes) -> None:
        self.received.append((self.now, message))

    def _pump(self) -> None:
        outbound = self.outbound
        while True:
            while self._to_send and outbound.room_bytes(self.now) > 0:
                outbound.append(0, 0, 53, self._to_send.pop(0))
            packets = outbound.transmit(self.now)
            if not packets:
                break
            self._leave(packets)
        self._set_timer()

    def _leave(self, packets: list[bytes]) -> None:
        for packet in packets:
            self.sent_packets += 1
            size = len(packet) + OVERHEAD_BYTES
            if self._free_at - self.now > self._queue_s or self._chance.random() < self._loss:
                self.dropped_packets += 1
                continue
            self._free_at = max(self.now, self._free_at) + size / self._bytes_per_s
            self._at(self._free_at + self._late(), lambda packet=packet: self._hear(packet))  # type: ignore[misc]

    def _late(self) -> float:
        return self._delay_s + self._jitter_s * self._chance.random()

    def _hear(self, packet: bytes) -> None:
        for kind, flags, body in chunks(packet):
            assert kind == DATA
            self.inbound.receive(read_data(flags, body))
        sack = self._back.sealed(sack_chunk(*self.inbound.acknowledged()))
        if self._chance.random() >= self._loss:
            self._at(self.now + self._delay_s, lambda: self._acknowledge(sack))

    def _acknowledge(self, packet: bytes) -> None:
        for _, _, body in chunks(packet):
            self.outbound.acknowledged(read_sack(body), self.now)
        self._pump()

    def _set_timer(self) -> None:
        deadline = self.outbound.deadline
        if deadline is not None and (self._wakes_at is None or deadline < self._wakes_at):
            self._wakes_at = deadline
            self._at(deadline, self._wake)

    def _wake(self) -> None:
        if self._wakes_at is not None and self.now >= self._wakes_at:
            self._wakes_at = None
            if self.outbound.deadline is not None and self.outbound.deadline <= self.now:
                self._leave(self.outbound.expired(self.now))
                self._pump()
            self._set_timer()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), event))
