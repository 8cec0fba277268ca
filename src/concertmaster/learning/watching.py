"""Which forecasts are held against what came: lengths, what remained, and success.

Every answer is a label of its length. A workflow is one label of what remained and one of
success: what remains at each of its calls is much the same number, and a test that counted it
as many would take one odd workflow for drift. So it is the first answered call whose forecast
of what remains counts, and the model with most of the calls whose chance is held against the
grade, as it was stated at the first of them.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.learning.drift import Drift, DriftWatch
from concertmaster.predictors.chances import Chances
from concertmaster.predictors.interface import Completion

MOST_WORKFLOWS = 10_000
"""Workflows whose end or grade is awaited."""

MOST_UNREAD = 2_000
"""Chances to hold as they were stated. One is worked out once so many have come after it, or let
go of where nobody has ever graded: what chances rest on is large."""


@dataclass(slots=True)
class _Part:
    """What a model did in a workflow: the chances as stated at its first call, and its calls."""

    model: ModelName
    chances: Mapping[ModelName, float]
    calls: int = 0

    @property
    def is_read(self) -> bool:
        """Whether its chances are known without working them out."""
        return not isinstance(self.chances, Chances) or self.chances.read

    def settle(self) -> None:
        """Work out the chance that a grade is held against, and keep no other."""
        chance = self.chances.get(self.model)
        self.chances = {} if chance is None else {self.model: chance}


@dataclass(slots=True)
class _Open:
    """A workflow so far.

    Attributes:
        group: App, and role of the first call.
        remaining: What was said to remain at that call.
        whole: Whether what came is what was to remain: no call failed, none came after the end.
        ended_s: When the last answer was complete, on the driver's clock.
    """

    group: tuple[str, str] = ("", "")
    remaining: Quantiles | None = None
    whole: bool = True
    tokens: int = 0
    ended_s: float = 0.0
    parts: dict[ModelName, _Part] = field(default_factory=dict)


class _Over(NamedTuple):
    """A workflow that is over: what its grade will be held against."""

    app: str
    ended_s: float
    parts: tuple[_Part, ...]


class Watching:
    """Holds forecasts against outcomes; the groups of its alarms begin with the quantity.

    Args:
        watch: Looks for drift.
    """

    def __init__(self, watch: DriftWatch | None = None) -> None:
        self._watch = watch or DriftWatch()
        self._open: OrderedDict[WorkflowId, _Open | _Over] = OrderedDict()
        self._unread: deque[_Part] = deque()
        self._has_grades = False

    def learn(
        self, request: Request, completion: Completion, forecast: Forecast, gpu: str
    ) -> Drift | None:
        """Take in an answer, and what was forecast of its call by the predictor that is watched."""
        model, tokens, at_s = completion.model, completion.output_tokens, completion.finished_s
        found = self._of(request.workflow_id)
        if not found.parts:
            found.group, found.remaining = (request.app, request.role), forecast.remaining_tokens
        part = found.parts.get(model)
        if part is None:
            part = found.parts[model] = _Part(model, forecast.success)
            self._hold(part)
        part.calls += 1
        found.tokens += tokens
        found.ended_s = at_s
        law = forecast.output_law(model)
        if law is None:
            return None
        group = ("output_tokens", request.app, request.role, model, gpu)
        return self._watch.add(group, law, tokens, at_s)

    def cut(self, workflow_id: WorkflowId) -> None:
        """Take in that a call failed: what came of its workflow is not what was to remain."""
        self._of(workflow_id).whole = False

    def close(self, workflow_id: WorkflowId, grade: float | None = None) -> list[Drift]:
        """Return alarms of a workflow that is over; its grade may come later, in its own call."""
        self._has_grades = self._has_grades or grade is not None
        found = self._open.get(workflow_id)
        if found is None:
            return []
        over = _over(found) if isinstance(found, _Open) else found
        alarms = [self._ended(found)] if isinstance(found, _Open) else []
        if grade is None:
            self._open[workflow_id] = over
        else:
            del self._open[workflow_id]
            alarms.append(self._graded(over, grade))
        return [alarm for alarm in alarms if alarm is not None]

    def reset(self) -> None:
        """Begin again, because forecasts come from another fit."""
        self._watch.reset()
        self._open.clear()
        self._unread.clear()

    def _hold(self, part: _Part) -> None:
        """Hold chances; the oldest are settled if grades come, let go of if they never did."""
        self._unread.append(part)
        if len(self._unread) > MOST_UNREAD:
            oldest = self._unread.popleft()
            if self._has_grades or oldest.is_read:
                oldest.settle()
            else:
                oldest.chances = {}

    def _ended(self, found: _Open) -> Drift | None:
        if not found.whole or found.remaining is None:
            return None
        group = ("remaining_tokens", *found.group)
        return self._watch.add(group, found.remaining, found.tokens, found.ended_s)

    def _graded(self, over: _Over, grade: float) -> Drift | None:
        most = max(over.parts, key=lambda part: part.calls, default=None)
        chance = None if most is None else most.chances.get(most.model)
        for part in over.parts:
            part.chances = {}
        if most is None or chance is None:
            return None
        group = ("success", over.app, most.model)
        return self._watch.add_grade(group, chance, grade, over.ended_s)

    def _of(self, workflow_id: WorkflowId) -> _Open:
        found = self._open.get(workflow_id)
        if isinstance(found, _Open):
            return found
        opened = self._open[workflow_id] = _Open() if found is None else _again(found)
        if len(self._open) > MOST_WORKFLOWS:
            self._open.popitem(last=False)
        return opened


def _over(found: _Open) -> _Over:
    return _Over(found.group[0], found.ended_s, tuple(found.parts.values()))


def _again(over: _Over) -> _Open:
    """Go on with a workflow that was over; what remained of it has been held against."""
    parts = {part.model: part for part in over.parts}
    return _Open(group=(over.app, ""), whole=False, ended_s=over.ended_s, parts=parts)
