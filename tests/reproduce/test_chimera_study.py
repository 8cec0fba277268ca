"""The study of model choice: its split, its figures, its claims."""

from collections.abc import Mapping
from itertools import product

import pytest

from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.learning.datasets import key_of
from concertmaster.policies.catalog import policy
from concertmaster.predictors.recent import RecentLengths
from concertmaster.reproduce import chimera_world as world
from concertmaster.reproduce.chimera import STUDY, longest_wait_s, per_token_s, promised_ratio
from concertmaster.reproduce.chimera_arms import ARMS, BUSY, ORACLES, SLACKS, UNGRADED, WITHOUT
from concertmaster.reproduce.chimera_summary import summary
from concertmaster.reproduce.chimera_witness import Witness
from concertmaster.reproduce.results import Cell, Results
from concertmaster.workload.records import CallRecord, Gauges, RunRecords, WorkflowRecord
from concertmaster.workload.split import held_out

needs_data = pytest.mark.skipif(
    not world.DATA.is_dir(), reason=f"needs the routing sets in {world.DATA}"
)


def a_call(name: str, workflow: str, **changes: object) -> CallRecord:
    facts: dict[str, object] = {
        "request_id": RequestId(name),
        "workflow_id": WorkflowId(workflow),
        "role": "solver",
        "service_class": ServiceClass.INTERACTIVE,
        "arrival_s": 0.0,
        "prompt_tokens": 9,
        "deadline_s": None,
    }
    return CallRecord(**{**facts, **changes})  # type: ignore[arg-type]


def a_workflow(name: str, finished_s: float | None) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id=WorkflowId(name),
        app="",
        service_class=ServiceClass.INTERACTIVE,
        arrival_s=10.0,
        deadline_s=None,
        finished_s=finished_s,
    )


def a_run(workflows: list[WorkflowRecord], calls: list[CallRecord]) -> RunRecords:
    return RunRecords(
        policy="p",
        seed=0,
        calls=calls,
        workflows=workflows,
        gauges=Gauges(),
        decision_s=[],
        duration_s=1.0,
        wall_s=1.0,
    )


def test_seconds_by_token_are_a_mean_over_workflows_that_were_answered() -> None:
    calls = [
        a_call("a/0", "a", output_tokens=30),
        a_call("a/1", "a", output_tokens=70),
        a_call("b/0", "b", output_tokens=10),
        a_call("c/0", "c"),
    ]
    run = a_run([a_workflow("a", 20.0), a_workflow("b", 14.0), a_workflow("c", None)], calls)

    assert per_token_s(run) == pytest.approx((10 / 100 + 4 / 10) / 2)


def test_promised_is_the_forecast_of_the_model_that_gave_the_last_answer() -> None:
    calls = [
        a_call("a/0", "a", model="s", finished_s=1.0),
        a_call("a/1", "a", model="l", finished_s=2.0),
        a_call("b/0", "b", model="s", finished_s=1.0),
        a_call("b/1", "b"),
    ]
    promised: Mapping[RequestId, Mapping[str, float]] = {
        RequestId(call.request_id): {"s": 0.25, "l": 0.75} for call in calls
    }

    assert promised_ratio(a_run([], calls), promised) == 0.5  # type: ignore[arg-type]


def test_the_longest_wait_is_that_of_a_call_in_the_line() -> None:
    calls = [
        a_call("a", "a", arrival_s=1.0, dispatched_s=4.0),
        a_call("b", "b", arrival_s=2.0, dispatched_s=2.5),
        a_call("c", "c", arrival_s=0.0),
    ]

    assert longest_wait_s(a_run([], calls)) == 3.0


