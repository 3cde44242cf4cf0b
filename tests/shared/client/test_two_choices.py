"""Who is asked before a session opens, and what the answers change."""

from __future__ import annotations

import pytest

from shared.client.route_planner import Candidate, plan_route
from shared.client.two_choices import explain, informed, two_choices
from shared.errors import Busy, NoRoom, NoRoute
from shared.identity import PeerId
from shared.protocol import Load
from shared.spans import Span

ANN, BOB, EVE = PeerId("ann"), PeerId("bob"), PeerId("eve")


def peer(name: PeerId, start: int, end: int, *, sessions: int = 0, room: int = 1000) -> Candidate:
    return Candidate(
        peer=name, span=Span(start, end), kv_tokens_free=room, ms_per_layer=1.0, sessions=sessions
    )


def load(*, sessions: int = 0, wait_ms: float = 0, room: int = 1000, retry_after_s: float = 0) -> Load:
    return Load(
        request=1,
        sessions=sessions,
        wait_ms=wait_ms,
        kv_tokens_free=room,
        kv_tokens=1000,
        retry_after_s=retry_after_s,
    )


def asked(candidates: list[Candidate], tokens: int = 10) -> frozenset[PeerId]:
    return two_choices(candidates, 8, model="demo", tokens=tokens, salt="s").ask


def test_only_the_peers_in_which_the_two_routes_differ_are_asked() -> None:
    assert asked([peer(ANN, 0, 4, sessions=9), peer(BOB, 4, 8, sessions=1), peer(EVE, 4, 8)]) == {BOB, EVE}


def test_without_a_choice_nobody_is_asked() -> None:
    assert asked([peer(ANN, 0, 4, sessions=9), peer(BOB, 4, 8, sessions=9)]) == frozenset()


def test_nobody_is_asked_on_an_idle_swarm() -> None:
    assert asked([peer(ANN, 0, 8), peer(BOB, 0, 8)]) == frozenset()


def test_when_all_seem_full_the_best_two_are_asked_whether_that_is_still_so() -> None:
    choice = two_choices(
        [peer(ANN, 0, 8, room=5), peer(BOB, 0, 8, room=5)], 8, model="demo", tokens=10, salt="s"
    )
    assert choice.full and choice.ask == {ANN, BOB}


def test_layers_that_nobody_serves_are_told_as_ever() -> None:
    with pytest.raises(NoRoute, match="layers 4–8"):
        two_choices([peer(ANN, 0, 4)], 8, model="demo", tokens=10, salt="s")


@pytest.mark.parametrize(
    ("ann", "bob", "taken"),
    [
        (load(sessions=4), load(sessions=1), BOB),
        (load(sessions=1), load(sessions=4), ANN),
        (load(wait_ms=80), load(sessions=1), BOB),
        (load(room=3), load(sessions=50), BOB),
        (None, load(sessions=9), ANN),
    ],
)
def test_the_less_loaded_is_taken_by_what_they_say(ann: Load | None, bob: Load | None, taken: PeerId) -> None:
    candidates = [
        informed(peer(ANN, 0, 8, sessions=2), ann, 0),
        informed(peer(BOB, 0, 8, sessions=2), bob, 0),
    ]
    route = plan_route(candidates, Span(0, 8), model="demo", tokens=10, salt="s")
    assert [span.peer for span in route] == [taken]


def test_sessions_of_ours_count_before_any_peer_tells_of_them() -> None:
    assert informed(peer(ANN, 0, 8, sessions=1), None, 3).sessions == 3
    assert informed(peer(ANN, 0, 8), load(sessions=5), 3).sessions == 5


def test_a_full_swarm_says_when_its_fullest_hop_will_have_room() -> None:
    loads = {
        ANN: load(room=0, retry_after_s=4.0),
        BOB: load(room=0, retry_after_s=9.0),
    }
    error = explain([peer(ANN, 0, 4, room=0), peer(BOB, 4, 8, room=0)], loads, 8, "demo", 10)
    assert isinstance(error, Busy) and error.retry_after_s == 9.0
    assert str(error) == "every peer of demo is full; try again in 9 s"


def test_a_session_larger_than_any_peer_is_not_told_to_come_back() -> None:
    error = explain([peer(ANN, 0, 8, room=0)], {ANN: load(room=0)}, 8, "demo", 1001)
    assert isinstance(error, NoRoom)
    assert "1001 tokens" in str(error) and "shorten it" in str(error)
    assert isinstance(explain([peer(ANN, 0, 8, room=0)], {}, 8, "demo", 1001), Busy), "its size is unknown"
