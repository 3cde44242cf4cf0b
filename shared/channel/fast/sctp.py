"""The SCTP association of a data channel: DATA and SACK by our own halves, all else by aiortc.

aiortc's coroutines for handshakes, resets and goodbyes are kept and run on the spot, since over UDP they
never wait. Everything that comes in numbers passes them by.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from time import monotonic
from typing import Any

from aiortc import RTCDataChannel, RTCDtlsTransport, RTCSctpTransport
from aiortc.rtcsctptransport import (
    CHUNK_TYPES,
    WEBRTC_BINARY,
    WEBRTC_BINARY_EMPTY,
    WEBRTC_DCEP,
    WEBRTC_STRING,
    WEBRTC_STRING_EMPTY,
    Chunk,
    DataChunk,
    ForwardTsnChunk,
    InitChunk,
    SackChunk,
)

from shared.channel.fast.chunks import (
    DATA,
    SACK,
    Data,
    Envelope,
    Sack,
    chunks,
    only_data,
    read_data,
    read_sack,
    sack_chunk,
)
from shared.channel.fast.congestion import FIRST_TIMEOUT_S, Congestion
from shared.channel.fast.dtls import FastDtlsTransport
from shared.channel.fast.inbound import Inbound, TooLong
from shared.channel.fast.outbound import Outbound
from shared.channel.fast.path_mtu import HEARTBEAT_ACK, PROBE_S, PathMtu, probe_packet, probed_size

log = logging.getLogger(__name__)

# What may be on its way, and what we hold of it. More than the UDP buffers take would only be lost.
WIDE_WINDOW_BYTES = 1 << 20
NARROW_WINDOW_BYTES = 256 * 1024
# One timeout is a cut of the path; after a second one long packets are suspected.
_SUSPICIOUS_TIMEOUTS = 2

_State = RTCSctpTransport.State


class FastSctpTransport(RTCSctpTransport):
    """aiortc's SCTP with a short way for DATA and SACK. Needs a `FastDtlsTransport` below it.

    Everything is sent reliably and in order, whatever a channel asks for.
    """

    def __init__(self, transport: RTCDtlsTransport, port: int = 5000) -> None:
        super().__init__(transport, port)
        assert isinstance(transport, FastDtlsTransport)
        self._dtls = transport
        self._inbound: Inbound | None = None
        self._outbound: Outbound | None = None
        self._ours: Envelope | None = None
        self._theirs: Envelope | None = None
        self._pumping = False
        self._complained = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._rto = FIRST_TIMEOUT_S
        self.takes_packet_bytes = 0
        """The longest packet that the other side reads; 0 while it did not say."""
        self._path = PathMtu(0)
        self._probe_timer: asyncio.TimerHandle | None = None

    # What comes in.

    def packet_received(self, packet: bytes) -> None:
        """A packet out of DTLS. Nothing that a peer can send raises."""
        try:
            if self._theirs is not None and self._theirs.fits(packet):
                if (piece := only_data(packet)) is not None:
                    self._data_received(piece)
                    return
                for kind, flags, body in chunks(packet):
                    self._chunk_received(kind, flags, body)
            else:
                _run(super()._handle_data(packet))
        except TooLong as error:
            log.warning("the association ends: %s", error)
            self._hang_up()
        except Exception:
            # aiortc's parsers raise whatever unpacking raises. Told once, since a peer could fill the log.
            level = logging.DEBUG if self._complained else logging.WARNING
            log.log(level, "a packet of %d bytes was not understood", len(packet), exc_info=True)
            self._complained = True

    def batch_received(self) -> None:
        """All that lay in the socket has been heard: acknowledge it once, and send what has room now."""
        inbound = self._inbound
        if inbound is not None and inbound.acknowledgement_due and self._ours is not None:
            self._dtls.send_packets([self._ours.sealed(sack_chunk(*inbound.acknowledged()))])
        self._pump()

    def _chunk_received(self, kind: int, flags: int, body: bytes) -> None:
        if kind == DATA:
            self._data_received(read_data(flags, body))
        elif kind == SACK:
            self._sack_received(read_sack(body))
        elif kind == HEARTBEAT_ACK:
            self._probe_answered(probed_size(body))
        elif kind in CHUNK_TYPES:
            _run(self._receive_chunk(CHUNK_TYPES[kind](flags, body)))

    def _data_received(self, piece: Data) -> None:
        if self._inbound is not None:
            self._inbound.receive(piece)
            self._last_received_tsn = self._inbound.cumulative & 0xFFFF_FFFF
            if self._reconfig_deferred is not None:
                _run(self._reset_deferred_streams())

    def _sack_received(self, sack: Sack) -> None:
        if self._outbound is not None:
            self._outbound.acknowledged(sack, monotonic())

    def _deliver(self, stream: int, protocol: int, message: bytes) -> None:
        if protocol == WEBRTC_BINARY:
            channel = self._data_channels.get(stream)
            if channel is not None:
                self._emit(channel, message)
        else:
            _run(self._receive(stream, protocol, message))

    def _emit(self, channel: RTCDataChannel, message: bytes) -> None:
        try:
            channel.emit("message", message)
        except Exception as error:
            # A mistake of whoever listens, not of the peer: it surfaces as from any callback of the loop.
            context = {"message": "a data channel's listener failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    # What goes out.

    def _data_channel_send(self, channel: RTCDataChannel, data: bytes | str) -> None:
        protocol, payload = _labelled(data)
        most = self._remote_max_message_size
        if most and len(payload) > most:
            raise ValueError(f"a message of {len(payload)} bytes, but the other side takes {most}")
        outbound = self._ready
        if outbound is not None and not self._data_channel_queue and outbound.room_bytes(monotonic()) > 0:
            # It was never buffered, so nobody is told of room: senders do not expect that while they send.
            self._cut(outbound, channel, protocol, payload)
            self._transmit_all(outbound)
        else:
            channel._addBufferedAmount(len(payload))
            self._data_channel_queue.append((channel, protocol, payload))

    @property
    def _ready(self) -> Outbound | None:
        """Our sending half, unless the association is not open or someone further up is sending by it."""
        usable = self._association_state == _State.ESTABLISHED and not self._pumping
        return self._outbound if usable else None

    def _pump(self) -> None:
        """Send what has room. A handler that is told of room and sends more is served by the same loop."""
        outbound = self._ready
        if outbound is None:
            return
        self._pumping = True
        try:
            self._take_messages(outbound)
            while self._transmit_all(outbound):
                self._take_messages(outbound)
        finally:
            self._pumping = False
        if self._reconfig_queue:
            _run(self._transmit_reconfig())

    def _take_messages(self, outbound: Outbound) -> None:
        """Cut as many messages as may leave now. What is cut cannot be overtaken any more, so no others."""
        while self._data_channel_queue and outbound.room_bytes(monotonic()) > 0:
            channel, protocol, payload = self._data_channel_queue.popleft()
            self._cut(outbound, channel, protocol, payload)
            if protocol != WEBRTC_DCEP:
                channel._addBufferedAmount(-len(payload))

    def _cut(self, outbound: Outbound, channel: RTCDataChannel, protocol: int, payload: bytes) -> None:
        stream = self._stream_of(channel)
        sequence = self._outbound_stream_seq.get(stream, 0)
        self._outbound_stream_seq[stream] = (sequence + 1) & 0xFFFF
        outbound.append(stream, sequence, protocol, payload)
        self._local_tsn = outbound.next_tsn & 0xFFFF_FFFF

    def _transmit_all(self, outbound: Outbound) -> bool:
        """Send what may leave; whether something did."""
        packets = outbound.transmit(monotonic())
        if packets:
            self._dtls.send_packets(packets)
        self._set_timer(outbound)
        return bool(packets)

    def _stream_of(self, channel: RTCDataChannel) -> int:
        """The channel's stream; one that has none yet takes the next of our parity (RFC 8832 §6)."""
        if channel.id is None:
            assert self._data_channel_id is not None
            free = self._data_channel_id
            while free in self._data_channels:
                free += 2
            self._data_channels[free] = channel
            channel._setId(free)
        assert channel.id is not None
        return channel.id

    # The timer is left to fire, and then looks whether it is time: moving it for each SACK costs 4 %.

    def _set_timer(self, outbound: Outbound) -> None:
        deadline = outbound.deadline
        if deadline is None:
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline - monotonic()), self._timer_fired
        )

    def _timer_fired(self) -> None:
        self._timer = None
        outbound = self._outbound
        if outbound is None or outbound.deadline is None:
            return
        # The answer may lie in the socket when this process was busy for long.
        self._dtls.drain()
        now = monotonic()
        if outbound.deadline is not None and outbound.deadline <= now:
            self._dtls.send_packets(outbound.expired(now))
            if outbound.unanswered >= _SUSPICIOUS_TIMEOUTS and self._path.narrowed():
                self._shorten(outbound)
        self._set_timer(outbound)

    # How long packets may be.

    def _seek_longer(self) -> None:
        """Ask the path for the longest packets that both ends like, then for shorter ones."""
        self._stop_seeking()
        assert self._ours is not None
        while self._association_state == _State.ESTABLISHED and (size := self._path.next_probe()):
            if self._dtls.send_probe(probe_packet(self._ours, size)):
                self._probe_timer = asyncio.get_running_loop().call_later(PROBE_S, self._seek_longer)
                return
            self._path.refused()

    def _stop_seeking(self) -> None:
        if self._probe_timer is not None:
            self._probe_timer.cancel()
            self._probe_timer = None

    def _probe_answered(self, size: int) -> None:
        if self._outbound is not None and self._path.answered(size):
            self._stop_seeking()
            self._outbound.payload_bytes = self._path.payload_bytes

    def _shorten(self, outbound: Outbound) -> None:
        """The path takes long packets no more: new ones are short, and those on their way may be cut."""
        log.info("the path seems to take no packets of %d bytes any more", outbound.payload_bytes)
        outbound.payload_bytes = self._path.payload_bytes
        self._dtls.cut_datagrams(allowed=True)

    # What aiortc calls.

    def _set_state(self, state: RTCSctpTransport.State) -> None:
        if state == _State.ESTABLISHED and self._outbound is None:
            self._establish()
        super()._set_state(state)
        if (
            state == _State.ESTABLISHED
            and self.takes_packet_bytes
            and self._dtls.cut_datagrams(allowed=False)
        ):
            self._seek_longer()
        elif state == _State.CLOSED:
            self._stop_seeking()

    def _establish(self) -> None:
        """Both sides know their tags, first numbers and windows."""
        assert self._remote_port is not None and self._last_received_tsn is not None
        window = WIDE_WINDOW_BYTES if self._dtls.wide else NARROW_WINDOW_BYTES
        self._ours = Envelope(self._local_port, self._remote_port, self._remote_verification_tag)
        self._theirs = Envelope(self._remote_port, self._local_port, self._local_verification_tag)
        self._inbound = Inbound(self._last_received_tsn, window, self._deliver)
        # aiortc keeps the other side's first window as the threshold of slow start.
        self._outbound = Outbound(self._ours, self._local_tsn, self._ssthresh, Congestion(window))
        self._path = PathMtu(self.takes_packet_bytes)

    async def _init(self) -> None:
        if not self._dtls.wide:
            self._advertised_rwnd = NARROW_WINDOW_BYTES
        await super()._init()

    async def _handle_data(self, data: bytes) -> None:
        self.packet_received(data)
        self.batch_received()

    async def _receive_chunk(self, chunk: Chunk) -> None:
        # An INIT that was overtaken would set our numbers back; a restart needs a new DTLS session anyway.
        if not (isinstance(chunk, InitChunk) and self._outbound is not None):
            await super()._receive_chunk(chunk)

    async def _receive_data_chunk(self, chunk: DataChunk) -> None:
        self._data_received(Data(chunk.tsn, chunk.flags, chunk.stream_id, chunk.protocol, chunk.user_data))

    async def _receive_sack_chunk(self, chunk: SackChunk) -> None:
        sack = Sack(chunk.cumulative_tsn, chunk.advertised_rwnd, chunk.gaps, len(chunk.duplicates))
        self._sack_received(sack)

    async def _receive_forward_tsn_chunk(self, chunk: ForwardTsnChunk) -> None:
        if self._inbound is not None:
            self._inbound.forward(chunk.cumulative_tsn)
            self._last_received_tsn = self._inbound.cumulative & 0xFFFF_FFFF

    async def _data_channel_flush(self) -> None:
        self._pump()

    def _t3_cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        _run(self._abort())
        self._set_state(_State.CLOSED)


def _labelled(data: bytes | str) -> tuple[int, bytes]:
    """A message with its protocol number; SCTP has no empty messages (RFC 8831 §6.6)."""
    if isinstance(data, str):
        return (WEBRTC_STRING, data.encode()) if data else (WEBRTC_STRING_EMPTY, b"\0")
    return (WEBRTC_BINARY, data) if data else (WEBRTC_BINARY_EMPTY, b"\0")


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run one of aiortc's coroutines to its end at once. Over UDP none of them waits for anything."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise RuntimeError(f"{work} waited, which it never did")
