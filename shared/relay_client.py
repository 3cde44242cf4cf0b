"""A participant's connection to a relay: logs in, stays connected, and tells what arrives.

Used by peers and gateways alike. Records, signals and frames pass through here unread: the directory judges
announcements, the channels judge greetings and frames. A relay that sends rubbish costs a reconnect.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar, TypeVarTuple, assert_never

import aiohttp
from msgspec import Struct

from shared.errors import ConnectionLost, CorollaError, ProtocolError, Refused, RelayUnreachable
from shared.identity import ID_BYTES, Identity, PeerId, id_bytes, id_from_bytes
from shared.protocol import (
    MAX_RELAY_MESSAGE_BYTES,
    Announce,
    Challenge,
    Denied,
    Found,
    FromRelay,
    Gone,
    Login,
    Lookup,
    Restarting,
    Signal,
    SignedRecord,
    ToRelay,
    Welcome,
    decode,
    encode,
    peer_id,
)
from shared.settings import relay_url
from shared.short_way import ClientWriter, ShortWay, client_writer, shorten

log = logging.getLogger(__name__)

LOGIN_DOMAIN = "corolla-login-1"

CONNECT_TIMEOUT_S = 10.0
LOGIN_TIMEOUT_S = 10.0
LOOKUP_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
# Routers forget idle connections; a relay that died without a word is noticed after one and a half of these.
HEARTBEAT_S = 15.0
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 30.0
# A relay that turned us out would do so again, most often because another process uses our key.
TURNED_OUT_RETRY_S = 600.0
# A connection that lasted this long was a good one: the next retry is quick again.
STEADY_S = 10.0
# When this much waits, senders wait too. Kept short, since an urgent frame cannot overtake what is in here.
OUTGOING_BYTES = 64 * 1024
# A relay that announces more lookup results than this is not worth the memory.
MAX_FOUND_RECORDS = 100_000

Args = TypeVarTuple("Args")
Expected = TypeVar("Expected")


def login_payload(nonce: str, host: str) -> bytes:
    """What a login signs: the relay's nonce, and the host that the participant dialled.

    With the host in it, a relay that hands us another relay's nonce cannot use our answer there.
    """
    return bytes.fromhex(nonce) + b"\0" + host.lower().encode()


class Listeners(Generic[*Args]):
    """Who wants to hear of an event: call it with a quick, plain function to add one."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[*Args], None]] = []

    def __call__(self, callback: Callable[[*Args], None]) -> None:
        self._callbacks.append(callback)

    def tell(self, *args: *Args) -> None:
        for callback in self._callbacks:
            try:
                callback(*args)
            except Exception:
                # A mistake in one listener must not cost the others their connection.
                log.exception("a listener of the relay connection failed")


