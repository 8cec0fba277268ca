"""What the study of tails plays: fleets, workloads, the promise, and the load.

Nothing that is measured is learnt from: templates, training and warm-up have other seeds.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from concertmaster import compose, forecaster
from concertmaster.core.fleet import Fleet
from concertmaster.predictors.interface import Predictor
from concertmaster.reproduce.attainment import Enough, attained
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.reproduce.kept import kept
from concertmaster.reproduce.ledger import FOLDER
from concertmaster.reproduce.search import highest
from concertmaster.reproduce.stores import trained_store
from concertmaster.reproduce.swarmx_arms import ARMS, BLIND, Forecasts
from concertmaster.reproduce.window import makespans_s, middle
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords

TEMPLATES, TRAINED_ON, WARM_UP = 1500, 600, 200
TEMPLATE_SEED, TRAINING_SEED, WARM_UP_SEED = 0, 77, 4242
WARM_UP_LOAD = 0.3
"""Of the guess at which the search for load 1 begins."""

WORKFLOWS = 300
SEARCH_SEEDS = (900, 901, 902)

SLO_FACTOR = 3.0
"""Promised: this many times the median makespan on an idle fleet under the blind arm."""

PROMISED = 0.9
"""Share of workflows that meet the promise at load 1 under the blind arm."""

IDLE_RPS_PER_GPU = 0.001


class World(NamedTuple):
    """A fleet and what it is asked.

    Attributes:
        times: How many times the fleet of 16 GPUs.
        workload: A generator and at least one of its settings, so that more may follow.
        guess_rps: Where the search for its load begins, for 16 GPUs.
        sized_as: The world of 16 GPUs whose load, times ``times``, is taken for this one;
            "" to search.
        learnt: What training and warm-up draw from; "" for ``workload`` under other seeds.
        workflows: How many a run plays.
    """

    fleet: str
    times: int
    workload: str
    guess_rps: float = 0.75
    sized_as: str = ""
    learnt: str = ""
    workflows: int = WORKFLOWS


DEEP = "research/a100+a40/16"
"""Where claims on deep research are measured."""

CODING, CODING_ONE = "coding/h20+l20/16", "coding-one-model/h20/16"
"""Recorded sessions: one model plans and another acts, or one does both."""

PLANNING_MODEL = "qwen3-30b-a3b-instruct-2507"


def _coding(fleet: str, more: str = "") -> World:
    """Return a world of recorded sessions, each measured or learnt from, never both."""
    measured, learnt = (f"coding:part={part}{more}" for part in ("test", "train"))
    return World(fleet, 1, measured, 0.03, learnt=learnt, workflows=120)


WORLDS: Mapping[str, World] = {
    DEEP: World("research-a100-a40", 1, "research:told=0.85"),
    "four-peak/h20+l20/16": World("research-h20-l20", 1, "research:fanout=four-peak", 0.98),
    "video/a100+a40/16": World("video-a100-a40", 1, "video:told=0.9", 0.18),
    "research/a100+a40/48": World("research-a100-a40", 3, "research:told=0.85", sized_as=DEEP),
    "research/a100+a40/128": World("research-a100-a40", 8, "research:told=0.85", sized_as=DEEP),
    "research/h20+l20/16": World("research-h20-l20", 1, "research:told=0.85"),
    "four-peak/a100+a40/32": World("research-a100-a40", 2, "research:fanout=four-peak"),
    "video/h20+l20/32": World("video-h20-l20", 2, "video:told=0.9", 0.3),
    CODING: _coding("coding-h20-l20"),
    CODING_ONE: _coding("coding-single-h20", f",actor={PLANNING_MODEL}"),
}
"""Worlds by name: workload, GPUs and how many."""


@cache
def fleet_of(world: str) -> Fleet:
    """Return the fleet of a world."""
    return study_fleet(WORLDS[world].fleet, times=WORLDS[world].times)


def plans(workload: str, count: int, seed: int) -> Sequence[WorkflowPlan]:
    """Draw workflows, or all that there are."""
    return load_source(f"{workload},workflows={count}", seed=seed).plans


def learnt(world: str, count: int, seed: int) -> Sequence[WorkflowPlan]:
    """Draw workflows that are not measured."""
    return plans(WORLDS[world].learnt or WORLDS[world].workload, count, seed)


@cache
def templates_of(world: str) -> Sequence[WorkflowPlan]:
    """Return the workflows that runs draw from."""
    return plans(WORLDS[world].workload, TEMPLATES, TEMPLATE_SEED)


def _kept(world: str, what: str, *further: object) -> tuple[object, ...]:
    drawn = TEMPLATES, TEMPLATE_SEED, SEARCH_SEEDS, WARM_UP_SEED
    return (what, WORLDS[world], fleet_of(world), drawn, SLO_FACTOR, ARMS[BLIND], *further)


@cache
def slo_s(world: str) -> float:
    """Seconds in which a workflow is promised to be done."""
    if WORLDS[world].sized_as:
        return slo_s(WORLDS[world].sized_as)

    def measure() -> float:
        rate_rps = IDLE_RPS_PER_GPU * 16 * WORLDS[world].times
        run = play(world, BLIND, rate_rps=rate_rps, workflows=200, seed=SEARCH_SEEDS[0])
        return SLO_FACTOR * median(makespans_s(run))

    return kept(FOLDER, "swarmx-slo", _kept(world, "slo"), measure)


@cache
def rate_of(world: str) -> float:
    """Workflows a second at load 1: the most at which the blind arm keeps 90 % of promises."""
    if WORLDS[world].sized_as:
        return WORLDS[world].times * rate_of(WORLDS[world].sized_as)

    def meets(rate_rps: float) -> bool:
        count = WORLDS[world].workflows
        return keeps(world, BLIND, PROMISED, rate_rps=rate_rps, workflows=count, seeds=SEARCH_SEEDS)

    start = WORLDS[world].guess_rps * WORLDS[world].times
    key = _kept(world, "rate", PROMISED)
    return kept(FOLDER, "swarmx-rate", key, lambda: highest(meets, start=start, step=1.12))


def attained_ratio(run: RunRecords, within_s: float) -> float:
    """Share of the workflows of a run's middle that were done in time; lost ones were not."""
    asked = middle(run).workflows
    done = sum(
        one.finished_s is not None and one.finished_s - one.arrival_s <= within_s for one in asked
    )
    return done / len(asked)


