"""Who may have a session here, who may command it, and what is left of it afterwards: nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peer.serving.hop_session import INBOX_SIZE
from peer.serving.service import MAX_REPLIES
from shared.channel import Priority
from shared.errors import ProtocolError
from shared.identity import PeerId
from shared.protocol import (
    PREFILL_WINDOW,
    TEE_ROWS,
    TEE_WINDOW,
    Close,
    Consumed,
    Decline,
    Failed,
    Fetch,
    Files,
    Grant,
    Hop,
    Load,
    Lost,
    Open,
    Opened,
    PeerMessage,
    Probe,
    Renew,
    RouteSpan,
    Sampling,
    Step,
    Tee,
    Token,
)
from shared.tokenizer_files import split_files
from tests.peer.serving.parties import (
    ARTEFACT,
    CONTEXT,
    HIDDEN,
    LAYERS,
    PROMPT,
    SESSION,
    SOON_S,
    VOCABULARY,
    House,
    Party,
    Steady,
    expected_states,
    expected_tokens,
    house,
    ids_body,
    span,
    states_body,
    states_step,
    step,
)
from tests.peer.serving.wild import wild_messages

OTHER = "2" * 32
NEW = 6
PREFILL = step(0, len(PROMPT), sample=True), ids_body(PROMPT)
# Two caches of 2 heads of 16 float32 each, per layer.
LAYER_BYTES = 2 * 2 * 16 * 4
MIDDLE = (("ann", 0, 2), ("me", 2, 4), ("eve", 4, 6))


def limited(home: House, new: int = NEW, **changes: Any) -> Open:  # noqa: ANN401
    """An `Open` for a session that draws `new` tokens and then stands still."""
    return home.open(credit=len(PROMPT) + new, **changes)


async def works(home: House, party: Party, session: str = OTHER) -> None:
    """An honest session from its beginning to its end, exactly."""
    await party.opens(limited(home, session=session))
    asked = msgspec.structs.replace(PREFILL[0], session=session)
    await party.say(asked, PREFILL[1])
    assert await party.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)
    await party.say(Close(session))


async def nothing_came_before(party: Party, opened: Open) -> Opened:
    """The session's inbox is in order: when this `Open` is answered, what went before has had its effect."""
    answer = await party.opens(opened)
    assert party.heard_nothing
    return answer


# ---------------------------------------------------------------- a session's work


async def test_a_session_draws_what_the_whole_model_draws_and_stops_at_its_credit() -> None:
    async with house() as home:
        ann = home.party("ann")
        assert await ann.opens(limited(home)) == Opened(SESSION, 0, 0)
        await ann.say(*PREFILL)

        tokens = [await ann.hear(Token) for _ in range(NEW)]

        assert [token.token for token in tokens] == expected_tokens(tuple(PROMPT), NEW)
        assert [token.position for token in tokens] == list(range(len(PROMPT), len(PROMPT) + NEW))
        assert [[(hop.peer, hop.start, hop.end) for hop in token.hops] for token in tokens] == [
            [(home.me, 0, LAYERS)]
        ] * NEW
        # Without further credit, no further token: the next thing heard answers the next message.
        await nothing_came_before(ann, limited(home, epoch=1))


async def test_a_grant_by_the_asker_lets_the_ring_go_on() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home, 2))
        await ann.say(*PREFILL)
        first = await ann.hear_tokens(2)

        await ann.say(Grant(SESSION, 0, len(PROMPT) + NEW))

        assert first + await ann.hear_tokens(NEW - 2) == expected_tokens(tuple(PROMPT), NEW)


async def test_a_stop_token_ends_the_ring() -> None:
    expected = expected_tokens(tuple(PROMPT), NEW)
    stop = next(token for token in expected[1:] if token != expected[0])
    end = expected.index(stop) + 1
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open(stop_tokens=[stop]))
        await ann.say(*PREFILL)

        tokens = [await ann.hear(Token) for _ in range(end)]

        assert [token.token for token in tokens] == expected[:end]
        assert [token.stop for token in tokens] == [False] * (end - 1) + [True]
        await nothing_came_before(ann, home.open(epoch=1))


async def test_a_middle_hop_passes_on_what_the_layers_give() -> None:
    states = expected_states(tuple(PROMPT), 2)
    before = Hop("f" * 64, 0, 2, 1.0, 2.0, "local")
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))

        await ann.say(states_step(0, len(PROMPT), sample=True, hops=[before]), states_body(states))
        passed, body = await eve.hear_step()

        got = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states(tuple(PROMPT), 4), rtol=1e-4, atol=1e-4)
        assert (passed.position, passed.count, passed.sample) == (0, len(PROMPT), True)
        assert passed.hops[0] == before
        (mine,) = passed.hops[1:]
        assert (mine.peer, mine.start, mine.end, mine.path) == (home.me, 2, 4, "direct")
        # One way of a pipe whose round trip takes 8 ms.
        assert mine.link_ms == 4.0 and mine.computed_ms > 0