class RelayClient:
    """A connection to one relay that comes back by itself while the `async with` lasts.

    Entering raises RelayUnreachable when the relay does not answer, unless `patient`. Callbacks are plain
    functions, called in the order of arrival; they must be quick, since nothing is read meanwhile.
    """

    def __init__(self, url: str, identity: Identity, *, patient: bool = False) -> None:
        self.url = url
        self.identity = identity
        self.connected = asyncio.Event()
        self.stun: tuple[str, int] | None = None
        """Host and port of the relay's STUN responder, once connected."""
        self.second_stun_port = 0
        """Where it answers too, so that we can learn what our router does; 0 when it does not."""
        self.address = ""
        """Where the relay sees us, once connected."""
        self.login_ms: float | None = None
        """Round trip of the last login, the relay's check of our signature included."""
        self.attempted = asyncio.Event()
        """Set once the first attempt to connect has succeeded or failed."""
        self.error: CorollaError | None = None
        """Why there is no connection; None while there is one, or while the first attempt runs."""

        self.on_signal: Listeners[Signal] = Listeners()
        self.on_frame: Listeners[PeerId, memoryview] = Listeners()
        self.on_gone: Listeners[PeerId] = Listeners()
        self.on_dropped: Listeners[PeerId] = Listeners()
        """A frame to this participant was dropped, since it reads more slowly than others send."""
        self.on_denied: Listeners[str] = Listeners()
        self.on_state: Listeners[bool] = Listeners()

        self._ws_url = relay_url(url)
        self._patient = patient
        self._turned_out = False
        self._link: _Link | None = None
        self._last_announcement: SignedRecord | None = None
        self._will_announce = False
        self._watched: dict[str | None, None] = {}
        self._on_record: Listeners[SignedRecord] = Listeners()
        self._lookups: dict[int, _LookupState] = {}
        self._next_request = 1
        self._task: asyncio.Task[None] | None = None
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        )
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._stay_connected(first), name=f"relay {self.url}")
        try:
            await first
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    # ------------------------------------------------------------ asking

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait until logged in. Raises RelayUnreachable after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.connected.wait()
        except TimeoutError:
            raise RelayUnreachable(
                f"the relay at {self.url} did not come back in {timeout_s:.0f} s"
            ) from None

    async def announce(self, record: SignedRecord) -> None:
        """Publish a signed announcement, now or at the next connection, and again after every reconnect."""
        self._last_announcement = record
        if self._link is not None:
            await self._link.send(Announce(record))

    def watch(self, callback: Callable[[SignedRecord], None], model: str | None = None) -> None:
        """Call `callback` with every live record of a model, or of all, and with every later change.

        Records may come twice, or be of another model that is watched here too.
        """
        self._watched[model] = None
        self._on_record(callback)
        if self._link is not None:
            self._link.post(self._watch_request(model))

    async def lookup(self, model: str | None = None) -> list[SignedRecord]:
        """The live announcements of a model, or of all. Raises ConnectionLost when the relay goes away."""
        request = self._request()
        waiting = _LookupState([], asyncio.get_running_loop().create_future())
        self._lookups[request] = waiting
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                await self._connected_link().send(Lookup(request=request, model=model))
                await waiting.done
        except TimeoutError:
            raise ConnectionLost(
                f"the relay at {self.url} did not answer a lookup in {LOOKUP_TIMEOUT_S:.0f} s"
            ) from None
        finally:
            del self._lookups[request]
        return waiting.records

    async def send_signal(self, signal: Signal) -> None:
        """Pass a signed greeting to its receiver. Raises ConnectionLost while not connected."""
        await self._connected_link().send(signal)

    async def send_frame(self, peer: PeerId, *parts: bytes | bytearray | memoryview) -> None:
        """Send one frame to a participant; waits while the connection is behind.

        Raises ConnectionLost while not connected. A frame that cannot be delivered is told by `on_gone` or
        `on_dropped`.
        """
        frame = id_bytes(peer), *parts
        link = self._connected_link()
        if not link.write_at_once(frame):
            await link.send_bytes(b"".join(frame))

    def send_at_once(self, peer: PeerId, *parts: bytes | bytearray | memoryview) -> bool:
        """The same without waiting; False when that would have to wait. Raises ConnectionLost."""
        return self._connected_link().write_at_once((id_bytes(peer), *parts))

    def _connected_link(self) -> _Link:
        if self._link is None:
            raise ConnectionLost(f"not connected to the relay at {self.url}")
        return self._link

    def _request(self) -> int:
        request = self._next_request
        self._next_request += 1
        return request

    def _watch_request(self, model: str | None) -> Lookup:
        return Lookup(request=self._request(), model=model, watch=True)

    # ------------------------------------------------------------ staying connected

    async def _stay_connected(self, first: asyncio.Future[None]) -> None:
        failures = 0
        if self._patient:
            first.set_result(None)
        while True:
            started = time.monotonic()
            retry_after_s = 0.0
            try:
                retry_after_s = await self._connect_once(first)
                if not self._turned_out:
                    self.error = RelayUnreachable(f"the connection to the relay at {self.url} ended")
            except (ConnectionLost, Refused, ProtocolError) as error:
                if not first.done():
                    first.set_exception(error)
                    return
                log.warning("%s", error)
                self.error = error
                if isinstance(error, RelayUnreachable):
                    retry_after_s = error.retry_after_s
            except Exception:
                # A mistake of ours, told with its traceback; a new connection is still worth more than none.
                log.exception("the connection to the relay at %s failed", self.url)
            self.attempted.set()
            if self._turned_out:
                self._turned_out = False
                await asyncio.sleep(TURNED_OUT_RETRY_S)
            failures = 1 if time.monotonic() - started > STEADY_S else failures + 1
            await asyncio.sleep(retry_delay(failures, retry_after_s, random.random()))

    async def _connect_once(self, first: asyncio.Future[None]) -> float:
        """One connection from dialling to its end. Returns after how long the relay wants us back."""
        socket = await self._dial()
        try:
            way, welcome = await self._log_in(socket)
            async with asyncio.TaskGroup() as tasks:
                link = _Link(socket, self.url)
                writing = tasks.create_task(link.write())
                self._enter(link, welcome)
                if not first.done():
                    first.set_result(None)
                try:
                    return await self._read(socket, way)
                finally:
                    writing.cancel()
        finally:
            self._leave()
            await socket.close()

    async def _dial(self) -> aiohttp.ClientWebSocketResponse:
        assert self._http is not None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._http.ws_connect(
                    self._ws_url,
                    heartbeat=HEARTBEAT_S,
                    max_msg_size=MAX_RELAY_MESSAGE_BYTES,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                )
        except aiohttp.WSServerHandshakeError as error:
            raise RelayUnreachable(
                _handshake_sentence(self.url, error.status), _retry_after_s(error.headers)
            ) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
            raise RelayUnreachable(
                f"no relay answers at {self.url}: check the address, and that `python -m relay` runs there"
                f" ({reason})"
            ) from None

    async def _log_in(self, socket: aiohttp.ClientWebSocketResponse) -> tuple[ShortWay, Welcome]:
        try:
            async with asyncio.timeout(LOGIN_TIMEOUT_S):
                challenge = await self._expect(socket, Challenge)
                # Now, since the relay says nothing more before our login.
                way = shorten(_protocol(socket), self._take_frame, masked=False)
                payload = login_payload(challenge.nonce, self._ws_url.host_port_subcomponent or "")
                signature = self.identity.sign(LOGIN_DOMAIN, payload).hex()
                asked = time.monotonic()
                await socket.send_str(encode(Login(self.identity.id, signature)).decode())
                welcome = await self._expect(socket, Welcome)
                self.login_ms = (time.monotonic() - asked) * 1000
                way.handled()
                return way, welcome
        except TimeoutError:
            raise RelayUnreachable(f"the relay at {self.url} did not finish the login in time") from None
        except (aiohttp.ClientError, OSError):
            raise RelayUnreachable(f"the relay at {self.url} hung up during the login") from None

    async def _expect(self, socket: aiohttp.ClientWebSocketResponse, kind: type[Expected]) -> Expected:
        """The next message, which must be of the given type while logging in."""
        received = await socket.receive()
        if received.type is not aiohttp.WSMsgType.TEXT:
            raise RelayUnreachable(f"the relay at {self.url} hung up during the login")
        message = _decode(received.data)
        if isinstance(message, kind):
            return message
        if isinstance(message, Denied):
            raise Refused(f"the relay at {self.url} refuses the login: {message.reason}")
        raise ProtocolError(
            f"the relay at {self.url} said {type(message).__name__} where {kind.__name__} was due"
        )

    def _enter(self, link: _Link, welcome: Welcome) -> None:
        self._link = link
        self.error = None
        self.attempted.set()
        self.address = welcome.address
        host = self._ws_url.host
        self.stun = (host, welcome.stun_port) if host and welcome.stun_port else None
        self.second_stun_port = welcome.second_stun_port
        if self._last_announcement is not None:
            link.post(Announce(self._last_announcement))
        for model in self._watched:
            link.post(self._watch_request(model))
        log.info("connected to the relay at %s", self.url)
        self.connected.set()
        self.on_state.tell(True)

    def _leave(self) -> None:
        if self._link is None:
            return
        self._link.close()
        self._link = None
        self.connected.clear()
        for waiting in self._lookups.values():
            if not waiting.done.done():
                waiting.done.set_exception(ConnectionLost(f"the relay at {self.url} went away"))
        self.on_state.tell(False)

    # ------------------------------------------------------------ reading

    async def _read(self, socket: aiohttp.ClientWebSocketResponse, way: ShortWay) -> float:
        """Read until the connection ends. Never pauses: aiohttp's buffer has no bound for those who do."""
        retry_after_s = 0.0
        try:
            async for received in socket:
                if received.type is aiohttp.WSMsgType.BINARY:
                    self._frame(received.data)
                elif received.type is aiohttp.WSMsgType.TEXT:
                    message = _decode(received.data)
                    if isinstance(message, Restarting):
                        retry_after_s = message.retry_after_s
                    if isinstance(message, Denied) and message.fatal:
                        self._turn_out(message)
                        break
                    self._told(message)
                else:
                    break
                way.handled()
        except ProtocolError as error:
            log.warning("the relay at %s sends rubbish, connecting anew: %s", self.url, error)
        log.info("the connection to the relay at %s ended", self.url)
        return retry_after_s

    def _turn_out(self, denied: Denied) -> None:
        self._turned_out = True
        self.error = Refused(
            f"the relay at {self.url} turned us out: {denied.reason}. Should another process use the same "
            f"key, end one of the two; this one asks again in {TURNED_OUT_RETRY_S / 60:.0f} minutes"
        )
        log.error("%s", self.error)

    def _take_frame(self, data: memoryview) -> bool:
        """A frame where it is read; False for what `_frame` should complain about, or not hear yet."""
        if self._link is None or len(data) < ID_BYTES:
            return False
        self.on_frame.tell(id_from_bytes(data[:ID_BYTES]), data[ID_BYTES:])
        return True

    def _frame(self, data: bytes) -> None:
        if len(data) < ID_BYTES:
            raise ProtocolError(
                f"a frame of {len(data)} bytes from {self.url} is too short to name its source"
            )
        self._take_frame(memoryview(data))

    def _told(self, message: FromRelay) -> None:
        match message:
            case Found():
                self._found(message)
            case Signal():
                self.on_signal.tell(message)
            case Gone():
                self.on_gone.tell(peer_id(message.peer))
            case Denied():
                self._denied(message)
            case Restarting():
                log.info("the relay at %s restarts", self.url)
            case Challenge() | Welcome():
                raise ProtocolError(
                    f"the relay at {self.url} sent a {type(message).__name__} after the login"
                )
            case _:
                assert_never(message)

    def _found(self, found: Found) -> None:
        waiting = self._lookups.get(found.request)
        if waiting is None:
            for record in found.records:
                self._on_record.tell(record)
            return
        waiting.records.extend(found.records)
        if len(waiting.records) > MAX_FOUND_RECORDS:
            raise ProtocolError(f"the relay at {self.url} answers a lookup with too many records")
        if not found.more and not waiting.done.done():
            waiting.done.set_result(None)

    def _denied(self, denied: Denied) -> None:
        if denied.peer is not None:
            self.on_dropped.tell(peer_id(denied.peer))
            return
        log.warning("the relay at %s refuses: %s", self.url, denied.reason)
        self.on_denied.tell(denied.reason)
        if denied.retry_after_s and not self._will_announce:
            # Only announcements are refused for a while, and the newest one says all.
            self._will_announce = True
            wait_s = min(denied.retry_after_s, LONGEST_RETRY_S) * (1 + random.random())
            asyncio.get_running_loop().call_later(wait_s, self._announce_again)

    def _announce_again(self) -> None:
        self._will_announce = False
        if self._link is not None and self._last_announcement is not None:
            self._link.post(Announce(self._last_announcement))


