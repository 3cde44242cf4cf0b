"""A swarm without peers: answers by a script, through the same calls as `SwarmClient`.

swarm = FakeSwarm()
swarm.serve("petal", ann=(0, 2), bob=(2, 4))
swarm.say("Hello!")              # the next answer; more of these queue up
swarm.script(Pause(gate), NoRoute("nobody"))   # or step by step
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import msgspec
from tokenizers import Tokenizer

from shared.announcement import sign_announcement
from shared.channel import PathReport
from shared.client.directory import Directory
from shared.client.session import Drawn, Reason, Request, Rerouted
from shared.errors import NoRoute
from shared.identity import Identity, PeerId
from shared.protocol import Announcement, Hop, Likelihood, Path, PeerState, RouteSpan
from shared.tokenizer_files import files_hash
from tests.harness.tokenizers import END, byte_level, chat_files


class Say(msgspec.Struct, frozen=True):
    """Tokens of a text, one by one."""

    text: str


class Raw(msgspec.Struct, frozen=True):
    """These tokens, whatever they mean."""

    tokens: Sequence[int]


class Stop(msgspec.Struct, frozen=True):
    """A stop token."""


class Pause(msgspec.Struct, frozen=True):
    """Nothing comes until the event is set."""

    until: asyncio.Event


class Lose(msgspec.Struct, frozen=True):
    """A peer goes away and another takes over."""

    lost: str
    heir: str
    reason: Reason = "lost"
    stood_by: bool = False


Part = Say | Raw | Stop | Pause | Lose | Exception


class FakeRelay:
    """Looks like a connection to a relay."""

    def __init__(self) -> None:
        self.url = "http://127.0.0.1:1"
        self.connected = asyncio.Event()
        self.connected.set()


class FakeSwarm:
    """Make it inside a running event loop."""

    def __init__(self, tokenizer: Tokenizer | None = None, files: Mapping[str, bytes] | None = None) -> None:
        self.directory = Directory()
        self.relay = FakeRelay()
        self.relays = [self.relay]
        self.tokenizer = tokenizer or byte_level()
        self.files = dict(files or chat_files(self.tokenizer))
        self.identities: dict[str, Identity] = {}
        self.paths: dict[str, tuple[Path, float | None]] = {}
        self.reports: dict[str, PathReport] = {}
        self.requests: list[Request] = []
        self.fetches = 0
        self.running = 0
        """Answers under way; each must end, however its asker leaves."""
        self.began = asyncio.Event()
        """Set whenever an answer began."""
        self.ended = asyncio.Event()
        """Set whenever an answer ended."""
        self._sequence = 0
        self._models: dict[str, str] = {}
        self._scripts: deque[Sequence[Part]] = deque()

    # ------------------------------------------------------------ arranging

    def serve(self, model: str, *, layers: int = 4, context: int = 512, **spans: tuple[int, int]) -> str:
        """Announce peers by name with their layers; returns the artefact."""
        for name, (start, end) in spans.items():
            self.announce(name, model, start, end, layers=layers, context=context)
        return artefact_of(model)

    def announce(
        self,
        name: str,
        model: str,
        start: int,
        end: int,
        *,
        layers: int = 4,
        context: int = 512,
        state: PeerState = "serving",
    ) -> None:
        identity = self.identities.setdefault(name, Identity.generate())
        self._sequence += 1
        now = time.time()
        announcement = Announcement(
            peer=identity.id,
            sequence=self._sequence,
            issued_at=now,
            expires_at=now + 60,
            state=state,
            name=name,
            model=model,
            artefact=artefact_of(model),
            tokenizer=files_hash(self.files),
            layer_count=layers,
            start=start,
            end=end,
            dtype="float16",
            device="cpu",
            context_length=context,
            kv_tokens_free=10_000,
        )
        self._models[name] = model
        self.directory.add(sign_announcement(identity, announcement))

    def leave(self, *names: str) -> None:
        for name in names:
            self.announce(name, self._models[name], 0, 1, state="left")

    def link(self, name: str, path: Path, rtt_ms: float | None) -> None:
        self.paths[name] = (path, rtt_ms)

    def id(self, name: str) -> PeerId:
        return self.identities[name].id

    def say(self, text: str) -> None:
        """One whole answer, ended by the model itself."""
        self.script(Say(text), Stop())

    def script(self, *parts: Part) -> None:
        self._scripts.append(parts)

    # ------------------------------------------------------------ what the gateway calls

    def links(self) -> Mapping[PeerId, tuple[Path, float | None]]:
        return {self.id(name): link for name, link in self.paths.items()}

    def path_reports(self) -> Mapping[PeerId, PathReport]:
        return {self.id(name): report for name, report in self.reports.items()}

    async def fetch_files(self, artefact: str) -> Mapping[str, bytes]:
        self.fetches += 1
        if not any(peer.artefact == artefact for peer in self.directory.live()):
            raise NoRoute("no live peer serves any layer of this model")
        await asyncio.sleep(0)
        return self.files

    async def generate(
        self, request: Request, reserved: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        self.requests.append(request)
        script = self._scripts.popleft() if self._scripts else [Say("Hello."), Stop()]
        position, end = len(request.prompt), len(request.prompt) + request.max_new_tokens
        self.running += 1
        self.began.set()
        try:
            for part in script:
                match part:
                    case Pause(until=event):
                        await event.wait()
                    case Lose():
                        yield self._rerouted(part)
                    case Exception():
                        raise part
                    case Say() | Raw() | Stop():
                        reserved()
                        for token in self._tokens(part):
                            await asyncio.sleep(0)
                            yield self._drawn(request, position, token, stop=isinstance(part, Stop))
                            position += 1
                            if position == end:
                                return
        finally:
            self.running -= 1
            self.ended.set()

    # ------------------------------------------------------------ scripts

    def _tokens(self, part: Say | Raw | Stop) -> Sequence[int]:
        match part:
            case Say(text=text):
                ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
                return ids
            case Raw(tokens=tokens):
                return tokens
            case Stop():
                return [self.end_token]

    @property
    def end_token(self) -> int:
        token: int | None = self.tokenizer.token_to_id(END)
        return token if token is not None else 2

    def _drawn(self, request: Request, position: int, token: int, *, stop: bool) -> Drawn:
        sampling, prompt = request.sampling, request.prompt
        scored = prompt[1:] if sampling.prompt_likelihoods and position == len(prompt) else ()
        top = sampling.likelihoods or 0
        return Drawn(
            position,
            token,
            self._hops(request),
            stop,
            None if sampling.likelihoods is None else likelihood(token, top),
            [likelihood(each, top) for each in scored],
        )

    def _hops(self, request: Request) -> list[Hop]:
        return [
            Hop(peer.peer, peer.start, peer.end, 0.1, 1.2345, "direct")
            for peer in sorted(self.directory.serving(request.artefact), key=lambda peer: peer.start)
        ]

    def _rerouted(self, part: Lose) -> Rerouted:
        lost = self.directory.get(self.id(part.lost))
        assert lost is not None
        route = [RouteSpan(self.id(part.heir), lost.start, lost.end)]
        return Rerouted(self.id(part.lost), (lost.start, lost.end), route, part.reason, part.stood_by)


def likelihood(token: int, top: int) -> Likelihood:
    """A likelihood that tells tokens apart; the token itself is the likeliest of all."""
    others = [(token + place, -0.25 - token / 1000 - place) for place in range(top)]
    return Likelihood(token, -0.25 - token / 1000, others)


def artefact_of(model: str) -> str:
    """Another name, other weights."""
    return hashlib.sha256(model.encode()).hexdigest()
