"""End to end: a fleet that may double its GPUs while work comes in bursts or steps up.

A fleet under ``static`` keeps the GPUs that its world has; every other one starts with these
and finds as many more replicas of each pool on disk. What a run costs is its GPU-seconds.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from concertmaster import compose
from concertmaster.core.actions import Action, Demote, Wake
from concertmaster.core.events import Event
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId, ScalingLimits
from concertmaster.reproduce import swarmx_world as world_of
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.reproduce.swarmx_arms import ARMS
from concertmaster.reproduce.swarmx_drift import p90_s
from concertmaster.reproduce.window import figures, makespans_s, middle, quantiles
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.records import RunRecords, WorkflowRecord

MOST_TIMES = 2
"""Times the GPUs of its world that a fleet may come to."""

WINDOW_S = 60.0
"""Width of the windows of the timeline."""


class Shape(NamedTuple):
    """How work arrives.

    Attributes:
        arrivals: As ``--arrivals`` reads it.
        load: Share of load 1: the mean of bursts, or before a step.
        workflows: How many: two periods of the bursts.
    """

    arrivals: str
    load: float
    workflows: int


SHAPES: Mapping[str, Shape] = {
    "bursts": Shape("burst:6:150:300", 1.0, 620),
    "step": Shape("step:4:600", 0.5, 900),
}
"""Rates by name."""


class GpuCount:
    """Follows the GPUs of replicas that run or start; give it as observer."""

    def __init__(self, fleet: Fleet) -> None:
        self._gpus = {name: pool.tensor_parallel for name, (pool, _, _) in fleet.replicas.items()}
        self._first = sum(
            self._gpus[name]
            for name, (_, _, state) in fleet.replicas.items()
            if state is Readiness.RUNNING
        )
        self._changes: list[tuple[float, int]] = []

    def __call__(self, now_s: float, _event: Event, actions: list[Action]) -> None:
        """Note what is started and stopped."""
        for action in actions:
            if isinstance(action, Wake):
                self._changes.append((now_s, self._gpus[action.replica_id]))
            elif isinstance(action, Demote):
                self._changes.append((now_s, -self._gpus[action.replica_id]))

    def at(self, instants_s: list[float]) -> list[float]:
        """Return how many there were at each instant."""
        counts = accumulate((change for _, change in self._changes), initial=self._first)
        held = list(zip([float("-inf"), *(at_s for at_s, _ in self._changes)], counts, strict=True))
        return [float([gpus for at_s, gpus in held if at_s <= now_s][-1]) for now_s in instants_s]


@cache
def elastic_fleet(world: str) -> Fleet:
    """Return a world's fleet with as many replicas more on disk as it may start."""
    place = world_of.WORLDS[world]
    serving = world_of.fleet_of(world)
    larger = study_fleet(place.fleet, times=MOST_TIMES * place.times)

    def state(name: ReplicaId) -> Readiness:
        return Readiness.RUNNING if name in serving.replicas else Readiness.DISK

    replicas = {
        name: (pool, node, state(name)) for name, (pool, node, _) in larger.replicas.items()
    }
    return replace(larger, replicas=replicas, limits=ScalingLimits(gpus=MOST_TIMES * gpus(serving)))


def gpus(fleet: Fleet) -> int:
    """Return the GPUs that all replicas take together."""
    return sum(pool.tensor_parallel for pool, _, _ in fleet.replicas.values())


def scale(world: str, shape: str, arm: str, *, seed: int) -> dict[str, float | list[float]]:
    """Play one arm, router and scaling, and say what it took."""
    fleet, how, what = elastic_fleet(world), ARMS[arm], SHAPES[shape]
    count = GpuCount(fleet)
    run = compose.simulate(
        fleet,
        draw(
            world_of.templates_of(world),
            workflows=what.workflows,
            rate_rps=what.load * world_of.rate_of(world),
            seed=seed,
            arrivals=ArrivalSpec.parse(what.arrivals),
        ),
        how.policy,
        seed=seed,
        predictor=world_of.predictor_of(world, how.forecasts),
        observe=count,
    )
    times_s = windows_s(run.workflows)
    return {
        **figures(run),
        "attained_ratio": world_of.attained_ratio(run, world_of.slo_s(world)),
        "makespans_s": quantiles(makespans_s(middle(run))),
        "timeline_s": times_s,
        "timeline_p90_s": [_p90_s(run, at_s) for at_s in times_s],
        "timeline_gpus": count.at(times_s),
    }


def windows_s(workflows: list[WorkflowRecord]) -> list[float]:
    """Return the starts of the windows in which workflows arrive; the last one is whole."""
    last_s = max(one.arrival_s for one in workflows)
    return [WINDOW_S * at for at in range(max(1, int(last_s / WINDOW_S)))]


def _p90_s(run: RunRecords, start_s: float) -> float:
    return p90_s([one for one in run.workflows if start_s <= one.arrival_s < start_s + WINDOW_S])
