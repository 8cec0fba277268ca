"""Workflows as the scheduler sees them, and as agents unfold them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_call, a_fleet, a_plan, a_request, a_workload
from concertmaster.compose import simulate
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.workflow import Workflows
from concertmaster.workload.agents import Agents
from concertmaster.workload.plan import Call, ModelOutcome, WorkflowPlan
from concertmaster.workload.progress import WorkflowProgress
from concertmaster.workload.records import CallOutcome

M = ModelName("m")
W1 = WorkflowId("w1")


def a_diamond() -> WorkflowPlan:
    return a_plan(
        "w1",
        a_call(0),
        a_call(1, parents=(0,)),
        a_call(2, parents=(0,)),
        a_call(3, parents=(1, 2)),
    )


def stages(calls: list[Call]) -> list[int]:
    return [call.stage for call in calls]


# Seen by the scheduler.


def test_a_workflow_begins_with_its_first_call_and_counts_them() -> None:
    workflows = Workflows()
    first = workflows.arrive(3.0, a_request("a", workflow_id=W1))
    again = workflows.arrive(9.0, a_request("b", workflow_id=W1))

    assert again is first
    assert (first.started_s, first.seen_s, first.calls, first.open_calls) == (3.0, 9.0, 2, 2)


def test_an_idle_workflow_is_forgotten_and_one_with_an_open_call_is_not() -> None:
    workflows = Workflows(idle_s=10.0)
    for name in ("idle", "open"):
        workflows.arrive(0.0, a_request(name, workflow_id=WorkflowId(name)))
    workflows.settle(WorkflowId("idle"))

    workflows.arrive(10.0, a_request("later"))

    assert len(workflows) == 2
    assert workflows.get(WorkflowId("open")).open_calls == 1


def test_forgetting_keeps_pace_with_arrivals() -> None:
    workflows = Workflows(idle_s=5.0)
    for i in range(500):
        request = a_request(f"r{i}")
        workflows.arrive(float(i), request)
        workflows.settle(request.workflow_id)

    assert len(workflows) <= 10


def test_of_too_many_workflows_the_longest_idle_is_forgotten_and_never_an_open_one() -> None:
    workflows = Workflows(most=3)
    for i in range(20):
        request = a_request(f"r{i}")
        workflows.arrive(0.1 * i, request)
        if i:
            workflows.settle(request.workflow_id)

    assert len(workflows) == 3
    assert workflows.get(WorkflowId("workflow of r0")).open_calls == 1
    assert workflows.get(WorkflowId("workflow of r19")).calls == 1


def test_a_workflow_that_just_came_is_not_forgotten_for_want_of_room() -> None:
    workflows = Workflows(most=1)
    for name in ("a", "b", "c"):
        workflows.arrive(0.0, a_request(name, workflow_id=WorkflowId(name)))

    assert [workflows.get(WorkflowId(name)).open_calls for name in "abc"] == [1, 1, 1]


def test_a_workflow_used_again_is_not_the_oldest() -> None:
    workflows = Workflows(idle_s=10.0)
    for i, name in enumerate(("a", "b", "a")):
        workflows.arrive(float(i), a_request(f"r{i}", workflow_id=WorkflowId(name)))
    for name in ("a", "b", "a"):
        workflows.settle(WorkflowId(name))

    workflows.arrive(11.5, a_request("later"))

    assert workflows.get(WorkflowId("a")).calls == 2
    assert len(workflows) == 2


def test_closing_forgets_a_workflow_at_once_unless_a_call_is_open() -> None:
    workflows = Workflows()
    workflows.arrive(0.0, a_request("a", workflow_id=W1))
    workflows.close(W1)
    assert len(workflows) == 1

    workflows.settle(W1)
    workflows.close(W1)
    workflows.close(W1)

    assert len(workflows) == 0


# Unfolded by agents.


def test_a_call_is_shown_once_all_it_waits_for_has_finished() -> None:
    progress = WorkflowProgress(a_diamond())

    assert stages(progress.first()) == [0]
    assert stages(progress.finish(0, M)) == [1, 2]
    assert stages(progress.finish(2, M)) == []
    assert stages(progress.finish(1, M)) == [3]
    assert not progress.is_complete
    assert stages(progress.finish(3, M)) == []
    assert progress.is_complete


def test_a_workflow_is_graded_by_its_last_graded_call_on_the_model_that_served_it() -> None:
    outcomes = {
        M: ModelOutcome(correct=1.0, output_tokens=5),
        ModelName("small"): ModelOutcome(correct=0.25, output_tokens=5),
    }
    plan = a_plan("w1", a_call(0, outcomes=outcomes), a_call(1, outcomes=outcomes), a_call(2))
    progress = WorkflowProgress(plan)
    for stage, model in ((0, "m"), (1, "small"), (2, "m")):
        progress.finish(stage, ModelName(model))

    assert progress.success() == 0.25


def test_a_workflow_without_graded_calls_keeps_the_grade_that_was_recorded() -> None:
    progress = WorkflowProgress(a_plan("w1", a_call(0), success=0.5))
    progress.finish(0, M)

    assert progress.success() == 0.5


grades = st.sampled_from((0.0, 0.5, 1.0))


@given(
    st.lists(st.tuples(st.none() | st.floats(0.0, 1.0), st.none() | grades), max_size=6),
    st.randoms(use_true_random=False),
    st.sampled_from(("chain", "tree")),
)
def test_a_call_is_made_unless_the_draw_says_that_nobody_needs_it(
    stages: list[tuple[float | None, float | None]], rng: random.Random, shape: str
) -> None:
    calls = [a_call(0, outcomes={M: ModelOutcome(correct=0.5, output_tokens=5)})]
    for stage, (doubt, grade) in enumerate(stages, start=1):
        outcomes = {} if grade is None else {M: ModelOutcome(correct=grade, output_tokens=5)}
        parents = (rng.randrange(stage),) if shape == "tree" else (stage - 1,)
        calls.append(a_call(stage, doubt=doubt, outcomes=outcomes, parents=parents))
    plan = a_plan("w1", *calls)
    agents = Agents(a_workload(plan))
    ready, made = agents.begin(plan), []

    while ready:
        call = ready.pop(rng.randrange(len(ready)))
        request, _ = agents.call(0.0, W1, call)
        ready += (freed := agents.finish(1.0, request, call, M))
        made.append(call.stage)
        grade = agents._running[W1][0].success()
        assert all(one.is_called_for(grade or 0.0) for one in freed)
        assert agents.is_over(W1) == agents.is_settled(W1) == (not ready)

    assert [record.role for record in agents.calls] == [plan.calls[s].role for s in made]
    assert len(agents.calls) == len(made) == len(set(made))
    if shape == "chain":
        assert {call.stage for call in calls if call.doubt is None} <= set(made)
    assert agents.workflows[0].outcome == "completed"


def test_a_stage_that_nobody_needs_is_in_no_record_of_a_simulation() -> None:
    solved = {M: ModelOutcome(correct=1.0, output_tokens=5)}
    plans = [
        a_plan(
            f"w{i}",
            a_call(0, role="solver", outcomes=solved),
            a_call(1, role="verifier"),
            a_call(2, role="solver", outcomes=solved, doubt=doubt),
            a_call(3, role="writer"),
        )
        for i, doubt in enumerate((0.05, 0.5))
    ]

    run = simulate(a_fleet(), a_workload(*plans), "chimera", seed=1)

    roles = [[c.role for c in run.calls if c.workflow_id == f"w{i}"] for i in range(2)]
    assert roles == [["solver", "verifier", "solver", "writer"], ["solver", "verifier", "writer"]]
    assert [one.outcome for one in run.workflows] == ["completed", "completed"]
    assert [one.success for one in run.workflows] == [1.0, 1.0]


def test_an_agent_tells_the_scheduler_only_what_a_caller_knows() -> None:
    plan = a_plan(
        "w1",
        a_call(0),
        a_call(1, role="critic", step="vote", prefix_hashes=(7,), max_output_tokens=64),
        app="chat",
        template="loop",
        arrival_s=2.0,
        deadline_s=30.0,
    )
    agents = Agents(a_workload(plan))
    agents.begin(plan)

    request, record = agents.call(5.0, W1, plan.calls[1])

    assert request == a_request(
        "w1/1",
        workflow_id=W1,
        arrival_s=5.0,
        prompt_tokens=200,
        max_output_tokens=64,
        role="critic",
        app="chat",
        template="loop",
        step="vote",
        stage=1,
        parents=(RequestId("w1/0"),),
        prefix_hashes=(7,),
        deadline_s=32.0,
    )
    assert (record.arrival_s, record.deadline_s, record.outcome) == (5.0, 32.0, "failed")


def test_a_workflow_is_completed_by_its_last_answer() -> None:
    plan = a_plan("w1", a_call(0))
    agents = Agents(a_workload(plan))
    (call,) = agents.begin(plan)
    request, _ = agents.call(0.0, W1, call)

    assert agents.finish(4.0, request, call, M) == []

    (record,) = agents.workflows
    assert (record.outcome, record.finished_s, agents.over) == ("completed", 4.0, 1)
    assert agents.is_over(W1)


@pytest.mark.parametrize("outcome", ["rejected", "failed"])
def test_a_call_without_an_answer_ends_its_workflow_the_same_way(outcome: CallOutcome) -> None:
    plan = a_plan("w1", a_call(0), a_call(1))
    agents = Agents(a_workload(plan))
    (call,) = agents.begin(plan)
    _, record = agents.call(0.0, W1, call)

    agents.refuse(record, outcome, "why")

    assert (record.outcome, record.reason) == (outcome, "why")
    assert agents.workflows[0].outcome == outcome
    assert not agents.is_over(W1)
    assert agents.is_settled(W1)
    assert agents.success(W1) is None


def test_a_workflow_that_lost_a_call_is_settled_once_its_other_branches_are_through() -> None:
    plan = a_diamond()
    agents = Agents(a_workload(plan))
    agents.begin(plan)
    requests = {}
    for stage in range(3):
        assert not agents.is_settled(W1)
        requests[stage], record = agents.call(0.0, W1, plan.calls[stage])
        if stage == 2:
            agents.refuse(record, "failed", "why")
        elif stage == 0:
            agents.finish(1.0, requests[0], plan.calls[0], M)
    assert not agents.is_settled(W1)

    agents.finish(2.0, requests[1], plan.calls[1], M)

    assert agents.is_settled(W1)
    assert not agents.is_over(W1)