async def test_a_middle_hop_passes_a_long_step_on_in_pieces() -> None:
    """So the next hop computes one while this one computes the next; only the last one asks for a token."""
    text = tuple((7 * place) % 128 for place in range(49))
    states = expected_states(text, 2)
    async with house(span(2, 4)) as home:
        home.service.batcher.pace = Steady(16)
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE, max_tokens=60))

        await ann.say(states_step(0, 49, sample=True), states_body(states))
        heard = [await eve.hear_step() for _ in range(3)]

        pieces = [(passed.position, passed.count, passed.sample) for passed, _ in heard]
        # A last piece of one position would overtake the others.
        assert pieces == [(0, 16, False), (16, 16, False), (32, 17, True)]
        got = torch.frombuffer(bytearray(b"".join(body for _, body in heard)), dtype=torch.float32)
        torch.testing.assert_close(got.view(-1, HIDDEN), expected_states(text, 4), rtol=1e-4, atol=1e-4)
        assert [len(passed.hops) for passed, _ in heard] == [1, 1, 1]
        assert (await ann.hear(Consumed)).position == 49


async def test_the_last_position_of_a_prompt_does_not_overtake_the_rest() -> None:
    states = expected_states(tuple(PROMPT), 2)
    last = len(PROMPT) - 1
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))

        await ann.say(states_step(0, last), states_body(states[:last]))
        await ann.say(states_step(last, 1, sample=True), states_body(states[last:]))
        await ann.say(states_step(last + 1, 1, sample=True), states_body(states[:1]))
        for _ in range(3):
            await eve.hear_step()

        assert eve.pipe.lanes == [Priority.PREFILL, Priority.PREFILL, Priority.DECODE]


@pytest.mark.parametrize("held", [0, 5])
async def test_a_next_hop_that_holds_less_gets_the_rest_before_the_first_step(held: int) -> None:
    states = expected_states(tuple(PROMPT), 2)
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))
        await ann.say(states_step(0, 8), states_body(states[:8]))
        await eve.hear_step()

        route = [*home.route(*MIDDLE[:2]), *home.route(("dora", 4, 6))]
        assert (await asker.opens(home.open(epoch=1, route=route, index=1))).position == 8
        await ann.say(states_step(8, 1, epoch=1, sample=True, held=[8, 8, held]), states_body(states[8:]))

        dora = home.party("dora")
        replay, replayed = await dora.hear_step()
        onward, last = await dora.hear_step()
        assert (replay.position, replay.count, replay.sample, replay.held) == (
            held,
            8 - held,
            False,
            [8, 8, held],
        )
        assert (onward.position, onward.count, onward.sample, onward.held) == (8, 1, True, [])
        got = torch.frombuffer(bytearray(replayed + last), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states(tuple(PROMPT), 4)[held:], rtol=1e-4, atol=1e-4)
        assert eve.heard_nothing


@pytest.mark.parametrize("held", [6, 8])
async def test_a_replay_ends_at_a_next_hop_that_has_it_already(held: int) -> None:
    states = expected_states(tuple(PROMPT), 2)
    async with house(span(2, 4)) as home:
        asker, bob, eve = home.party("asker"), home.party("bob"), home.party("eve")
        assert (await asker.opens(home.open(("bob", 0, 2), *MIDDLE[1:], epoch=1))).position == 0
        await bob.say(states_step(0, 5, epoch=1, held=[0, 0, held]), states_body(states[:5]))
        await bob.say(states_step(5, 3, epoch=1), states_body(states[5:8]))
        await bob.say(states_step(8, 1, epoch=1, sample=True), states_body(states[8:]))

        got = bytearray()
        for position, count in [(held, 8 - held), (8, 1)]:
            if count:
                onward, body = await eve.hear_step()
                assert (onward.position, onward.count, onward.sample) == (position, count, position == 8)
                got += body
        states = torch.frombuffer(got, dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(states, expected_states(tuple(PROMPT), 4)[held:], rtol=1e-4, atol=1e-4)


async def test_a_route_is_taken_with_its_first_step_and_the_one_before_goes_on_until_then() -> None:
    expected = expected_tokens(tuple(PROMPT), NEW + 2)
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        await ann.say(*PREFILL)
        await ann.hear_tokens(NEW)

        await ann.opens(limited(home, epoch=1))
        await ann.say(Grant(SESSION, 0, len(PROMPT) + NEW + 2))
        assert await ann.hear_tokens(2) == expected[NEW:]

        last = len(PROMPT) + NEW
        await ann.say(step(last, 1, epoch=1, sample=True), ids_body([expected[NEW]]))
        token = await ann.hear(Token)
        assert (token.epoch, token.position, token.token) == (1, last + 1, expected[NEW + 1])
        await ann.say(step(last, 1, epoch=0, sample=True), ids_body([expected[NEW]]))
        await nothing_came_before(ann, limited(home, epoch=2))


# ---------------------------------------------------------------- standbys


async def test_a_standby_follows_and_says_so_but_passes_nothing_on_until_it_is_a_hop() -> None:
    states = expected_states(tuple(PROMPT), 2)
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        assert (await asker.opens(home.open(*MIDDLE, standby=True))).position == 0
        assert (home.service.session_count, home.service.standby_count) == (0, 1)
        await ann.say(states_step(0, 5), states_body(states[:5]))
        await ann.say(states_step(5, 1, sample=True), states_body(states[5:6]))
        await ann.say(states_step(6, 2), states_body(states[6:8]))
        for party in (ann, asker):
            assert [(await party.hear(Consumed)).position for _ in range(2)] == [5, 8]
        assert eve.heard_nothing

        assert (await asker.opens(home.open(*MIDDLE, epoch=1))).position == 8
        assert (home.service.session_count, home.service.standby_count) == (1, 0)
        await ann.say(states_step(8, 1, epoch=1, sample=True, held=[8, 8, 6]), states_body(states[8:]))
        replay, replayed = await eve.hear_step()
        onward, last = await eve.hear_step()
        assert [(replay.position, replay.count), (onward.position, onward.count)] == [(6, 2), (8, 1)]
        got = torch.frombuffer(bytearray(replayed + last), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states(tuple(PROMPT), 4)[6:], rtol=1e-4, atol=1e-4)


async def test_a_last_hop_that_stands_by_draws_nothing() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open(standby=True))
        await ann.say(*PREFILL)
        assert (await ann.hear(Consumed)).position == len(PROMPT)
        await nothing_came_before(ann, limited(home, epoch=1))
        await ann.say(step(len(PROMPT) - 1, 1, epoch=1, sample=True), ids_body(PROMPT[-1:]))
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)


