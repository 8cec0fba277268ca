"""Parts into one workload: arrivals settled, rates scaled, the whole sorted and cut."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from concertmaster.core.errors import InputError
from concertmaster.core.request import WorkflowId
from concertmaster.workload.arrivals import ArrivalSpec, checked_rate
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What the user asked of the arrivals.

    Attributes:
        arrivals: ``None`` replays what was recorded.
        rate_rps: Mean workflows a second, all parts together; ``None`` keeps the recorded.
        rate_scale: Every gap is divided by it.
        limit: Most workflows to keep: the first to arrive.
    """

    arrivals: ArrivalSpec | None = None
    rate_rps: float | None = None
    rate_scale: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        checked_rate("--rate", self.rate_rps)
        checked_rate("--rate-scale", self.rate_scale)
        if self.limit is not None and self.limit < 1:
            problem = f"expected a whole number >= 1, found {self.limit}"
            raise InputError("--limit", "", problem, "leave it out for all workflows")


def merge(sources: Sequence[Source], timing: Timing, rng: random.Random) -> list[WorkflowPlan]:
    """Sort the workflows of all parts by arrival, the first one at 0."""
    sources = [from_zero(source) for source in distinct(sources)]
    spec = timing.arrivals
    if spec is None or spec.kind == "trace":
        plans = _replayed(sources, timing)
    else:
        plans = _drawn(sources, spec, timing, rng)
    plans.sort(key=lambda plan: (plan.arrival_s, plan.workflow_id))
    return plans[: timing.limit]


def from_zero(source: Source) -> Source:
    """Shift a part so that its first workflow arrives at 0."""
    start_s = min((plan.arrival_s for plan in source.plans), default=0.0)
    if not start_s:
        return source
    plans = [replace(plan, arrival_s=plan.arrival_s - start_s) for plan in source.plans]
    return replace(source, plans=plans)


def distinct(sources: Sequence[Source]) -> list[Source]:
    """Rename workflows whose id another part has already: ``id~2``."""
    taken: set[str] = set()
    renamed = []
    for source in sources:
        plans = [_renamed(plan, taken) for plan in source.plans]
        taken.update(plan.workflow_id for plan in plans)
        renamed.append(replace(source, plans=plans))
    return renamed


def _renamed(plan: WorkflowPlan, taken: set[str]) -> WorkflowPlan:
    name, count = plan.workflow_id, 1
    while name in taken:
        count += 1
        name = WorkflowId(f"{plan.workflow_id}~{count}")
    return plan if name == plan.workflow_id else replace(plan, workflow_id=name)


def _replayed(sources: Sequence[Source], timing: Timing) -> list[WorkflowPlan]:
    for source in sources:
        if not source.timed:
            raise _untimed(source, "--arrivals poisson --rate 2")
    plans = [plan for source in sources for plan in source.plans]
    scale = timing.rate_scale
    if timing.rate_rps is not None:
        span_s = max(plan.arrival_s for plan in plans)
        if not span_s:
            problem = "expected arrivals that differ, to scale them to a rate, found one instant"
            raise InputError(sources[0].name, "arrivals", problem, "add --arrivals poisson")
        scale *= timing.rate_rps * span_s / (len(plans) - 1)
    if scale == 1.0:
        return plans
    return [replace(plan, arrival_s=plan.arrival_s / scale) for plan in plans]


def _untimed(source: Source, remedy: str) -> InputError:
    problem = "expected recorded arrivals, found none"
    return InputError(source.name, "arrivals", problem, f"add {remedy}")


def _drawn(
    sources: Sequence[Source], spec: ArrivalSpec, timing: Timing, rng: random.Random
) -> list[WorkflowPlan]:
    """Draw arrivals for all parts together, their workflows evenly mixed."""
    rate_rps = timing.rate_rps
    if rate_rps is None:
        rate_rps = sum(_recorded_rps(source) for source in sources)
    queues = [iter(_ordered(source, rng)) for source in sources]
    turns = [at for at, source in enumerate(sources) for _ in source.plans]
    rng.shuffle(turns)
    turns = turns[: timing.limit]
    instants_s = spec.instants_s(len(turns), rate_rps * timing.rate_scale, rng)
    return [
        replace(next(queues[turn]), arrival_s=arrival_s)
        for turn, arrival_s in zip(turns, instants_s, strict=True)
    ]


def _recorded_rps(source: Source) -> float:
    """Return the mean rate of a part that has one."""
    if not source.timed:
        raise _untimed(source, "a rate, for example --rate 2")
    span_s = max(plan.arrival_s for plan in source.plans)
    if not span_s:
        raise _untimed(source, "a rate, for example --rate 2")
    return (len(source.plans) - 1) / span_s


def _ordered(source: Source, rng: random.Random) -> list[WorkflowPlan]:
    """Keep the recorded order; files without arrivals are sorted by app, so shuffle those."""
    plans = list(source.plans)
    if source.timed:
        plans.sort(key=lambda plan: (plan.arrival_s, plan.workflow_id))
    else:
        rng.shuffle(plans)
    return plans
