"""The agents of a simulation: they make a call once all it waits for is answered."""

from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.workload.asking import due_s, request_of
from concertmaster.workload.plan import Call, WorkflowPlan, Workload
from concertmaster.workload.progress import WorkflowProgress
from concertmaster.workload.records import CallOutcome, CallRecord, WorkflowRecord


class Agents:
    """All workflows of a workload, and the records of how they fared."""

    def __init__(self, workload: Workload) -> None:
        self.calls: list[CallRecord] = []
        self.workflows: list[WorkflowRecord] = []
        self.over = 0
        self._running: dict[WorkflowId, tuple[WorkflowProgress, WorkflowRecord]] = {}
        self._open_calls: dict[WorkflowId, int] = {}

    def begin(self, plan: WorkflowPlan) -> list[Call]:
        """Start a workflow; return its first calls."""
        record = WorkflowRecord(
            workflow_id=plan.workflow_id,
            app=plan.app,
            service_class=plan.service_class,
            arrival_s=plan.arrival_s,
            deadline_s=due_s(plan),
        )
        self.workflows.append(record)
        progress = WorkflowProgress(plan)
        self._running[plan.workflow_id] = (progress, record)
        first = progress.first()
        self._open_calls[plan.workflow_id] = len(first)
        return first

    def call(self, now_s: float, workflow_id: WorkflowId, call: Call) -> tuple[Request, CallRecord]:
        """Make a call: what the scheduler sees of it, and an open record."""
        progress = self._running[workflow_id][0]
        request = request_of(progress.plan, call, now_s)
        record = CallRecord(
            request_id=request.request_id,
            workflow_id=workflow_id,
            role=call.role,
            service_class=request.service_class,
            arrival_s=now_s,
            prompt_tokens=call.prompt_tokens,
            deadline_s=request.deadline_s,
        )
        self.calls.append(record)
        return request, record

    def finish(self, now_s: float, request: Request, call: Call, model: ModelName) -> list[Call]:
        """Take in an answer; return the calls that it sets free."""
        progress, record = self._running[request.workflow_id]
        freed = progress.finish(call.stage, model)
        self._open_calls[request.workflow_id] += len(freed) - 1
        if progress.is_complete:
            record.finished_s, record.outcome = now_s, "completed"
            record.success = progress.success()
            self.over += 1
        return freed

    def refuse(self, call: CallRecord, outcome: CallOutcome, reason: str) -> None:
        """Take in that a call got no answer: its workflow ends there."""
        call.outcome, call.reason = outcome, reason
        self._open_calls[call.workflow_id] -= 1
        record = self.record(call.workflow_id)
        if record.outcome == "failed" and outcome == "rejected":
            record.outcome = "rejected"

    def record(self, workflow_id: WorkflowId) -> WorkflowRecord:
        """Return how a workflow that has begun fares."""
        return self._running[workflow_id][1]

    def is_over(self, workflow_id: WorkflowId) -> bool:
        """Say whether every call of a workflow has been answered."""
        return self._running[workflow_id][0].is_complete

    def is_settled(self, workflow_id: WorkflowId) -> bool:
        """Say whether no call of a workflow is open or to come: it is over, or lost a call."""
        return self._open_calls[workflow_id] == 0

    def success(self, workflow_id: WorkflowId) -> float | None:
        """Return the grade of a workflow that is over; ``None`` if it is not or has no grade."""
        return self.record(workflow_id).success
