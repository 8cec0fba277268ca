"""The report of a run: one JSON document, the same for simulation and replay.

Denominators: attainment counts every request, served or not, so that a scheduler cannot
look better by refusing work. Goodput counts requests that met their promise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from concertmaster.core.request import ServiceClass
from concertmaster.workload.records import CallRecord, Gauges, RunRecords, WorkflowRecord

Report = dict[str, Any]
"""JSON object; keys as in docs/metrics.md. A number that was not measured is null."""

PERCENTILES = (50, 90, 95, 99)


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles (nearest rank); nulls for no values.

    >>> summary([3.0, 1.0, 2.0])["p50"]
    2.0
    """
    keys = [f"p{percent}" for percent in PERCENTILES]
    if not values:
        return dict.fromkeys(["mean", *keys])
    ranked = sorted(values)
    out: dict[str, float | None] = {"mean": math.fsum(ranked) / len(ranked)}
    for percent, key in zip(PERCENTILES, keys, strict=True):
        out[key] = ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]
    return out


def build_report(run: RunRecords) -> Report:
    """Sum a run up."""
    calls, workflows = run.calls, run.workflows
    served = [call for call in calls if call.outcome == "served"]
    graded = [
        w.success or 0.0 for w in workflows if w.success is not None or w.outcome != "completed"
    ]
    return {
        "policy": run.policy,
        "seed": run.seed,
        "workflows": _outcomes(workflows, "completed"),
        "requests": _outcomes(calls, "served"),
        "makespan_s": summary(_makespans(workflows)),
        "e2e_s": summary(_durations(served, lambda call: call.finished_s)),
        "ttft_s": summary(_durations(served, lambda call: call.first_token_s)),
        "tpot_s": summary([tpot for call in served if (tpot := _tpot_s(call)) is not None]),
        "e2e_per_output_token_s": {"mean": _per_token(served)},
        "success_ratio": _mean(graded) if any(w.success is not None for w in workflows) else None,
        "slo_attainment_ratio": _mean([call.met for call in calls]),
        "goodput_rps": sum(call.met for call in calls) / run.duration_s if run.duration_s else None,
        "by_class": {
            service_class.value: _class_report(
                [call for call in calls if call.service_class is service_class],
                [one for one in workflows if one.service_class is service_class],
            )
            | {"kv_reserved_gb_s": _reserved_gb_s(run.gauges, service_class)}
            for service_class in ServiceClass
        },
        "queue_wait_s": summary(_durations(calls, lambda call: call.dispatched_s)),
        **_gauges(run.gauges, calls),
        "scheduler": _decisions(run.decision_s),
        "wall_s": run.wall_s,
    }


def _outcomes(rows: Sequence[CallRecord | WorkflowRecord], good: str) -> dict[str, int]:
    counts = {"total": len(rows), "completed": 0, "rejected": 0, "failed": 0}
    for row in rows:
        counts["completed" if row.outcome == good else row.outcome] += 1
    return counts


def _makespans(workflows: Iterable[WorkflowRecord]) -> list[float]:
    return [w.finished_s - w.arrival_s for w in workflows if w.finished_s is not None]


def _durations(
    calls: Iterable[CallRecord], end: Callable[[CallRecord], float | None]
) -> list[float]:
    return [end_s - call.arrival_s for call in calls if (end_s := end(call)) is not None]


def _tpot_s(call: CallRecord) -> float | None:
    if call.output_tokens < 2 or call.first_token_s is None or call.finished_s is None:
        return None
    return (call.finished_s - call.first_token_s) / (call.output_tokens - 1)


def _per_token(served: Sequence[CallRecord]) -> float | None:
    """Mean over requests of E2E latency by its output tokens, as Chimera 1.3 reports it."""
    return _mean(
        [
            (call.finished_s - call.arrival_s) / max(1, call.output_tokens)
            for call in served
            if call.finished_s is not None
        ]
    )


def _class_report(calls: Sequence[CallRecord], workflows: Sequence[WorkflowRecord]) -> Report:
    return {
        "slo_attainment_ratio": _mean([call.met for call in calls]),
        "makespan_s": summary(_makespans(workflows)),
        "queue_wait_s": summary(_durations(calls, lambda call: call.dispatched_s)),
    }


_GAUGE_KEYS = {
    "kv": {
        "reserved_gb_s": "kv_reserved_gb_s",
        "used_gb_s": "kv_used_gb_s",
        "reserved_peak_gb": "kv_reserved_peak_gb",
        "preemptions": "preemptions",
    },
    "weights": {"cold_starts": "cold_starts", "wakes": "wakes", "ready_wait_s": "ready_wait_s"},
    "fleet": {
        "gpu_s": "gpu_s",
        "replica_starts": "replica_starts",
        "replica_stops": "replica_stops",
    },
}
_DOES_NOT_FIT = frozenset({"too_long", "context_length_exceeded"})
"""The core's word for a call that no KV cache or context holds, and the gateway's on the wire."""


def _gauges(gauges: Gauges | None, calls: Sequence[CallRecord]) -> Report:
    """Group the gauges; nulls where nobody could look, and the refusals that the calls tell."""
    report: Report = {
        group: {
            key: None if gauges is None else getattr(gauges, field) for key, field in keys.items()
        }
        for group, keys in _GAUGE_KEYS.items()
    }
    report["kv"]["refused"] = sum(call.reason in _DOES_NOT_FIT for call in calls)
    return report


def _reserved_gb_s(gauges: Gauges | None, service_class: ServiceClass) -> float | None:
    return None if gauges is None else gauges.kv_reserved_gb_s_by.get(service_class, 0.0)


def _decisions(decision_s: Sequence[float]) -> Report:
    seconds = summary(decision_s)
    return {
        "decisions": len(decision_s),
        "decision_s_p50": seconds["p50"],
        "decision_s_p99": seconds["p99"],
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
