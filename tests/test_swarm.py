"""A swarm answers, and goes on answering while peers come and go."""

from __future__ import annotations

import asyncio
import json
import random
from array import array
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from peer.settings import DEMO_MODEL
from shared.announcement import sign_announcement
from shared.channel import Channel, Dialer
from shared.client.session import Drawn, Rerouted
from shared.client.swarm_client import FETCH_TIMEOUT_S
from shared.errors import NoRoute, ProtocolError, SessionFailed
from shared.identity import Identity
from shared.protocol import (
    PREFILL_WINDOW,
    Announcement,
    Hop,
    Open,
    Opened,
    PeerMessage,
    RouteSpan,
    Sampling,
    Step,
    Tensor,
)
from shared.protocol import Path as ChannelPath
from shared.relay_client import RelayClient
from tests.harness.swarm import Swarm, tokens

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
LONG = 120
"""More tokens than the ring may run ahead, so that a peer which leaves early leaves in mid-answer."""


async def emptied(swarm: Swarm) -> None:
    """Closes travel behind the last token: wait until they have arrived."""
    async with asyncio.timeout(5):
        for peer in swarm.peers.values():
            assert peer.service is not None
            await peer.service.drained()


async def test_the_next_question_of_a_chat_goes_where_its_beginning_is_kept(swarm: Swarm) -> None:
    """Though for any other text one peer with all layers is better than three."""
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    question = PROMPT * 8
    answered = tokens([event async for event in swarm.ask(question, new=3)])
    await emptied(swarm)
    await swarm.start(joe=(0, 6))

    async def visited(prompt: list[int]) -> list[str]:
        (drawn,) = [event async for event in swarm.ask(prompt, new=1)]
        assert isinstance(drawn, Drawn)
        return [swarm.name(hop.peer) for hop in drawn.hops]

    assert await visited([*question, *answered, *PROMPT]) == ["ann", "bob", "eve"]
    assert await visited(question[::-1]) == ["joe"]