async def test_a_hop_sends_copies_of_what_it_passes_on_in_the_background_and_no_more_than_are_taken() -> None:
    text = [(7 * index) % VOCABULARY for index in range(TEE_WINDOW + 200)]
    states = expected_states(tuple(text[:CONTEXT]), 2)
    rows = len(states) - 1
    async with house(span(2, 4)) as home:
        asker, ann, eve, zoe = (home.party(name) for name in ("asker", "ann", "eve", "zoe"))
        await asker.opens(home.open(*MIDDLE, max_tokens=CONTEXT))
        await ann.say(states_step(0, 40), states_body(states[:40]))
        await eve.hear_step()
        await asker.say(Tee(SESSION, 0, zoe.id, 10))
        copy, copied = await zoe.hear_step()
        assert (copy.position, copy.count, copy.sample) == (10, 30, False)
        assert zoe.pipe.lanes == [Priority.BACKGROUND]

        # A row is too little for a copy; sixteen are enough.
        for position in range(40, 40 + TEE_ROWS):
            await ann.say(states_step(position, 1, sample=True), states_body(states[position : position + 1]))
        more, further = await zoe.hear_step()
        assert (more.position, more.count) == (40, TEE_ROWS)
        await ann.say(states_step(56, rows - 56), states_body(states[56:rows]))
        got = copied + further
        while len(got) < (rows - 10) * HIDDEN * 4:
            await zoe.say(Consumed(SESSION, 0, 10 + len(got) // HIDDEN // 4))
            got += (await zoe.hear_step())[1]
        passed = torch.frombuffer(bytearray(got), dtype=torch.float32).view(-1, HIDDEN)
        expected = expected_states(tuple(text[:CONTEXT]), 4)[10:rows]
        torch.testing.assert_close(passed, expected, rtol=1e-3, atol=1e-3)


async def test_a_standby_that_is_gone_is_told_and_only_the_asker_may_name_one() -> None:
    states = expected_states(tuple(PROMPT), 2)
    async with house(span(2, 4)) as home:
        asker, ann, zoe = home.party("asker"), home.party("ann"), home.party("zoe")
        await asker.opens(home.open(*MIDDLE))
        await ann.say(states_step(0, 8), states_body(states[:8]))
        await ann.say(Tee(SESSION, 0, zoe.id, 0))
        await asker.say(Tee(SESSION, 7, zoe.id, 0))
        zoe.pipe.closed.set()
        await nothing_came_before(asker, home.open(*MIDDLE, epoch=1))
        await ann.say(states_step(8, 1, epoch=1), states_body(states[8:]))
        await asker.say(Tee(SESSION, 1, zoe.id, 0))
        for position in range(9, 9 + TEE_ROWS):
            await ann.say(states_step(position, 1, epoch=1), states_body(states[:1]))
        assert await asker.hear(Lost) == Lost(SESSION, 1, zoe.id)


async def test_a_standby_gives_its_memory_to_a_session_and_takes_none_from_another() -> None:
    token = LAYERS * LAYER_BYTES
    async with house(kv_bytes=100 * token) as home:
        ann, bob = home.party("ann"), home.party("bob")
        await ann.opens(home.open(standby=True, max_tokens=60))
        assert home.service.kv_tokens_free == 100
        await bob.say(home.open(session=OTHER, standby=True, max_tokens=60))
        assert (await bob.hear(Decline)).code == "busy"

        await bob.opens(home.open(session=OTHER, max_tokens=60))

        assert await ann.hear(Lost) == Lost(SESSION, 0, home.me)
        assert (home.service.session_count, home.service.standby_count) == (1, 0)
        await bob.say(home.open(session="3" * 32, max_tokens=60))
        assert (await bob.hear(Decline)).code == "busy"
        assert home.budget.reserved_bytes == 60 * token
        await bob.say(Close(OTHER))


async def test_a_peer_that_leaves_stands_by_for_nobody() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open(standby=True))
        home.service.drain()
        assert await ann.hear(Lost) == Lost(SESSION, 0, home.me)
        await asyncio.wait_for(home.service.drained(), SOON_S)


# ---------------------------------------------------------------- admission


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"artefact": "b" * 64}, "artefact", "other weights"),
        ({"max_tokens": CONTEXT + 1}, "context", f"holds {CONTEXT} tokens, not {CONTEXT + 1}"),
        ({"index": 1}, "invalid", "does not name this peer"),
        ({"index": 1 << 53}, "invalid", "does not name this peer"),
        ({"route": [RouteSpan("f" * 64, 0, LAYERS)]}, "invalid", "does not name this peer"),
    ],
)
async def test_what_is_not_served_is_declined_in_one_sentence(
    changes: dict[str, Any], code: str, message: str
) -> None:
    async with house() as home:
        await declined(home, home.open(**changes), code, message)
        await works(home, home.party("ann"))


