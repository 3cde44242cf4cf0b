"""One side of a data channel by the ORTC classes, and SDP for those who speak nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiortc import (
    RTCDataChannel,
    RTCDataChannelParameters,
    RTCDtlsTransport,
    RTCIceGatherer,
    RTCIceTransport,
    RTCSctpCapabilities,
    RTCSctpTransport,
)
from aiortc.sdp import SessionDescription, candidate_to_sdp

from shared.channel.upgrade import to_the_end
from shared.channel.webrtc import Guard, Transports, best_transports, new_certificate

MAX_MESSAGE_BYTES = 262_144

_SDP = """v=0
o=- 1 1 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0
m=application 9 UDP/DTLS/SCTP webrtc-datachannel
c=IN IP4 0.0.0.0
a=mid:0
a=sctp-port:5000
a=max-message-size:{most}
a=ice-ufrag:{ufrag}
a=ice-pwd:{password}
a=fingerprint:sha-256 {fingerprint}
a=setup:{setup}
{candidates}
a=end-of-candidates
"""


class OrtcSide:
    """`sdp` tells how to reach this side, `connect` takes the other's. Who offers is the DTLS server."""

    def __init__(self, *, offers: bool, transports: Transports | None = None) -> None:
        self.transports = transports or best_transports()
        self.gatherer = RTCIceGatherer(iceServers=[])
        self.gatherer._connection.ice_controlling = offers
        self.ice = RTCIceTransport(self.gatherer)
        self.dtls: RTCDtlsTransport = self.transports.dtls(self.ice, [new_certificate()])
        self.sctp: RTCSctpTransport = self.transports.sctp(self.dtls)
        self.announced: asyncio.Queue[RTCDataChannel] = asyncio.Queue()
        self.sctp.on("datachannel", self._announced)
        self.messages: asyncio.Queue[bytes | str] = asyncio.Queue()
        self._offers = offers
        self._guards: Sequence[Guard] = []

    async def sdp(self) -> str:
        """How to reach this side, as an offer or an answer."""
        await self.gatherer.gather()
        self._guards = self.transports.guard(self.gatherer._connection)
        ice = self.gatherer.getLocalParameters()
        fingerprints = {f.algorithm: f.value for f in self.dtls.getLocalParameters().fingerprints}
        text = _SDP.format(
            most=MAX_MESSAGE_BYTES,
            ufrag=ice.usernameFragment,
            password=ice.password,
            fingerprint=fingerprints["sha-256"],
            setup="actpass" if self._offers else "active",
            candidates="\n".join(
                f"a=candidate:{candidate_to_sdp(candidate)}"
                for candidate in self.gatherer.getLocalCandidates()
            ),
        )
        return text.replace("\n", "\r\n")

    async def connect(self, remote_sdp: str) -> None:
        """Go through ICE, DTLS and the beginning of SCTP."""
        media = SessionDescription.parse(remote_sdp).media[0]
        for candidate in media.ice_candidates:
            await self.ice.addRemoteCandidate(candidate)
        await self.ice.addRemoteCandidate(None)
        assert media.ice is not None
        assert media.dtls is not None
        await self.ice.start(media.ice)
        assert self.ice.state == "completed"
        for guard in self._guards:
            guard.release()
        await self.dtls.start(media.dtls)
        assert self.dtls.state == "connected"
        await self.sctp.start(media.sctpCapabilities or RTCSctpCapabilities(65536), 5000)

    def open(self, label: str, **parameters: bool | int) -> RTCDataChannel:
        """A data channel of ours, whose messages come to `messages`."""
        channel = RTCDataChannel(self.sctp, RTCDataChannelParameters(label=label, **parameters))  # type: ignore[arg-type]
        channel.on("message", self.messages.put_nowait)
        return channel

    def _announced(self, channel: RTCDataChannel) -> None:
        channel.on("message", self.messages.put_nowait)
        self.announced.put_nowait(channel)

    async def close(self) -> None:
        reading = self.dtls._task
        await self.sctp.stop()
        await self.dtls.stop()
        await self.ice.stop()
        if reading is not None:
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.exception()


@asynccontextmanager
async def ortc_side(*, offers: bool, transports: Transports | None = None) -> AsyncIterator[OrtcSide]:
    side = OrtcSide(offers=offers, transports=transports)
    try:
        yield side
    finally:
        await to_the_end(side.close())


async def is_open(channel: RTCDataChannel) -> RTCDataChannel:
    """Wait until a channel is open."""
    if channel.readyState != "open":
        opened = asyncio.Event()
        channel.on("open", opened.set)
        await opened.wait()
    return channel
