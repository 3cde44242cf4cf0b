"""A relay in memory that may alter, repeat, reorder or withhold whatever passes through it.

Left alone it behaves as a relay should. Its connections are what a `Dialer` needs of a `RelayClient`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from shared.errors import ConnectionLost
from shared.identity import Identity, PeerId
from shared.protocol import Signal
from shared.relay_client import Listeners

TamperSignal = Callable[[PeerId, Signal], Iterable[Signal]]
TamperFrame = Callable[[PeerId, PeerId, bytes], Iterable[bytes]]


class EvilRelay:
    """Set `signals` and `frames` to decide what becomes of each: nothing, one, or many."""

    def __init__(self) -> None:
        self.signals: TamperSignal = lambda sender, signal: [signal]
        self.frames: TamperFrame = lambda sender, receiver, sealed: [sealed]
        self.connections: dict[PeerId, EvilConnection] = {}

    def connect(self, identity: Identity) -> EvilConnection:
        connection = self.connections[identity.id] = EvilConnection(self, identity.id)
        return connection

    def vanish(self, peer: PeerId) -> None:
        """As when a process is killed: its connection closes and everyone is told."""
        del self.connections[peer]
        for other in self.connections.values():
            other.on_gone.tell(peer)

    def deliver_signal(self, signal: Signal) -> None:
        if (receiver := self.connections.get(PeerId(signal.receiver))) is not None:
            receiver.on_signal.tell(signal)

    def deliver_frame(self, sender: PeerId, receiver: PeerId, sealed: bytes) -> None:
        if (connection := self.connections.get(receiver)) is not None:
            connection.on_frame.tell(sender, memoryview(sealed))


class EvilConnection:
    """One participant's connection to an `EvilRelay`."""

    def __init__(self, relay: EvilRelay, peer: PeerId) -> None:
        self.connected = asyncio.Event()
        self.connected.set()
        self.stun: tuple[str, int] | None = None
        self.second_stun_port = 0
        self.address = ""
        self.on_signal: Listeners[Signal] = Listeners()
        self.on_frame: Listeners[PeerId, memoryview] = Listeners()
        self.on_gone: Listeners[PeerId] = Listeners()
        self.on_dropped: Listeners[PeerId] = Listeners()
        self.on_state: Listeners[bool] = Listeners()
        self._relay = relay
        self._peer = peer
        self._loop = asyncio.get_running_loop()

    def set_connected(self, connected: bool) -> None:
        """Cut this participant off, or let it back in; the others are not told."""
        (self.connected.set if connected else self.connected.clear)()
        self.on_state.tell(connected)

    async def send_signal(self, signal: Signal) -> None:
        self._check(PeerId(signal.receiver))
        for passed in self._relay.signals(self._peer, signal):
            self._loop.call_soon(self._relay.deliver_signal, passed)

    async def send_frame(self, peer: PeerId, *parts: bytes | bytearray | memoryview) -> None:
        self.send_at_once(peer, *parts)

    def send_at_once(self, peer: PeerId, *parts: bytes | bytearray | memoryview) -> bool:
        self._check(peer)
        for sealed in self._relay.frames(self._peer, peer, b"".join(parts)):
            self._loop.call_soon(self._relay.deliver_frame, self._peer, peer, sealed)
        return True

    def _check(self, receiver: PeerId) -> None:
        if not self.connected.is_set():
            raise ConnectionLost("not connected to the relay")
        if receiver not in self._relay.connections:
            self._loop.call_soon(self.on_gone.tell, receiver)
