"""What a simulation reads off its fleet: promises by class, samples, and who served when."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from concertmaster.compose import simulate
from concertmaster.core.fleet import Fleet
from concertmaster.core.request import ServiceClass
from concertmaster.observe.report import build_report
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.sim.incidents import Incident, loss
from concertmaster.workload.arrivals import POISSON
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import Gauges, RunRecords

CLASSES = tuple(ServiceClass)
LARGE, MIDDLE, MIXED = (
    "qwen2.5-32b-instruct",
    "qwen2.5-14b-instruct",
    "qwen3-30b-a3b-instruct-2507",
)


@cache
def fleet() -> Fleet:
    return study_fleet("shared-a100-40g")


def workload(*, only: ServiceClass | None = None) -> Workload:
    """Return research on three models, of which two pairs of GPUs hold two."""
    specs = [
        f"research:workflows=8,big={big},small={small}"
        for big, small in ((LARGE, MIXED), (MIDDLE, LARGE))
    ]
    drawn = load_workloads(specs, seed=3, arrivals=POISSON, rate_rps=0.5)
    plans = tuple(
        replace(plan, service_class=only or CLASSES[at % 2]) for at, plan in enumerate(drawn)
    )
    return replace(drawn, workflows=plans)


@cache
def played(*, only: ServiceClass | None = None, kills: bool = False) -> RunRecords:
    incidents: list[Incident] = loss(fleet(), 0.5, at_s=40.0) if kills else []
    asked = workload(only=only)
    return simulate(fleet(), asked, "fcfs/lru-swap", seed=0, incidents=incidents)


def gauges(run: RunRecords) -> Gauges:
    assert run.gauges is not None
    return run.gauges


def test_what_is_promised_is_divided_between_classes_without_rest() -> None:
    found = gauges(played())

    assert {*found.kv_reserved_gb_s_by} == {*CLASSES}
    assert min(found.kv_reserved_gb_s_by.values()) > 0
    assert sum(found.kv_reserved_gb_s_by.values()) == pytest.approx(found.kv_reserved_gb_s)


@pytest.mark.parametrize("only", CLASSES)
def test_a_class_alone_has_all_that_is_promised(only: ServiceClass) -> None:
    run = played(only=only)
    report = build_report(run)

    shares = {name: report["by_class"][name]["kv_reserved_gb_s"] for name in CLASSES}
    assert shares[only] == pytest.approx(report["kv"]["reserved_gb_s"])
    assert sum(shares.values()) == pytest.approx(shares[only])


def test_classes_have_no_promises_where_nobody_could_look() -> None:
    report = build_report(replace(played(), gauges=None))

    assert {one["kv_reserved_gb_s"] for one in report["by_class"].values()} == {None}


def test_samples_are_in_order_and_reach_the_peak() -> None:
    found = gauges(played())
    instants_s = [at_s for at_s, _, _ in found.kv_samples]

    assert instants_s == sorted(instants_s)
    assert max(gb for _, gb, _ in found.kv_samples) == found.kv_reserved_peak_gb


@pytest.mark.parametrize("kills", [False, True])
def test_each_start_begins_one_span_of_service_and_spans_do_not_overlap(*, kills: bool) -> None:
    run = played(kills=kills)
    found = gauges(run)
    by_replica: dict[str, list[tuple[float, float]]] = {}
    for name, begin_s, end_s in sorted(found.served_spans):
        by_replica.setdefault(name, []).append((begin_s, end_s))

    assert found.replica_starts >= 3
    assert found.replica_stops >= 1
    if not kills:
        assert len(found.served_spans) == found.replica_starts
    for spans in by_replica.values():
        assert all(0 <= begin_s <= end_s <= run.duration_s for begin_s, end_s in spans)
        assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_calls_are_answered_while_their_replica_serves() -> None:
    run = played()
    spans = gauges(run).served_spans

    for call in run.calls:
        assert any(
            name == call.replica_id and begin_s <= call.first_token_s <= end_s
            for name, begin_s, end_s in spans
            if call.first_token_s is not None
        )
