"""One peer's service without a network, and participants that talk to it.

Messages cross a pipe as JSON, so a test can say nothing that the wire would refuse, and neither can the
service. Real channels and relays are for tests/test_swarm.py and for test_hostile_peer.py.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import tempfile
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path as FilePath
from typing import Any, TypeVar

import msgspec
import torch
from transformers import AutoModelForCausalLM

from peer.model.checkpoint import open_checkpoint
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import Pace
from peer.serving.compute import Computed, Draw, Work, compute_pass
from peer.serving.kv_budget import KvBudget
from peer.serving.service import Offer, Service
from shared.channel import Channel, Priority
from shared.errors import ConnectionLost
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_WINDOW,
    Consumed,
    Open,
    Opened,
    PeerMessage,
    RouteSpan,
    Sampling,
    Step,
    Tensor,
    Token,
    WireDtype,
    decode,
    encode,
)
from tests.harness.models import save_random

SOON_S = 10.0
"""Longer than anything here takes; a test that waits this long has failed."""
ARTEFACT = "a" * 64
SESSION = "1" * 32
CONTEXT = 512
LAYERS = 6
HIDDEN = 64
VOCABULARY = 128
PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]

Kind = TypeVar("Kind", bound=msgspec.Struct)


# ---------------------------------------------------------------- the model


_TEMPORARY = tempfile.TemporaryDirectory(prefix="corolla-serving-")


@functools.cache
def model_directory() -> FilePath:
    return save_random("llama", FilePath(_TEMPORARY.name, "llama"))


@functools.cache
def span(start: int = 0, end: int = LAYERS) -> Span:
    torch.set_num_threads(1)
    return Span.load(open_checkpoint(str(model_directory())), start, end)


@functools.cache
def whole_model() -> Any:  # noqa: ANN401 - transformers' models are only partly typed
    """The unsplit model by transformers, which tells what is right."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32)
    return whole.eval()


@functools.cache
def expected_tokens(prompt: tuple[int, ...], new: int) -> list[int]:
    """Greedy continuation by the unsplit model, without a cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            tokens.append(int(whole_model()(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def expected_states(prompt: tuple[int, ...], layer: int) -> torch.Tensor:
    """What goes into a layer of the unsplit model, [count, hidden]."""
    with torch.inference_mode():
        output = whole_model()(input_ids=torch.tensor([list(prompt)]), output_hidden_states=True)
    states: torch.Tensor = output.hidden_states[layer][0]
    return states


def compute(held: Span, cache: KVCache, asked: Step, body: bytes, draw: Draw | None) -> Computed:
    """One step alone, at once."""
    work = Work(cache, asked, body, draw)
    compute_pass(held, [(work, asked.count)])
    return work.result()


class Steady(Pace):
    """Always the same piece, however fast the machine."""

    def __init__(self, piece: int) -> None:
        super().__init__()
        self._always = piece

    @property
    def piece(self) -> int:
        return self._always


def ids_body(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def states_body(states: torch.Tensor) -> bytes:
    body: bytes = states.contiguous().numpy().tobytes()
    return body


# ---------------------------------------------------------------- participants


class Pipe(Channel):
    """A channel's end at the service: what is sent into it, its party hears. It has no links."""

    def __init__(self, party: Party) -> None:
        self.peer = party.id
        self.closed = asyncio.Event()
        self.reason = ""
        self.reading = asyncio.Event()
        self.reading.set()
        self._party = party
        self.lanes: list[Priority] = []
        """By which priority each step came."""

    async def send(
        self,
        message: PeerMessage,
        body: bytes | bytearray | memoryview = b"",
        priority: Priority = Priority.DECODE,
    ) -> None:
        if self.closed.is_set():
            raise ConnectionLost(f"the pipe of {self.peer[:8]} is closed")
        await self.reading.wait()
        if isinstance(message, Step):
            self.lanes.append(priority)
        heard = self._party.makes_room if isinstance(message, Consumed) else self._party.inbox
        heard.put_nowait((decode(encode(message), PeerMessage), bytes(body)))

    @property
    def rtt_ms(self) -> float | None:
        return 8.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield


