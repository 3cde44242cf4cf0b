"""When the swarm is full, questions wait in line, each user in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import cast

import aiohttp
import pytest

from shared.client.session import Drawn, Request, Rerouted
from shared.errors import Busy
from tests.harness.fake_swarm import FakeSwarm
from tests.web.api import chat, chunks, content, post
from web.app import Gateway, GatewaySettings
from web.line import Line, Ticket, Waiting, WaitingLines
from web.swarm import Swarm

# ---------------------------------------------------------------- the order


def test_a_round_takes_one_question_of_each_user() -> None:
    line = Line()
    tickets = [line.join(user) for user in ("ann", "ann", "ann", "bob", "eve", "bob")]

    assert [line.place(ticket) for ticket in tickets] == [1, 4, 6, 2, 3, 5]
    assert served_in_turn(line, tickets) == ["ann", "bob", "eve", "ann", "bob", "ann"]


def served_in_turn(line: Line, tickets: list[Ticket]) -> list[str]:
    order = []
    while tickets:
        (first,) = (ticket for ticket in tickets if line.place(ticket) == 1)
        order.append(first.user)
        line.leave(first)
        tickets.remove(first)
    return order


def test_places_are_a_row_without_gaps_whoever_leaves() -> None:
    line = Line()
    tickets = [line.join(user) for user in "aabbbcca"]
    for gone in (3, 0, 4):
        line.leave(tickets.pop(gone))

        assert sorted(line.place(ticket) for ticket in tickets) == list(range(1, len(tickets) + 1))


def test_who_leaves_before_its_turn_keeps_its_users_turn() -> None:
    line = Line()
    first, second, other = line.join("ann"), line.join("ann"), line.join("bob")
    line.leave(second)

    assert (line.place(first), line.place(other)) == (1, 2)


def test_a_line_has_an_end_and_so_has_each_users_part() -> None:
    line = Line(longest=3, most_per_user=2)
    line.join("ann")
    line.join("ann")
    with pytest.raises(Busy, match="2 questions wait already"):
        line.join("ann")
    line.join("bob")
    with pytest.raises(Busy):
        line.join("eve")


# ---------------------------------------------------------------- waiting


class Crowded:
    """A swarm with room for so many sessions; each lasts until it is told to end."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.asked: list[str] = []
        """Whose sessions had room, in order."""
        self.running: list[asyncio.Event] = []

    async def generate(
        self, request: Request, reserved: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Drawn | Rerouted, None]:
        if len(self.running) >= self.room:
            raise Busy("every peer is full", 0.3)
        over = asyncio.Event()
        self.running.append(over)
        self.asked.append(str(request.prompt[0]))
        reserved()
        try:
            await over.wait()
            yield Drawn(1, 7, [], True)
        finally:
            self.running.remove(over)


def request(number: int) -> Request:
    return Request(artefact="a" * 64, prompt=[number], max_new_tokens=1)


async def ask(lines: WaitingLines, user: str, number: int, places: list[int]) -> None:
    async with aclosing(lines.generate(user, request(number))) as events:
        async for event in events:
            if isinstance(event, Waiting):
                places.append(event.place)


async def test_questions_are_answered_in_turn_as_room_comes_free() -> None:
    swarm = Crowded(1)
    lines = WaitingLines(cast(Swarm, swarm))
    places: dict[int, list[int]] = {}
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for number, user in enumerate(["ann", "ann", "ann", "bob"]):
            tasks.create_task(ask(lines, user, number, places.setdefault(number, [])))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for _ in range(4):
            while not swarm.running:  # noqa: ASYNC110 - whoever is next tries by itself
                await asyncio.sleep(0.01)
            swarm.running[0].set()
            await asyncio.sleep(0)
            while swarm.running and swarm.running[0].is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    assert swarm.asked == ["0", "1", "3", "2"]
    assert places[0] == []
    assert places[2][-2:] == [1, 0]
    # It was the second until bob came, who had not asked yet; from then on it only moved up.
    after = places[2][1:] if places[2][0] == 2 else places[2]
    assert after == sorted(after, reverse=True)


async def test_ones_turn_is_told_before_the_first_token() -> None:
    swarm = Crowded(1)
    lines = WaitingLines(cast(Swarm, swarm))
    places: list[int] = []
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(ask(lines, "ann", 0, []))
        await until(lambda: bool(swarm.running))
        second = tasks.create_task(ask(lines, "bob", 1, places))
        await until(lambda: places == [1])
        swarm.running[0].set()
        await first
        await until(lambda: places == [1, 0])
        assert not second.done()
        second.cancel()  # between its turn and its first token: the room comes free all the same
        await until(lambda: not swarm.running)


async def test_who_gives_up_leaves_the_line() -> None:
    swarm = Crowded(1)
    lines = WaitingLines(cast(Swarm, swarm))
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        first = tasks.create_task(ask(lines, "ann", 0, []))
        await until(lambda: bool(swarm.running))
        places: list[int] = []
        second = tasks.create_task(ask(lines, "bob", 1, []))
        await asyncio.sleep(0.01)
        third = tasks.create_task(ask(lines, "eve", 2, places))
        await until(lambda: places == [2])
        second.cancel()
        await until(lambda: places == [2, 1])
        swarm.running[0].set()
        await first
        await until(lambda: swarm.asked == ["0", "2"])
        swarm.running[0].set()
        await third


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the line tells by what it does
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
async def patient(swarm: FakeSwarm, data_dir: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway that waits as long as gateways do."""
    async with (
        Gateway(GatewaySettings(data_dir=data_dir, keepalive_s=0.05), swarm) as gateway,
        aiohttp.ClientSession(gateway.url, timeout=aiohttp.ClientTimeout(60)) as http,
    ):
        yield http


async def test_a_full_swarm_is_waited_for_and_the_place_told(
    patient: aiohttp.ClientSession, swarm: FakeSwarm
) -> None:
    for _ in range(2):
        swarm.script(Busy("every peer of petal is full", 0.2))
    swarm.say("Now.")

    stream = await chunks(patient, chat(stream=True, swarm={"route": True}))

    assert content(stream) == "Now."
    places = [chunk["swarm"]["waiting"] for chunk in stream if "waiting" in chunk.get("swarm", {})]
    assert places == [1, 1, 0]


async def test_a_whole_answer_waits_as_well(patient: aiohttp.ClientSession, swarm: FakeSwarm) -> None:
    swarm.script(Busy("every peer of petal is full", 0.2))
    swarm.say("Now.")

    status, answer, _ = await post(patient, chat())

    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Now.")


async def test_a_full_line_is_429_with_a_time_to_come_back(
    patient: aiohttp.ClientSession, swarm: FakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.line.Line", partial(Line, longest=0))
    swarm.script(Busy("every peer of petal is full", 0.2))

    status, answer, headers = await post(patient, chat())

    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert headers["Retry-After"] == "10"
