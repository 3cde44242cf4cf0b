"""The direct way to a peer: a WebRTC data channel by aiortc's ORTC classes, without SDP.

ICE (RFC 8445) finds a way through both home routers, DTLS proves that who answers there is who described
itself in the sealed link, SCTP carries the frames: reliable and in order, one negotiated data channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import aioice.stun
from aioice import Connection
from aiortc import (
    InvalidStateError,
    RTCCertificate,
    RTCDataChannel,
    RTCDataChannelParameters,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
    RTCIceCandidate,
    RTCIceGatherer,
    RTCIceParameters,
    RTCIceServer,
    RTCIceTransport,
    RTCSctpCapabilities,
    RTCSctpTransport,
)
from aiortc.sdp import candidate_from_sdp, candidate_to_sdp

from shared.channel.fast import contract
from shared.channel.link import Link
from shared.errors import ConnectionLost, ProtocolError
from shared.framing import CHUNK_BYTES, HEADER_BYTES
from shared.protocol import MAX_CHUNK_BYTES, Describe

log = logging.getLogger(__name__)

# An unreachable STUN responder would otherwise hold up every link for five seconds.
GATHER_TIMEOUT_S = 1
OPEN_TIMEOUT_S = 7.0
# Two routers that both wait for the other's first packet lose it; aioice's own 0.5 s costs such pairs half a
# second, and its seven tries let a hopeless one take a minute. These give 0.15 s and 6.4 s.
aioice.stun.RETRY_RTO = 0.1
aioice.stun.RETRY_MAX = 5

# What aiortc holds before SCTP takes it. More would only make urgent frames wait.
BUFFER_BYTES = 64 * 1024
SCTP_PORT = 5000
DATA_CHANNEL_ID = 0
MAX_CANDIDATES = 16

_ICE_TEXT = re.compile(r"[a-zA-Z0-9+/]{4,256}")
_FINGERPRINT = re.compile(r"sha-256 ([0-9A-F]{2}(:[0-9A-F]{2}){31})")

# Set to "plain" to carry direct links by aiortc's own transports, when the fast ones are under suspicion.
TRANSPORTS_VARIABLE = "COROLLA_DATA_CHANNEL"


class Guard(Protocol):
    """Stands before a socket and lets nobody but the other side's address reach DTLS."""

    def release(self) -> None:
        """ICE has found that address."""


class Transports(NamedTuple):
    """What carries a data channel, and what guards the sockets of its ICE connection once they are there."""

    dtls: type[RTCDtlsTransport]
    sctp: type[RTCSctpTransport]
    guard: Callable[[Connection], Sequence[Guard]]
    packet_bytes: int = 0
    """The longest SCTP packet that they read; 0 where only the shortest are safe."""


PLAIN = Transports(RTCDtlsTransport, RTCSctpTransport, lambda connection: [])


def best_transports() -> Transports:
    """The fast ones, or aiortc's own where the fast ones would not find what they lean on."""
    if os.environ.get(TRANSPORTS_VARIABLE) == "plain":
        return PLAIN
    absent = contract.missing()
    if absent:
        log.warning("direct links will be slow, since these are missing: %s", ", ".join(absent))
        return PLAIN
    from shared.channel.fast.datagrams import stand_before
    from shared.channel.fast.dtls import FastDtlsTransport
    from shared.channel.fast.path_mtu import LONGEST_PACKET_BYTES
    from shared.channel.fast.sctp import FastSctpTransport

    return Transports(FastDtlsTransport, FastSctpTransport, stand_before, LONGEST_PACKET_BYTES)


TRANSPORTS = best_transports()

new_certificate = RTCCertificate.generateCertificate