async def declined(home: House, opened: Open, code: str, message: str) -> Decline:
    """Nothing is held for a session that is declined."""
    before = home.service.session_count, home.budget.reserved_bytes
    asker = home.party("asker of much")
    await asker.say(opened)
    decline = await asker.hear(Decline)
    assert (decline.session, decline.epoch, decline.code) == (opened.session, opened.epoch, code)
    assert message in decline.message and "\n" not in decline.message
    assert (home.service.session_count, home.budget.reserved_bytes) == before
    return decline


@pytest.mark.parametrize(
    "entries",
    [
        (("ann", 0, 1), ("me", 1, 4), ("eve", 4, 6)),
        (("ann", 0, 2), ("me", 2, 5), ("eve", 5, 6)),
        (("me", 0, 6),),
    ],
)
async def test_layers_that_are_not_here_are_declined(entries: tuple[tuple[str, int, int], ...]) -> None:
    async with house(span(2, 4)) as home:
        await declined(home, home.open(*entries), "layers", "this peer serves layers 2–4")


@pytest.mark.parametrize(
    "entries",
    [
        (("ann", 0, 2), ("me", 3, 6)),
        (("ann", 0, 4), ("me", 2, 6)),
        (("me", 0, 4),),
        (("me", 2, 6),),
        (("me", 0, 6), ("ann", 0, 6)),
        (("me", 0, 6), ("ann", 6, 9)),
        (("me", 0, 3), ("ann", 3, 3), ("eve", 3, 6)),
    ],
)
async def test_a_route_that_does_not_cover_the_model_once_is_declined(
    entries: tuple[tuple[str, int, int], ...],
) -> None:
    async with house() as home:
        await declined(home, home.open(*entries), "invalid", "layer")


async def test_a_history_of_unknown_tokens_is_declined() -> None:
    sampling = Sampling(repetition_penalty=1.2)
    async with house() as home:
        await declined(home, home.open(sampling=sampling, history=[5, 128]), "invalid", "vocabulary")


async def test_a_session_has_the_whole_memory_that_it_may_need_or_none() -> None:
    async with house(kv_bytes=100 * LAYERS * LAYER_BYTES) as home:
        assert home.service.kv_tokens_free == 100
        busy = await declined(home, home.open(max_tokens=101), "busy", "0.2 MB of KV memory")
        assert busy.message.endswith("100 tokens would fit, not 101")
        assert busy.retry_after_s > 0

        ann = home.party("ann")
        await ann.opens(home.open(max_tokens=60))
        assert home.service.kv_tokens_free == 40
        assert home.budget.reserved_bytes == 60 * LAYERS * LAYER_BYTES
        await declined(home, home.open(max_tokens=41, session=OTHER), "busy", "KV memory")
        await ann.opens(home.open(max_tokens=40, session=OTHER))
        assert home.service.kv_tokens_free == 0

        await ann.say(Close(SESSION))
        assert home.service.kv_tokens_free == 60


async def test_the_input_log_is_part_of_the_memory_where_there_is_a_next_hop() -> None:
    async with house(span(2, 4)) as home:
        await home.party("asker").opens(home.open(*MIDDLE, max_tokens=10))
        assert home.budget.reserved_bytes == 10 * (2 * LAYER_BYTES + HIDDEN * 4)


async def test_part_of_the_layers_needs_part_of_the_memory() -> None:
    async with house() as home:
        await home.party("asker").opens(home.open(("ann", 0, 5), ("me", 5, 6), max_tokens=10))
        assert home.budget.reserved_bytes == 10 * LAYER_BYTES


async def test_no_more_sessions_than_the_owner_allows() -> None:
    async with house(max_sessions=2) as home:
        ann = home.party("ann")
        for session in (SESSION, OTHER):
            await ann.opens(home.open(session=session))
        busy = await declined(home, home.open(session="3" * 32), "busy", "2 sessions already")
        assert busy.retry_after_s > 0
        # A session that is here may change its route all the same.
        await ann.opens(home.open(epoch=1))

        await ann.say(Close(OTHER))
        await ann.opens(home.open(session="3" * 32))


