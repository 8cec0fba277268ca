"""Workflows, as far as they are resolved: what they have asked for and what they got."""

from collections import OrderedDict
from dataclasses import dataclass

from concertmaster.core.request import Request, WorkflowId


@dataclass(slots=True, kw_only=True)
class Workflow:
    """One user goal, seen through the calls that have arrived so far.

    Attributes:
        attained_s: Engine seconds its calls have been given, by the rate curves.
        open_calls: Calls that have arrived and have no outcome.
    """

    workflow_id: WorkflowId
    started_s: float
    seen_s: float
    calls: int = 0
    open_calls: int = 0
    output_tokens: int = 0
    attained_s: float = 0.0


class Workflows:
    """The workflows that may still send calls.

    Args:
        idle_s: An idle one is forgotten after this.
        most: Beyond this many, the longest idle ones are forgotten earlier.
    """

    def __init__(self, *, idle_s: float = 3600.0, most: int = 100_000) -> None:
        self._idle_s = idle_s
        self._most = most
        self._by_id: OrderedDict[WorkflowId, Workflow] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def arrive(self, now_s: float, request: Request) -> Workflow:
        """Note a call and return its workflow, begun if this is its first."""
        workflow = self._by_id.get(request.workflow_id)
        if workflow is None:
            workflow = Workflow(workflow_id=request.workflow_id, started_s=now_s, seen_s=now_s)
            self._by_id[request.workflow_id] = workflow
        else:
            self._by_id.move_to_end(request.workflow_id)
        workflow.seen_s = now_s
        workflow.calls += 1
        workflow.open_calls += 1
        if workflow.calls == 1:
            self._forget(now_s)
        return workflow

    def settle(self, workflow_id: WorkflowId) -> None:
        """Note that one of its calls has its outcome."""
        self._by_id[workflow_id].open_calls -= 1

    def get(self, workflow_id: WorkflowId) -> Workflow:
        """Return a workflow with an open call; such a one is never forgotten."""
        return self._by_id[workflow_id]

    def close(self, workflow_id: WorkflowId) -> None:
        """Forget a workflow that is over, unless calls of it are still open."""
        workflow = self._by_id.get(workflow_id)
        if workflow is not None and workflow.open_calls == 0:
            del self._by_id[workflow_id]

    def _forget(self, now_s: float) -> None:
        """Drop idle workflows from the old end; two a call keep pace with arrivals."""
        for _ in range(2):
            oldest = next(iter(self._by_id.values()))
            if oldest.seen_s + self._idle_s > now_s and len(self._by_id) <= self._most:
                return
            if oldest.open_calls:
                oldest.seen_s = now_s
                self._by_id.move_to_end(oldest.workflow_id)
            else:
                del self._by_id[oldest.workflow_id]
