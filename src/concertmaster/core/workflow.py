"""Workflows, as far as they are resolved: what they have asked for, got, and are owed."""

from collections import OrderedDict
from dataclasses import dataclass, field

from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.core.sketch import Sketch, middle

_NOWHERE = ModelName("")


@dataclass(slots=True, kw_only=True)
class Workflow:
    """One user goal, seen through the calls that have arrived so far.

    Attributes:
        attained_s: Engine seconds its calls have been given, by the rate curves.
        open_calls: Calls that have arrived and have no outcome.
        model: The model that its latest call was sent to; "" before the first.
        owed_tokens: Output tokens that it still needs of that model, by forecast.
        context_tokens: Prompt and expected answer of its latest call: what an engine may hold.
        ends: Instants at which its calls in flight are expected to end, as distributions; kept
            only for policies that weigh siblings.
        roles: Roles of its calls before the latest.
        last_role: Role of its latest call.
    """

    workflow_id: WorkflowId
    started_s: float
    seen_s: float
    calls: int = 0
    open_calls: int = 0
    output_tokens: int = 0
    attained_s: float = 0.0
    model: ModelName = _NOWHERE
    owed_tokens: int = 0
    context_tokens: int = 0
    ends: dict[RequestId, Sketch] = field(default_factory=dict)
    roles: set[str] = field(default_factory=set)
    last_role: str = ""

    def longest_s(self, now_s: float) -> Sketch | None:
        """Seconds until the end of the call in flight that ends last by its median, if any."""
        if not self.ends:
            return None
        last = max(self.ends.values(), key=middle)
        return [max(0.0, end_s - now_s) for end_s in last]

    def note_role(self, role: str) -> None:
        """Take in the role of a call once it has been decided where the call goes."""
        if self.last_role:
            self.roles.add(self.last_role)
        self.last_role = role


@dataclass(slots=True)
class Owed:
    """What the live workflows of one model still need of it.

    Counted by workflow, so that it neither vanishes while an agent thinks between two calls
    nor counts the rest of a workflow once for each of its open calls.
    """

    workflows: int = 0
    tokens: int = 0


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
        self._owed: dict[ModelName, Owed] = {}

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

    def known(self, now_s: float, request: Request) -> Workflow:
        """Return the workflow of a call that has not arrived, as it stands."""
        found = self._by_id.get(request.workflow_id)
        return found or Workflow(workflow_id=request.workflow_id, started_s=now_s, seen_s=now_s)

    def settle(self, workflow_id: WorkflowId, *, answered: bool = True) -> None:
        """Note that one of its calls has its outcome.

        A workflow whose last open call went without an answer owes nothing until it asks
        again: most end there, and nobody would close them.
        """
        workflow = self._by_id[workflow_id]
        workflow.open_calls -= 1
        if not answered and not workflow.open_calls:
            self.commit(workflow, workflow.model, 0)

    def rest(self, workflow: Workflow) -> None:
        """Note that a workflow is thought to be over: it owes nothing until it asks again."""
        if not workflow.open_calls:
            self.commit(workflow, workflow.model, 0)

    def get(self, workflow_id: WorkflowId) -> Workflow:
        """Return a workflow with an open call; such a one is never forgotten."""
        return self._by_id[workflow_id]

    def close(self, workflow_id: WorkflowId) -> None:
        """Forget a workflow that is over, unless calls of it are still open."""
        workflow = self._by_id.get(workflow_id)
        if workflow is not None and workflow.open_calls == 0:
            self._drop(workflow)

    def owed(self, model: ModelName) -> Owed:
        """Return what live workflows still need of a model."""
        return self._owed.setdefault(model, Owed())

    def commit(self, workflow: Workflow, model: ModelName, tokens: int) -> None:
        """Note which model a workflow is with now, and what it will need of it."""
        self._charge(workflow, -1)
        workflow.model, workflow.owed_tokens = model, max(0, tokens)
        self._charge(workflow, 1)

    def stream(self, workflow: Workflow, fresh_tokens: int) -> None:
        """Note that a workflow was given output tokens; while it has an open call it owes one."""
        workflow.output_tokens += fresh_tokens
        left_tokens = workflow.owed_tokens - fresh_tokens
        self.commit(workflow, workflow.model, max(left_tokens, int(workflow.open_calls > 0)))

    def _charge(self, workflow: Workflow, sign: int) -> None:
        if workflow.owed_tokens:
            owed = self.owed(workflow.model)
            owed.workflows += sign
            owed.tokens += sign * workflow.owed_tokens

    def _drop(self, workflow: Workflow) -> None:
        self._charge(workflow, -1)
        del self._by_id[workflow.workflow_id]

    def validate(self) -> None:
        """Check that what is owed is the sum over the live workflows."""
        for model, owed in self._owed.items():
            mine = [w.owed_tokens for w in self._by_id.values() if w.model == model]
            assert (owed.workflows, owed.tokens) == (sum(map(bool, mine)), sum(mine)), model

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
                self._drop(oldest)