async def test_a_peer_that_leaves_takes_no_new_sessions_and_finishes_those_it_has() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        home.service.drain()
        drained = asyncio.create_task(home.service.drained())
        await declined(home, home.open(session=OTHER), "draining", "leaving")

        await ann.opens(limited(home, epoch=1))
        await ann.say(step(0, len(PROMPT), epoch=1, sample=True), PREFILL[1])
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)
        assert not drained.done()
        await ann.say(Close(SESSION))
        await asyncio.wait_for(drained, SOON_S)


@pytest.mark.parametrize("max_tokens", [0, 39, 41])
async def test_a_session_keeps_the_size_it_was_opened_with(max_tokens: int) -> None:
    # Its cache keeps the old size: a smaller reservation would lend memory that nobody counts.
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open())
        held = home.budget.reserved_bytes
        await ann.say(home.open(epoch=1, max_tokens=max_tokens))
        assert (await ann.hear(Decline)).code == "invalid"
        assert home.budget.reserved_bytes == held


async def test_whoever_asks_how_busy_it_is_hears_what_a_session_would_meet_and_holds_nothing() -> None:
    async with house(kv_bytes=100 * LAYERS * LAYER_BYTES, max_sessions=2) as home:
        ann, bob = home.party("ann"), home.party("bob")

        async def load(tokens: int) -> Load:
            await bob.say(Probe(7, tokens))
            return await bob.hear(Load)

        assert await load(40) == Load(
            request=7, sessions=0, wait_ms=0.0, kv_tokens_free=100, kv_tokens=100, retry_after_s=0.0
        )
        await ann.opens(limited(home, max_tokens=61))
        await ann.say(*PREFILL)
        await ann.hear_tokens(NEW)
        first = await load(40)
        assert (first.sessions, first.kv_tokens_free, first.kv_tokens) == (1, 39, 100)
        assert first.retry_after_s > 0 and first.ms_per_layer is not None and first.ms_per_layer > 0
        assert (await load(39)).retry_after_s == 0

        await ann.opens(home.open(session=OTHER, max_tokens=1))
        full = await load(1)
        assert (full.sessions, full.kv_tokens_free) == (2, 0) and full.retry_after_s > 0
        home.service.drain()
        await ann.say(Close(SESSION))
        assert (await load(1)).kv_tokens_free == 0, "one that leaves takes nobody"


# ---------------------------------------------------------------- who may command


async def test_only_the_asker_may_grant() -> None:
    async with house() as home:
        ann, mallory = home.party("ann"), home.party("mallory")
        await ann.opens(limited(home, 2))
        await ann.say(*PREFILL)
        await ann.hear_tokens(2)

        await mallory.say(Grant(SESSION, 0, 40))

        await nothing_came_before(ann, limited(home, 2, epoch=1))


async def test_only_the_asker_may_close() -> None:
    async with house() as home:
        ann, mallory = home.party("ann"), home.party("mallory")
        await ann.opens(limited(home))
        await mallory.say(Close(SESSION))
        assert home.service.session_count == 1
        await ann.say(*PREFILL)
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)


async def test_only_the_asker_may_change_the_route() -> None:
    async with house() as home:
        ann, mallory = home.party("ann"), home.party("mallory")
        await ann.opens(limited(home))
        await mallory.say(home.open(epoch=7))
        assert (await mallory.hear(Decline)).code == "invalid"
        await ann.say(*PREFILL)
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)


async def test_only_the_source_may_send_steps() -> None:
    states = expected_states(tuple(PROMPT), 2)
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))
        for party in (asker, eve, home.party("mallory")):
            await party.say(states_step(0, 4), states_body(torch.ones(4, HIDDEN)))

        await ann.say(states_step(0, len(PROMPT)), states_body(states))

        _, body = await eve.hear_step()
        got = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states(tuple(PROMPT), 4), rtol=1e-4, atol=1e-4)
        assert eve.heard_nothing and asker.heard_nothing


async def test_only_the_last_hop_may_bring_tokens_to_the_first() -> None:
    route = (("me", 0, 2), ("ann", 2, 4), ("eve", 4, 6))
    async with house(span(0, 2)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*route))
        await asker.say(*PREFILL)
        await ann.hear_step()
        drawn = Token(SESSION, 0, len(PROMPT), 9)

        for party in (asker, ann, home.party("mallory")):
            await party.say(msgspec.structs.replace(drawn, token=1))
        await eve.say(drawn)

        _, body = await ann.hear_step()
        got = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states((*PROMPT, 9), 2)[-1:], rtol=1e-4, atol=1e-4)
        assert ann.heard_nothing


