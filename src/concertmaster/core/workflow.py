"""Workflows, as far as they are resolved: what they have asked for, got, and are owed."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from concertmaster.core.demand import Demands
from concertmaster.core.request import ModelName, Request, RequestId, ServiceClass, WorkflowId
from concertmaster.core.sketch import Bar

_NOWHERE = ModelName("")
_NOTHING: Mapping[ModelName, int] = {}


@dataclass(slots=True, kw_only=True)
class Workflow:
    """One user goal, seen through the calls that have arrived so far.

    Attributes:
        interactive: Whether a person waits for it, as its latest call says.
        waited_s: Seconds that its calls have stood in line.
        attained_s: Engine seconds its calls have been given, by the rate curves.
        open_calls: Calls that have arrived and have no outcome.
        model: The model that its latest call was sent to; "" before the first.
        kept_to: Model that it was admitted with, of several that its first call allowed; "" if
            that was left open.
        owed: Output tokens that it still needs, by forecast and model.
        grown_tokens: By how much its latest call has raised what it owes.
        context_tokens: Prompt and expected answer of its latest call: what an engine may hold.
        ends: Instants at which its calls in flight are expected to end, as distributions; kept
            only for policies that weigh siblings.
        away: Model and context that it counts with while it is between two calls.
        roles: Roles of its calls before the latest.
        last_role: Role of its latest call.
    """

    workflow_id: WorkflowId
    started_s: float
    seen_s: float
    interactive: bool = True
    calls: int = 0
    open_calls: int = 0
    output_tokens: int = 0
    attained_s: float = 0.0
    waited_s: float = 0.0
    model: ModelName = _NOWHERE
    kept_to: ModelName = _NOWHERE
    owed: dict[ModelName, int] = field(default_factory=dict)
    grown_tokens: int = 0
    context_tokens: int = 0
    ends: dict[RequestId, Bar] = field(default_factory=dict)
    away: tuple[ModelName, int] = (_NOWHERE, 0)
    roles: frozenset[str] = frozenset()
    last_role: str = ""

    @property
    def owed_tokens(self) -> int:
        """What it still needs of the model that it is with."""
        return self.owed.get(self.model, 0)

    @property
    def longest(self) -> Bar | None:
        """The call in flight that ends last by its median, if any."""
        return max(self.ends.values(), key=attrgetter("middle_s"), default=None)

    def note_role(self, role: str) -> None:
        """Take in the role of a call once it has been decided where the call goes."""
        if self.last_role and self.last_role not in self.roles:
            self.roles |= {self.last_role}
        self.last_role = role


@dataclass(slots=True)
class Owed:
    """What the live workflows of one model still need of it.

    Counted by workflow, so that it neither vanishes while an agent thinks between two calls
    nor counts the rest of a workflow once for each of its open calls.

    Attributes:
        people: Those of the workflows that a person waits for.
        away_tokens: Context that workflows between two calls bring back with their next.
        away_squares: Sum of the squares of these.
    """

    workflows: int = 0
    people: int = 0
    tokens: int = 0
    away_tokens: int = 0
    away_squares: int = 0


class Workflows:
    """The workflows that may still send calls.

    Args:
        idle_s: An idle one is forgotten after this.
        most: Beyond this many, the longest idle ones are forgotten earlier.

    Attributes:
        demands: Told what each model is asked for, if anybody wants to know.
    """

    def __init__(self, *, idle_s: float = 3600.0, most: int = 100_000) -> None:
        self.demands: Demands | None = None
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
        self._note_class(workflow, interactive=request.service_class is ServiceClass.INTERACTIVE)
        workflow.seen_s = now_s
        workflow.calls += 1
        workflow.open_calls += 1
        self._note_away(workflow)
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
        self._note_away(workflow)

    def _note_class(self, workflow: Workflow, *, interactive: bool) -> None:
        """Count what a workflow owes anew if another waits for it than was known."""
        for model in workflow.owed:
            self.owed(model).people += interactive - workflow.interactive
        workflow.interactive = interactive

    def _note_away(self, workflow: Workflow) -> None:
        """Count the context of a workflow while it is between two calls of one model."""
        model, tokens = workflow.away
        if tokens:
            self._count_away(model, -1, tokens)
        is_away = not workflow.open_calls and workflow.model in workflow.owed
        workflow.away = (workflow.model, workflow.context_tokens if is_away else 0)
        if is_away and workflow.context_tokens:
            self._count_away(workflow.model, 1, workflow.context_tokens)

    def _count_away(self, model: ModelName, sign: int, tokens: int) -> None:
        owed = self.owed(model)
        owed.away_tokens += sign * tokens
        owed.away_squares += sign * tokens * tokens

    def rest(self, workflow: Workflow) -> None:
        """Note that a workflow is thought to be over: it owes nothing until it asks again."""
        if not workflow.open_calls:
            self.commit(workflow, workflow.model, 0)
            self._note_away(workflow)

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
        owed = self._owed.get(model)
        if owed is None:
            owed = self._owed[model] = Owed()
        return owed

    def commit(
        self,
        workflow: Workflow,
        model: ModelName,
        tokens: int,
        elsewhere: Mapping[ModelName, int] = _NOTHING,
    ) -> None:
        """Note which model a workflow is with now, and what it will need of it and of others."""
        owed = {**elsewhere, model: max(0, tokens)}
        workflow.grown_tokens = max(0, owed[model] - workflow.owed.get(model, 0))
        workflow.model = model
        for one in (*owed, *(gone for gone in workflow.owed if gone not in owed)):
            self._announce(workflow, one, owed.get(one, 0))

    def stream(self, workflow: Workflow, fresh_tokens: int, model: ModelName | None = None) -> None:
        """Note output tokens of a model, by default the one that the workflow is with.

        While it has an open call it owes that one a token at least.
        """
        model = workflow.model if model is None else model
        workflow.output_tokens += fresh_tokens
        least = int(workflow.open_calls > 0 and model == workflow.model)
        left_tokens = workflow.owed.get(model, 0) - fresh_tokens
        grown_tokens = least - left_tokens if left_tokens < least else 0
        if self.demands is not None:
            flow = self.demands.flow(model)
            flow.output_tokens += fresh_tokens
            flow.exceed(grown_tokens, workflow.grown_tokens)
        workflow.grown_tokens += grown_tokens
        self._owe(workflow, model, left_tokens + grown_tokens)

    def _announce(self, workflow: Workflow, model: ModelName, tokens: int) -> None:
        """Tell what is newly asked of a model, or no longer."""
        more_tokens = tokens - workflow.owed.get(model, 0)
        if more_tokens:
            if self.demands is not None:
                self.demands.flow(model).announce(more_tokens)
            self._owe(workflow, model, tokens)

    def _owe(self, workflow: Workflow, model: ModelName, tokens: int) -> None:
        owed, before_tokens = self.owed(model), workflow.owed.get(model, 0)
        owed.tokens += tokens - before_tokens
        if tokens:
            workflow.owed[model] = tokens
        else:
            workflow.owed.pop(model, None)
        change = bool(tokens) - bool(before_tokens)
        if change:
            owed.workflows += change
            owed.people += change * workflow.interactive

    def _drop(self, workflow: Workflow) -> None:
        self.commit(workflow, workflow.model, 0)
        self._note_away(workflow)
        del self._by_id[workflow.workflow_id]

    def validate(self) -> None:
        """Check that what is owed is the sum over the live workflows."""
        for model, owed in self._owed.items():
            mine = [w.owed[model] for w in self._by_id.values() if model in w.owed]
            people = sum(w.interactive for w in self._by_id.values() if model in w.owed)
            found = (owed.workflows, owed.people, owed.tokens)
            assert found == (len(mine), people, sum(mine)), model
            assert all(tokens > 0 for tokens in mine), model
            away = [w.away[1] for w in self._by_id.values() if w.away[0] == model]
            assert (owed.away_tokens, owed.away_squares) == (sum(away), sum(a * a for a in away))

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
