"""Figures of a run's middle: workflows that arrived while the fleet was neither empty nor done.

The first tenth of arrivals finds an idle fleet and the last tenth leaves one behind, so both
are left out of figures; they load the fleet all the same. Rejected and failed workflows stay
in, and count as missed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from concertmaster.observe.report import build_report
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.records import RunRecords, WorkflowRecord

WARM_UP_RATIO = 0.1
"""Share of arrivals left out at the start."""

COOL_DOWN_RATIO = 0.1
"""Share of arrivals left out at the end."""

_NOT_FIGURES = frozenset({"seed", "wall_s"})


Arrived = TypeVar("Arrived", WorkflowPlan, WorkflowRecord)


def middle_of(
    workflows: Iterable[Arrived],
    *,
    warm_up_ratio: float = WARM_UP_RATIO,
    cool_down_ratio: float = COOL_DOWN_RATIO,
) -> list[Arrived]:
    """Leave out the first and the last to arrive."""
    ranked = sorted(workflows, key=lambda one: (one.arrival_s, one.workflow_id))
    begin = int(len(ranked) * warm_up_ratio)
    return ranked[begin : len(ranked) - int(len(ranked) * cool_down_ratio)]


def middle(
    run: RunRecords,
    *,
    warm_up_ratio: float = WARM_UP_RATIO,
    cool_down_ratio: float = COOL_DOWN_RATIO,
) -> RunRecords:
    """Keep workflows that arrived in the middle, and their calls.

    ``duration_s`` becomes the time over which they arrived. Gauges stay those of the whole run.
    """
    kept = middle_of(run.workflows, warm_up_ratio=warm_up_ratio, cool_down_ratio=cool_down_ratio)
    names = {one.workflow_id for one in kept}
    return replace(
        run,
        workflows=kept,
        calls=[call for call in run.calls if call.workflow_id in names],
        duration_s=kept[-1].arrival_s - kept[0].arrival_s if kept else 0.0,
    )


def figures(
    run: RunRecords,
    *,
    warm_up_ratio: float = WARM_UP_RATIO,
    cool_down_ratio: float = COOL_DOWN_RATIO,
) -> dict[str, float]:
    """Every number of the report on a run's middle, by its path: ``makespan_s.mean``.

    ``kv``, ``weights``, ``fleet`` and ``scheduler`` are of the whole run. Added are
    ``workflows.completed_ratio`` and ``workflows.met_ratio`` (completed, in time if a time
    was promised), both over all workflows of the middle. What was not measured is absent.
    """
    kept = middle(run, warm_up_ratio=warm_up_ratio, cool_down_ratio=cool_down_ratio)
    found = dict(_flat(build_report(kept)))
    total = len(kept.workflows)
    if total:
        found["workflows.completed_ratio"] = found["workflows.completed"] / total
        found["workflows.met_ratio"] = sum(one.met for one in kept.workflows) / total
    return found


def _flat(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in report.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and key not in _NOT_FIGURES:
            yield f"{prefix}{key}", float(value)


def makespans_s(run: RunRecords) -> list[float]:
    """Makespans of the workflows that completed."""
    return [one.finished_s - one.arrival_s for one in run.workflows if one.finished_s is not None]


def quantiles(values: Sequence[float], count: int = 50) -> list[float]:
    """Thin values out to evenly spaced quantiles, enough to draw their law.

    >>> quantiles([4.0, 1.0, 3.0, 2.0], count=2)
    [1.0, 3.0]
    """
    ranked = sorted(values)
    if len(ranked) <= count:
        return ranked
    return [ranked[math.ceil((i + 0.5) / count * len(ranked)) - 1] for i in range(count)]
