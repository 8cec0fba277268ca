"""What goes wrong when: a plan drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["faults", "kill engine", "kill gateway", "fill disk", "jump clock"]

SPEEDUP = 20.0
"""How much faster than real the emulated engines run; their stalls and drips are divided by it."""

ENGINES = 3
ALL = -1
STEP_S = (0.8, 2.0)
"""Least and most time between two steps, and how long each lasts."""

STORMS: tuple[dict[str, float | bool], ...] = (
    {"error_ratio": 1.0},
    {"error_ratio": 0.4, "death_ratio": 0.2},
    {"full_ratio": 1.0},
    {"full_ratio": 0.5},
    {"stall_ratio": 0.5, "stall_s": 60.0 * SPEEDUP},
    {"stall_ratio": 0.5, "stall_s": 0.5 * SPEEDUP},
    {"drip_s": 0.05 * SPEEDUP},
    {"death_ratio": 1.0},
    {"death_ratio": 0.3, "stall_ratio": 0.3, "stall_s": 60.0 * SPEEDUP},
    {"rename_metrics": True},
)


@dataclass(frozen=True)
class Step:
    """One thing that goes wrong, and for how long.

    Attributes:
        at_s: Seconds after the beginning.
        engine: Which one, where it is one; ``ALL`` for all at once.
        faults: What the engine is told to do wrong.
        jump_s: By how much the gateway's clock jumps.
    """

    at_s: float
    lasts_s: float
    kind: Kind
    engine: int = 0
    faults: dict[str, float | bool] = field(default_factory=dict)
    jump_s: float = 0.0


def plan(seed: int, duration_s: float) -> list[Step]:
    """Draw what goes wrong; the first steps are one of each kind, as far as there is time."""
    rng = random.Random(seed)
    kinds = _kinds(rng)
    steps, at_s = [], 0.5
    while at_s < duration_s:
        step = _step(rng, at_s, next(kinds))
        steps.append(step)
        at_s += rng.uniform(*STEP_S)
    return steps


def _kinds(rng: random.Random) -> Iterator[Kind]:
    first: list[Kind] = ["faults", "kill engine", "kill gateway", "fill disk", "jump clock"]
    yield from rng.sample(first, len(first))
    while True:
        yield rng.choices(first, (12, 2, 1, 1, 1))[0]


def _step(rng: random.Random, at_s: float, kind: Kind) -> Step:
    return Step(
        at_s=round(at_s, 3),
        lasts_s=round(rng.uniform(*STEP_S), 3),
        kind=kind,
        engine=ALL if kind == "faults" and rng.random() < 0.2 else rng.randrange(ENGINES),
        faults=rng.choice(STORMS) if kind == "faults" else {},
        jump_s=rng.choice((-30.0, -1.0, 1.0, 4.0)),
    )
