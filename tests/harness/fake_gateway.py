"""A gateway without a swarm behind it: the true page and its headers, with answers by a script.

    async with FakeGateway() as gateway:
        gateway.script(Say("Hello "), Wait(gate), Reroute(lost="bob", heir="eve"), Say("again"))

The true gateway with a fake swarm is in fake_swarm.py; this one can also misbehave as no gateway should:
break connections, go away and come back, and stream any text in any pieces.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections import deque
from types import TracebackType
from typing import Any, Self

import orjson
from aiohttp import web
from msgspec import Struct

from shared.spans import Span, coverage, gaps
from web.page import Page

Json = dict[str, Any]


class Say(Struct, frozen=True):
    """A text, in pieces of so many characters; each piece is one token with its hops."""

    text: str
    characters: int = 4
    every_s: float = 0.0


class Wait(Struct, frozen=True):
    """Nothing comes until the event is set."""

    until: asyncio.Event


class Queue(Struct, frozen=True):
    """The swarm is full, and this is one's place in line; 0 when the turn has come."""

    place: int


class Reroute(Struct, frozen=True):
    """A peer went away and another one took over."""

    lost: str
    heir: str


class Fail(Struct, frozen=True):
    """An error in the middle of the stream."""

    message: str


class Cut(Struct, frozen=True):
    """The answer has reached its longest."""


class Drop(Struct, frozen=True):
    """The connection breaks."""


class Refuse(Struct, frozen=True):
    """No stream at all: a status and an error."""

    status: int
    message: str


Part = Say | Wait | Queue | Reroute | Fail | Cut | Drop | Refuse


_ports: set[int] = set()


