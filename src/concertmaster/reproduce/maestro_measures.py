"""What the study of memory reads off a run, beside the figures of every report."""

from collections.abc import Mapping, Sequence

from concertmaster.core.fleet import Fleet
from concertmaster.core.request import ServiceClass
from concertmaster.observe.report import summary
from concertmaster.reproduce.window import figures, middle
from concertmaster.workload.records import CallRecord, Gauges, RunRecords, WorkflowRecord

LOST_S = 3600.0
"""Makespan that a workflow without an answer counts as: the bound on waiting."""

SAMPLES = 200
"""Samples of memory over time that are kept for a plot."""

Spans = Mapping[str, Sequence[tuple[float, float]]]
"""Model to when it was in service somewhere; spans may overlap."""


def measures(fleet: Fleet, run: RunRecords) -> dict[str, float | list[float]]:
    """Return all figures of a run."""
    kept, gauges = middle(run), run.gauges
    assert gauges is not None, "a simulation sees into its fleet"
    return {
        **figures(run),
        **_by_class(kept.workflows),
        "served_models": float(len({one.model for one in run.calls if one.outcome == "served"})),
        "completed_rps": completed_rps(run.workflows),
        "absent_ratio": absent_ratio(run.calls, _spans_of_models(fleet, gauges)),
        **_memory(gauges),
        **_residence(fleet, gauges),
    }


def _by_class(workflows: Sequence[WorkflowRecord]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in ServiceClass:
        mine = [record for record in workflows if record.service_class is one]
        if mine:
            found[f"{one.value}.met_ratio"] = sum(record.met for record in mine) / len(mine)
            found[f"{one.value}.p95_s"] = summary([makespan_s(one) for one in mine])["p95"] or 0.0
    found["all.p95_s"] = summary([makespan_s(one) for one in workflows])["p95"] or 0.0
    return found


def makespan_s(record: WorkflowRecord) -> float:
    """Return a makespan; a workflow that lost a call counts as ``LOST_S``."""
    return LOST_S if record.finished_s is None else record.finished_s - record.arrival_s


def completed_rps(workflows: Sequence[WorkflowRecord]) -> float:
    """Workflows completed a second, from the first arrival until the last of them was done."""
    ends_s = [one.finished_s for one in workflows if one.finished_s is not None]
    return len(ends_s) / (max(ends_s) - min(one.arrival_s for one in workflows)) if ends_s else 0.0


def absent_ratio(calls: Sequence[CallRecord], spans: Spans) -> float:
    """Share of the seconds that calls stood in line in which no replica of their model served.

    That is what loads cost, and what it cost to wait for one.
    """
    waits = [
        (one.arrival_s, one.dispatched_s, one.model)
        for one in calls
        if one.dispatched_s is not None and one.dispatched_s > one.arrival_s
    ]
    waited_s = sum(end_s - begin_s for begin_s, end_s, _ in waits)
    merged = {model: merge(found) for model, found in spans.items()}
    served_s = sum(
        covered_s(begin_s, end_s, merged.get(model, ())) for begin_s, end_s, model in waits
    )
    return (waited_s - served_s) / waited_s if waited_s else 0.0


def merge(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Join spans that overlap.

    >>> merge([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0)])
    [(0.0, 2.0), (3.0, 4.0)]
    """
    joined: list[tuple[float, float]] = []
    for begin_s, end_s in sorted(spans):
        if joined and begin_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((begin_s, end_s))
    return joined


def covered_s(begin_s: float, end_s: float, spans: Sequence[tuple[float, float]]) -> float:
    """Seconds of a wait that lie within spans, which do not overlap.

    >>> covered_s(1.0, 5.0, [(0.0, 2.0), (4.0, 9.0)])
    2.0
    """
    return sum(max(0.0, min(end_s, last_s) - max(begin_s, first_s)) for first_s, last_s in spans)


def _spans_of_models(fleet: Fleet, gauges: Gauges) -> Spans:
    models = {name: pool.model.name for name, (pool, _, _) in fleet.replicas.items()}
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, begin_s, end_s in gauges.served_spans:
        spans.setdefault(models[name], []).append((begin_s, end_s))  # type: ignore[index]
    return spans


def _memory(gauges: Gauges) -> dict[str, list[float]]:
    """Thin samples of memory out to what a plot shows."""
    step = max(1, -(-len(gauges.kv_samples) // SAMPLES))
    kept = gauges.kv_samples[::step]
    return {
        "memory_at_s": [at_s for at_s, _, _ in kept],
        "memory_reserved_gb": [gb for _, gb, _ in kept],
        "memory_used_gb": [gb for _, _, gb in kept],
    }


def _residence(fleet: Fleet, gauges: Gauges) -> dict[str, list[float]]:
    """When each replica served, replicas by their place in the fleet."""
    places = {str(name): float(at) for at, name in enumerate(fleet.replicas)}
    spans = sorted(gauges.served_spans)
    return {
        "served_replica": [places[name] for name, _, _ in spans],
        "served_from_s": [begin_s for _, begin_s, _ in spans],
        "served_to_s": [end_s for _, _, end_s in spans],
    }
