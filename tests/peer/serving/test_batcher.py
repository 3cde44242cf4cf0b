"""Whoever is ready is computed together, exactly as alone, and nobody waits for a long prompt."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peer.model.checkpoint import open_checkpoint
from peer.model.errors import BadInputs
from peer.model.joint import JointCache
from peer.model.kv_cache import KVCache
from peer.model.span import Span
from peer.serving.batcher import MOST_SINGLES, SMALLEST_PIECE, TARGET_MS, Batcher, Pace, choose
from peer.serving.compute import Draw, Work
from peer.serving.executor import Executor
from peer.settings import DEMO_MODEL
from shared.background import Background
from shared.errors import CorollaError
from shared.protocol import PREFILL_CHUNK, Close, Sampling, Token
from tests.harness.models import save_random
from tests.harness.near_ties import equal_but_for_near_ties
from tests.peer.serving.parties import (
    CONTEXT,
    LAYERS,
    SOON_S,
    VOCABULARY,
    Steady,
    expected_tokens,
    house,
    ids_body,
    span,
    step,
    whole_model,
)

GREEDY = Draw(Sampling(), [], 0)


@asynccontextmanager
async def batching(held: Span, piece: int = SMALLEST_PIECE) -> AsyncIterator[Batcher]:
    async with Executor() as executor, Background() as tasks:
        batcher = Batcher(held, executor)
        batcher.pace = Steady(piece)
        tasks.start(batcher.run())
        async with asyncio.timeout(10 * SOON_S):
            yield batcher


async def tell(batcher: Batcher, cache: KVCache, tokens: Sequence[int]) -> int:
    """Feed tokens behind what the cache holds; gives the token drawn after them."""
    asked = step(cache.length, len(tokens), sample=True)
    computed = await batcher.compute(cache, asked, ids_body(tokens), GREEDY)
    assert computed.token is not None
    return computed.token


async def answer(batcher: Batcher, prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens, one step after another."""
    cache = batcher._span.new_cache(0, LAYERS, CONTEXT)
    tokens = [await tell(batcher, cache, prompt)]
    while len(tokens) < new:
        tokens.append(await tell(batcher, cache, tokens[-1:]))
    return tokens


def random_prompt(seed: int, count: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(count)]


# ---------------------------------------------------------------- exactness


async def test_sixteen_sessions_at_different_positions_draw_what_each_would_draw_alone() -> None:
    prompts = [random_prompt(seed, 3 + 7 * seed) for seed in range(16)]
    async with batching(span(), piece=64) as batcher:
        answers = await asyncio.gather(*(answer(batcher, prompt, 12) for prompt in prompts))
        steps = 16 * 12
        assert batcher.passes < steps / 3

    for prompt, got in zip(prompts, answers, strict=True):
        assert equal_but_for_near_ties(prompt, got, whole_model())


async def test_a_family_that_cannot_be_joined_is_served_all_the_same(tmp_path: Any) -> None:  # noqa: ANN401
    directory = save_random("bloom", tmp_path)
    held = Span.load(open_checkpoint(str(directory)), 0, LAYERS)
    whole: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole.eval()
    prompts = [random_prompt(seed, 5 + seed) for seed in range(4)]
    assert not held.joins_sessions

    async with batching(held) as batcher:
        answers = await asyncio.gather(*(answer(batcher, prompt, 6) for prompt in prompts))

    for prompt, got in zip(prompts, answers, strict=True):
        assert equal_but_for_near_ties(prompt, got, whole)


async def test_sessions_on_different_layers_take_turns() -> None:
    held = span()
    prompt = random_prompt(1, 9)

    async def part(end: int) -> int:
        cache = held.new_cache(0, end, CONTEXT)
        for token in prompt:
            asked = step(cache.length, 1, sample=end == LAYERS)
            computed = await batcher.compute(cache, asked, ids_body([token]), GREEDY)
        return computed.token if computed.token is not None else len(computed.body)

    async with batching(held) as batcher:
        whole, half, other = await asyncio.gather(part(LAYERS), part(3), part(LAYERS))
    assert [whole] == [other] == expected_tokens(tuple(prompt), 1)
    assert half == 64 * 4