class Party:
    """A participant that may say anything the protocol can write, and keeps what it hears."""

    def __init__(self, name: str, house: House) -> None:
        self.id = PeerId(hashlib.sha256(name.encode()).hexdigest())
        self.inbox: asyncio.Queue[tuple[PeerMessage, bytes]] = asyncio.Queue()
        self.makes_room: asyncio.Queue[tuple[PeerMessage, bytes]] = asyncio.Queue()
        """What it hears of steps that are done, apart: few tests care."""
        self.pipe = Pipe(self)
        self._house = house

    async def say(self, message: PeerMessage, body: bytes = b"") -> None:
        said: PeerMessage = decode(encode(message), PeerMessage)
        self._house.service.handle(self.pipe, said, memoryview(body), "direct")
        await asyncio.sleep(0)

    async def hear(self, kind: type[Kind]) -> Kind:
        """The next message, which must be of this kind."""
        queue = self.makes_room if kind is Consumed else self.inbox
        message, _ = await asyncio.wait_for(queue.get(), SOON_S)
        assert isinstance(message, kind), f"expected {kind.__name__}, heard {message}"
        return message

    async def hear_step(self) -> tuple[Step, bytes]:
        message, body = await asyncio.wait_for(self.inbox.get(), SOON_S)
        assert isinstance(message, Step), message
        return message, body

    async def hear_tokens(self, count: int) -> list[int]:
        return [(await self.hear(Token)).token for _ in range(count)]

    async def opens(self, opened: Open) -> Opened:
        await self.say(opened)
        return await self.hear(Opened)

    @property
    def heard_nothing(self) -> bool:
        return self.inbox.empty()


class House:
    """A service with its budget, and the parties around it."""

    def __init__(self, held: Span, kv_bytes: int, lease_s: float, **offer: Any) -> None:  # noqa: ANN401
        self.me = PeerId(hashlib.sha256(b"me").hexdigest())
        self.budget = KvBudget(kv_bytes)
        self.files = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}'}
        fields: dict[str, Any] = {
            "artefact": ARTEFACT,
            "context_length": CONTEXT,
            "tokenizer_files": self.files,
        }
        self.service = Service(
            self.me, held, Offer(**(fields | offer)), self.budget, self._dial, lease_s=lease_s
        )
        self.service.batcher.pace = Steady(PREFILL_WINDOW)
        self._parties: dict[str, Party] = {}

    def party(self, name: str) -> Party:
        if name not in self._parties:
            self._parties[name] = Party(name, self)
        return self._parties[name]

    async def _dial(self, peer: PeerId) -> Channel:
        for party in self._parties.values():
            if party.id == peer and not party.pipe.closed.is_set():
                return party.pipe
        raise ConnectionLost(f"{peer[:8]} is not connected")

    def route(self, *entries: tuple[str, int, int]) -> list[RouteSpan]:
        """`me` is the service; other names are parties."""
        return [
            RouteSpan(self.me if name == "me" else self.party(name).id, start, end)
            for name, start, end in entries
        ]

    def open(self, *entries: tuple[str, int, int], **changes: Any) -> Open:  # noqa: ANN401
        """An honest `Open` for the given route, or for the whole model here."""
        route = self.route(*(entries or (("me", 0, LAYERS),)))
        fields: dict[str, Any] = {
            "session": SESSION,
            "epoch": 0,
            "artefact": ARTEFACT,
            "route": route,
            "index": next((index for index, entry in enumerate(route) if entry.peer == self.me), 0),
            "max_tokens": 40,
            "prompt_length": len(PROMPT),
            "credit": 40,
            "sampling": Sampling(),
        }
        return Open(**(fields | changes))


@asynccontextmanager
async def house(
    held: Span | None = None,
    *,
    kv_bytes: int = 1 << 30,
    lease_s: float = 30.0,
    **offer: Any,  # noqa: ANN401
) -> AsyncIterator[House]:
    """A running service; afterwards nothing of its sessions may be left."""
    home = House(held or span(), kv_bytes, lease_s, **offer)
    async with home.service:
        yield home
    assert home.service.session_count == 0
    assert home.budget.reserved_bytes == 0


def step(
    position: int,
    count: int,
    *,
    shape: Sequence[int] | None = None,
    dtype: WireDtype = "int32",
    **changes: Any,  # noqa: ANN401
) -> Step:
    """Of token ids, unless told otherwise."""
    fields: dict[str, Any] = {"session": SESSION, "epoch": 0} | changes
    tensor = Tensor(dtype, [count] if shape is None else list(shape))
    return Step(position=position, count=count, tensor=tensor, **fields)


def states_step(position: int, count: int, **changes: Any) -> Step:  # noqa: ANN401
    """Of hidden states."""
    return step(position, count, shape=[count, HIDDEN], dtype="float32", **changes)
