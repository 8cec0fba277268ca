"""Reports of one run, and several policies side by side."""

import math

import pytest

from builders import a_fleet, a_pool, chains
from concertmaster.compose import simulate
from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.observe.compare import compare_reports, half_width, mean
from concertmaster.observe.report import Report, build_report, summary
from concertmaster.workload.records import CallRecord, Gauges, RunRecords, WorkflowRecord


def a_call_record(name: str = "r1", **changes: object) -> CallRecord:
    facts: dict[str, object] = {
        "request_id": RequestId(name),
        "workflow_id": WorkflowId("w1"),
        "role": "",
        "service_class": ServiceClass.INTERACTIVE,
        "arrival_s": 0.0,
        "prompt_tokens": 100,
        "deadline_s": None,
        "dispatched_s": 1.0,
        "first_token_s": 2.0,
        "finished_s": 6.0,
        "output_tokens": 5,
        "outcome": "served",
    }
    return CallRecord(**{**facts, **changes})  # type: ignore[arg-type]


def a_workflow_record(name: str = "w1", **changes: object) -> WorkflowRecord:
    facts: dict[str, object] = {
        "workflow_id": WorkflowId(name),
        "app": "",
        "service_class": ServiceClass.INTERACTIVE,
        "arrival_s": 0.0,
        "deadline_s": None,
        "finished_s": 6.0,
        "outcome": "completed",
    }
    return WorkflowRecord(**{**facts, **changes})  # type: ignore[arg-type]


def a_run(
    *calls: CallRecord, workflows: tuple[WorkflowRecord, ...] = (), duration_s: float = 10.0
) -> RunRecords:
    return RunRecords(
        policy="las",
        seed=1,
        calls=list(calls),
        workflows=list(workflows),
        gauges=Gauges(),
        decision_s=[],
        duration_s=duration_s,
        wall_s=0.5,
    )


REFUSED: dict[str, object] = {
    "outcome": "rejected",
    "dispatched_s": None,
    "first_token_s": None,
    "finished_s": None,
    "output_tokens": 0,
}

# One run.


def test_times_of_a_call_are_counted_from_its_arrival() -> None:
    report = build_report(a_run(a_call_record(arrival_s=0.5)))

    assert report["queue_wait_s"]["mean"] == 0.5
    assert report["ttft_s"]["mean"] == 1.5
    assert report["e2e_s"]["mean"] == 5.5
    assert report["tpot_s"]["mean"] == 1.0
    assert report["e2e_per_output_token_s"]["mean"] == 1.1


def test_a_call_of_one_token_has_no_time_per_output_token() -> None:
    report = build_report(a_run(a_call_record(output_tokens=1)))

    assert report["tpot_s"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))


def test_refused_calls_count_as_missed_and_not_as_fast() -> None:
    calls = [a_call_record("a"), a_call_record("b", **REFUSED), a_call_record("c", **REFUSED)]

    report = build_report(a_run(*calls))

    assert report["slo_attainment_ratio"] == pytest.approx(1 / 3)
    assert report["goodput_rps"] == 0.1
    assert report["requests"] == {"total": 3, "completed": 1, "rejected": 2, "failed": 0}
    assert report["e2e_s"]["mean"] == 6.0


def test_calls_that_fit_nowhere_are_counted_as_refused_by_memory() -> None:
    calls = [a_call_record("a"), a_call_record("b", **{**REFUSED, "reason": "too_long"})]

    assert build_report(a_run(*calls))["kv"]["refused"] == 1


def test_what_nobody_could_look_at_is_null_and_not_zero() -> None:
    run = a_run(a_call_record("a"))
    run.gauges = None

    report = build_report(run)

    for group in ("kv", "weights", "fleet"):
        measured = {key for key, value in report[group].items() if value is not None}
        assert measured <= {"refused"}, group


def test_a_late_answer_is_served_but_not_met() -> None:
    report = build_report(
        a_run(a_call_record("late", deadline_s=5.9), a_call_record("just", deadline_s=6.0))
    )

    assert report["requests"]["completed"] == 2
    assert report["slo_attainment_ratio"] == 0.5


def test_makespans_are_of_completed_workflows_and_the_others_are_counted() -> None:
    workflows = (
        a_workflow_record("a", arrival_s=2.0),
        a_workflow_record("b", finished_s=None, outcome="failed"),
        a_workflow_record("c", finished_s=None, outcome="rejected"),
    )

    report = build_report(a_run(workflows=workflows))

    assert report["makespan_s"]["mean"] == 4.0
    assert report["workflows"] == {"total": 3, "completed": 1, "rejected": 1, "failed": 1}


