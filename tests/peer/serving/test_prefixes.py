"""What finished sessions leave is used exactly, by the same asker alone, and gives way to new sessions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.model.kv_cache import KVCache
from peer.serving.input_log import InputLog
from peer.serving.prefixes import Prefix, Prefixes
from shared.client.page_names import PageNames
from shared.protocol import PREFIX_PAGE, Close, Grant, Open, Token
from tests.peer.serving.parties import (
    HIDDEN,
    LAYERS,
    House,
    Party,
    expected_states,
    expected_tokens,
    house,
    ids_body,
    span,
    states_body,
    states_step,
    step,
)

NAMES = PageNames(bytes(32))
NEW = 6
TEXT = [(7 * place + place // 5) % 128 for place in range(330)]
LAYER_BYTES = 2 * 2 * 16 * 4


def opened(home: House, prompt: list[int], number: int, **changes: Any) -> Open:  # noqa: ANN401
    fields: dict[str, Any] = {
        "session": f"{number:032x}",
        "max_tokens": len(prompt) + NEW,
        "prompt_length": len(prompt),
        "credit": len(prompt) + NEW,
        "pages": NAMES.names(prompt),
    }
    return home.open(**(fields | changes))


async def chat(home: House, asker: Party, prompt: list[int], number: int) -> int:
    """One whole session; gives how many positions the peer had kept for it. The answer must be exact."""
    answer = await asker.opens(opened(home, prompt, number))
    session = f"{number:032x}"
    begin = min(answer.position, len(prompt) - 1)
    inputs = prompt[begin:]
    await asker.say(step(begin, len(inputs), session=session, sample=True), ids_body(inputs))
    tokens = [(await asker.hear(Token)).token for _ in range(NEW)]
    assert tokens == expected_tokens(tuple(prompt), NEW)
    await asker.say(Close(session, NAMES.names([*prompt, *tokens])))
    return answer.position


async def test_the_next_question_of_a_chat_begins_behind_the_last_answer() -> None:
    async with house() as home:
        ann = home.party("ann")
        assert await chat(home, ann, TEXT[:130], 1) == 0
        assert (home.budget.reserved_bytes, len(home.service.prefixes)) == (0, 1)
        longer = [*TEXT[:130], *expected_tokens(tuple(TEXT[:130]), NEW), *TEXT[:100]]
        assert await chat(home, ann, longer, 2) == 128
        assert len(home.service.prefixes) == 1, "the longer one takes the place of its beginning"
        assert await chat(home, ann, longer, 3) == 192
        # What is drawn after the last token was not kept, so the asker brings that token again.
        assert await chat(home, ann, longer[:128], 4) == 128


async def test_chats_with_the_same_beginning_each_get_it() -> None:
    async with house() as home:
        ann = home.party("ann")
        await chat(home, ann, TEXT[:200], 1)
        one, other = [*TEXT[:130], *TEXT[:60]], [*TEXT[:130], *TEXT[5:70]]
        assert await chat(home, ann, one, 2) == 128
        assert await chat(home, ann, other, 3) == 128
        # The first one's own continuation is still there.
        assert await chat(home, ann, TEXT[:230], 4) == 192
        assert len(home.service.prefixes) == 3


async def test_another_asker_gets_nothing() -> None:
    async with house() as home:
        await chat(home, home.party("ann"), TEXT[:130], 1)
        assert await chat(home, home.party("bob"), TEXT[:130], 2) == 0


async def begin(asker: Party, prompt: list[int], number: int, start: int) -> int:
    """Bring the prompt from `start` on; gives the first token."""
    inputs = prompt[start:]
    body = ids_body(inputs)
    await asker.say(step(start, len(inputs), session=f"{number:032x}", sample=True), body)
    return (await asker.hear(Token)).token


async def test_a_session_that_runs_lends_its_beginning() -> None:
    async with house() as home:
        ann = home.party("ann")
        first, second = TEXT[:130], [*TEXT[:130], *TEXT[5:70]]
        await ann.opens(opened(home, first, 1, credit=1))
        assert await begin(ann, first, 1, 0) == expected_tokens(tuple(first), NEW)[0]

        assert await chat(home, ann, second, 2) == 128
        # The one that lent goes on, and is none the worse for it.
        await ann.say(Grant("0" * 31 + "1", 1, len(first) + NEW))
        rest = [(await ann.hear(Token)).token for _ in range(NEW - 1)]
        assert rest == expected_tokens(tuple(first), NEW)[1:]
        assert home.service.prefixes.held_bytes > 0, "what the second one left was its own"


async def test_a_session_that_took_back_some_of_its_text_lends_what_is_left() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(opened(home, TEXT[:130], 1, credit=1))
        await begin(ann, TEXT[:130], 1, 0)
        changed = [*TEXT[:70], *TEXT[:60]]
        await begin(ann, changed, 1, 70)

        assert await chat(home, ann, TEXT[:130], 2) == 70


async def test_a_session_that_runs_lends_nothing_to_another_asker() -> None:
    async with house() as home:
        ann = home.party("ann")
        await ann.opens(opened(home, TEXT[:130], 1, credit=1))
        await begin(ann, TEXT[:130], 1, 0)

        assert await chat(home, home.party("bob"), TEXT[:130], 2) == 0


async def test_another_text_under_the_same_session_name_gets_nothing() -> None:
    async with house() as home:
        ann = home.party("ann")
        await chat(home, ann, TEXT[:130], 1)
        assert await chat(home, ann, TEXT[1:131], 1) == 0


async def test_what_other_hops_computed_is_not_mixed() -> None:
    """The hops before this one made the hidden states: with others before it, it begins anew."""
    async with house(span(2, 4)) as home:
        asker = home.party("asker")
        states = expected_states(tuple(TEXT[:70]), 2)

        async def hears(first: str, number: int) -> int:
            route = ((first, 0, 2), ("me", 2, 4), ("eve", 4, 6))
            names = [home.party(name) for name, *_ in route if name != "me"]
            session = f"{number:032x}"
            asked = home.open(*route, session=session, max_tokens=100, pages=NAMES.names(TEXT[:70]))
            position = (await asker.opens(asked)).position
            inputs = states[position:]
            await names[0].say(states_step(position, len(inputs), session=session), states_body(inputs))
            passed, body = await names[1].hear_step()
            got = torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, HIDDEN)
            expected = expected_states(tuple(TEXT[:70]), 4)[passed.position :]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            await asker.say(Close(session, NAMES.names(TEXT[:70])))
            return position

        assert await hears("ann", 1) == 0
        assert await hears("bob", 2) == 0
        assert await hears("ann", 3) == 64
        assert await hears("bob", 4) == 64


async def test_the_kept_log_still_brings_a_fresh_next_hop_to_the_same_state() -> None:
    async with house(span(2, 4)) as home:
        asker, ann, eve = home.party("asker"), home.party("ann"), home.party("eve")
        states = expected_states(tuple(TEXT[:70]), 2)
        route = (("ann", 0, 2), ("me", 2, 4), ("eve", 4, 6))
        pages = NAMES.names(TEXT[:70])
        await asker.opens(home.open(*route, max_tokens=100))
        await ann.say(states_step(0, 66), states_body(states[:66]))
        await eve.hear_step()
        await asker.say(Close("1" * 32, pages))

        asked = home.open(*route, session="2" * 32, max_tokens=100, pages=pages)
        assert (await asker.opens(asked)).position == 64
        await ann.say(states_step(64, 5, session="2" * 32), states_body(states[64:69]))
        await eve.hear_step()
        entries = [*home.route(*route[:2]), *home.route(("dora", 4, 6))]
        await asker.opens(home.open(session="2" * 32, max_tokens=100, epoch=1, route=entries, index=1))
        await ann.say(
            states_step(69, 1, session="2" * 32, epoch=1, held=[69, 69, 0]), states_body(states[69:])
        )

        replay, replayed = await home.party("dora").hear_step()
        assert (replay.position, replay.count) == (0, 69)
        got = torch.frombuffer(bytearray(replayed), dtype=torch.float32).view(-1, HIDDEN)
        torch.testing.assert_close(got, expected_states(tuple(TEXT[:70]), 4)[:69], rtol=1e-4, atol=1e-4)

        # What two different hops fed is nobody's beginning.
        moved = [*home.route(("bob", 0, 2)), *home.route(*route[1:])]
        await asker.opens(home.open(session="2" * 32, max_tokens=100, epoch=2, route=moved, index=1))
        await home.party("bob").say(states_step(69, 1, session="2" * 32, epoch=2), states_body(states[69:]))
        await asker.say(Close("2" * 32, pages))
        assert len(home.service.prefixes) == 0


# ---------------------------------------------------------------- memory


async def test_kept_prefixes_are_freed_when_sessions_want_the_memory() -> None:
    async with house(kv_bytes=600 * LAYERS * LAYER_BYTES) as home:
        ann = home.party("ann")
        await chat(home, ann, TEXT[:130], 1)
        await chat(home, ann, TEXT[1:131], 2)
        assert home.service.prefixes.held_bytes == 2 * 136 * LAYERS * LAYER_BYTES
        assert home.service.kv_tokens_free == 600, "what is kept counts as free"

        await ann.opens(home.open(session="3" * 32, max_tokens=400))
        assert len(home.service.prefixes) == 1, "the older one went"
        await ann.opens(home.open(session="4" * 32, max_tokens=200))
        assert len(home.service.prefixes) == 0
        await ann.say(Close("3" * 32))
        await ann.say(Close("4" * 32))
        assert await chat(home, ann, TEXT[1:131], 5) == 0


async def test_a_chat_that_fills_the_peer_still_goes_on_from_where_it_was() -> None:
    async with house(kv_bytes=160 * LAYERS * LAYER_BYTES) as home:
        ann = home.party("ann")
        await chat(home, ann, TEXT[:140], 1)
        assert await chat(home, ann, TEXT[:150], 2) == 128


async def test_the_memory_of_a_session_never_outgrows_its_reservation() -> None:
    async with house() as home:
        ann = home.party("ann")
        await chat(home, ann, TEXT[:300], 1)
        assert home.service.prefixes.held_bytes == 306 * LAYERS * LAYER_BYTES
        await ann.opens(opened(home, TEXT[:300], 2, max_tokens=301))
        session = home.service._admitted[f"{2:032x}"].session
        assert session._cache is not None
        assert session.position == 256
        assert session._cache.bytes <= 301 * LAYERS * LAYER_BYTES


def prefix(scope: str, pages: str, size: int = 1) -> Prefix:
    """One letter for each page, one number for each position, `size` positions allocated for each page."""
    cache = KVCache(0, 1, 10_000, [None])
    numbers = torch.zeros(1, 1, len(pages) * size, 1)
    cache.update(numbers, numbers, 0)
    cache.commit(1, len(pages) * size)
    return Prefix(scope, list(pages), len(pages) * PREFIX_PAGE, cache, InputLog(1))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), st.text("ab", max_size=4), st.integers(0, 4) | st.just(100)),
        max_size=20,
    )
)
def test_any_order_of_keeping_and_taking_never_holds_more_than_is_free(
    acts: list[tuple[str, str, int]],
) -> None:
    kept = Prefixes()
    size = prefix("x", "a").held_bytes
    for scope, pages, free in acts:
        kept.keep(prefix(scope, pages), free * size)
        beginning = kept.begin(scope, list(pages[:2]), free * size)
        assert kept.held_bytes <= free * size
        if beginning is not None:
            assert 0 < beginning.pages <= len(pages[:2])
            assert list(beginning.prefix.pages[: beginning.pages]) == list(pages[: beginning.pages])


def test_the_least_recently_used_is_freed_first() -> None:
    kept = Prefixes()
    for pages in ("aa", "bb", "cc"):
        kept.keep(prefix("x", pages), 1 << 30)
    assert kept.begin("x", ["a"], 1 << 30) is not None

    kept.shrink(kept.held_bytes - 1)
    kept.shrink(kept.held_bytes - 1)

    assert kept.begin("x", ["b"], 1 << 30) is None
    assert kept.begin("x", ["c"], 1 << 30) is None
    assert kept.begin("x", ["a"], 1 << 30) is not None


@pytest.mark.parametrize("pages", ["", "a"])
def test_less_than_a_page_is_not_kept(pages: str) -> None:
    kept = Prefixes()
    cache = KVCache(0, 1, 100, [None])
    kept.keep(Prefix("x", list(pages), PREFIX_PAGE - 1, cache, InputLog(1)), 1 << 30)
    assert len(kept) == 0