class DirectLink(Link):
    """One attempt at a data channel, and the data channel when it succeeds.

    `describe`, then `open`, then `send`; `lost` is set when it ends or cannot be opened; `close` in any case.
    """

    path = "direct"
    kind = "data channel"
    chunk_bytes = CHUNK_BYTES

    def __init__(
        self,
        certificate: RTCCertificate,
        controlling: bool,
        stun: tuple[str, int] | None,
        on_frame: Callable[[Link, bytes], None],
        on_room: Callable[[], None],
        transports: Transports | None = None,
    ) -> None:
        super().__init__()
        dtls, sctp, self._guard, self._packet_bytes = transports or TRANSPORTS
        self.lost = asyncio.Event()
        self._on_frame = on_frame
        self._gatherer = RTCIceGatherer(iceServers=_servers(stun))
        connection = self._gatherer._connection
        connection.ice_controlling = controlling
        connection.get_component_candidates = partial(  # type: ignore[method-assign]
            connection.get_component_candidates, timeout=GATHER_TIMEOUT_S
        )
        self._ice = RTCIceTransport(self._gatherer)
        self._dtls = dtls(self._ice, [certificate])
        self._sctp = sctp(self._dtls)
        self._channel = RTCDataChannel(
            self._sctp, RTCDataChannelParameters(label="corolla", negotiated=True, id=DATA_CHANNEL_ID)
        )
        self._channel.bufferedAmountLowThreshold = BUFFER_BYTES // 2
        self._guards: Sequence[Guard] = []
        self._opened = asyncio.Event()
        # Attached before SCTP starts, since aiortc drops messages that nobody listens for.
        self._channel.on("message", self._message)
        self._channel.on("open", self._opened.set)
        self._channel.on("close", self.lost.set)
        self._channel.on("bufferedamountlow", on_room)
        self._dtls.on("statechange", self._dtls_changed)
        self._sctp.on("datachannel", lambda _: self.lost.set())

    async def describe(self, attempt: int) -> Describe:
        """Where this side can be reached; without candidates when it cannot.

        Not to be cancelled: aioice would leave its sockets open. It ends by itself after `GATHER_TIMEOUT_S`.
        """
        await self._gatherer.gather()
        self._guards = self._guard(self._gatherer._connection)
        ice = self._gatherer.getLocalParameters()
        sha256 = next(f for f in self._dtls.getLocalParameters().fingerprints if f.algorithm == "sha-256")
        candidates = sorted(self._gatherer.getLocalCandidates(), key=lambda candidate: -candidate.priority)
        return Describe(
            attempt=attempt,
            ufrag=ice.usernameFragment or "",
            password=ice.password or "",
            fingerprint=f"sha-256 {sha256.value}",
            candidates=[candidate_to_sdp(candidate) for candidate in candidates[:MAX_CANDIDATES]],
            packet_bytes=self._packet_bytes,
        )

    async def open(self, remote: Describe) -> None:
        """Connect to the side described. Raises ConnectionLost, or ProtocolError for a bad description."""
        ice, dtls, candidates = _read(remote)
        if self._packet_bytes:
            cast(Any, self._sctp).takes_packet_bytes = remote.packet_bytes
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await self._open(ice, dtls, candidates)
        except TimeoutError:
            raise ConnectionLost(f"no direct link in {OPEN_TIMEOUT_S:.0f} s") from None
        except (OSError, InvalidStateError) as error:
            raise ConnectionLost(f"the direct link was cut while it opened: {error}") from None

    async def _open(
        self, ice: RTCIceParameters, dtls: RTCDtlsParameters, candidates: list[RTCIceCandidate]
    ) -> None:
        for candidate in candidates:
            await self._ice.addRemoteCandidate(candidate)
        await self._ice.addRemoteCandidate(None)
        await self._ice.start(ice)
        if self._ice.state != "completed":
            raise ConnectionLost("no pair of addresses lets packets through")
        for guard in self._guards:
            guard.release()
        await self._dtls.start(dtls)
        if self._dtls.state != "connected":
            raise ConnectionLost("the DTLS handshake failed, or the certificate is not the one described")
        await self._sctp.start(RTCSctpCapabilities(HEADER_BYTES + MAX_CHUNK_BYTES), SCTP_PORT)
        await self._opened.wait()

    @property
    def ready(self) -> bool:
        return self._alive and self._channel.bufferedAmount < BUFFER_BYTES

    @property
    def overrun(self) -> bool:
        """True when the peer sends without regard to SCTP's own window: aiortc would hold it all."""
        return self._sctp._advertised_rwnd <= 0

    def send(self, frame: bytes) -> None:
        if self._alive:
            self._channel.send(frame)

    @property
    def _alive(self) -> bool:
        # When DTLS has ended, aiortc still calls the data channel open and fails in a task of its own.
        return self._channel.readyState == "open" and not self.lost.is_set()

    async def close(self) -> None:
        """Stop all three transports, so that no socket, timer or task of theirs is left."""
        self.lost.set()
        reading = self._dtls._task
        with contextlib.suppress(ConnectionError):
            await self._sctp.stop()
        await self._dtls.stop()
        await self._ice.stop()
        if reading is not None:
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.exception()

    def _message(self, message: bytes | str) -> None:
        if isinstance(message, bytes):
            self._on_frame(self, message)
        else:
            self.lost.set()

    def _dtls_changed(self) -> None:
        if self._dtls.state in ("closed", "failed"):
            self.lost.set()


def _read(remote: Describe) -> tuple[RTCIceParameters, RTCDtlsParameters, list[RTCIceCandidate]]:
    """A description as aiortc wants it. Raises ProtocolError."""
    fingerprint = _FINGERPRINT.fullmatch(remote.fingerprint)
    if not (fingerprint and _ICE_TEXT.fullmatch(remote.ufrag) and _ICE_TEXT.fullmatch(remote.password)):
        raise ProtocolError("a description has no usable ICE credentials or SHA-256 fingerprint")
    candidates = [usable for text in remote.candidates[:MAX_CANDIDATES] if (usable := _candidate(text))]
    return (
        RTCIceParameters(remote.ufrag, remote.password),
        RTCDtlsParameters([RTCDtlsFingerprint("sha-256", fingerprint[1])]),
        candidates,
    )


def _candidate(text: str) -> RTCIceCandidate | None:
    """A candidate with a plain UDP address, else None. A name would make us ask the local network for it."""
    try:
        candidate = candidate_from_sdp(text)
        address = ipaddress.ip_address(candidate.ip)
    except (ValueError, AssertionError):
        return None
    ours = candidate.protocol.lower() == "udp" and candidate.component == 1
    known = candidate.type in ("host", "srflx", "relay") and 0 < candidate.port < 65536
    aimless = address.is_multicast or address.is_unspecified or address.is_loopback
    return candidate if ours and known and not aimless else None


def _servers(stun: tuple[str, int] | None) -> list[RTCIceServer]:
    """Always a list: None would silently mean Google's responder. aioice asks over IPv4 only."""
    if stun is None or ":" in stun[0]:
        return []
    return [RTCIceServer(f"stun:{stun[0]}:{stun[1]}")]