async def test_each_token_tells_the_hops_that_made_it(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    answer = [event async for event in swarm.ask(PROMPT, new=5)]
    for drawn in answer:
        assert isinstance(drawn, Drawn)
        assert [(swarm.name(hop.peer), hop.start, hop.end) for hop in drawn.hops] == [
            ("ann", 0, 2),
            ("bob", 2, 4),
            ("eve", 4, 6),
        ]
        assert all(hop.computed_ms > 0 and hop.path in ("direct", "relayed") for hop in drawn.hops)
    assert [drawn.position for drawn in answer if isinstance(drawn, Drawn)] == [9, 10, 11, 12, 13]


async def test_hops_tell_how_long_the_way_to_them_is_once_it_was_measured(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    answer = [event async for event in swarm.ask(PROMPT, new=LONG)]
    links = [hop.link_ms for event in answer for hop in _hops(event)]
    assert any(link is not None and link > 0 for link in links)


async def test_a_prompt_of_several_chunks_is_answered_exactly(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    prompt = [random.Random(1).randrange(128) for _ in range(400)]
    answer = [event async for event in swarm.ask(prompt, new=8)]
    assert tokens(answer) == swarm.reference(prompt, new=8)


async def test_a_prompt_longer_than_what_may_be_on_its_way_is_answered_exactly() -> None:
    async with Swarm(Path(DEMO_MODEL)) as swarm:
        await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
        prompt = [random.Random(2).randrange(2048) for _ in range(PREFILL_WINDOW + 700)]
        answer = [event async for event in swarm.ask(prompt, new=8)]
        assert tokens(answer) == swarm.reference(prompt, new=8)


async def test_a_seed_gives_the_same_text_on_one_peer_and_on_three(swarm: Swarm) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=40, seed=7, repetition_penalty=1.1)
    await swarm.start(solo=(0, 6))
    alone = tokens([event async for event in swarm.ask(PROMPT, new=30, sampling=sampling)])
    await swarm.stop("solo")
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    together = tokens([event async for event in swarm.ask(PROMPT, new=30, sampling=sampling)])
    assert together == alone
    assert len(set(alone)) > 5


async def test_the_last_hop_tells_how_likely_every_token_was(swarm: Swarm) -> None:
    sampling = Sampling(temperature=0.7, seed=3, likelihoods=2, prompt_likelihoods=True)
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    prompt = PROMPT * 20
    answer = [event async for event in swarm.ask(prompt, new=5, sampling=sampling)]
    assert all(isinstance(drawn, Drawn) and drawn.likelihood for drawn in answer)
    told = [*_drawn(answer[0]).prompt_likelihoods, *(_drawn(drawn).likelihood for drawn in answer)]

    expected = swarm.logprobs([*prompt, *tokens(answer)])
    assert [score.token for score in told if score] == [*prompt, *tokens(answer)][1:]
    for place, score in enumerate(told):
        assert score is not None
        assert score.logprob == pytest.approx(float(expected[place, score.token]), abs=1e-3)
        best = expected[place].topk(2)
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=1e-3)


async def test_a_text_follows_its_grammar_and_a_new_last_hop_draws_what_the_lost_one_would_have() -> None:
    schema = {
        "type": "object",
        "properties": {"petals": {"type": "integer"}, "words": {"type": "string", "maxLength": 40}},
        "required": ["petals", "words"],
        "additionalProperties": False,
    }
    tokenizer = Tokenizer.from_file(str(Path(DEMO_MODEL) / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    assert end is not None
    sampling = Sampling(temperature=1.0, seed=11, grammar=LLMatcher.grammar_from_json_schema(schema))
    async with Swarm(Path(DEMO_MODEL)) as swarm:
        await swarm.start(ann=(0, 3), bob=(3, 6))
        prompt = tokenizer.encode("Tell me of the petals.").ids
        whole = tokens(
            [event async for event in swarm.ask(prompt, new=200, sampling=sampling, stop_tokens=[end])]
        )

        answer = swarm.ask(prompt, new=200, sampling=sampling, stop_tokens=[end])
        events = [await anext(answer) for _ in range(6)]
        await swarm.start(eve=(3, 6))
        await swarm.stop("bob")
        events += [event async for event in answer]

    jsonschema.validate(json.loads(tokenizer.decode(whole[:-1])), schema)
    assert whole[-1] == end
    assert tokens(events) == whole
    assert any(isinstance(event, Rerouted) for event in events)


@pytest.mark.parametrize("victim", ["ann", "bob", "eve"])
async def test_an_answer_goes_on_when_a_peer_leaves(swarm: Swarm, victim: str) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    answer = swarm.ask(PROMPT, new=LONG)
    events = [await anext(answer) for _ in range(random.Random(victim).randrange(1, 20))]
    span = next(hop for hop in _hops(events[-1]) if swarm.name(hop.peer) == victim)
    await swarm.start_one("spare", f"{span.start}:{span.end}")

    await swarm.stop(victim)
    events += [event async for event in answer]

    assert tokens(events) == swarm.reference(PROMPT, new=LONG)
    assert any(isinstance(event, Rerouted) for event in events)
    assert "spare" in {swarm.name(hop.peer) for hop in _hops(events[-1])}


async def test_a_replacement_may_be_two_peers_and_may_hold_more_than_the_gap(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 6))
    answer = swarm.ask(PROMPT, new=LONG)
    events = [await anext(answer) for _ in range(7)]
    await swarm.start(carl=(1, 4), dora=(3, 6))

    await swarm.stop("bob")
    events += [event async for event in answer]

    assert tokens(events) == swarm.reference(PROMPT, new=LONG)
    assert [swarm.name(hop.peer) for hop in _hops(events[-1])] == ["ann", "carl", "dora"]


async def test_two_losses_one_after_the_other_cost_no_token(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6), bill=(2, 4), ella=(4, 6))
    answer = swarm.ask(PROMPT, new=LONG)
    events = [await anext(answer) for _ in range(5)]
    for hop in (1, 2):
        await swarm.stop(swarm.name(_hops(events[-1])[hop].peer))
        events += [await anext(answer) for _ in range(15)]
    events += [event async for event in answer]
    assert tokens(events) == swarm.reference(PROMPT, new=LONG)


async def test_with_nobody_left_the_text_so_far_stays_and_one_sentence_says_why(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    answer = swarm.ask(PROMPT, new=200)
    events = [await anext(answer) for _ in range(5)]
    await swarm.stop("bob")
    with pytest.raises(NoRoute, match=r"no live peer serves layers 3–6 of "):
        async for event in answer:
            events.append(event)
    made = tokens(events)
    assert made == swarm.reference(PROMPT, new=len(made))


async def test_after_all_sessions_no_peer_holds_memory_for_any(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))

    async def whole() -> None:
        assert len(tokens([event async for event in swarm.ask(PROMPT, new=10)])) == 10

    async def abandoned() -> None:
        answer = swarm.ask(PROMPT, new=100)
        await anext(answer)
        assert all(swarm.reserved_bytes().values())
        await answer.aclose()

    async with asyncio.TaskGroup() as tasks:
        for task in (whole(), abandoned(), whole(), abandoned()):
            tasks.create_task(task)
    await emptied(swarm)
    assert swarm.reserved_bytes() == {"ann": 0, "bob": 0}


async def test_an_asker_that_vanishes_costs_no_more_than_its_credit(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    answer = swarm.ask(PROMPT, new=300)
    await anext(answer)
    service = swarm.peers["ann"].service
    assert service is not None
    # Nobody reads: the ring runs out of credit and stands still, far from the 300 tokens it may draw.
    session = next(iter(service._admitted.values())).session
    positions = [session.position]
    while len(positions) < 3 or positions[-1] != positions[-3]:
        await asyncio.sleep(0.3)
        positions.append(session.position)
    assert positions[-1] <= len(PROMPT) + 70
    await answer.aclose()


async def test_an_asker_that_names_a_gateway_as_a_hop_does_not_cut_the_gateways_own_chats(
    swarm: Swarm,
) -> None:
    await swarm.start(ann=(0, 3), bob=(3, 6))
    chat = swarm.ask(PROMPT, new=LONG)
    events = [await anext(chat)]
    identity, opened = Identity.generate(), asyncio.Event()

    async def hear(channel: Channel, message: PeerMessage, body: memoryview, path: ChannelPath) -> None:
        if isinstance(message, Opened):
            opened.set()

    ann = swarm.peers["ann"].identity.id
    relay = RelayClient(swarm.relay.url, identity)
    async with relay, Dialer(identity, relay, hear) as dialer:
        channel = await dialer.channel(ann)
        route = [RouteSpan(ann, 0, 3), RouteSpan(swarm.client.identity.id, 3, 6)]
        await channel.send(
            Open(
                session="e" * 32,
                epoch=0,
                artefact=swarm.artefact,
                route=route,
                index=0,
                max_tokens=20,
                prompt_length=3,
                credit=20,
                sampling=Sampling(),
            )
        )
        await asyncio.wait_for(opened.wait(), 5)
        step = Step(session="e" * 32, epoch=0, position=0, count=3, tensor=Tensor("int32", [3]), sample=True)
        await channel.send(step, array("i", [1, 2, 3]).tobytes())
        events += [event async for event in chat]

    assert tokens(events) == swarm.reference(PROMPT, new=LONG)
    assert not any(isinstance(event, Rerouted) for event in events)


async def test_the_next_question_of_a_chat_computes_only_what_is_new(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    prompt = [random.Random(4).randrange(128) for _ in range(150)]
    answer = tokens([event async for event in swarm.ask(prompt, new=8)])
    await emptied(swarm)
    assert set(swarm.reserved_bytes().values()) == {0}
    before = computed_positions(swarm)

    longer = [*prompt, *answer, 5, 6, 7]
    again = tokens([event async for event in swarm.ask(longer, new=8)])

    assert again == swarm.reference(longer, new=8)
    # Two whole pages of 158 positions were kept; the last of eight tokens needs no position.
    assert computed_positions(swarm) - before == 3 * (len(longer) - 128 + 7)


def computed_positions(swarm: Swarm) -> int:
    """Positions that all peers have computed, each through its own layers."""
    services = [peer.service for peer in swarm.peers.values()]
    return sum(service.batcher.positions for service in services if service is not None)


@pytest.mark.parametrize("victim", ["ann", "bob", "eve"])
async def test_a_chat_that_began_behind_what_was_kept_survives_a_loss(swarm: Swarm, victim: str) -> None:
    await swarm.start(ann=(0, 2), bob=(2, 4), eve=(4, 6))
    prompt = [random.Random(5).randrange(128) for _ in range(100)]
    assert tokens([event async for event in swarm.ask(prompt, new=4)]) == swarm.reference(prompt, new=4)
    await emptied(swarm)

    chat = swarm.ask(prompt, new=LONG)
    events = [await anext(chat) for _ in range(9)]
    span = next(hop for hop in _hops(events[-1]) if swarm.name(hop.peer) == victim)
    await swarm.start_one("spare", f"{span.start}:{span.end}")
    await swarm.stop(victim)
    events += [event async for event in chat]

    assert tokens(events) == swarm.reference(prompt, new=LONG)
    assert any(isinstance(event, Rerouted) for event in events)


async def test_a_session_longer_than_the_model_is_declined_in_one_sentence(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 6))
    with pytest.raises(SessionFailed, match="512 tokens"):
        await anext(swarm.ask(PROMPT, new=600))


async def test_it_also_works_when_no_direct_path_opens(llama: Path) -> None:
    async with Swarm(llama, direct=False) as swarm:
        await swarm.start(ann=(0, 3), bob=(3, 6))
        answer = [event async for event in swarm.ask(PROMPT, new=10)]
        assert tokens(answer) == swarm.reference(PROMPT, new=10)
        assert {hop.path for event in answer for hop in _hops(event)} == {"relayed"}


async def test_a_peer_that_hangs_up_does_not_hold_up_the_tokenizer() -> None:
    async with Swarm(Path(DEMO_MODEL)) as swarm:
        ann = await swarm.start_one("ann", "all")
        announced = swarm.client.directory.get(ann.identity.id)
        assert announced is not None
        await swarm.stop("ann")
        async with _hangs_up(swarm, announced):
            ann = await swarm.start_one("ann", "all")

            async with asyncio.timeout(FETCH_TIMEOUT_S / 2):
                files = await swarm.client.fetch_files(ann.artefact)

    assert files["tokenizer.json"] == (Path(DEMO_MODEL) / "tokenizer.json").read_bytes()


@asynccontextmanager
async def _hangs_up(swarm: Swarm, like: Announcement) -> AsyncGenerator[None]:
    """A participant that announces the same as another, and closes every channel at its first message."""
    identity = Identity.generate()

    async def hang_up(channel: Channel, message: PeerMessage, body: memoryview, path: ChannelPath) -> None:
        raise ProtocolError("not now")

    relay = RelayClient(swarm.relay.url, identity)
    async with relay, Dialer(identity, relay, hang_up):
        same = msgspec.structs.replace(like, peer=identity.id, name="max", state="serving")
        await relay.announce(sign_announcement(identity, same))
        await swarm.until(lambda: swarm.client.directory.get(identity.id) is not None)
        yield


def _drawn(event: Drawn | Rerouted) -> Drawn:
    assert isinstance(event, Drawn)
    return event


def _hops(event: Drawn | Rerouted) -> list[Hop]:
    assert isinstance(event, Drawn)
    return list(event.hops)
