"""A planned call looks alike to whoever makes it: a simulation, a replay or a rehearsal."""

from dataclasses import replace

from builders import a_call, a_plan, a_workload
from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.learning.prompts import prompt_of
from concertmaster.learning.rehearsal import as_asked
from concertmaster.workload.agents import Agents
from concertmaster.workload.asking import request_of
from concertmaster.workload.plan import WorkflowPlan

M = ModelName("m")


def a_described_plan() -> WorkflowPlan:
    facts = {"role": "coder", "step": "edit", "prefix_hashes": (1, 2), "prompt_text": "sort"}
    calls = a_call(0), a_call(3, parents=(0,), tool_s=2.0, after_tool=True, model=M, **facts)
    return a_plan(
        "w",
        *calls,
        app="app",
        template="loop",
        arrival_s=5.0,
        deadline_s=60.0,
        service_class=ServiceClass.BATCH,
    )


def test_a_simulation_and_a_rehearsal_make_the_same_request() -> None:
    plan = a_described_plan()
    agents = Agents(a_workload(plan))
    agents.begin(plan)
    made, _ = agents.call(9.0, plan.workflow_id, plan.calls[1])

    rehearsed = as_asked(plan, plan.calls[1], {0: 7.0}).request

    assert rehearsed == replace(made, models=(M,))
    assert made.deadline_s == 65.0
    assert (made.role, made.app, made.template, made.step) == ("coder", "app", "loop", "edit")


def test_a_call_names_its_models_unless_somebody_knows_better() -> None:
    plan = a_described_plan()
    call = replace(plan.calls[0], models=(M, ModelName("n")))

    assert request_of(plan, call, 0.0).models == (M, ModelName("n"))
    assert request_of(plan, call, 0.0, models=(M,)).models == (M,)


def test_a_prompt_that_nobody_measured_is_as_long_as_its_text() -> None:
    call = a_described_plan().calls[1]

    assert prompt_of(call).chars == len("sort")
    assert prompt_of(replace(call, prompt_chars=900)).chars == 900
    assert as_asked(a_described_plan(), call, {0: 7.0}).prompt == prompt_of(call)