def test_a_workflow_that_did_not_complete_counts_as_unsolved() -> None:
    workflows = (
        a_workflow_record("a", success=1.0),
        a_workflow_record("b", outcome="failed", finished_s=None),
        a_workflow_record("ungraded"),
    )

    assert build_report(a_run(workflows=workflows))["success_ratio"] == 0.5
    assert build_report(a_run(workflows=workflows[1:]))["success_ratio"] is None


def test_classes_are_reported_apart() -> None:
    batch = a_call_record("b", service_class=ServiceClass.BATCH, dispatched_s=5.0)

    by_class = build_report(a_run(a_call_record(), batch))["by_class"]

    assert by_class["interactive"]["queue_wait_s"]["mean"] == 1.0
    assert by_class["batch"]["queue_wait_s"]["mean"] == 5.0


def test_a_run_of_nothing_has_no_ratios_and_held_no_memory() -> None:
    report = build_report(a_run(duration_s=0.0))

    assert report["slo_attainment_ratio"] is None
    assert report["goodput_rps"] is None
    assert report["makespan_s"]["p99"] is None
    assert report["kv"]["reserved_gb_s"] == 0.0


@pytest.mark.parametrize(
    ("count", "ranks"),
    [(1, (1, 1, 1, 1)), (2, (1, 2, 2, 2)), (10, (5, 9, 10, 10)), (100, (50, 90, 95, 99))],
)
def test_percentiles_are_nearest_ranks(count: int, ranks: tuple[int, ...]) -> None:
    found = summary([float(i) for i in range(count, 0, -1)])

    assert tuple(found[f"p{percent}"] for percent in (50, 90, 95, 99)) == ranks


# Several runs.


def a_report(policy: str = "fcfs", seed: int = 1, **makespan_s: float | None) -> Report:
    return {
        "policy": policy,
        "seed": seed,
        "makespan_s": {"mean": 1.0, "p50": 1.0, "p95": 1.0, **makespan_s},
        "ttft_s": {"p50": None},
    }


def test_a_mean_comes_with_its_interval_over_seeds() -> None:
    runs = [a_report(mean=value) for value in (1.0, 2.0, 3.0, 4.0)]

    found = compare_reports({"fcfs": runs})["policies"]["fcfs"]

    assert found["mean"]["makespan_s"]["mean"] == 2.5
    assert found["ci95"]["makespan_s"]["mean"] == pytest.approx(
        3.182 * math.sqrt(5 / 3) / math.sqrt(4)
    )
    assert found["mean"]["policy"] == "fcfs"


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = compare_reports({"fcfs": [a_report(mean=2.0)]})["policies"]["fcfs"]

    assert found["mean"]["makespan_s"]["mean"] == 2.0
    assert found["ci95"]["makespan_s"]["mean"] is None


def test_ratios_are_taken_seed_by_seed_against_the_first_policy() -> None:
    """Paired: the seeds differ by ten times, the ratios hardly."""
    reports = {
        "fcfs": [a_report(mean=10.0), a_report(mean=100.0)],
        "las": [a_report(mean=5.0), a_report(mean=60.0)],
    }

    pairs = compare_reports(reports)["pairs"]

    assert list(pairs) == ["las / fcfs"]
    assert pairs["las / fcfs"]["makespan_s.mean"]["mean"] == pytest.approx(0.55)
    assert pairs["las / fcfs"]["makespan_s.mean"]["ci95"] == pytest.approx(12.706 * 0.05)


def test_what_was_not_measured_stays_null() -> None:
    reports = {"fcfs": [a_report(), a_report(p95=None)], "las": [a_report(), a_report()]}

    found = compare_reports(reports)

    assert found["policies"]["fcfs"]["mean"]["ttft_s"]["p50"] is None
    assert found["policies"]["fcfs"]["mean"]["makespan_s"]["p95"] == 1.0
    assert found["pairs"]["las / fcfs"]["ttft_s.p50"] == {"mean": None, "ci95": None}
    assert found["pairs"]["las / fcfs"]["makespan_s.p95"] == {"mean": 1.0, "ci95": None}


def test_the_interval_narrows_with_seeds_and_vanishes_without_variance() -> None:
    few, many = half_width([1.0, 2.0] * 2), half_width([1.0, 2.0] * 20)

    assert few is not None
    assert many is not None
    assert many < few / 3
    assert half_width([3.0] * 5) == 0.0
    assert mean([0.1] * 10) == 0.1


def test_two_policies_over_simulated_seeds_compare_as_expected() -> None:
    fleet = a_fleet(a_pool(max_sequences=2), replicas=2)
    reports = {
        name: [
            build_report(simulate(fleet, chains(40, gap_s=0.2, seed=seed), name, seed=seed))
            for seed in (1, 2, 3)
        ]
        for name in ("fcfs", "oracle-stjf")
    }

    ratio = compare_reports(reports)["pairs"]["oracle-stjf / fcfs"]["makespan_s.mean"]

    assert ratio["mean"] + ratio["ci95"] < 1.0
