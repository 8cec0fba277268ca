"""Whole workflows are judged at their first call: begun, begun on a quicker model, or refused."""

from dataclasses import replace

import pytest

from builders import (
    CheckedScheduler,
    a_curve,
    a_fleet,
    a_forecast,
    a_pool,
    a_request,
    a_view,
    a_waiting_call,
    a_workload,
    chains,
    placements,
)
from concertmaster.compose import simulate
from concertmaster.core.actions import Action, Reject
from concertmaster.core.events import RequestFinished
from concertmaster.core.fleet import Fleet
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, RequestId, ServiceClass, WorkflowId
from concertmaster.policies.admission import InTime, needed_s
from concertmaster.policies.catalog import policy
from concertmaster.workload.records import RunRecords

BIG, SMALL = ModelName("big"), ModelName("small")


def two_models() -> Fleet:
    """A heavy model and one that is four times as quick, a place each."""
    return a_fleet(
        a_pool("big", model="big", max_sequences=1, curve=a_curve(slowness=4.0)),
        a_pool("small", model="small", max_sequences=1),
    )


def of_tokens(tokens: float, **changes: object) -> Forecast:
    return a_forecast(tokens, remaining_tokens=Quantiles.exactly(tokens), **changes)


def begin(
    scheduler: CheckedScheduler,
    name: str,
    tokens: float,
    within_s: float | None,
    *models: ModelName,
    now_s: float = 0.0,
    **changes: object,
) -> list[Action]:
    facts: dict[str, object] = {
        "models": models,
        "deadline_s": None if within_s is None else now_s + within_s,
        **changes,
    }
    return scheduler.arrive(name, now_s, of_tokens(tokens), **facts)


def model_of(actions: list[Action]) -> str:
    ((_, replica_id),) = placements(actions).items()
    return replica_id.partition("-")[0]


# What is decided.


@pytest.mark.parametrize(
    ("within_s", "model"), [(60.0, "big"), (41.0, "big"), (39.0, "small"), (3.4, "small")]
)
def test_a_workflow_gets_the_surest_model_that_is_quick_enough(within_s: float, model: str) -> None:
    """A thousand tokens take 40 s on the heavy one and 10 s on the other."""
    scheduler = CheckedScheduler(two_models(), "maestro")

    assert model_of(begin(scheduler, "r", 1000.0, within_s)) == model


def test_a_forecast_of_success_says_which_is_the_surest() -> None:
    gate, pools = InTime(), two_models().pools
    call = a_waiting_call(
        request=a_request(deadline_s=60.0),
        forecast=of_tokens(100.0, success={SMALL: 0.9, BIG: 0.2}),
    )

    assert gate.judge(call, pools, a_view(pools=pools)) == SMALL


def test_a_workflow_that_cannot_be_done_is_refused_at_its_first_call() -> None:
    scheduler = CheckedScheduler(two_models(), "maestro")

    assert begin(scheduler, "r", 1000.0, 3.3) == [Reject(RequestId("r"), "too_late", None)]
    assert len(scheduler.core.workflows) == 0, "it has left no trace"


def test_what_stands_in_its_way_says_when_to_try_again() -> None:
    """A running answer is taken to be half through: 10 s, then the other waiting call."""
    scheduler = CheckedScheduler(two_models(), "maestro")
    begin(scheduler, "r1", 2000.0, None, SMALL, max_output_tokens=2000)
    waits = begin(scheduler, "r2", 500.0, 30.0, SMALL, max_output_tokens=500)
    assert waits == []

    (refused,) = begin(scheduler, "r3", 500.0, 6.0, SMALL, max_output_tokens=500)

    assert isinstance(refused, Reject)
    assert refused.reason == "too_late"
    assert refused.retry_after_s is not None
    assert refused.retry_after_s == pytest.approx(10.0 + 5.0 + 5.0 - 6.0, rel=0.05)


def test_later_calls_of_a_workflow_are_never_refused_for_that() -> None:
    scheduler = CheckedScheduler(two_models(), "maestro")
    workflow = WorkflowId("w")
    assert model_of(begin(scheduler, "r1", 100.0, 5.0, SMALL, workflow_id=workflow)) == "small"
    scheduler.at(1.0, RequestFinished(RequestId("r1"), 1, 50))

    late = begin(scheduler, "r2", 9000.0, 1.0, SMALL, now_s=4.0, workflow_id=workflow)

    assert model_of(late) == "small"