async def test_only_the_hop_itself_may_say_that_it_lost_the_session() -> None:
    async with house(span(2, 4)) as home:
        asker, eve = home.party("asker"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))

        mallory = home.party("mallory")
        await mallory.say(Lost(SESSION, 0, eve.id))
        await mallory.say(Lost(SESSION, 0, mallory.id))  # it has no part in the route
        assert asker.heard_nothing
        await eve.say(Lost(SESSION, 0, eve.id))
        assert await asker.hear(Lost) == Lost(SESSION, 0, eve.id)


@pytest.mark.parametrize(
    "message",
    [
        Opened(SESSION, 0, 0),
        Decline(SESSION, 0, "busy", "no"),
        Failed(SESSION, 0, "no"),
        Load(request=1, sessions=0, wait_ms=0.0, kv_tokens_free=0, kv_tokens=0),
        Files(1, [], []),
        Fetch(1, "b" * 64),
    ],
    ids=lambda message: type(message).__name__,
)
async def test_what_no_honest_participant_sends_is_an_error_of_the_sender(message: PeerMessage) -> None:
    async with house() as home:
        await home.party("ann").opens(limited(home))
        with pytest.raises(ProtocolError) as refusal:
            await home.party("mallory").say(message)
        assert "\n" not in str(refusal.value)
        await home.party("ann").say(*PREFILL)
        assert await home.party("ann").hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)


async def test_anyone_may_fetch_the_tokenizer() -> None:
    async with house() as home:
        bob = home.party("bob")
        await bob.say(Fetch(7, ARTEFACT))
        message, body = await asyncio.wait_for(bob.inbox.get(), SOON_S)
        assert isinstance(message, Files) and message.request == 7
        assert split_files(message, body) == home.files


# ---------------------------------------------------------------- epochs, repetitions and the unknown


async def test_a_step_of_an_unknown_session_is_answered_lost() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.say(*PREFILL)
        assert await ann.hear(Lost) == Lost(SESSION, 0, home.me)


async def test_who_asks_without_reading_holds_up_nobody_and_fills_no_memory() -> None:
    async with house() as home:
        ann = home.party("ann")
        ann.pipe.reading.clear()
        for _ in range(MAX_REPLIES):
            await ann.say(*PREFILL)
        await ann.say(Fetch(7, ARTEFACT))

        assert home.service.dropped_replies == 1
        await works(home, home.party("bob"))


async def test_commands_for_unknown_sessions_are_no_trouble() -> None:
    async with house() as home:
        ann = home.party("ann")
        for message in (
            Close(SESSION),
            Grant(SESSION, 0, 9),
            Renew([SESSION, OTHER]),
            Renew([]),
            Lost(SESSION, 0, ann.id),
            Token(SESSION, 0, 3, 4),
        ):
            await ann.say(message)
        assert ann.heard_nothing
        await works(home, ann)


async def test_repeated_messages_change_nothing() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        reserved = home.budget.reserved_bytes
        for _ in range(3):
            await ann.say(limited(home))
        await ann.say(*PREFILL)
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)
        assert (home.service.session_count, home.budget.reserved_bytes) == (1, reserved)

        # The same inputs again give the same tokens again: they are computed anew, not added.
        await ann.say(*PREFILL)
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)
        for _ in range(3):
            await ann.say(Close(SESSION))
        assert home.budget.reserved_bytes == 0


async def test_a_higher_epoch_keeps_the_cache_and_older_steps_are_dropped() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home, epoch=3))
        await ann.say(step(0, len(PROMPT), epoch=3, sample=True), PREFILL[1])
        await ann.hear_tokens(NEW)

        answer = await ann.opens(limited(home, epoch=5))
        assert answer == Opened(SESSION, 5, len(PROMPT) + NEW - 1)
        # The last prompt token again is all that is needed.
        again = step(len(PROMPT) - 1, 1, epoch=5, sample=True), ids_body(PROMPT[-1:])
        await ann.say(*again)
        assert await ann.hear_tokens(NEW) == expected_tokens(tuple(PROMPT), NEW)
        for epoch in (0, 3, 4, 6):
            await ann.say(step(0, len(PROMPT), epoch=epoch, sample=True), PREFILL[1])
        await ann.say(limited(home, epoch=4))
        await nothing_came_before(ann, limited(home, epoch=6))


async def test_other_layers_begin_with_an_empty_cache() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        await ann.say(*PREFILL)
        await ann.hear_tokens(NEW)
        assert (await ann.opens(limited(home, epoch=1))).position == len(PROMPT) + NEW - 1
        other = home.open(("me", 0, 5), ("eve", 5, 6), epoch=2)
        assert (await ann.opens(other)).position == 0


async def test_a_step_beyond_what_is_here_asks_for_a_replay() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        await ann.say(step(5, 1), ids_body([1]))
        assert await ann.hear(Lost) == Lost(SESSION, 0, home.me)


# ---------------------------------------------------------------- mishaps


