"""How soon two homes can talk, and how soon they talk directly, for each pair of routers.

Builds homes behind real routers in network namespaces (needs root, `ip` and `nft`), a relay between them.
The first word is timed from the wish to say it, the dial included, until it came back; "direct" from the same
wish until messages go directly. Without a direct way the reason is printed.

    python -m bench.nat --round-trip-ms 50 --repeat 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from itertools import combinations_with_replacement

from tests.harness.namespaces import why_unavailable
from tests.nat.lab import KINDS, Kind, Lab
from tests.nat.participant import Participant, met, participant


async def measure(ann: Participant, bob: Participant, relay: str) -> tuple[float, float | None, str]:
    """Milliseconds to the first word and to the direct link, and why there is none."""
    async with met(ann, bob, relay):
        await asyncio.gather(ann.look(), bob.look())
        first = await ann.say(bob)
        settled = await ann.settle(bob)
        direct = settled.ms if settled.path == "direct" else None
        return first.ms, direct, settled.why_relayed


async def compare(round_trip_ms: float, repeat: int) -> dict[str, dict[str, float | str | None]]:
    results = {}
    with Lab(round_trip_ms=round_trip_ms) as lab:
        async with participant(lab.left.machine) as ann, participant(lab.right.machine) as bob:
            for one, other in combinations_with_replacement(KINDS, 2):
                lab.left.router.become(one)
                lab.right.router.become(other)
                rounds = [await measure(ann, bob, lab.relay_url) for _ in range(repeat)]
                results[f"{one}-{other}"] = row = summary(rounds)
                print_row(one, other, row)
    return results


def summary(rounds: Sequence[tuple[float, float | None, str]]) -> dict[str, float | str | None]:
    """Medians; no direct time when any round had no direct link."""
    direct = [each for _, each, _ in rounds if each is not None]
    return {
        "first_ms": statistics.median(first for first, _, _ in rounds),
        "direct_ms": statistics.median(direct) if len(direct) == len(rounds) else None,
        "why_relayed": next((why for _, _, why in rounds if why), ""),
    }


def print_row(one: Kind, other: Kind, row: dict[str, float | str | None]) -> None:
    direct = f"{row['direct_ms']:>8.1f}" if row["direct_ms"] is not None else f"{'-':>8}"
    print(f"{one:>10} - {other:<10} {row['first_ms']:>8.1f} {direct}  {row['why_relayed']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--round-trip-ms", type=float, nargs="*", default=[0, 50], help="between the homes")
    parser.add_argument(
        "--repeat", type=int, default=3, help="rounds for each pair, of which the median counts"
    )
    options = parser.parse_args()
    if why := why_unavailable():
        parser.exit(1, f"no measurement: {why}\n")
    results = {}
    for round_trip_ms in options.round_trip_ms:
        print(f"{round_trip_ms:g} ms between the homes{'':>4}first ms  direct ms")
        results[f"{round_trip_ms:g}"] = asyncio.run(compare(round_trip_ms, options.repeat))
    print(json.dumps({"repeat": options.repeat, "round_trip_ms": results}))


if __name__ == "__main__":
    main()