def _fresh_port() -> int:
    """One that no gateway of this process had: a browser keeps conversations for each origin."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        if port not in _ports:
            _ports.add(port)
            return port


class FakeGateway:
    """Serves from entering to leaving. `stop` and `start` play a gateway that goes away for a while."""

    def __init__(self) -> None:
        self.url = ""
        self.history: Json = {}
        """What is told of the last hour."""
        self.asked: list[Json] = []
        """The bodies of the questions."""
        self.left = asyncio.Event()
        """Set when an asker left before the answer was complete."""
        self.said = 0
        """Pieces of answers that were sent."""
        self.paths = {"ann": "local", "bob": "relayed", "eve": "direct"}
        self.path_words = {"bob": "relayed, 7.0 ms there and back (socket: its address does not answer)"}
        self.resting: set[str] = set()
        """Whose direct path is closed while nothing is said."""
        self.route: list[tuple[str, Span]] = []
        relay = {"url": "ws://127.0.0.1:8787", "connected": True}
        self._view: Json = {"relay": relay, "models": [], "peers": []}
        self._changed = asyncio.Condition()
        self._scripts: deque[tuple[Part, ...]] = deque()
        self._runner: web.AppRunner | None = None
        self._port = 0

    # ------------------------------------------------------------ arranging

    def serve(self, model: str, layer_count: int, **spans: tuple[int, int]) -> None:
        """Peers by name; their spans in order are the route of every answer."""
        held = {name: Span(*span) for name, span in spans.items()}
        counts = coverage(held.values(), layer_count)
        artefact = hashlib.sha256(model.encode()).hexdigest()
        self._view["models"].append(
            {
                "model": model,
                "artefact": artefact,
                "layer_count": layer_count,
                "context_length": 2048,
                "coverage": counts,
                "gaps": [[gap.start, gap.end] for gap in gaps(counts)],
                "covered": min(counts) > 0,
            }
        )
        self._view["peers"] += [self._peer(name, model, artefact, span) for name, span in held.items()]
        if not self.route:
            self.route = _cover(held, layer_count)

    async def tell(self, relay_connected: bool = True) -> None:
        """Tell everyone who watches what `serve` and `forget_models` changed."""
        self._view["relay"]["connected"] = relay_connected
        async with self._changed:
            self._changed.notify_all()

    def forget_models(self) -> None:
        """Every peer goes away."""
        self._view["models"].clear()
        self._view["peers"].clear()
        self.route.clear()

    def script(self, *parts: Part) -> None:
        """The next answer; more of these queue up."""
        self._scripts.append(parts)

    # ------------------------------------------------------------ serving

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after a stop, on the same port as before."""
        app = web.Application()
        page = Page()
        page.add_routes(app.router)
        app.on_response_prepare.append(page.finish_headers)
        app.router.add_get("/api/swarm/events", self._get_events)
        app.router.add_get("/api/history", self._get_history)
        app.router.add_post("/v1/chat/completions", self._post_chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._port = self._port or _fresh_port()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # ------------------------------------------------------------ answering

    async def _get_events(self, request: web.Request) -> web.StreamResponse:
        response = await _open_stream(request)
        while True:
            async with self._changed:
                await _send(response, self._view)
                await self._changed.wait()

    async def _get_history(self, request: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(orjson.loads(await request.read()))
        parts = self._scripts.popleft() if self._scripts else (Say("I have nothing to say."),)
        if isinstance(parts[0], Refuse):
            return web.json_response(_error(parts[0].message), status=parts[0].status)
        response = await _open_stream(request)
        try:
            return await self._answer(request, response, parts)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise

    async def _answer(
        self, request: web.Request, response: web.StreamResponse, parts: tuple[Part, ...]
    ) -> web.StreamResponse:
        position, finish = 12, "stop"
        for part in parts:
            match part:
                case Say():
                    began = asyncio.get_running_loop().time()
                    for number, piece in enumerate(_pieces(part), 1):
                        await _send(response, _chunk(piece, tokens=[self._token(position)]))
                        self.said += 1
                        position += 1
                        # By the clock: sleeps that end late would add up to a slower pace.
                        due = began + number * part.every_s
                        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                case Wait():
                    await part.until.wait()
                case Queue():
                    await _send(response, _chunk("", waiting=part.place))
                case Reroute():
                    await _send(response, _chunk("", event=self._reroute(part)))
                case Fail():
                    await _send(response, _error(part.message))
                    return response
                case Cut():
                    finish = "length"
                case Drop():
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                case Refuse():
                    raise AssertionError("an answer that began cannot be refused")
        await _send(response, _chunk("", finish=finish))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _token(self, position: int) -> Json:
        hops = [self._hop(position + index, name, span) for index, (name, span) in enumerate(self.route)]
        spent = sum(hop["waited_ms"] + hop["computed_ms"] + hop["link_ms"] for hop in hops)
        return {"position": position, "ms": spent + 0.8, "hops": hops}

    def _hop(self, number: int, name: str, span: Span) -> Json:
        """Times that differ a little from token to token, and always in the same way."""
        return {
            "peer": _id(name),
            "name": name,
            "start": span.start,
            "end": span.end,
            "waited_ms": 0.1 + 0.05 * (number % 4),
            "computed_ms": (0.55 + 0.04 * (number % 5)) * len(span),
            "link_ms": 0.4 + 3.1 * (self.paths.get(name) == "relayed"),
            "path": self.paths.get(name, "direct"),
        }

    def _reroute(self, change: Reroute) -> Json:
        span = dict(self.route)[change.lost]
        self.route = [(change.heir if name == change.lost else name, span) for name, span in self.route]
        return {
            "kind": "rerouted",
            "message": f"{change.lost} (layers {span}) went away; {change.heir} took over",
            "lost": _id(change.lost),
            "lost_name": change.lost,
            "route": [
                {"peer": _id(name), "name": name, "start": span.start, "end": span.end}
                for name, span in self.route
            ],
        }

    def _peer(self, name: str, model: str, artefact: str, span: Span) -> Json:
        return {
            "peer": _id(name),
            "name": name,
            "model": model,
            "artefact": artefact,
            "start": span.start,
            "end": span.end,
            "state": "serving",
            "dtype": "float32",
            "device": "cpu",
            "kv_tokens_free": 4096,
            "ms_per_layer": 0.6,
            "throughput": 2400.0,
            "sessions": 0,
            "path": self.paths.get(name),
            "rtt_ms": 1.5,
            "path_words": self.path_words.get(name),
            "path_rests": name in self.resting,
        }


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _cover(held: dict[str, Span], layer_count: int) -> list[tuple[str, Span]]:
    route: list[tuple[str, Span]] = []
    reached = 0
    for name, span in held.items():
        if span.start == reached and reached < layer_count:
            route.append((name, span))
            reached = span.end
    return route


def _pieces(part: Say) -> list[str]:
    return [part.text[at : at + part.characters] for at in range(0, len(part.text), part.characters)]


def _chunk(content: str, finish: str | None = None, **swarm: Any) -> Json:  # noqa: ANN401 - JSON
    delta = {"content": content} if content else {}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice], **({"swarm": swarm} if swarm else {})}


def _error(message: str) -> Json:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


async def _open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    return response


async def _send(response: web.StreamResponse, value: Json) -> None:
    await response.write(b"data: " + orjson.dumps(value) + b"\n\n")
