"""A peer's life as others see it: joining, serving, draining, left; and what it may meet on the way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from peer.benchmark import Speed, SpeedBook, layer_sizes
from peer.lifecycle import Peer, much_changed
from peer.model.checkpoint import open_checkpoint
from peer.model.errors import ModelNotFound, UnsupportedModel
from peer.model.span import Span as LoadedSpan
from peer.settings import PeerSettings
from shared.channel import Dialer
from shared.errors import Busy, ConnectionLost, NoRoute, RelayUnreachable, SettingsError
from shared.identity import Identity
from shared.protocol import Announcement, Close
from shared.relay_client import RelayClient
from shared.spans import Span
from tests.harness.models import LAYERS, VOCABULARY
from tests.harness.swarm import Swarm, tokens

PROMPT = [5, 17, 90, 3, 44, 12, 61, 33, 8]
SOON_S = 10.0
# One llama layer of the tests: queries and outputs, keys and values, the MLP, two norms; float32.
LAYER_BYTES = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) * 4
EMBEDDING_BYTES = VOCABULARY * 64 * 4


def settings(swarm: Swarm, **changes: Any) -> PeerSettings:  # noqa: ANN401
    fields: dict[str, Any] = {
        "relays": swarm.relay_urls,
        "model": str(swarm.model),
        "threads": 1,
        "kv_bytes": 1 << 30,
        "quantize": "none",
    }
    return PeerSettings(**(fields | changes))


def announced(swarm: Swarm, identity: Identity) -> Announcement | None:
    return swarm.client.directory.get(identity.id)


async def in_state(swarm: Swarm, identity: Identity, state: str) -> Announcement:
    def there() -> bool:
        found = announced(swarm, identity)
        return found is not None and found.state == state

    await swarm.until(there)
    found = announced(swarm, identity)
    assert found is not None
    return found


class Gate:
    """Holds the loading of layers until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        load = LoadedSpan.load

        def held(*arguments: Any, **named: Any) -> LoadedSpan:  # noqa: ANN401
            self.reached.set()
            assert self.open.wait(SOON_S)
            return load(*arguments, **named)

        monkeypatch.setattr("peer.lifecycle.LoadedSpan.load", held)


