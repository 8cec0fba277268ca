"""Which forecasts are held against what came: lengths, what remained, and success.

Every answer is a label of its length. A workflow is one label of what remained and one of
success: what remains at each of its calls is much the same number, and a test that counted it
as many would take one odd workflow for drift. So it is the first answered call whose forecast
of what remains counts, and the model with most of the calls whose chance is held against the
grade, as it was stated at the first of them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.learning.drift import Drift, DriftWatch
from concertmaster.predictors.interface import Completion

MOST_WORKFLOWS = 10_000
"""Workflows whose end or grade is awaited."""


@dataclass(slots=True)
class _Part:
    """What a model did in a workflow: the chances as stated at its first call, and its calls."""

    chances: Mapping[ModelName, float]
    calls: int = 0


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


class _Stated(NamedTuple):
    """What a model did in a workflow: its calls, and its chance as stated at the first."""

    model: ModelName
    calls: int
    chance: float | None


class _Over(NamedTuple):
    """A workflow that is over: what its grade will be held against, a third of what it was."""

    app: str
    ended_s: float
    parts: tuple[_Stated, ...]


class Watching:
    """Holds forecasts against outcomes; the groups of its alarms begin with the quantity.

    Args:
        watch: Looks for drift.
    """

    def __init__(self, watch: DriftWatch | None = None) -> None:
        self._watch = watch or DriftWatch()
        self._open: OrderedDict[WorkflowId, _Open | _Over] = OrderedDict()

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
            part = found.parts[model] = _Part(forecast.success)
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
        found = self._open.get(workflow_id)
        if found is None:
            return []
        over = _settled(found) if isinstance(found, _Open) else found
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

    def _ended(self, found: _Open) -> Drift | None:
        if not found.whole or found.remaining is None:
            return None
        group = ("remaining_tokens", *found.group)
        return self._watch.add(group, found.remaining, found.tokens, found.ended_s)

    def _graded(self, over: _Over, grade: float) -> Drift | None:
        most = max(over.parts, key=lambda part: part.calls, default=None)
        if most is None or most.chance is None:
            return None
        group = ("success", over.app, most.model)
        return self._watch.add_grade(group, most.chance, grade, over.ended_s)

    def _of(self, workflow_id: WorkflowId) -> _Open:
        found = self._open.get(workflow_id)
        if isinstance(found, _Open):
            return found
        opened = self._open[workflow_id] = _Open() if found is None else _again(found)
        if len(self._open) > MOST_WORKFLOWS:
            self._open.popitem(last=False)
        return opened


def _settled(found: _Open) -> _Over:
    """Read the chances that were stated: what they rest on need not be kept for a late grade."""
    parts = found.parts.items()
    stated = [_Stated(model, part.calls, part.chances.get(model)) for model, part in parts]
    return _Over(found.group[0], found.ended_s, tuple(stated))


def _again(over: _Over) -> _Open:
    """Go on with a workflow that was over; what remained of it has been held against."""
    parts = {
        model: _Part({} if chance is None else {model: chance}, calls)
        for model, calls, chance in over.parts
    }
    return _Open(group=(over.app, ""), whole=False, ended_s=over.ended_s, parts=parts)