def figures_of(cell: Cell, makespan_s: float, solved: float) -> dict[str, float]:
    return {
        "per_token_s": makespan_s / 100,
        "makespan_s.mean": makespan_s,
        "makespan_s.p95": 2 * makespan_s,
        "success_ratio": solved,
        "promised_ratio": solved + 0.02,
        "longest_wait_s": 1.0,
        "capacity_rps": 2.0,
        "best_ratio": 0.9,
        "weakest_ratio": 0.3,
        "strongest_ratio": 0.6,
        "scheduler.decisions": 300.0,
        "scheduler.decision_s_p50": 1e-4,
        "workflows.total": 100.0,
        "seed": float(cell.seed),
    }


def results(ours: tuple[float, float], theirs: Mapping[str, tuple[float, float]]) -> Results:
    cells = STUDY.cells(seeds=2, full=False)
    return Results(
        {
            cell: figures_of(cell, *(theirs.get(cell.arm, (10.0, 0.4))))
            if cell.arm != "chimera"
            else figures_of(cell, *ours)
            for cell in cells
        }
    )


def met(found: Results) -> dict[str, bool]:
    return {claim.id: claim.met for claim in summary(found).claims}


def test_claims_follow_what_was_measured() -> None:
    good = met(results((8.0, 0.5), {}))
    slow = met(results((12.0, 0.5), {}))
    wrong = met(results((8.0, 0.41), {}))

    assert all(good.values())
    assert {name for name, holds in slow.items() if not holds} == {
        "vllm-per-token",
        "ltr-makespan",
        "vllm+mlfq-makespan",
        "oracle-length",
    }
    assert {name for name, holds in wrong.items() if not holds} == {"vllm-success"}


@pytest.mark.parametrize(
    ("rival", "holds"),
    [((7.0, 0.6), False), ((7.0, 0.4), True), ((9.0, 0.6), True), ((7.0, 0.5), False)],
)
def test_a_rival_dominates_only_if_it_is_sooner_and_as_good(
    rival: tuple[float, float], *, holds: bool
) -> None:
    assert met(results((8.0, 0.5), {"cascade": rival}))["dominated"] is holds


def test_every_arm_is_a_policy_and_the_busy_load_has_all_of_them() -> None:
    cells = STUDY.cells(seeds=1, full=True)

    policies = {cell.arm.removesuffix(UNGRADED) for cell in cells}
    assert {policy(name).name for name in policies} == policies
    assert {cell.arm for cell in cells if cell.load == BUSY} == {cell.arm for cell in cells}
    assert {cell.arm for cell in cells if cell.load != BUSY} == set(ARMS)


def test_by_default_parts_are_taken_out_on_one_fleet_and_worth_is_swept_on_all() -> None:
    cells = STUDY.cells(seeds=1, full=False)

    assert len({cell.setting for cell in cells if cell.arm in {*WITHOUT, *ORACLES}}) == 1
    assert len({cell.setting for cell in cells if cell.arm in SLACKS}) == 3


def test_grades_that_are_kept_back_reach_no_forecast() -> None:
    told: list[float | None] = []

    class Told(RecentLengths):
        def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
            told.append(success)

    Witness(Told()).close(WorkflowId("w"), 1.0)
    Witness(Told(), graded=False).close(WorkflowId("w"), 1.0)

    assert told == [1.0, None]


def test_the_full_grid_has_at_least_four_pairs_and_two_triples() -> None:
    sizes = [len({p.model.name for p in world.fleet_of(name).pools}) for name in world.WORLDS]

    assert sizes.count(2) >= 4
    assert sizes.count(3) >= 2


@needs_data
@pytest.mark.parametrize("setting", ["qwen2.5-3b+72b/math", "gpt-3.5+4/code"])
def test_what_is_played_was_held_back_and_answered_by_every_model(setting: str) -> None:
    test, train = (world.plans_of(setting, test=one) for one in (True, False))

    assert all(held_out(key_of(plan)) for plan in test)
    assert not {key_of(plan) for plan in test} & {key_of(plan) for plan in train}
    models = {pool.model.name for pool in world.fleet_of(setting).pools}
    for plan, model in product(test, models):
        assert plan.deciding_call is not None
        assert model in plan.deciding_call.outcomes