async def test_a_peer_announces_that_it_joins_before_it_loads_then_that_it_serves_then_that_it_left(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, identity = Gate(monkeypatch), Identity.generate()
    peer = Peer(settings(swarm, layers="2/3", name="ann"), identity)
    entering = asyncio.create_task(peer.__aenter__())

    joining = await in_state(swarm, identity, "joining")
    assert (joining.name, joining.start, joining.end, joining.layer_count) == ("ann", 2, 4, LAYERS)
    assert joining.kv_tokens_free == 0
    assert swarm.client.directory.serving(joining.artefact) == []
    assert not entering.done()

    gate.open.set()
    serving = await in_state(swarm, identity, "serving")
    await entering
    # Two layers of keys and values, 2 heads of 16 float32 each, and a row of 64 for the input log.
    assert serving.kv_tokens_free == (1 << 30) // (2 * 2 * 2 * 16 * 4 + 64 * 4)
    assert (serving.model, serving.dtype, serving.device) == (swarm.model.name, "float32", "cpu")
    assert serving.context_length == 512
    assert serving.sequence > joining.sequence
    assert serving.expires_at > time.time()

    await peer.__aexit__(None, None, None)
    await in_state(swarm, identity, "left")
    assert identity.id not in {live.peer for live in swarm.client.directory.live()}


def two_devices(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """One device under two names, one of which has twice as much room; gives what each has free."""
    free = {torch.device("cpu"): 2 << 30, torch.device("cpu", 0): 1 << 30}
    monkeypatch.setattr("peer.lifecycle.choose_devices", lambda _: tuple(free))
    monkeypatch.setattr("peer.lifecycle.free_bytes", free.get)
    return free


async def test_layers_are_spread_over_all_devices_by_what_they_have_free(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = two_devices(monkeypatch)
    peer = await swarm.start_one("ann", "0:6")
    assert peer.service is not None
    assert [device.index for device in peer.service.span.layer_devices.values()] == [None] * 4 + [0] * 2
    assert peer.memory.layers_bytes + peer.memory.kv_bytes == sum(free.values()) * 3 // 4
    assert tokens([event async for event in swarm.ask(PROMPT)]) == swarm.reference(PROMPT)


async def test_layers_that_cannot_be_spread_lie_on_one_device(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_devices(monkeypatch)
    load = LoadedSpan.load

    def refusing(*arguments: Any, **named: Any) -> LoadedSpan:  # noqa: ANN401
        if named["layer_devices"]:
            raise UnsupportedModel("its layers share a tensor")
        return load(*arguments, **named)

    monkeypatch.setattr("peer.lifecycle.LoadedSpan.load", refusing)
    peer = await swarm.start_one("ann", "0:6")
    assert peer.service is not None
    assert set(peer.service.span.layer_devices.values()) == {torch.device("cpu")}


async def test_who_speaks_to_a_peer_that_loads_is_told_so(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, identity = Gate(monkeypatch), Identity.generate()
    peer = Peer(settings(swarm), identity)
    entering = asyncio.create_task(peer.__aenter__())
    await in_state(swarm, identity, "joining")

    async with (
        RelayClient(swarm.relay.url, other := Identity.generate()) as relay,
        Dialer(other, relay, nothing, direct=False) as dialer,
    ):
        channel = await dialer.channel(identity.id)
        await channel.send(Close("1" * 32))
        await asyncio.wait_for(channel.closed.wait(), SOON_S)
        assert channel.reason == "this peer is still loading its layers"

    gate.open.set()
    await entering
    await peer.__aexit__(None, None, None)


async def nothing(*_: object) -> None:
    """Takes messages and does nothing."""


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("2/3", 2 * LAYER_BYTES),
        ("1/3", 2 * LAYER_BYTES + EMBEDDING_BYTES),
        # The last norm and the head.
        ("3/3", 2 * LAYER_BYTES + EMBEDDING_BYTES + 64 * 4),
    ],
)
async def test_a_third_of_the_layers_reads_a_third_of_the_bytes(
    swarm: Swarm, layers: str, expected: int
) -> None:
    told: list[tuple[int, int]] = []
    peer = Peer(
        settings(swarm, layers=layers),
        Identity.generate(),
        progress=lambda done, total: told.append((done, total)),
    )
    async with peer:
        assert told[-1] == (expected, expected)
        assert peer.service is not None and peer.service.span.bytes_read == expected


async def test_draining_lets_a_running_answer_finish_and_takes_no_new_one(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 6))
    peer = swarm.peers["ann"]
    answer = swarm.ask(PROMPT, new=120)
    events = [await anext(answer)]

    drain = asyncio.create_task(peer.drain())
    await in_state(swarm, peer.identity, "draining")
    assert swarm.client.directory.serving(peer.artefact) == []
    assert not drain.done()
    events += [event async for event in answer]

    assert await asyncio.wait_for(drain, SOON_S)
    assert tokens(events) == swarm.reference(PROMPT, new=120)


async def test_draining_gives_up_on_an_answer_that_takes_too_long(swarm: Swarm) -> None:
    await swarm.start(ann=(0, 6))
    answer = swarm.ask(PROMPT, new=300)
    await anext(answer)
    # Nobody reads on, so it never finishes.
    assert not await swarm.peers["ann"].drain(timeout_s=0.01)
    await answer.aclose()


async def test_a_relay_that_goes_away_while_a_peer_drains_cuts_no_answer(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    await swarm.start(ann=(0, 6))
    peer = swarm.peers["ann"]
    answer = swarm.ask(PROMPT, new=120)
    events = [await anext(answer)]

    with monkeypatch.context() as gone:
        gone.setattr(peer.relays.clients[0], "announce", lost)
        drain = asyncio.create_task(peer.drain())
        events += [event async for event in answer]
        assert await asyncio.wait_for(drain, SOON_S)
    assert tokens(events) == swarm.reference(PROMPT, new=120)


async def test_a_relay_that_goes_away_when_the_layers_are_loaded_costs_no_second_loading(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer(settings(swarm), Identity.generate())
    with monkeypatch.context() as gone:
        gone.setattr(peer.relays.clients[0], "announce", lost)
        async with peer:
            assert peer.service is not None


async def lost(*_: object) -> None:
    raise ConnectionLost("the connection to the relay was lost")


# ---------------------------------------------------------------- what keeps a peer from starting


async def test_a_relay_that_does_not_answer_is_told_before_anything_is_loaded(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(RelayUnreachable, match=r"no relay answers at http://127\.0\.0\.1:1"):
        async with Peer(PeerSettings(relays=("http://127.0.0.1:1",), model=str(llama)), Identity.generate()):
            pass
    assert not gate.reached.is_set()


@pytest.mark.parametrize("layers", ["9:3", "0:7", "3:3", "x", "1:2:3", "0/3", "4/3", "1/0", ""])
async def test_layers_that_are_no_part_of_the_model_are_told_before_anyone_hears_of_the_peer(
    swarm: Swarm, layers: str
) -> None:
    identity = Identity.generate()
    with pytest.raises(SettingsError, match="--layers"):
        async with Peer(settings(swarm, layers=layers), identity):
            pass
    assert announced(swarm, identity) is None


async def test_a_directory_without_a_model_is_told(swarm: Swarm, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no config\.json"):
        async with Peer(settings(swarm, model=str(tmp_path)), Identity.generate()):
            pass


@pytest.mark.parametrize("device", ["cuda:7", "mps", "meta", "toaster", "", "cuda:x"])
async def test_a_device_that_is_not_here_is_told(swarm: Swarm, device: str) -> None:
    with pytest.raises(SettingsError, match=f"--device {device} is not on this machine"):
        Peer(settings(swarm, device=device), Identity.generate())


async def test_a_peer_whose_layers_fail_to_load_takes_its_announcement_back(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> LoadedSpan:
        raise ModelNotFound("a file is gone")

    monkeypatch.setattr("peer.lifecycle.LoadedSpan.load", broken)
    identity = Identity.generate()
    with pytest.raises(ModelNotFound, match="a file is gone"):
        async with Peer(settings(swarm), identity):
            pass
    await in_state(swarm, identity, "left")


async def test_leaving_while_the_layers_load_reads_no_further_tensor_and_is_told(swarm: Swarm) -> None:
    identity = Identity.generate()
    first, go_on = threading.Event(), threading.Event()
    told: list[int] = []

    def progress(done_bytes: int, _: int) -> None:
        told.append(done_bytes)
        first.set()
        assert go_on.wait(SOON_S)

    entering = asyncio.create_task(Peer(settings(swarm), identity, progress=progress).__aenter__())
    assert await asyncio.to_thread(first.wait, SOON_S)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering

    go_on.set()
    # As the command does when it ends: it waits for its threads.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert len(told) == 1
    await in_state(swarm, identity, "left")


async def test_quantized_peers_tell_it_and_are_of_another_artefact(
    swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COROLLA_HOME", str(tmp_path))
    identities = [Identity.generate() for _ in range(3)]
    async with (
        Peer(settings(swarm, quantize="none"), identities[0]),
        Peer(settings(swarm, quantize="int8"), identities[1]),
        Peer(settings(swarm, quantize="auto"), identities[2]),
    ):
        told = [await in_state(swarm, identity, "serving") for identity in identities]

    assert [announcement.dtype for announcement in told] == ["float32", "float32/int8", "float32/fp16"]
    assert len({announcement.artefact for announcement in told}) == 3
    assert (tmp_path / "quantized" / told[1].artefact / "layer-0.safetensors").exists()


async def test_a_swarm_answers_with_rounded_weights(llama: Path) -> None:
    async with Swarm(llama, quantize="fp16") as swarm:
        await swarm.start(ann=(0, 3), bob=(3, 6))
        answer = tokens([event async for event in swarm.ask(PROMPT, new=8)])

    assert len(answer) == 8


# ---------------------------------------------------------------- choosing layers


def memory_for(layers: int) -> int:
    """As much as so many layers and one end of the model take, with the KV memory of `settings`."""
    return (1 << 30) + layers * LAYER_BYTES + EMBEDDING_BYTES


async def test_newcomers_take_what_nobody_holds_then_what_one_holds_and_say_why(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COROLLA_HOME", str(tmp_path))
    monkeypatch.setattr("peer.lifecycle.PROPAGATION_S", 0.1)
    words: list[str] = []
    choosing = settings(swarm, memory_bytes=memory_for(3))
    async with AsyncExitStack() as stack:
        for _ in range(4):
            peer = Peer(choosing, Identity.generate(), notice=words.append)
            await stack.enter_async_context(peer)
            swarm.peers[str(len(words))] = peer
            await in_state(swarm, peer.identity, "serving")
        events = [event async for event in swarm.ask(PROMPT, new=5)]
        spans = sorted((peer.layers.start, peer.layers.end) for peer in swarm.peers.values())
        told = [swarm.client.directory.get(peer.identity.id) for peer in swarm.peers.values()]
        swarm.peers.clear()

    assert spans == [(0, 3), (0, 3), (3, 6), (3, 6)]
    assert words == [
        "taking layers 0–3: layers 0–3 had no peer",
        "taking layers 3–6: layers 3–6 had no peer",
        "taking layers 0–3: layers 0–3 had one peer",
        "taking layers 3–6: layers 3–6 had one peer",
    ]
    assert tokens(events) == swarm.reference(PROMPT, new=5)
    assert all(one is not None and one.movable and (one.throughput or 0) > 0 for one in told)


async def test_two_newcomers_at_the_same_moment_take_different_layers(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COROLLA_HOME", str(tmp_path))
    choosing = settings(swarm, memory_bytes=memory_for(3))
    peers = [Peer(choosing, Identity.generate()) for _ in range(2)]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(peer) for peer in peers))
        assert sorted(peer.layers for peer in peers) == [Span(0, 3), Span(3, 6)]


async def test_a_peer_moves_to_layers_that_lost_theirs_after_its_answers_and_serves_them(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COROLLA_HOME", str(tmp_path))
    monkeypatch.setattr("peer.lifecycle.PROPAGATION_S", 0.1)
    monkeypatch.setattr("peer.lifecycle.RECONSIDER_S", 0.3)
    await swarm.start(ann=(0, 3), bob=(3, 6))
    mover = Peer(settings(swarm, memory_bytes=memory_for(3)), Identity.generate())
    async with mover:
        # Whichever half the measured speeds made it take: the other one loses its peer.
        lost, missing = ("bob", Span(3, 6)) if mover.layers == Span(0, 3) else ("ann", Span(0, 3))
        answer = swarm.ask(PROMPT, new=60)
        events = [await anext(answer)]
        await swarm.stop(lost)

        # Some layers have nobody left, so the answer waits for the mover, or ends for want of them.
        with contextlib.suppress(NoRoute, Busy):
            events += [event async for event in answer]
        await swarm.until(lambda: is_serving(swarm, mover.identity, missing))
        again = [event async for event in swarm.ask(PROMPT, new=5)]
        moved = announced(swarm, mover.identity)
        await swarm.start(eve=(0, 3))
        await swarm.until(lambda: is_movable(swarm, mover.identity))

    assert tokens(again) == swarm.reference(PROMPT, new=5)
    assert moved is not None
    assert not moved.movable  # it stays until somebody joins or leaves
    assert mover.kv_budget.reserved_bytes == 0


def is_serving(swarm: Swarm, identity: Identity, span: Span) -> bool:
    found = announced(swarm, identity)
    return found is not None and (found.state, found.start, found.end) == ("serving", span.start, span.end)


def is_movable(swarm: Swarm, identity: Identity) -> bool:
    found = announced(swarm, identity)
    return found is not None and found.movable


async def test_a_peer_that_was_asked_to_leave_does_not_move_any_more(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COROLLA_HOME", str(tmp_path))
    monkeypatch.setattr("peer.lifecycle.PROPAGATION_S", 0.1)
    await swarm.start(ann=(0, 3))
    peer = Peer(settings(swarm, memory_bytes=memory_for(3)), Identity.generate())
    async with peer:
        assert peer.layers == Span(3, 6)
        await swarm.start(bob=(3, 6))
        await swarm.stop("ann")
        await swarm.until(lambda: len(swarm.client.directory.serving(peer.artefact)) == 2)

        assert await peer.drain()
        assert not await peer.reconsider(open_checkpoint(str(swarm.model)))
        await in_state(swarm, peer.identity, "draining")
        assert peer.layers == Span(3, 6)


async def test_a_peer_for_which_no_layer_fits_is_told_what_would(swarm: Swarm) -> None:
    identity = Identity.generate()
    with pytest.raises(SettingsError, match=r"no layer of .* fits: .* give more with --memory"):
        async with Peer(settings(swarm, memory_bytes=1 << 30), identity):
            pass
    assert announced(swarm, identity) is None


def test_what_layers_take_is_known_before_they_are_loaded(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    sizes = layer_sizes(checkpoint, torch.float32, None, torch.device("cpu"))
    assert sizes.layers == (LAYER_BYTES,) * LAYERS
    assert sizes.first == EMBEDDING_BYTES


async def test_a_measured_speed_is_kept_for_the_next_start(tmp_path: Path) -> None:
    book, cpu = SpeedBook(tmp_path), torch.device("cpu")
    assert book.find("a" * 64, cpu, 2) is None
    kept = Speed(1234.5, 0.8, time.time())
    book.keep("a" * 64, cpu, 2, kept)
    assert book.find("a" * 64, cpu, 2) == kept
    assert book.find("b" * 64, cpu, 2) is book.find("a" * 64, cpu, 1) is None
    book.keep("a" * 64, cpu, 2, Speed(1.0, 1.0, time.time() - 30 * 24 * 3600))
    assert book.find("a" * 64, cpu, 2) is None


async def test_a_load_that_changed_much_is_announced_before_the_next_renewal(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.lifecycle.LOOK_S", 0.1)
    await swarm.start(ann=(0, 6))
    peer = swarm.peers["ann"]
    answers = [swarm.ask(PROMPT, new=200) for _ in range(6)]
    for answer in answers:
        await anext(answer)

    await swarm.until(lambda: (found := announced(swarm, peer.identity)) is not None and found.sessions > 4)
    for answer in answers:
        await answer.aclose()


def test_only_a_large_change_of_the_load_is_worth_telling() -> None:
    told = msgspec.convert(
        {
            "peer": "a" * 64,
            "sequence": 1,
            "issued_at": 0.0,
            "expires_at": 45.0,
            "state": "serving",
            "name": "ann",
            "model": "demo",
            "artefact": "b" * 64,
            "tokenizer": "c" * 64,
            "layer_count": 6,
            "start": 0,
            "end": 6,
            "dtype": "float32",
            "device": "cpu",
            "context_length": 512,
            "kv_tokens_free": 1000,
            "sessions": 3,
            "wait_ms": 10.0,
        },
        Announcement,
    )

    def changed(**fields: float) -> bool:
        return much_changed(told, msgspec.structs.replace(told, **fields))

    assert not changed() and not changed(sessions=5) and not changed(wait_ms=40.0)
    assert changed(sessions=12) and changed(wait_ms=200.0) and changed(kv_tokens_free=100)
