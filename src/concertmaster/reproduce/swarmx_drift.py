"""Drift: a fleet loses most of its capacity while it serves, or what it is asked changes.

Each incident is played as it happens, and on a fleet to which it happened before the first
arrival, under the recipe that adapts. The latter says what P90 can be reached; the former how
soon it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from concertmaster import compose
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.reproduce import swarmx_world as world_of
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.swarmx_arms import ARMS, SETTLED
from concertmaster.sim.incidents import Incident, loss, replicas_of, slowing
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords, WorkflowRecord

LOST_RATIO = 0.71
"""Share of capacity that is lost: as in the drift experiment of SwarmX."""

STRICKEN_S, LASTS_S = 300.0, 900.0
"""When it happens, and when the last workflow arrives."""

WINDOW_S, STEP_S = 60.0, 10.0
"""Width of the windows that P90 is taken in, and the distance between them."""

NEAR = 1.2
"""P90 has recovered when it is at most so many times what can be reached."""

SLOWER = 10.0


class Scenario(NamedTuple):
    """What happens, and under which load.

    Attributes:
        load: Share of load 1, whose promises the fleet kept before.
        strike: Incidents of a fleet at an instant.
        longer: Whether the longer half of the templates alone is asked for from then on.
    """

    load: float
    strike: Callable[[Fleet, float], Sequence[Incident]]
    longer: bool = False


def _throttled(fleet: Fleet, at_s: float) -> list[Incident]:
    """Slow so many replicas tenfold that as much is lost as if the share had died."""
    share = min(1.0, LOST_RATIO / (1 - 1 / SLOWER))
    dead = loss(fleet, share, at_s=at_s)
    return slowing([one.replica_id for one in dead], SLOWER, at_s=at_s)


def _one_slow(fleet: Fleet, at_s: float) -> list[Incident]:
    first: list[ReplicaId] = [replicas_of(fleet, pool.pool_id)[0] for pool in fleet.pools]
    return slowing(first, 4.0, at_s=at_s)


def _nothing(_fleet: Fleet, _at_s: float) -> list[Incident]:
    return []


SCENARIOS: Mapping[str, Scenario] = {
    "loss": Scenario(0.25, lambda fleet, at_s: loss(fleet, LOST_RATIO, at_s=at_s)),
    "throttle": Scenario(0.25, _throttled),
    "slow": Scenario(0.8, _one_slow),
    "mix": Scenario(0.6, _nothing, longer=True),
}
"""What befalls the fleet, by name."""


class Frozen:
    """Forecasts as they stood: what is seen teaches nothing."""

    def __init__(self, inner: Predictor) -> None:
        self.reads_prompts = inner.reads_prompts
        self._inner = inner

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Pass on."""
        return self._inner.predict(request, prompt)

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Do not."""

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Do not."""


def drift(world: str, scenario: str, arm: str, *, seed: int) -> dict[str, float | list[float]]:
    """Play one scenario under one arm and say how P90 went."""
    run = _play(world, scenario, arm, at_s=0.0 if arm == SETTLED else STRICKEN_S, seed=seed)
    times_s, p90s_s = timeline(run.workflows)
    lost = sum(one.outcome != "completed" for one in run.workflows)
    return {
        "p90_after_s": p90_s([one for one in run.workflows if one.arrival_s >= STRICKEN_S]),
        "lost_ratio": lost / len(run.workflows),
        "timeline_s": times_s,
        "timeline_p90_s": p90s_s,
    }


def _play(world: str, scenario: str, arm: str, *, at_s: float, seed: int) -> RunRecords:
    fleet, what, how = world_of.fleet_of(world), SCENARIOS[scenario], ARMS[arm]
    predictor = world_of.predictor_of(world, how.forecasts)
    return compose.simulate(
        fleet,
        asked(world, what, at_s=at_s, seed=seed),
        how.policy,
        seed=seed,
        predictor=predictor if how.adapts else Frozen(predictor),
        incidents=what.strike(fleet, at_s),
        follow_pace=how.adapts,
    )


def asked(world: str, scenario: Scenario, *, at_s: float, seed: int) -> Workload:
    """Draw what is asked; the same workflows whenever the incident is."""
    rate_rps = scenario.load * world_of.rate_of(world)
    templates = world_of.templates_of(world)
    workflows = round(rate_rps * LASTS_S)
    workload = draw(templates, workflows=workflows, rate_rps=rate_rps, seed=seed)
    if not scenario.longer:
        return workload
    others = draw(longer_half(templates), workflows=workflows, rate_rps=rate_rps, seed=seed)
    changed = [
        plan if plan.arrival_s < at_s else replace(other, arrival_s=plan.arrival_s)
        for plan, other in zip(workload, others, strict=True)
    ]
    return Workload(name=workload.name, workflows=tuple(changed))


def longer_half(templates: Sequence[WorkflowPlan]) -> Sequence[WorkflowPlan]:
    """Return the templates with the most output tokens."""

    def output_tokens(plan: WorkflowPlan) -> int:
        return sum(call.output_tokens for call in plan.calls)

    return sorted(templates, key=lambda plan: (output_tokens(plan), plan.workflow_id))[
        len(templates) // 2 :
    ]


def p90_s(workflows: Sequence[WorkflowRecord]) -> float:
    """P90 of makespans of those that completed, by nearest rank; 0.0 if there are none."""
    done = sorted(one.finished_s - one.arrival_s for one in workflows if one.finished_s is not None)
    return done[min(len(done) - 1, int(0.9 * len(done)))] if done else 0.0


def timeline(workflows: Sequence[WorkflowRecord]) -> tuple[list[float], list[float]]:
    """P90 of the workflows that arrive in a window, by the window's start."""
    count = int((LASTS_S - WINDOW_S) / STEP_S)
    starts_s = [at * STEP_S for at in range(count)]
    windows = (
        [one for one in workflows if start_s <= one.arrival_s < start_s + WINDOW_S]
        for start_s in starts_s
    )
    return starts_s, [p90_s(window) for window in windows]


def recovery_s(times_s: Sequence[float], p90s_s: Sequence[float], reachable_s: float) -> float:
    """Seconds from the incident until P90 is near what can be reached, and stays.

    It has come back at a window if that window and all that begin in the next ``WINDOW_S`` are
    near; if none is, the time to the last window counts.
    """
    after = [(at_s, p90) for at_s, p90 in zip(times_s, p90s_s, strict=True) if at_s >= STRICKEN_S]
    for at_s, _ in after:
        near = [
            p90 <= NEAR * reachable_s for when_s, p90 in after if at_s <= when_s < at_s + WINDOW_S
        ]
        if all(near):
            return at_s - STRICKEN_S
    return after[-1][0] - STRICKEN_S
