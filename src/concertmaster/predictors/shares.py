"""Which models a workflow will ask, learned from those that are over.

A planner that runs on one model is followed by queries on another: who knows that when the
planner asks can make the other model ready.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.interface import Completion

MIN_WORKFLOWS = 3
"""Finished workflows below which nothing is said of a group."""

MEMORY_WORKFLOWS = 100
"""A workflow counts with e^-1 of its weight after so many more."""

MOST_CALLS = 4096
"""Calls of one workflow that are remembered."""

ANY = ModelName("")
"""Stands for the model of calls that leave it open."""

_Group = tuple[str, str, str]
_NOTHING: Mapping[ModelName, float] = {}


@dataclass(slots=True)
class _Means:
    """Mean tokens by model, over the workflows of a group."""

    workflows: int = 0
    tokens: dict[ModelName, float] = field(default_factory=dict)

    def take_in(self, tokens: Mapping[ModelName, float]) -> None:
        self.workflows += 1
        weight = 1 / min(self.workflows, MEMORY_WORKFLOWS)
        for model in {**self.tokens, **tokens}:
            mean = self.tokens.get(model, 0.0)
            self.tokens[model] = mean + weight * (tokens.get(model, 0.0) - mean)


class ModelShares:
    """Output tokens that a workflow needs from a call on, by model.

    Kept by app, template and role. It speaks only where calls of a workflow name models, and
    not all the same.

    Args:
        most_workflows: Unfinished ones to remember; the one that was quiet longest goes first.
        most_groups: Groups to remember; calls of those beyond are told nothing.
    """

    def __init__(self, *, most_workflows: int = 20_000, most_groups: int = 1000) -> None:
        self._most_workflows = most_workflows
        self._most_groups = most_groups
        self._open: OrderedDict[WorkflowId, list[tuple[_Group, ModelName, int]]] = OrderedDict()
        self._by_group: dict[_Group, _Means] = {}

    def of(self, request: Request) -> Mapping[ModelName, float]:
        """Return mean tokens from this call on, itself included; empty if nothing is known."""
        means = self._by_group.get(_group(request))
        if means is None or means.workflows < MIN_WORKFLOWS:
            return _NOTHING
        own = _named(request)
        if all(model == own for model in means.tokens):
            return _NOTHING
        return dict(means.tokens)

    def note(self, request: Request, completion: Completion) -> None:
        """Remember an answer until its workflow is over."""
        calls = self._open.setdefault(request.workflow_id, [])
        self._open.move_to_end(request.workflow_id)
        if len(calls) < MOST_CALLS:
            calls.append((_group(request), _named(request), completion.output_tokens))
        if len(self._open) > self._most_workflows:
            self._open.popitem(last=False)

    def close(self, workflow_id: WorkflowId) -> None:
        """Learn from a workflow that is over; each role of it counts once."""
        for group, tokens in _means_by_group(self._open.pop(workflow_id, ())):
            means = self._by_group.get(group)
            if means is None:
                if len(self._by_group) >= self._most_groups:
                    continue
                means = self._by_group[group] = _Means()
            means.take_in(tokens)


def _group(request: Request) -> _Group:
    return request.app, request.template, request.role


def _named(request: Request) -> ModelName:
    return request.models[0] if len(request.models) == 1 else ANY


def _means_by_group(
    calls: Iterable[tuple[_Group, ModelName, int]],
) -> Iterable[tuple[_Group, dict[ModelName, float]]]:
    """Return what followed a call of each group, as the mean over its calls."""
    rest: dict[ModelName, int] = {}
    sums: dict[_Group, dict[ModelName, float]] = {}
    counts: dict[_Group, int] = {}
    for group, model, tokens in reversed(list(calls)):
        rest[model] = rest.get(model, 0) + tokens
        total = sums.setdefault(group, {})
        counts[group] = counts.get(group, 0) + 1
        for named, left in rest.items():
            total[named] = total.get(named, 0.0) + left
    for group, total in sums.items():
        yield group, {named: tokens / counts[group] for named, tokens in total.items()}
