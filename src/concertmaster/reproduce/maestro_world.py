"""What the study of memory plays: budgets of GPUs, nine applications, three contentions.

Held-out tasks are measured; forecasts are trained and warmed up on the others.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from concertmaster import compose, forecaster
from concertmaster.core.fleet import Fleet
from concertmaster.predictors.interface import Predictor
from concertmaster.reproduce.data import data_folder
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import clustered_fleet
from concertmaster.reproduce.maestro_arms import ARMS, OURS
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.records import RunRecords

FLEET = "shared-a100-40g"
STAGES = "workflow_stages.parquet"
TEMPLATES, TEMPLATE_SEED = 1500, 0
WARM_UP, WARM_UP_SEED, WARM_UP_RPS = 300, 4242, 1.0
HORIZON_S = 150.0
"""How long workflows arrive."""

CONTENTION: Mapping[str, float] = {"low": 1.0, "medium": 2.5, "high": 5.0}
"""Workflows a second for each machine of eight GPUs."""


class World(NamedTuple):
    """A budget of GPUs.

    Attributes:
        network_ms: Round trip to each machine of eight GPUs; equal ones are one cluster.
        caps: Whether callers cap their answers tightly.
        horizon_s: How long workflows arrive.
    """

    network_ms: tuple[float, ...]
    caps: str = "guessed"
    horizon_s: float = HORIZON_S


EIGHT, TIGHT, BRIEF = "8 GPUs", "8 GPUs, tight caps", "8 GPUs, briefly"
SIXTEEN, TWO = "16 GPUs", "2 clusters of 8 GPUs, 1 and 80 ms"
TWENTY_FOUR, THREE = "24 GPUs", "3 clusters of 8 GPUs, 1, 20 and 80 ms"

WORLDS: Mapping[str, World] = {
    EIGHT: World((1,)),
    TIGHT: World((1,), "tight"),
    BRIEF: World((1,), horizon_s=40.0),
    SIXTEEN: World((1, 1)),
    TWO: World((1, 80)),
    TWENTY_FOUR: World((1, 1, 1)),
    THREE: World((1, 20, 80)),
    "32 GPUs": World((1,) * 4),
    "64 GPUs": World((1,) * 8),
}
"""Worlds by name."""


@cache
def fleet_of(world: str) -> Fleet:
    """Return the fleet of a world."""
    return clustered_fleet(FLEET, WORLDS[world].network_ms)


def plans(count: int, seed: int, *, part: str, caps: str) -> Sequence[WorkflowPlan]:
    """Draw workflows of the applications: of held-out tasks (``test``) or the others."""
    stages = data_folder() / STAGES
    spec = f"nine-apps:stages={stages},workflows={count},part={part},caps={caps}"
    return load_source(spec, seed=seed).plans


@cache
def templates_of(world: str) -> Sequence[WorkflowPlan]:
    """Return the workflows that runs draw from."""
    return plans(TEMPLATES, TEMPLATE_SEED, part="test", caps=WORLDS[world].caps)


@cache
def _warm(forecasts: str, caps: str) -> Predictor:
    """Let forecasts see traffic on the fleet of one cluster, whatever is measured."""
    fleet = fleet_of(EIGHT)
    predictor = forecaster.predictor_of(forecasts, fleet)
    shown = plans(WARM_UP, WARM_UP_SEED, part="train", caps=caps)
    workload = draw(shown, workflows=WARM_UP, rate_rps=WARM_UP_RPS, seed=WARM_UP_SEED)
    compose.simulate(fleet, workload, OURS, seed=WARM_UP_SEED, predictor=predictor)
    return predictor


def play(world: str, arm: str, *, load: float, seed: int) -> RunRecords:
    """Run one arm on Poisson arrivals of so many workflows a second for each machine."""
    place, how = WORLDS[world], ARMS[arm]
    rate_rps = load * len(place.network_ms)
    workflows = round(rate_rps * place.horizon_s)
    return compose.simulate(
        fleet_of(world),
        draw(templates_of(world), workflows=workflows, rate_rps=rate_rps, seed=seed),
        how.policy,
        seed=seed,
        predictor=copy.deepcopy(_warm(how.forecasts, place.caps)),
    )
