"""Short simulations: one seed gives one run, swarms settle, losses cost no answer, nothing leaks."""

from __future__ import annotations

import random

import pytest

from bench.simulation import petals
from bench.simulation.machines import draw_machines, place_one_by_one
from bench.simulation.swarm import Churn, SimulatedSwarm, Users
from peer.placement import COPIES, Placed, carried
from shared.identity import PeerId
from shared.spans import Span, coverage

LAYERS = 16
STORM = Churn(mean_life_s=600.0, outage_every_s=120.0)


def storm(seed: int, *, seconds: float = 120.0) -> SimulatedSwarm:
    """Peers that come and go while ten people ask without a pause."""
    machines = draw_machines(random.Random(seed), 40, LAYERS)
    placed = place_one_by_one(machines, LAYERS)
    users = Users(count=10, gateways=3)
    swarm = SimulatedSwarm(machines, placed, LAYERS, users, seed=seed, churn=STORM, moves=True)
    swarm.run(seconds)
    return swarm


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    runs = [storm(seed, seconds=60.0) for seed in (1, 1, 2)]
    assert runs[0].kernel.trace == runs[1].kernel.trace != runs[2].kernel.trace
    assert runs[0].told.gaps == runs[1].told.gaps


def test_answers_go_on_while_peers_die_and_every_token_comes_once() -> None:
    swarm = storm(3)
    told = swarm.told
    assert told.deaths > 5 and told.answers > 50 and told.reroutes > 0
    assert told.failed == 0
    for gateway in swarm.gateways:
        for asking in gateway.askings.values():
            assert len(asking.machine.tokens) <= asking.prompt + asking.new
    assert told.tokens == len(told.gaps) + len(told.first_tokens)


def test_a_peer_that_falls_silent_is_left_for_its_standby_before_anyone_says_that_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.simulation.swarm.SILENT_PART", 1.0)
    monkeypatch.setattr("bench.simulation.swarm.SILENT_S", 60.0)
    machines = draw_machines(random.Random(0), 40, LAYERS)
    users = Users(count=4, gateways=2, new=(400, 400))
    swarm = SimulatedSwarm(machines, place_one_by_one(machines, LAYERS), LAYERS, users, seed=0)
    swarm.run(8.0)
    answers = [asking.machine for gateway in swarm.gateways for asking in gateway.askings.values()]
    followed = {
        span.peer
        for machine in answers
        for span in machine.route
        if (span.start, span.end) in {(each.start, each.end) for each in machine.standbys}
    }
    swarm.kill(PeerId(min(followed)))
    told = swarm.run(20.0)
    assert told.recoveries
    assert max(told.recoveries) < 5.0
    assert told.failed == 0


def test_when_the_questions_end_no_peer_holds_anything_for_them() -> None:
    swarm = storm(4, seconds=60.0)
    swarm.stop_asking()
    swarm.run(swarm.kernel.now + 300.0)
    assert not any(gateway.askings for gateway in swarm.gateways)
    for peer in swarm.peers.values():
        assert not peer.hops
        assert peer.kv_positions_free == pytest.approx(peer.machine.kv_positions)
    assert not any(sum(gateway.ours.values()) for gateway in swarm.gateways)


@pytest.mark.parametrize("count", [8, 24])
def test_a_swarm_that_stands_badly_spreads_out_and_then_rests(count: int) -> None:
    machines = draw_machines(random.Random(5), count, LAYERS)
    # Everyone at the beginning, but for one peer that holds all, so that no layer is without.
    crowded = [Placed(each.id, Span(0, each.layers), each.speed) for each in machines[1:]]
    whole = Placed(machines[0].id, Span(0, LAYERS), machines[0].speed)
    swarm = SimulatedSwarm(
        machines, [whole, *crowded], LAYERS, Users(count=4, gateways=2, think_s=60.0), seed=5, moves=True
    )
    before = carried(swarm.placed(), LAYERS)
    told = swarm.run(3 * 3600.0)
    moves = told.moves
    assert moves > 0
    assert swarm.run(5 * 3600.0).moves == moves
    assert told.orphaned == 0
    assert told.failed == 0
    assert carried(swarm.placed(), LAYERS) > before
    counts = coverage((each.span for each in swarm.placed()), LAYERS)
    enough = sum(len(each.span) for each in swarm.placed()) >= 2 * COPIES * LAYERS
    assert min(counts) >= (COPIES if enough else 1)


def test_many_sessions_get_more_tokens_than_by_routes_that_know_no_load() -> None:
    machines = draw_machines(random.Random(0), 40, LAYERS)
    rates = []
    for theirs in (False, True):
        placed = place_one_by_one(machines, LAYERS)
        users = Users(count=96, gateways=4, prompt=(4, 12), new=(64, 128))
        swarm = SimulatedSwarm(machines, placed, LAYERS, users, seed=0, standbys=False, petals=theirs)
        rates.append(swarm.run(20.0).positions)
    assert rates[0] > 1.5 * rates[1]


def test_the_bound_of_the_solver_is_the_maximum_flow_that_placement_counts_on() -> None:
    pytest.importorskip("scipy")
    from bench.simulation.bounds import lp_bound

    for seed in range(4):
        machines = draw_machines(random.Random(seed), 12, LAYERS)
        placed = petals.place_one_by_one(machines, LAYERS)
        assert lp_bound(placed, LAYERS) == pytest.approx(carried(placed, LAYERS), rel=0.002)


def test_petals_rules_leave_no_layer_without_a_peer_and_come_to_rest() -> None:
    machines = draw_machines(random.Random(1), 20, LAYERS)
    placed = petals.rebalanced(petals.place_one_by_one(machines, LAYERS), LAYERS, random.Random(1))
    assert all(coverage((each.span for each in placed), LAYERS))