async def test_askers_of_one_peer_share_its_passes() -> None:
    prompts = [tuple(random_prompt(seed, 6 + seed)) for seed in range(8)]
    async with house() as home:
        parties = [home.party(f"asker {number}") for number in range(8)]
        for number, (party, prompt) in enumerate(zip(parties, prompts, strict=True)):
            opened = home.open(
                session=f"{number:032x}", prompt_length=len(prompt), max_tokens=60, credit=len(prompt) + 20
            )
            await party.opens(opened)
        for number, (party, prompt) in enumerate(zip(parties, prompts, strict=True)):
            await party.say(step(0, len(prompt), session=f"{number:032x}", sample=True), ids_body(prompt))
        heard = [[await party.hear(Token) for _ in range(20)] for party in parties]

        assert home.service.batcher.passes < 8 * 20 / 3
        for number, (party, prompt, tokens) in enumerate(zip(parties, prompts, heard, strict=True)):
            drawn = [token.token for token in tokens]
            assert equal_but_for_near_ties(prompt, drawn, whole_model())
            assert all(hop.computed_ms > 0 for token in tokens for hop in token.hops)
            await party.say(Close(f"{number:032x}"))


# ---------------------------------------------------------------- fairness


async def test_a_long_prompt_stands_still_for_nobody_and_nobody_for_it() -> None:
    """A prompt of 400 positions in pieces of 16 takes 25 passes; each of them moves every other session."""
    held = span()
    async with batching(held, piece=16) as batcher:
        steps = [0] * 8
        over = asyncio.Event()

        async def chat(number: int) -> None:
            cache = held.new_cache(0, LAYERS, CONTEXT)
            token = await tell(batcher, cache, random_prompt(number, 5))
            while not over.is_set():
                token = await tell(batcher, cache, [token])
                steps[number] += 1

        chats = [asyncio.create_task(chat(number)) for number in range(8)]
        while min(steps) < 3:  # noqa: ASYNC110 - the chats count, and tell nobody
            await asyncio.sleep(0)
        before, passes = list(steps), batcher.passes
        prompt = random_prompt(99, 400)
        token = await tell(batcher, held.new_cache(0, LAYERS, CONTEXT), prompt)
        took = batcher.passes - passes
        moved = [after - first for after, first in zip(steps, before, strict=True)]
        over.set()
        await asyncio.gather(*chats)

    assert equal_but_for_near_ties(prompt, [token], whole_model())
    assert 25 <= took <= 27, "the prompt advances with every pass"
    assert min(moved) >= 24, "and so does everyone else"


async def test_two_long_prompts_take_turns() -> None:
    held = span()
    ended: list[str] = []

    async def prompt(name: str, count: int) -> None:
        await tell(batcher, held.new_cache(0, LAYERS, CONTEXT), random_prompt(1, count))
        ended.append(name)

    async with batching(held, piece=16) as batcher:
        first = asyncio.create_task(prompt("long", 400))
        await asyncio.sleep(0)
        await asyncio.gather(first, prompt("short", 48))
    assert ended == ["short", "long"]


def works(*counts: int, layers: Sequence[tuple[int, int]] = ()) -> list[Work]:
    spans = layers or [(0, LAYERS)] * len(counts)
    return [
        Work(KVCache(*part, 10, [None] * LAYERS), step(0, count), b"")
        for count, part in zip(counts, spans, strict=True)
    ]


def test_a_pass_takes_all_single_positions_and_one_piece() -> None:
    ready = works(1, 100, 1, 50, 1)
    assert choose(ready, 16) == [(ready[0], 1), (ready[1], 16), (ready[2], 1), (ready[4], 1)]
    assert choose(ready[1:4], 120) == [(ready[1], 100), (ready[2], 1), (ready[3], 20)]
    assert choose(ready[3:4], 64) == [(ready[3], 50)]
    assert choose([], 16) == []


def test_more_sessions_than_a_pass_holds_go_in_the_order_in_which_they_came() -> None:
    ready = works(*[1] * (MOST_SINGLES + 5), 20)
    shares = choose(ready, 16)
    assert [work for work, _ in shares] == [*ready[:MOST_SINGLES], ready[-1]]


def test_a_pass_leads_through_the_layers_of_the_first_that_came() -> None:
    ready = works(1, 1, 30, 1, layers=[(0, 3), (0, 6), (0, 6), (0, 3)])
    assert choose(ready, 16) == [(ready[0], 1), (ready[3], 1)]


# ---------------------------------------------------------------- pieces


class Paced:
    """A pace on a machine of known speed, with a clock that the passes move."""

    def __init__(self, ms_per_position: float) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)
        self._ms_per_position = ms_per_position
        self._sessions = [KVCache(0, 1, 10, [None]) for _ in range(2)]

    def passes(self, number: int, *sessions: int, positions: int | None = None) -> int:
        """So many passes, each a piece of the first of these sessions and a token of the others."""
        for _ in range(number):
            first = self.pace.piece if positions is None else positions
            counts = [first, *[1] * (len(sessions) - 1)]
            shares = [
                (Work(self._sessions[session], step(0, count), b""), count)
                for session, count in zip(sessions, counts, strict=True)
            ]
            pass_ms = sum(counts) * self._ms_per_position
            self.now += pass_ms / 1000
            self.pace.took(shares, pass_ms)
        return self.pace.piece