class _LookupState(Struct):
    """The parts of a lookup's answer that are here."""

    records: list[SignedRecord]
    done: asyncio.Future[None]


class _Link:
    """The sending half of one connection: a short queue with one writer.

    One task waits, because aiohttp lets all senders wait on one future, which any cancelled sender would
    cancel for the others. Frames that find nothing in their way are written at once.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, url: str) -> None:
        self._socket = socket
        self._url = url
        self._writer: ClientWriter | None = client_writer(socket)
        self._queue: deque[tuple[aiohttp.WSMsgType, bytes]] = deque()
        self._queued_bytes = 0
        """Of those in the queue, and of the one that is being written."""
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = False

    async def send(self, message: ToRelay) -> None:
        await self._room()
        self.post(message)

    async def send_bytes(self, data: bytes) -> None:
        await self._room()
        self._put(aiohttp.WSMsgType.BINARY, data)

    def write_at_once(self, parts: Iterable[bytes | bytearray | memoryview]) -> bool:
        """Write a frame if nothing is in its way; else False. Raises ConnectionLost."""
        if self._closed:
            raise self._lost()
        if self._queued_bytes or self._writer is None:
            return False
        return self._writer.write(parts, OUTGOING_BYTES)

    def post(self, message: ToRelay) -> None:
        """Queue a message without waiting: for the few that a connection starts with."""
        self._put(aiohttp.WSMsgType.TEXT, encode(message))

    def close(self) -> None:
        self._closed = True
        self._drained.set()

    async def write(self) -> None:
        """Write what is queued until cancelled, or until the connection ends."""
        try:
            while True:
                while self._queue:
                    kind, data = self._queue.popleft()
                    await self._socket.send_frame(data, kind)
                    self._queued_bytes -= len(data)
                    if self._queued_bytes < OUTGOING_BYTES:
                        self._drained.set()
                self._filled.clear()
                await self._filled.wait()
        except (aiohttp.ClientError, OSError):
            # The reading half meets the same end and tells it.
            self.close()

    async def _room(self) -> None:
        while not self._closed and self._queued_bytes >= OUTGOING_BYTES:
            self._drained.clear()
            await self._drained.wait()
        if self._closed:
            raise self._lost()

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to the relay at {self._url} ended")

    def _put(self, kind: aiohttp.WSMsgType, data: bytes) -> None:
        self._queue.append((kind, data))
        self._queued_bytes += len(data)
        self._filled.set()


def retry_delay(failures: int, retry_after_s: float, chance: float) -> float:
    """How long to wait before dialling again; `chance` is in [0, 1).

    Full jitter: after a restart of the relay, thousands return spread over the whole interval.
    """
    if retry_after_s:
        return min(retry_after_s, LONGEST_RETRY_S) * (0.5 + chance)
    return chance * min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures - 1, 16))


def _decode(text: str) -> FromRelay:
    message: FromRelay = decode(text, FromRelay)
    return message


def _protocol(socket: aiohttp.ClientWebSocketResponse) -> object:
    """What reads this connection in aiohttp; None where aiohttp is not as we know it."""
    return getattr(getattr(socket, "_conn", None), "protocol", None)


def _retry_after_s(headers: Mapping[str, str] | None) -> float:
    """What a Retry-After header says in seconds; 0 without one."""
    text = (headers or {}).get("Retry-After", "")
    return float(text) if text.isdecimal() and len(text) < 8 else 0.0


def _handshake_sentence(url: str, status: int) -> str:
    match status:
        case 403:
            reason = "it does not serve this origin"
        case 421:
            reason = "it does not go by that name; its operator can add it with --name"
        case 429:
            reason = "too many connections from this address; it will be tried again"
        case 503:
            reason = "it is full; try another relay, or later"
        case _:
            reason = f"it answers {status} where a WebSocket should open: is this the address of a relay?"
    return f"the relay at {url} does not let us in: {reason}"