@cache
def _warm(world: str, forecasts: Forecasts) -> Predictor:
    fleet = fleet_of(world)
    predictor = forecaster.predictor_of(_source(world, forecasts), fleet)
    workload = draw(
        learnt(world, WARM_UP, WARM_UP_SEED),
        workflows=WARM_UP,
        rate_rps=WARM_UP_LOAD * WORLDS[world].guess_rps * WORLDS[world].times,
        seed=WARM_UP_SEED,
    )
    compose.simulate(fleet, workload, BLIND, seed=WARM_UP_SEED, predictor=predictor)
    return predictor


def _source(world: str, forecasts: Forecasts) -> str:
    if forecasts == "recent":
        return forecaster.RECENT
    shown = learnt(world, TRAINED_ON, TRAINING_SEED)
    name = WORLDS[world].learnt or WORLDS[world].workload
    return str(trained_store(shown, name=name, seed=TRAINING_SEED, keep_in=Path(FOLDER)))


def predictor_of(world: str, forecasts: Forecasts) -> Predictor:
    """Return forecasts as they stand after the warm-up, to be used up by one run."""
    return copy.deepcopy(_warm(world, forecasts))


def play(world: str, arm: str, *, rate_rps: float, workflows: int, seed: int) -> RunRecords:
    """Run one arm on Poisson arrivals."""
    return _play(world, arm, _arriving(world, rate_rps, workflows, seed), seed)


def keeps(
    world: str, arm: str, share: float, *, rate_rps: float, workflows: int, seeds: Sequence[int]
) -> bool:
    """Say whether an arm keeps a share of promises at a rate, over all seeds together."""
    drawn = {seed: _arriving(world, rate_rps, workflows, seed) for seed in seeds}
    return attained(drawn, partial(_play, world, arm), within_s=slo_s(world), share=share)


def _arriving(world: str, rate_rps: float, workflows: int, seed: int) -> Workload:
    return draw(templates_of(world), workflows=workflows, rate_rps=rate_rps, seed=seed)


def _play(
    world: str, arm: str, workload: Workload, seed: int, enough: Enough | None = None
) -> RunRecords:
    return compose.simulate(
        fleet_of(world),
        workload,
        ARMS[arm].policy,
        seed=seed,
        predictor=predictor_of(world, ARMS[arm].forecasts),
        enough=enough,
    )