@pytest.mark.parametrize(
    ("asked", "body"),
    [
        (step(0, 1), ids_body([-1])),
        (step(0, 2), ids_body([1])),
        (states_step(0, 1), bytes(HIDDEN * 4)),
        (step(0, 41), ids_body([1] * 41)),
        (step(0, 1, hops=[Hop("f" * 64, 0, 1, 0, 0, "local")]), ids_body([1])),
    ],
)
async def test_a_wrong_step_ends_its_session_in_one_sentence_and_no_other(
    asked: Any,  # noqa: ANN401
    body: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with house() as home:
        ann, mallory = home.party("ann"), home.party("mallory")
        await ann.opens(limited(home, 2, session=OTHER))
        await ann.say(msgspec.structs.replace(PREFILL[0], session=OTHER), PREFILL[1])
        first = await ann.hear_tokens(2)

        await mallory.opens(home.open())
        await mallory.say(asked, body)
        failed = await mallory.hear(Failed)
        await mallory.say(*PREFILL)

        assert "\n" not in failed.message and "unexpected" not in failed.message
        assert "Traceback" not in caplog.text
        assert mallory.heard_nothing
        await ann.say(Grant(OTHER, 0, len(PROMPT) + NEW))
        assert first + await ann.hear_tokens(NEW - 2) == expected_tokens(tuple(PROMPT), NEW)


async def test_a_step_with_more_hops_than_came_before_it_is_not_passed_on() -> None:
    # With ours they might be more than a message may hold: the next hop would hang up on us.
    hops = [Hop("f" * 64, 0, 1, 0, 0, "local")] * 512
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        await asker.opens(home.open(*MIDDLE))
        await ann.say(states_step(0, 1, hops=hops), bytes(HIDDEN * 4))
        assert "512 hops, from only 1 before me" in (await asker.hear(Failed)).message
        assert eve.heard_nothing


async def test_a_mistake_of_ours_ends_one_session_and_is_not_kept_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open())
        with monkeypatch.context() as broken:
            broken.setattr("peer.serving.compute.sample", lambda *_: 1 / 0)
            await ann.say(*PREFILL)
            failed = await ann.hear(Failed)
        assert "ZeroDivisionError" in caplog.text and "Zero" not in failed.message
        await works(home, home.party("bob"))


async def test_a_next_hop_that_cannot_be_reached_is_told_to_the_asker() -> None:
    async with house(span(0, 2)) as home:
        asker, ann = home.party("asker"), home.party("ann")
        await asker.opens(home.open(("me", 0, 2), ("ann", 2, 6)))
        ann.pipe.closed.set()
        await asker.say(*PREFILL)
        assert await asker.hear(Lost) == Lost(SESSION, 0, ann.id)


async def test_a_channel_that_closes_is_told_to_those_whose_ring_used_it() -> None:
    async with house(span(0, 2)) as home:
        asker, bob, ann = home.party("asker"), home.party("bob"), home.party("ann")
        for party, session in ((asker, SESSION), (bob, OTHER)):
            await party.opens(home.open(("me", 0, 2), ("ann", 2, 6), session=session))
        await asker.say(*PREFILL)
        await ann.hear_step()

        ann.pipe.closed.set()
        home.service.channel_closed(ann.pipe)

        assert await asker.hear(Lost) == Lost(SESSION, 0, ann.id)
        assert bob.heard_nothing


async def test_an_asker_that_is_gone_costs_no_other_session() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(limited(home))
        ann.pipe.closed.set()
        await ann.say(*PREFILL)
        await works(home, home.party("bob"))


async def test_a_session_that_is_sent_more_than_it_takes_ends_and_holds_up_nobody() -> None:
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(SOON_S)

    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open())
        busy = asyncio.create_task(home.service.executor.run(hold))
        await asyncio.wait_for(begun.wait(), SOON_S)
        try:
            # One is with the session's task, and the inbox is full; none of them is waited for.
            for _ in range(INBOX_SIZE + 2):
                await ann.say(step(0, 1), ids_body([1]))
        finally:
            release.set()
            await busy
        assert "more steps came" in (await ann.hear(Failed)).message
        await ann.say(Close(SESSION))
        await works(home, ann)


async def test_a_prompt_goes_no_further_than_the_next_hop_has_made_room_for() -> None:
    window = CONTEXT // 4
    states = torch.zeros(window, HIDDEN)
    async with house(span(2, 4)) as home:
        asker, bob, eve = home.party("asker"), home.party("bob"), home.party("eve")
        route = (("bob", 0, 2), ("me", 2, 4), ("eve", 4, 6))
        await asker.opens(home.open(*route, max_tokens=CONTEXT))

        async def feed(epoch: int) -> None:
            for position in range(0, CONTEXT, window):
                told = step(position, window, shape=[window, HIDDEN], dtype="float32", epoch=epoch)
                await bob.say(told, states_body(states))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("peer.serving.hop_session.PREFILL_WINDOW", window)
            await feed(0)
            assert (await eve.hear(Step)).position == 0
            assert (await bob.hear(Consumed)).position == window
            await eve.say(Consumed(SESSION, 0, window))
            assert (await eve.hear(Step)).position == window
            assert (await bob.hear(Consumed)).position == 2 * window
            assert eve.heard_nothing and bob.makes_room.empty()

            # A new epoch takes the place of what waits for the old one.
            await asker.opens(home.open(*route, max_tokens=CONTEXT, epoch=1))
            await feed(1)
            assert (await eve.hear(Step)).epoch == 1
        await asker.say(Close(SESSION))


