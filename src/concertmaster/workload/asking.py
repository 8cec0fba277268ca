"""A planned call as a scheduler sees it."""

from concertmaster.core.request import ModelName, Request, RequestId
from concertmaster.workload.plan import Call, WorkflowPlan


def request_of(
    plan: WorkflowPlan, call: Call, arrival_s: float, *, models: tuple[ModelName, ...] = ()
) -> Request:
    """Make a call of a workflow: all of the plan that may be known at its arrival.

    Args:
        plan: The workflow.
        call: One of its calls.
        arrival_s: When it is made, on the plan's clock.
        models: Those that may answer, instead of those that the plan says.
    """
    return Request(
        request_id=RequestId(f"{plan.workflow_id}/{call.stage}"),
        workflow_id=plan.workflow_id,
        arrival_s=arrival_s,
        prompt_tokens=call.prompt_tokens,
        max_output_tokens=call.max_output_tokens,
        models=models or call.models,
        role=call.role,
        app=plan.app,
        template=plan.template,
        step=call.step,
        stage=call.stage,
        parents=tuple(RequestId(f"{plan.workflow_id}/{parent}") for parent in call.parents),
        service_class=plan.service_class,
        prefix_hashes=call.prefix_hashes,
        deadline_s=due_s(plan),
    )


def due_s(plan: WorkflowPlan) -> float | None:
    """Return when the last answer of a workflow is due, on the plan's clock."""
    return None if plan.deadline_s is None else plan.arrival_s + plan.deadline_s
