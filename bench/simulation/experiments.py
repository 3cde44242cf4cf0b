"""What `python -m bench.simulate` tries: placements, sudden losses, many sessions at once, hours of churn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import mean, median

import msgspec

from bench.simulation import petals
from bench.simulation.bounds import lp_bound
from bench.simulation.machines import Machine, draw_machines, place_one_by_one
from bench.simulation.swarm import Churn, SimulatedSwarm, Told, Users
from peer.placement import Placed, choose_move, spans_of_length
from shared.spans import coverage

QUARTER = 0.25
WARM_S, MEASURED_S = 40.0, 40.0
IN_A_CHAT = Users(count=0, prompt=(4, 12), new=(128, 384))
"""Routing is measured on tokens: hardly any prompt, so that the bound, which knows none, compares with it."""


class Placement(msgspec.Struct, frozen=True):
    """Parts of the sum of speeds over layers."""

    ours: float
    joined: float
    """Ours before anyone moved."""
    petals: float
    moves: int


class Routing(msgspec.Struct, frozen=True):
    """One run with a fixed number of sessions, each starting anew when it ends."""

    tokens_per_s: float
    bound: float
    first_token_s: float
    gap_ms: tuple[float, float]
    hops: float
    busy: float
    """The part of all peers' time in which they computed."""
    failed: int
    trace: str

    @property
    def efficiency(self) -> float:
        return self.tokens_per_s / self.bound


class Hour(msgspec.Struct, frozen=True):
    """What a swarm with churn did."""

    told: Told
    trace: str
    virtual_s: float
    wall_s: float
    events: int
    settled_moves: int
    """Moves in the last tenth of the time."""


# ---------------------------------------------------------------- placement


def try_placement(count: int, layers: int, seed: int) -> Placement:
    machines = draw_machines(random.Random(seed), count, layers)
    ideal = sum(machine.speed for machine in machines) / layers
    joined = place_one_by_one(machines, layers)
    ours, moves = settle(joined, layers, random.Random(seed))
    theirs = petals.rebalanced(petals.place_one_by_one(machines, layers), layers, random.Random(seed))
    return Placement(
        lp_bound(ours, layers) / ideal,
        lp_bound(joined, layers) / ideal,
        lp_bound(theirs, layers) / ideal,
        moves,
    )


def settle(placed: Sequence[Placed], layers: int, numbers: random.Random) -> tuple[list[Placed], int]:
    """Every peer in turn looks whether to move, until nobody does. Nobody joins, so each moves once."""
    now, moves = list(placed), 0
    while True:
        quiet = True
        for index in numbers.sample(range(len(now)), len(now)):
            me, others = now[index], now[:index] + now[index + 1 :]
            choice = choose_move(me, others, spans_of_length(len(me.span), layers), layers)
            if choice is not None:
                now[index] = msgspec.structs.replace(me, span=choice.span, movable=False)
                moves, quiet = moves + 1, False
        if quiet:
            return now, moves


def survives_quarter(count: int, layers: int, seed: int, place: Callable[..., list[Placed]]) -> bool | None:
    """Whether all layers have a peer left when a random quarter dies; None if memory allows no two copies."""
    numbers = random.Random(seed)
    machines = draw_machines(numbers, count, layers)
    if sum(machine.layers for machine in machines) < 2 * layers:
        return None
    placed = place(machines, layers)
    left = numbers.sample(placed, count - round(QUARTER * count))
    return all(coverage((each.span for each in left), layers))


def place_and_settle(machines: list[Machine], layers: int) -> list[Placed]:
    return settle(place_one_by_one(machines, layers), layers, random.Random(0))[0]


# ---------------------------------------------------------------- routing


def try_routing(
    sessions: int, count: int, layers: int, seed: int, *, theirs: bool = False, standbys: bool = False
) -> Routing:
    """A closed loop: so many sessions at all times."""
    machines = draw_machines(random.Random(seed), count, layers)
    place = petals.place_one_by_one if theirs else place_and_settle
    placed = place(machines, layers)
    users = msgspec.structs.replace(IN_A_CHAT, count=sessions)
    swarm = SimulatedSwarm(
        machines, placed, layers, users, seed=seed, standbys=standbys and not theirs, petals=theirs
    )
    swarm.run(WARM_S)
    swarm.told = told = Told()
    for peer in swarm.peers.values():
        peer.busy_s = 0.0
    swarm.run(WARM_S + MEASURED_S)
    return Routing(
        told.positions / MEASURED_S,
        lp_bound(placed, layers),
        median(told.first_tokens) if told.first_tokens else float("nan"),
        (1000 * quantile(told.gaps, 0.5), 1000 * quantile(told.gaps, 0.99)),
        mean(told.hops) if told.hops else float("nan"),
        mean(peer.busy_s for peer in swarm.peers.values()) / MEASURED_S,
        told.failed,
        swarm.kernel.trace,
    )


# ---------------------------------------------------------------- churn


def try_churn(
    count: int,
    layers: int,
    seed: int,
    *,
    hours: float = 1.0,
    users: Users | None = None,
    churn: Churn | None = None,
    standbys: bool = True,
    theirs: bool = False,
) -> Hour:
    """Peers come and go while people chat."""
    machines = draw_machines(random.Random(seed), count, layers)
    placed = petals.place_one_by_one(machines, layers) if theirs else place_one_by_one(machines, layers)
    began = time.monotonic()
    swarm = SimulatedSwarm(
        machines,
        placed,
        layers,
        users or Users(count=max(8, count // 8), think_s=240.0),
        seed=seed,
        standbys=standbys and not theirs,
        petals=theirs,
        churn=churn or Churn(mean_life_s=4 * 3600),
        moves=not theirs,
    )
    virtual_s = hours * 3600
    swarm.run(0.9 * virtual_s)
    before = swarm.told.moves
    told = swarm.run(virtual_s)
    return Hour(
        told,
        swarm.kernel.trace,
        virtual_s,
        time.monotonic() - began,
        swarm.kernel.events,
        told.moves - before,
    )


def quantile(values: Sequence[float], part: float) -> float:
    """The value that so large a part of them does not exceed; not a number when there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