async def test_a_step_longer_than_any_window_is_refused() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open())
        await ann.say(step(0, PREFILL_WINDOW + 1), ids_body([1] * (PREFILL_WINDOW + 1)))
        assert f"at most {PREFILL_WINDOW} positions" in (await ann.hear(Failed)).message
        await ann.say(Close(SESSION))


# ---------------------------------------------------------------- leases


class Clock:
    """The service's clock, which stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    parts = SimpleNamespace(monotonic=clock.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr("peer.serving.service.time", parts)
    return clock


LEASE_S = 0.1
"""By the clock of the test; in true time, the service looks ten times as often."""


async def ended(home: House, sessions: int) -> None:
    async with asyncio.timeout(SOON_S):
        while home.service.session_count > sessions:  # noqa: ASYNC110 - a lease runs out without a word
            await asyncio.sleep(LEASE_S / 20)


async def test_a_silent_session_is_closed_and_its_memory_is_free(clock: Clock) -> None:
    async with house(lease_s=LEASE_S) as home:
        await home.party("ann").opens(home.open())
        drained = asyncio.create_task(home.service.drained())
        clock.now += LEASE_S * 1.01
        await asyncio.wait_for(drained, SOON_S)
        assert (home.service.session_count, home.budget.reserved_bytes) == (0, 0)
        await works(home, home.party("ann"), SESSION)


async def test_the_askers_word_renews_a_lease_and_nobody_elses_does(clock: Clock) -> None:
    async with house(lease_s=LEASE_S) as home:
        ann, bob, mallory = home.party("ann"), home.party("bob"), home.party("mallory")
        await ann.opens(home.open())
        await bob.opens(home.open(session=OTHER))
        clock.now += LEASE_S * 0.6
        await ann.say(Renew([OTHER, SESSION]))
        await mallory.say(Renew([OTHER, SESSION]))
        await mallory.say(Grant(OTHER, 0, 1))
        clock.now += LEASE_S * 0.6

        await ended(home, 1)
        assert home.service.session_count == 1

        await ann.say(Close(SESSION))  # it was bob's that ended
        assert home.service.session_count == 0


async def test_steps_of_the_hop_before_renew_nothing(clock: Clock) -> None:
    # A vanished asker must not be kept alive by its own ring.
    async with house(span(2, 4), lease_s=LEASE_S) as home:
        await home.party("asker").opens(home.open(*MIDDLE))
        clock.now += LEASE_S * 0.6
        await home.party("ann").say(states_step(0, 1), bytes(HIDDEN * 4))
        clock.now += LEASE_S * 0.6
        await ended(home, 0)


# ---------------------------------------------------------------- endings


async def test_leaving_ends_running_sessions_and_frees_their_memory() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(home.open())
        await ann.say(*PREFILL)
        await ann.hear(Token)
        assert home.budget.reserved_bytes > 0
    assert home.budget.reserved_bytes == 0
    await asyncio.wait_for(home.service.drained(), SOON_S)


async def test_the_measured_speed_is_that_of_single_positions() -> None:
    async with house() as home:
        ann = home.party("ann")
        assert home.service.ms_per_layer is None
        await ann.opens(limited(home, 1))
        await ann.say(*PREFILL)
        await ann.hear(Token)
        assert home.service.ms_per_layer is None

        home.service.stepped(layers=6, count=1, computed_ms=12.0)
        assert home.service.ms_per_layer == pytest.approx(2.0)
        home.service.stepped(layers=6, count=1, computed_ms=24.0)
        assert home.service.ms_per_layer == pytest.approx(2.0 + 0.1 * (4.0 - 2.0))


# ---------------------------------------------------------------- any messages


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_messages_of_others_leave_an_honest_session_exact_and_no_memory_taken(
    data: st.DataObject,
) -> None:
    async def scene() -> None:
        async with house(max_sessions=8) as home:
            ann = home.party("ann")
            await ann.opens(limited(home, 2))
            await ann.say(*PREFILL)
            first = await ann.hear_tokens(2)

            others = [home.party("mallory"), home.party("trudy")]
            peers = [home.me, PeerId("f" * 64), *(other.id for other in others)]
            sessions = [SESSION, OTHER, "3" * 32]
            messages = wild_messages(sessions, peers, ARTEFACT)
            for sender, (message, body) in data.draw(
                st.lists(st.tuples(st.sampled_from(others), messages), max_size=12)
            ):
                try:
                    await sender.say(message, body)
                except ProtocolError as error:
                    assert str(error) and "\n" not in str(error)

            await ann.say(Grant(SESSION, 0, len(PROMPT) + NEW))
            assert first + await ann.hear_tokens(NEW - 2) == expected_tokens(tuple(PROMPT), NEW)
            assert ann.heard_nothing

            await ann.say(Close(SESSION))
            for sender in others:
                for session in sessions:
                    await sender.say(Close(session))
            assert home.budget.reserved_bytes == 0
            await works(home, ann)

    asyncio.run(scene())
