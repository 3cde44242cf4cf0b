"""The sending half of an association: what waits, what is on its way, what is lost. Pure: the time is told.

A packet is built once and sent as often as needed. Loss is told by order of sending, as in RACK (RFC 8985):
when something sent three sends later has arrived, a packet is lost, however few SACKs said so, and so is a
packet that was sent again. aiortc counts SACKs instead, and one SACK for each batch of packets starves that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from shared.channel.fast.chunks import FIRST, LAST, PAYLOAD_BYTES, Envelope, Sack, data_chunk, unwrapped
from shared.channel.fast.congestion import Congestion

# What leaves at once, beside what was just acknowledged: more would run over a router's queue after a pause.
# aiortc's 4 packets cost 16 KiB three round trips.
BURST_PACKETS = 32
# Packets that overtake each other are not lost: the distance doubles when a packet was sent again needlessly.
LEAST_REORDERING = 3
MOST_REORDERING = 48


class Packet:
    """One DATA chunk on its way, ready to be sent."""

    __slots__ = ("bytes", "lost", "order", "sends", "sent_at", "size", "tsn")

    def __init__(self, tsn: int, size: int, packet: bytes) -> None:
        self.tsn = tsn
        self.size = size
        self.bytes = packet
        self.order = 0
        self.sends = 0
        self.sent_at = 0.0
        self.lost = False


class Outbound:
    """Says which packets to send when. At the time `deadline`, `expired` is to be called.

    `first_tsn` is the number of the first packet, `window_bytes` what the other side first takes.
    """

    def __init__(self, envelope: Envelope, first_tsn: int, window_bytes: int, congestion: Congestion) -> None:
        self.next_tsn = first_tsn
        self.deadline: float | None = None
        self.waiting_bytes = 0
        """Bytes that were never sent yet."""
        self.flight_bytes = 0
        """Bytes on their way, neither acknowledged nor known to be lost."""
        self.congestion = congestion
        self.payload_bytes = PAYLOAD_BYTES
        """How much of a message goes into one packet."""
        self._envelope = envelope
        self._cumulative = first_tsn - 1
        self._window_bytes = window_bytes
        self._waiting: deque[Packet] = deque()
        # By TSN, in its order: sent and not acknowledged, those included that wait to be sent again.
        self._open: dict[int, Packet] = {}
        self._lost: deque[Packet] = deque()
        self._order = 0
        self._arrived_order = 0
        self._slowed_order = 0
        self._reordering = LEAST_REORDERING
        self._burst_bytes = self._most_burst_bytes
        self._burst_since = 0.0
        self._probed = False
        self._needless_probes = 0
        self._timeouts = 0

    def append(self, stream: int, sequence: int, protocol: int, message: bytes) -> None:
        """Cut a message into packets, which wait to be sent."""
        flags, size, tsn = FIRST, len(message), self.next_tsn
        most = self.payload_bytes
        for start in range(0, size, most):
            payload = message[start : start + most]
            if start + most >= size:
                flags |= LAST
            chunk = data_chunk(flags, tsn, stream, sequence, protocol, payload)
            self._waiting.append(Packet(tsn, len(payload), self._envelope.sealed(chunk)))
            tsn += 1
            flags = 0
        self.next_tsn = tsn
        self.waiting_bytes += size

    @property
    def unanswered(self) -> int:
        """How many timeouts in a row nothing came back for."""
        return self._timeouts

    def room_bytes(self, now: float) -> int:
        """How much more may leave now, not counting what waits already."""
        return self._limit_bytes(now) - self.flight_bytes - self.waiting_bytes

    def transmit(self, now: float) -> list[bytes]:
        """The packets that may leave now, in order: lost ones first."""
        flight_bytes = self.flight_bytes
        limit = self._limit_bytes(now)
        leaving: list[bytes] = []
        while self._lost and self.flight_bytes < limit:
            packet = self._lost.popleft()
            # Unless it was acknowledged after all while it waited, or sent again as a probe.
            if packet.lost and packet.tsn in self._open:
                packet.lost = False
                self._send(packet, now)
                leaving.append(packet.bytes)
        while self._waiting and self.flight_bytes < limit:
            packet = self._waiting.popleft()
            self._open[packet.tsn] = packet
            self.waiting_bytes -= packet.size
            self._send(packet, now)
            leaving.append(packet.bytes)
        # What was acknowledged while there was nothing to send is not saved up.
        self._burst_bytes = min(
            self._most_burst_bytes, self._burst_bytes - (self.flight_bytes - flight_bytes)
        )
        if leaving and self.deadline is None:
            self._wait(now)
        return leaving

    def acknowledged(self, sack: Sack, now: float) -> None:
        """The other side told what it has. What was overtaken, or speaks of the future, changes nothing."""
        cumulative = unwrapped(sack.cumulative, self._cumulative)
        if cumulative < self._cumulative or cumulative >= self.next_tsn - len(self._waiting):
            return
        self._window_bytes = sack.window
        held_back = self.flight_bytes + self.payload_bytes > self.congestion.window_bytes
        arrived = [self._open.pop(tsn, None) for tsn in range(self._cumulative + 1, cumulative + 1)]
        self._cumulative = cumulative
        if sack.gaps:
            arrived += self._beyond_gaps(sack)
        size = self._arrived(arrived, now)
        if sack.duplicates:
            self._sent_needlessly(sack.duplicates)
        self._find_lost()
        if size:
            recovering = self._arrived_order <= self._slowed_order
            self.congestion.acknowledged(
                size, now, held_back=held_back and (not recovering or not self.congestion.trips.queue_felt)
            )
            self._burst_bytes = max(0, self._burst_bytes) + size
        if not self._open:
            self.deadline = None
        elif size:
            self._wait(now)

    def expired(self, now: float) -> list[bytes]:
        """The deadline has come: ask for an answer, the next time take all for lost. Returns what to send."""
        if not self._open:
            self.deadline = None
            return []
        if not self._probed and self.congestion.trips.probe_s < self.congestion.trips.timeout_s:
            return self._probe(now)
        self._timeouts += 1
        for packet in self._open.values():
            self._lose(packet)
        self._lost = deque(self._open.values())
        self._slowed_order = self._order
        self.congestion.timed_out()
        self._wait(now)
        return self.transmit(now)

    def _limit_bytes(self, now: float) -> int:
        """How much may be on its way. One packet always, or a closed window would never be seen to open."""
        self._refill_burst(now)
        window = max(self._window_bytes, PAYLOAD_BYTES)
        return min(self.flight_bytes + self._burst_bytes, self.congestion.window_bytes, window)

    @property
    def _most_burst_bytes(self) -> int:
        return BURST_PACKETS * self.payload_bytes

    def _refill_burst(self, now: float) -> None:
        """A burst may follow the last one as soon as the path has carried that, by the window's own rate."""
        most = self._most_burst_bytes
        if self._burst_bytes < most:
            trip_s = self.congestion.trips.smoothed_s
            rate = self.congestion.window_bytes / trip_s if trip_s else 0.0
            refilled = self._burst_bytes + rate * (now - self._burst_since)
            self._burst_bytes = most if not self.flight_bytes else min(most, int(refilled))
        self._burst_since = now

    def _send(self, packet: Packet, now: float) -> None:
        self._order += 1
        packet.order = self._order
        packet.sends += 1
        packet.sent_at = now
        self.flight_bytes += packet.size

    def _beyond_gaps(self, sack: Sack) -> list[Packet]:
        """Those that arrived although one before them is missing. Looks at each open packet once, at most."""
        arrived: list[Packet] = []
        blocks = iter(sack.gaps)
        first, last = next(blocks)
        for tsn, packet in self._open.items():
            offset = tsn - self._cumulative
            while offset > last:
                block = next(blocks, None)
                if block is None:
                    break
                first, last = block
            if offset > last:
                break
            if offset >= first:
                arrived.append(packet)
        for packet in arrived:
            del self._open[packet.tsn]
        return arrived

    def _arrived(self, packets: Iterable[Packet | None], now: float) -> int:
        """Count them out, in bytes. The newest tells the round trip if it was sent once (Karn's rule)."""
        least_s = self.congestion.trips.least_s or 0.0
        size, newest = 0, None
        for packet in packets:
            if packet is None:
                continue
            size += packet.size
            if not packet.lost:
                self.flight_bytes -= packet.size
            # So soon after it was sent again it is the first sending that arrived (RFC 8985 §6.2 step 2).
            if packet.sends > 1 and now - packet.sent_at < least_s:
                continue
            if newest is None or packet.order > newest.order:
                newest = packet
        if size:
            self._probed = False
            self._timeouts = 0
        if newest is not None:
            self._arrived_order = max(self._arrived_order, newest.order)
            if newest.sends == 1:
                self.congestion.trips.measured(now - newest.sent_at, now)
        return size

    def _find_lost(self) -> None:
        """Those that left long before one that arrived. Stops at the first that was sent once, and later."""
        limit = self._arrived_order - self._reordering
        slow_down = False
        for packet in self._open.values():
            if packet.order > limit:
                if packet.sends == 1:
                    break
            elif not packet.lost:
                slow_down = slow_down or packet.order > self._slowed_order
                self._lose(packet)
                self._lost.append(packet)
        if slow_down:
            self._slowed_order = self._order
            self.congestion.slow_down()

    def _lose(self, packet: Packet) -> None:
        if not packet.lost:
            packet.lost = True
            self.flight_bytes -= packet.size
            self.congestion.lost(packet.size)

    def _sent_needlessly(self, count: int) -> None:
        probes = min(count, self._needless_probes)
        self._needless_probes -= probes
        if count > probes:
            self._reordering = min(2 * self._reordering, MOST_REORDERING)

    def _probe(self, now: float) -> list[bytes]:
        """Send the first open packet again. It leaves so late that all before it are lost when it arrives."""
        self._probed = True
        self._needless_probes += 1
        packet = next(iter(self._open.values()))
        if not packet.lost:
            self.flight_bytes -= packet.size
        packet.lost = False
        self._order += self._reordering
        self._send(packet, now)
        self._wait(now)
        return [packet.bytes]

    def _wait(self, now: float) -> None:
        """Set the deadline: by the round trip at first, by ever longer timeouts when nothing answers."""
        trips = self.congestion.trips
        if not self._probed and not self._timeouts and trips.probe_s < trips.timeout_s:
            self.deadline = now + trips.probe_s
        else:
            self.deadline = now + trips.backed_off_s(self._timeouts)