@pytest.mark.parametrize(
    ("ms_per_position", "piece"), [(1.0, 150), (5.0, 30), (100.0, SMALLEST_PIECE), (0.01, PREFILL_CHUNK)]
)
def test_pieces_come_to_take_the_time_they_should(ms_per_position: float, piece: int) -> None:
    assert Paced(ms_per_position).passes(20, 0, 1) == pytest.approx(piece, rel=0.05)


def test_who_is_alone_holds_up_nobody_and_brings_longer_pieces() -> None:
    paced = Paced(5.0)
    assert paced.passes(20, 0, 1) == pytest.approx(30, rel=0.05)
    assert paced.passes(20, 0) == pytest.approx(4 * 30, rel=0.05)
    assert paced.passes(1, 0, 1) == pytest.approx(30, rel=0.05)
    assert paced.passes(1, 1) == pytest.approx(30, rel=0.05)


def test_short_passes_tell_nothing_of_long_ones() -> None:
    paced = Paced(1.0)
    paced.passes(20, 0, 1)
    slow = Paced(TARGET_MS)
    slow.pace = paced.pace
    assert slow.passes(20, 1, 0, positions=2) == pytest.approx(150, rel=0.05)


# ---------------------------------------------------------------- mishaps


async def test_what_is_wrong_with_one_step_is_not_wrong_with_the_others() -> None:
    held = span()
    prompts = [random_prompt(seed, 4 + seed) for seed in range(3)]
    async with batching(held) as batcher:
        cache = held.new_cache(0, LAYERS, CONTEXT)
        others = asyncio.gather(*(answer(batcher, prompt, 4) for prompt in prompts))
        with pytest.raises(BadInputs, match="vocabulary"):
            await batcher.compute(cache, step(0, 1), ids_body([VOCABULARY]), None)
        answers = await others
        assert await tell(batcher, cache, prompts[0]) == answers[0][0]
    for prompt, got in zip(prompts, answers, strict=True):
        assert got == expected_tokens(tuple(prompt), 4)


async def test_a_pass_that_fails_as_a_whole_is_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when some layers have kept the new positions before it failed."""
    held = span()
    attend = JointCache.attend

    def fails(joint: JointCache, *arguments: Any) -> torch.Tensor:  # noqa: ANN401
        if len(joint.caches) > 1 and joint.attended == 3:
            raise RuntimeError("out of memory")
        return attend(joint, *arguments)

    monkeypatch.setattr(JointCache, "attend", fails)
    prompts = [random_prompt(seed, 4 + seed) for seed in range(3)]
    async with batching(held) as batcher:
        answers = await asyncio.gather(*(answer(batcher, prompt, 4) for prompt in prompts))
    for prompt, got in zip(prompts, answers, strict=True):
        assert got == expected_tokens(tuple(prompt), 4)


async def test_a_cancelled_step_computes_no_further_piece() -> None:
    held = span()
    async with batching(held, piece=16) as batcher:
        cache = held.new_cache(0, LAYERS, CONTEXT)
        task = asyncio.create_task(tell(batcher, cache, random_prompt(1, 400)))
        while cache.length < 32:  # noqa: ASYNC110 - a cache tells nobody
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        prompt = random_prompt(2, 7)
        assert await answer(batcher, prompt, 3) == expected_tokens(tuple(prompt), 3)
        assert cache.length < 400


async def test_an_error_in_the_middle_of_a_step_leaves_the_session_as_it_was_told() -> None:
    held = span()
    prompt = random_prompt(3, 60)
    async with batching(held, piece=16) as batcher:
        cache = held.new_cache(0, LAYERS, 60)
        with pytest.raises(CorollaError, match="do not fit"):
            await tell(batcher, cache, [*prompt, 5])
        asked = step(0, 60, sample=True)
        computed = await batcher.compute(cache, asked, ids_body(prompt), GREEDY)
    assert [computed.token] == expected_tokens(tuple(prompt), 1)


# ---------------------------------------------------------------- eight bits


async def test_eight_bit_caches_change_a_token_only_where_two_are_a_near_tie() -> None:
    """The logits of the demo model lie between -10 and 10: eight bits move one by less than 0.1."""
    held = Span.load(open_checkpoint(DEMO_MODEL), 0, 6, int8_kv=True)
    whole: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    whole.eval()
    prompts = [list(range(300 + 40 * seed, 330 + 43 * seed)) for seed in range(6)]

    async with batching(held) as batcher:
        answers = await asyncio.gather(*(answer(batcher, prompt, 24) for prompt in prompts))

    assert sum(map(len, answers)) == 6 * 24
    for prompt, got in zip(prompts, answers, strict=True):
        assert equal_but_for_near_ties(prompt, got, whole, tie=0.2)
