"""Thousands of peers and users on virtual time, through the project's own placement, planner and sessions.

    python -m bench.simulate                     # everything, three seeds each
    python -m bench.simulate --seeds 1 --peers 200 --hours 0.2

Prints what placements reach of the sum of speeds over layers, what routing reaches of the maximum flow
through the placement found (an LP), and what people meet while peers come and go; Petals' rules run beside.
The last line is JSON. Needs scipy: `pip install -e '.[bench]'`, or scipy alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean
from typing import Annotated, Any

import orjson
import typer

from bench.simulation import petals
from bench.simulation.experiments import (
    Hour,
    Routing,
    place_and_settle,
    quantile,
    survives_quarter,
    try_churn,
    try_placement,
    try_routing,
)
from bench.simulation.machines import Machine
from bench.simulation.swarm import Churn, Users
from peer.placement import Placed

LAYERS = 32
SMALL, LARGE = 12, 40
SESSIONS = (128, 512)
STORM_PEERS, STORM_HOURS = 80, 1 / 6
QUARTERS = 40
"""Random quarters that die, in all."""

app = typer.Typer(add_completion=False)


@app.command()
def simulate(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each experiment.")] = 3,
    peers: Annotated[int, typer.Option(min=12, help="Peers of the swarm with churn.")] = 1000,
    hours: Annotated[float, typer.Option(min=0.01, help="Virtual time of the swarm with churn.")] = 1.0,
) -> None:
    """Run all experiments and print what they found."""
    began = time.monotonic()
    figures: dict[str, Any] = {}
    _placements(seeds, figures)
    _survivals(figures)
    routings = _routings(seeds, figures)
    storms = _storms(seeds, figures)
    hour = _churn(peers, hours)
    figures["failed"] = sum(one.told.failed for one in (hour, *storms)) + sum(one.failed for one in routings)
    figures["trace"] = hour.trace
    figures["wall_s"] = round(time.monotonic() - began, 1)
    print(orjson.dumps(figures).decode())


# ---------------------------------------------------------------- placement


def _placements(seeds: int, figures: dict[str, Any]) -> None:
    print(f"placement: parts of the sum of speeds over {LAYERS} layers, which no placement exceeds (LP)")
    print("  peers  joined  moved  Petals  moves  worst seed")
    for count in (SMALL, LARGE):
        found = [try_placement(count, LAYERS, seed) for seed in range(seeds)]
        ours = mean(one.ours for one in found)
        print(
            f"  {count:5}  {mean(one.joined for one in found):6.3f}  {ours:5.3f}"
            f"  {mean(one.petals for one in found):6.3f}  {mean(one.moves for one in found):5.1f}"
            f"  {min(one.ours for one in found):10.3f}",
            flush=True,
        )
        figures[f"placement_{count}"] = round(ours, 3)


def _survivals(figures: dict[str, Any]) -> None:
    def theirs(machines: list[Machine], layers: int) -> list[Placed]:
        return petals.place_one_by_one(machines, layers)

    rates = []
    for place in (place_and_settle, theirs):
        told = [survives_quarter(LARGE, LAYERS, seed, place) for seed in range(QUARTERS)]
        possible = [one for one in told if one is not None]
        rates.append(mean(possible))
    print(
        f"a random quarter of {LARGE} peers dies at once: all layers have a peer left in {rates[0]:.0%} of"
        f" {QUARTERS} runs, with Petals' placement in {rates[1]:.0%}",
        flush=True,
    )
    figures["survive_quarter"] = round(rates[0], 3)


# ---------------------------------------------------------------- routing


def _routings(seeds: int, figures: dict[str, Any]) -> list[Routing]:
    print(
        f"routing: {LARGE} peers, a closed loop of sessions; parts of the maximum flow through the placement"
    )
    print("  sessions  rules   tokens/s  bound  part  first token  ms/token p50  p99  hops  busy")
    run: list[Routing] = []
    for sessions in SESSIONS:
        ours = [try_routing(sessions, LARGE, LAYERS, seed) for seed in range(seeds)]
        _tell_routing(sessions, "ours", ours)
        _tell_routing(sessions, "Petals", [try_routing(sessions, LARGE, LAYERS, 0, theirs=True)])
        figures[f"routing_{sessions}"] = round(mean(one.efficiency for one in ours), 3)
        run += ours
    _tell_routing(SESSIONS[0], "standby", [try_routing(SESSIONS[0], LARGE, LAYERS, 0, standbys=True)])
    _tell_routing(1, "ours", [try_routing(1, LARGE, LAYERS, 0)])
    return run


def _tell_routing(sessions: int, rules: str, runs: Sequence[Routing]) -> None:
    print(
        f"  {sessions:8}  {rules:7} {mean(one.tokens_per_s for one in runs):8.0f}"
        f"  {mean(one.bound for one in runs):5.0f}  {mean(one.efficiency for one in runs):.2f}"
        f"  {mean(one.first_token_s for one in runs):9.2f} s"
        f"  {mean(one.gap_ms[0] for one in runs):12.0f}  {mean(one.gap_ms[1] for one in runs):4.0f}"
        f"  {mean(one.hops for one in runs):4.1f}  {mean(one.busy for one in runs):4.0%}",
        flush=True,
    )


# ---------------------------------------------------------------- churn


def _churn(peers: int, hours: float) -> Hour:
    print(f"{peers} peers for {hours:g} h; Weibull lives of shape 0.5, outages of 3 % at once:")
    hour = try_churn(peers, LAYERS, 0, hours=hours)
    _tell_hour(hour, hours)
    return hour


def _storms(seeds: int, figures: dict[str, Any]) -> list[Hour]:
    """So many losses that the tail of recoveries shows."""
    storms = [
        try_churn(
            STORM_PEERS,
            LAYERS,
            seed,
            hours=STORM_HOURS,
            users=Users(count=STORM_PEERS // 2),
            churn=Churn(mean_life_s=900.0, outage_every_s=300.0),
        )
        for seed in range(seeds)
    ]
    print(
        f"{STORM_PEERS} peers that live 15 minutes, {STORM_PEERS // 2} answers at all times, for"
        f" {60 * STORM_HOURS:.0f} minutes; {seeds} seeds:"
    )
    for storm in storms:
        _tell_hour(storm, STORM_HOURS)
    recoveries = [each for storm in storms for each in storm.told.recoveries]
    figures["recovery_p99_s"] = round(quantile(recoveries, 0.99), 2)
    return storms


def _tell_hour(hour: Hour, hours: float) -> None:
    told = hour.told
    print(
        f"  {told.deaths} peers died, {told.joined} came; {told.moves / hours:.0f} moves an hour,"
        f" {hour.settled_moves} of them in the last tenth;"
        f" layers that a move left without a peer: {told.orphaned}"
    )
    print(
        f"  {told.answers} answers, {told.tokens} tokens, {told.failed} failed, {mean(told.hops):.1f} hops;"
        f" first token p50 {quantile(told.first_tokens, 0.5):.2f} s,"
        f" p99 {quantile(told.first_tokens, 0.99):.2f} s;"
        f" token p50 {1000 * quantile(told.gaps, 0.5):.0f} ms, p99 {1000 * quantile(told.gaps, 0.99):.0f} ms"
    )
    for error, count in told.errors.most_common(3):
        print(f"  failed {count} times: {error}")
    for who, times in (("somebody stood by", told.recoveries), ("nobody did", told.replays)):
        print(
            f"  {len(times)} times a peer of an answer died and {who}: from its death to the next token"
            f" p50 {quantile(times, 0.5):.2f} s, p99 {quantile(times, 0.99):.2f} s"
        )
    print(f"  {hour.events} events in {hour.wall_s:.0f} s, trace {hour.trace}", flush=True)


if __name__ == "__main__":
    app()
