"""The map of the swarm: newest valid announcement per peer, whatever the relays say and in which order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.announcement import CLOCK_SKEW_S, MAX_LEASE_S, sign_announcement
from shared.client.directory import Directory
from shared.errors import NoRoute
from shared.identity import Identity
from shared.protocol import Announcement, PeerState, SignedRecord
from shared.spans import Span

NOW = 1_800_000_000.0
PEERS = [Identity.generate() for _ in range(3)]


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def announced(
    identity: Identity,
    start: int = 0,
    end: int = 4,
    *,
    sequence: int = 1,
    state: PeerState = "serving",
    name: str = "ann",
    artefact: str = "0" * 64,
    issued_at: float = NOW,
) -> SignedRecord:
    announcement = Announcement(
        peer=identity.id,
        sequence=sequence,
        issued_at=issued_at,
        expires_at=issued_at + 45,
        state=state,
        name=name,
        model="demo",
        artefact=artefact,
        tokenizer="1" * 64,
        layer_count=8,
        start=start,
        end=end,
        dtype="float32",
        device="cpu",
        context_length=2048,
        kv_tokens_free=1000,
    )
    return sign_announcement(identity, announcement)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(clock: Clock) -> Directory:
    return Directory(clock)


def test_the_newest_announcement_wins_in_any_order(directory: Directory) -> None:
    ann = Identity.generate()
    directory.add(announced(ann, 2, 6, sequence=2))
    directory.add(announced(ann, 0, 4, sequence=1))
    [live] = directory.live()
    assert (live.start, live.end) == (2, 6)


def test_a_forged_announcement_changes_nothing(directory: Directory) -> None:
    record = announced(Identity.generate())
    directory.add(SignedRecord(record.body.replace('"ann"', '"eve"'), record.signature))
    directory.add(SignedRecord("{}", record.signature))
    assert directory.live() == []


def test_a_lease_that_ran_out_is_no_peer(directory: Directory, clock: Clock) -> None:
    directory.add(announced(Identity.generate()))
    clock.now += 44
    assert len(directory.live()) == 1
    clock.now += 2
    assert directory.live() == []


def test_a_peer_that_left_is_gone_and_its_older_word_cannot_bring_it_back(directory: Directory) -> None:
    ann = Identity.generate()
    directory.add(announced(ann, sequence=2, state="left"))
    directory.add(announced(ann, sequence=1))
    assert directory.live() == []


def test_a_peer_that_is_not_connected_waits_until_its_relay_shows_it_again(directory: Directory) -> None:
    ann = Identity.generate()
    directory.add(announced(ann, sequence=2))
    directory.gone(ann.id)
    assert directory.live() == []
    directory.add(announced(ann, sequence=1))
    assert directory.live() == []
    directory.add(announced(ann, sequence=2))
    assert len(directory.live()) == 1


def test_a_relay_that_hides_a_peer_does_not_hide_it_from_who_sees_it_elsewhere(directory: Directory) -> None:
    ann, bob = Identity.generate(), Identity.generate()
    directory.add(announced(ann), "honest")
    directory.add(announced(bob), "honest")
    directory.gone(ann.id, "evil")
    assert len(directory.live()) == 2
    directory.add(announced(ann), "evil")
    directory.gone(ann.id, "evil")
    assert len(directory.live()) == 2
    directory.gone(ann.id, "honest")
    assert [live.peer for live in directory.live()] == [bob.id]


def test_what_a_lost_relay_showed_is_no_evidence_against_another(directory: Directory) -> None:
    ann, bob = Identity.generate(), Identity.generate()
    for relay in ("one", "other"):
        directory.add(announced(ann), relay)
    directory.add(announced(bob), "one")
    directory.gone(ann.id, "other")
    assert len(directory.live()) == 2

    directory.lost("one")
    # Nobody who is left denies Bob; Ann is denied by the only one that is asked.
    assert [live.peer for live in directory.live()] == [bob.id]
    directory.lost("other")
    assert [live.peer for live in directory.live()] == [bob.id]


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_union_does_not_depend_on_which_relay_says_what_when(chance: random.Random) -> None:
    """Records of three peers, dealt to three relays in any order and number: the newest of each counts."""
    records = [announced(peer, sequence=sequence) for peer in PEERS for sequence in (1, 2, 3)]
    dealt = [(record, chance.choice("abc")) for record in records for _ in range(chance.randrange(1, 4))]
    chance.shuffle(dealt)
    directory = Directory(Clock())
    for record, relay in dealt:
        directory.add(record, relay)
    assert sorted((live.peer, live.sequence) for live in directory.live()) == sorted(
        (peer.id, 3) for peer in PEERS
    )


def test_a_relay_that_invents_peers_crowds_out_nobody(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.client.directory.ROOM", 20)
    directory = Directory(clock)
    for _ in range(50):
        directory.add(announced(Identity.generate()), "evil")
    ann = Identity.generate()
    directory.add(announced(ann), "honest")
    assert ann.id in {live.peer for live in directory.live()}
    assert len(directory.live()) == 21

    clock.now += 45 + MAX_LEASE_S + CLOCK_SKEW_S
    directory.add(announced(Identity.generate(), issued_at=clock.now), "evil")
    assert len(directory._records) == 1  # what ran out made room


def test_only_serving_peers_take_sessions_and_cover_layers(directory: Directory) -> None:
    directory.add(announced(Identity.generate(), 0, 4))
    directory.add(announced(Identity.generate(), 4, 8, state="joining"))
    [model] = directory.models()
    assert model.coverage == [1, 1, 1, 1, 0, 0, 0, 0]
    assert model.gaps == [Span(4, 8)]
    assert not model.covered
    assert len(directory.serving("0" * 64)) == 1


def test_two_fine_tunes_of_one_name_are_two_models(directory: Directory) -> None:
    directory.add(announced(Identity.generate(), 0, 4))
    directory.add(announced(Identity.generate(), 4, 8, artefact="2" * 64))
    assert [model.covered for model in directory.models()] == [False, False]


def test_a_covered_model_is_found_first_and_an_unknown_one_is_said_to_be(directory: Directory) -> None:
    directory.add(announced(Identity.generate(), 0, 4))
    directory.add(announced(Identity.generate(), 0, 8, artefact="2" * 64))
    assert directory.find("demo").artefact == "2" * 64
    with pytest.raises(NoRoute, match="no live peer serves any layer of nothing"):
        directory.find("nothing")


def test_listeners_hear_of_changes_until_they_stop(directory: Directory) -> None:
    heard: list[int] = []
    stop = directory.listen(lambda: heard.append(len(directory.live())))
    ann = Identity.generate()
    directory.add(announced(ann))
    directory.gone(ann.id)
    stop()
    directory.add(announced(ann, sequence=2))
    assert heard == [1, 0]
