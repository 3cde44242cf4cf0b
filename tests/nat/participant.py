"""A participant in a process of its own, as at a home: `Participant` steers it, `main` is what it does.

Commands and answers are lines of JSON, one answer for each command, in order. What comes over a channel is
sent back with the path that it came by.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar, assert_never

import msgspec
from msgspec import Struct

from shared.channel import Channel, Listen, upgrade
from shared.channel.link import LinkKind
from shared.channel.nat import hopeless
from shared.channel.upgrade import OPENING
from shared.identity import Identity, PeerId
from shared.protocol import NatKind, Path
from shared.relay_client import RelayClient
from tests.harness.commands import ROOT, python
from tests.harness.namespaces import Namespace
from tests.shared.channel.ends import End, Got, numbered, until

ANSWER_S = 30


class Join(Struct, tag=True):
    """Connect to a relay, as someone new. Answered by `Joined`.

    Who is `stubborn` tries to open direct links even where it is known to be in vain. Who `listens` opens a
    TCP port.
    """

    relay: str
    stubborn: bool = False
    listens: bool = False


class Joined(Struct):
    id: PeerId


class Look(Struct, tag=True):
    """Wait until it is known what our router does. Answered by `Seen`."""


class Seen(Struct):
    nat: NatKind


class Say(Struct, tag=True):
    """Send a message, over a new channel if there is none. Answered by `Said` when it has come back."""

    to: PeerId


class Said(Struct):
    ms: float
    """From the wish to say it, a dial included, until it came back."""
    there: Path
    back: Path


class Settle(Struct, tag=True):
    """Wait until a channel went direct, or will not. Answered by `Settled`."""

    to: PeerId


class Settled(Struct):
    path: Path
    ms: float
    """Since the channel was asked for here."""
    why_relayed: str
    kind: LinkKind


class Leave(Struct, tag=True):
    """Leave the relay and all channels. Answered by `Left`."""


class Left(Struct):
    pass


Command = Join | Look | Say | Settle | Leave
Answer = TypeVar("Answer", bound=Struct)


class Participant:
    """The hand that steers a participant's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.id = PeerId("")

    async def join(self, relay: str, *, stubborn: bool = False, listens: bool = False) -> None:
        self.id = (await self._ask(Join(relay, stubborn, listens), Joined)).id

    async def look(self) -> NatKind:
        return (await self._ask(Look(), Seen)).nat

    async def say(self, to: Participant) -> Said:
        return await self._ask(Say(to.id), Said)

    async def settle(self, to: Participant) -> Settled:
        return await self._ask(Settle(to.id), Settled)

    async def leave(self) -> None:
        await self._ask(Leave(), Left)

    async def _ask(self, command: Command, answer: type[Answer]) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        assert line, "the participant's process ended"
        return msgspec.json.decode(line, type=answer)


@asynccontextmanager
async def participant(machine: Namespace) -> AsyncIterator[Participant]:
    """A participant's process on a machine of the lab, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        *machine.command(*python("tests.nat.participant")), cwd=ROOT, stdin=PIPE, stdout=PIPE
    )
    try:
        yield Participant(process)
    finally:
        # Closed input would end it too, but a test that failed may have left it waiting for something.
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def met(
    one: Participant, other: Participant, relay: str, *, stubborn: bool = False, listens: bool = False
) -> AsyncIterator[None]:
    """Two participants at a relay, as strangers to each other; they leave it in the end."""
    try:
        for each in (one, other):
            await each.join(relay, stubborn=stubborn, listens=listens)
        yield
    finally:
        for each in (one, other):
            await each.leave()


# ---------------------------------------------------------------- the process


class _Person:
    """What a participant's process knows."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._end: End
        self._began: dict[PeerId, float] = {}
        self._number = 0

    async def obey(self, command: Command) -> Struct:
        match command:
            case Join():
                return await self._join(command.relay, command.stubborn, command.listens)
            case Look():
                return await self._look()
            case Say():
                return await self._say(command.to)
            case Settle():
                return await self._settle(command.to)
            case Leave():
                await self._stack.aclose()
                return Left()
            case _:
                assert_never(command)

    async def _join(self, relay: str, stubborn: bool, listens: bool) -> Joined:
        vars(upgrade)["hopeless"] = (lambda own, other: "") if stubborn else hopeless
        identity = Identity.generate()
        client = await self._stack.enter_async_context(RelayClient(relay, identity))
        self._end = End(identity, client, listen=Listen() if listens else None)
        self._end.handle = self._echo
        await self._stack.enter_async_context(self._end.dialer)
        return Joined(identity.id)

    async def _look(self) -> Seen:
        dialer = self._end.dialer
        await until(lambda: dialer.nat != "unknown")
        return Seen(dialer.nat)

    async def _say(self, to: PeerId) -> Said:
        started = time.perf_counter()
        self._began.setdefault(to, started)
        self._number += 2
        channel = await self._end.dialer.channel(to)
        await channel.send(numbered(self._number))
        async with asyncio.timeout(ANSWER_S):
            while (got := await self._end.inbox.get()).number != self._number + 1:
                pass
        return Said(ms=_ms(started), there=got.body.decode(), back=got.path)  # type: ignore[arg-type]

    async def _echo(self, got: Got) -> None:
        if got.number % 2:
            self._end.inbox.put_nowait(got)
        else:
            await got.channel.send(numbered(got.number + 1), got.path.encode())

    async def _settle(self, to: PeerId) -> Settled:
        await until(lambda: to in self._end.dialer.channels)
        channel = self._end.dialer.channels[to]
        started = self._began.setdefault(to, time.perf_counter())
        # What has not settled by then is told as it is, for the test to judge.
        with suppress(TimeoutError):
            await until(lambda: channel.path == "direct" or _gave_up(channel))
            if self._end.dialer.port is not None:
                await until(lambda: channel.report().kind == "socket")
        return Settled(channel.path, _ms(started), channel.why_relayed, channel.report().kind)


def _gave_up(channel: Channel) -> bool:
    return channel.direct is None and channel.why_relayed != OPENING


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 1)


async def main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    person = _Person()
    while line := await reader.readline():
        answer = await person.obey(msgspec.json.decode(line, type=Command))
        print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
