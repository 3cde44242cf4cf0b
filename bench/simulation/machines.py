"""The machines of a simulated swarm: how fast, how large, how far away, and how long they stay."""

from __future__ import annotations

import math
import random

import msgspec

from peer.placement import Placed, choose_span, spans_of_length
from shared.identity import PeerId
from shared.spans import Span


class Class(msgspec.Struct, frozen=True):
    """One kind of home machine. Faster ones have more memory; within a class it varies."""

    part: float
    """Of all machines."""
    speed: float
    """Layer-tokens per second."""
    least_memory: float
    most_memory: float
    """Parts of all layers that fit."""
    kv_positions: int
    """Positions of chats that fit, through its whole span."""
    upload_mbit: float


MIX = (
    Class(0.35, 60.0, 0.06, 0.12, 16_000, 20.0),
    Class(0.35, 400.0, 0.12, 0.25, 64_000, 40.0),
    Class(0.20, 1500.0, 0.25, 0.40, 256_000, 100.0),
    Class(0.10, 4000.0, 0.40, 0.50, 512_000, 200.0),
)
NEAREST_S, FARTHEST_S = 0.00375, 0.01875
"""One way from a home to the middle of the net: between two homes that makes round trips of 15 to 75 ms."""
LIFE_SHAPE = 0.5
"""Of the Weibull distribution: many leave soon, and who has stayed long stays longer."""
ROW_BYTES = 8192
"""One position's hidden states: 4096 numbers in bfloat16."""


class Machine(msgspec.Struct, frozen=True):
    """One machine of a home."""

    number: int
    speed: float
    layers: int
    """How many fit."""
    delay_s: float
    row_s: float
    """What its uplink takes for one position's hidden states."""
    kv_positions: int

    @property
    def id(self) -> PeerId:
        return PeerId(f"{self.number:08x}")


def draw_machine(numbers: random.Random, number: int, layer_count: int) -> Machine:
    kind = numbers.choices(MIX, [each.part for each in MIX])[0]
    memory = numbers.uniform(kind.least_memory, kind.most_memory)
    return Machine(
        number,
        kind.speed,
        max(1, round(memory * layer_count)),
        numbers.uniform(NEAREST_S, FARTHEST_S),
        ROW_BYTES * 8 / (kind.upload_mbit * 1e6),
        kind.kv_positions,
    )


def draw_machines(numbers: random.Random, count: int, layer_count: int) -> list[Machine]:
    return [draw_machine(numbers, number, layer_count) for number in range(count)]


def draw_life_s(numbers: random.Random, mean_s: float) -> float:
    return numbers.weibullvariate(mean_s / math.gamma(1 + 1 / LIFE_SHAPE), LIFE_SHAPE)


def place_one_by_one(machines: list[Machine], layer_count: int) -> list[Placed]:
    """As newcomers choose, one after another."""
    swarm: list[Placed] = []
    for machine in machines:
        options = spans_of_length(machine.layers, layer_count)
        span: Span = choose_span(swarm, options, machine.speed, layer_count).span
        swarm.append(Placed(machine.id, span, machine.speed))
    return swarm