def test_a_workflow_stays_with_the_model_that_it_was_admitted_with() -> None:
    scheduler = CheckedScheduler(two_models(), "maestro")
    workflow = WorkflowId("w")
    begin(scheduler, "r1", 1000.0, 39.0, workflow_id=workflow)
    scheduler.at(1.0, RequestFinished(RequestId("r1"), 1, 50))

    assert model_of(begin(scheduler, "r2", 10.0, None, now_s=2.0, workflow_id=workflow)) == "small"
    scheduler.at(3.0, RequestFinished(RequestId("r2"), 1, 10))
    only_big = begin(scheduler, "r3", 10.0, None, BIG, now_s=4.0, workflow_id=workflow)
    assert model_of(only_big) == "big", "unless a call allows another only"


@pytest.mark.parametrize(
    ("of", "service_class", "refused"),
    [
        ("maestro", ServiceClass.BATCH, False),
        ("maestro:program_s=4,doubt=1", ServiceClass.BATCH, True),
        ("maestro:program_s=4,doubt=1", ServiceClass.INTERACTIVE, False),
        ("maestro:person_s=4,doubt=1", ServiceClass.INTERACTIVE, True),
        ("maestro:person_s=4,doubt=1.6", ServiceClass.INTERACTIVE, False),
        ("maestro:person_s=4,admits=no", ServiceClass.INTERACTIVE, False),
    ],
)
def test_a_class_may_have_a_deadline_of_its_own(
    of: str, service_class: ServiceClass, *, refused: bool
) -> None:
    scheduler = CheckedScheduler(two_models(), of)

    actions = begin(scheduler, "r", 1000.0, None, service_class=service_class)

    assert any(isinstance(action, Reject) for action in actions) == refused


# What it will need.


def test_models_of_later_stages_count_at_their_own_pace() -> None:
    pools = two_models().pools
    forecast = of_tokens(0.0, remaining_by={SMALL: 100.0, BIG: 100.0})
    call = a_waiting_call(forecast=replace(forecast, output_tokens=Quantiles.exactly(50.0)))

    busy_s, idle_s = needed_s(call, SMALL, a_view(pools=pools))

    assert idle_s == pytest.approx(1.0 + 4.0, rel=0.02)
    assert busy_s == pytest.approx(idle_s, abs=0.1)


def test_each_call_waits_and_tools_take_their_time() -> None:
    pools = two_models().pools
    call = a_waiting_call(
        forecast=of_tokens(
            100.0,
            remaining_calls=Quantiles.exactly(4.0),
            remaining_tool_s=Quantiles.exactly(7.0),
        )
    )
    view = a_view(pools=pools, full=("small",), waits_s={"small": (3.0,)})

    assert needed_s(call, SMALL, view)[0] == pytest.approx(4 * 3.0 + 7.0 + 1.0, rel=0.02)


def test_a_model_that_is_down_counts_with_its_load_and_those_who_wait_for_it() -> None:
    pools = two_models().pools
    view = a_view(pools=pools, replicas={"small": 0}, wake_s={"small": 20.0})
    queued = replace(view, waiting={"small": 10_000})
    call = a_waiting_call(forecast=of_tokens(100.0))

    alone_s, behind_s = (needed_s(call, SMALL, one)[0] for one in (view, queued))

    assert alone_s == pytest.approx(21.0, rel=0.02)
    assert behind_s - alone_s == pytest.approx(10_000 * a_curve().step_s(1, 0), rel=0.05)


# The whole of it.


def loaded(of: str) -> RunRecords:
    """People and programs by turns, more than the fleet can do."""
    plans = [
        replace(
            plan,
            service_class=(ServiceClass.INTERACTIVE, ServiceClass.BATCH)[i % 2],
            deadline_s=(25.0, 75.0)[i % 2],
        )
        for i, plan in enumerate(chains(500, gap_s=0.85, seed=3).workflows)
    ]
    fleet = a_fleet(a_pool(max_sequences=4), replicas=2)
    return simulate(fleet, a_workload(*plans), of, seed=3)


def test_under_overload_more_workflows_are_in_time_and_the_refused_learn_it_at_once() -> None:
    open_to_all, judged = loaded("maestro:admits=no"), loaded("maestro:doubt=0")

    def met(run: RunRecords) -> int:
        return sum(workflow.met for workflow in run.workflows)

    refused = [call for call in judged.calls if call.outcome == "rejected"]
    assert {call.reason for call in refused} == {"too_late"}
    assert all(call.request_id.endswith("/0") for call in refused), "at the first call only"
    assert met(judged) > 1.1 * met(open_to_all)


def test_the_gate_is_part_of_the_recipe_only() -> None:
    assert policy("maestro").gate == InTime()
    assert policy("maestro:admits=no").gate is None
    assert policy("fcfs/expected").gate is None
