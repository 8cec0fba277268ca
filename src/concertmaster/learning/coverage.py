"""How often outcomes stay at or below what was forecast, over the latest labels."""

from collections import OrderedDict, deque

from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.learning.figures import COVERED

WINDOW = 1_000
MOST_WORKFLOWS = 10_000
MOST_CALLS = 256
"""Calls of one workflow whose forecasts are kept until it is over."""

_Waiting = tuple[Quantiles | None, Quantiles | None, int]


class Coverage:
    """Shares of outcomes at or below P50 and P95, by target.

    Args:
        window: Labels of a target that shares are taken over.
    """

    def __init__(self, *, window: int = WINDOW) -> None:
        self._window = window
        self._hits: dict[str, deque[tuple[bool, ...]]] = {}
        self._open: OrderedDict[WorkflowId, list[_Waiting]] = OrderedDict()

    def learn(
        self, request: Request, model: ModelName, output_tokens: int, forecast: Forecast
    ) -> None:
        """Take in an outcome; what remained is counted when its workflow is over."""
        self._add("output_tokens", forecast.output_law(model), output_tokens)
        calls = self._open.setdefault(request.workflow_id, [])
        if len(calls) < MOST_CALLS:
            calls.append((forecast.remaining_tokens, forecast.remaining_calls, output_tokens))
        if len(self._open) > MOST_WORKFLOWS:
            self._open.popitem(last=False)

    def close(self, workflow_id: WorkflowId) -> None:
        """Hold what remained of a workflow against what was said at each of its calls."""
        finished = self._open.pop(workflow_id, ())
        tokens = 0
        if len(finished) == MOST_CALLS:
            return
        for calls, (law_tokens, law_calls, output_tokens) in enumerate(reversed(finished), start=1):
            tokens += output_tokens
            self._add("remaining_tokens", law_tokens, tokens)
            self._add("remaining_calls", law_calls, calls)

    def ratios(self) -> dict[tuple[str, float], float]:
        """Return the share of outcomes covered, by target and level, where there are any."""
        return {
            (target, level): sum(hit[i] for hit in hits) / len(hits)
            for target, hits in self._hits.items()
            for i, level in enumerate(COVERED)
        }

    def _add(self, target: str, law: Quantiles | None, truth: float) -> None:
        if law is None:
            return
        hits = self._hits.get(target)
        if hits is None:
            hits = self._hits[target] = deque(maxlen=self._window)
        median, tail = COVERED
        hits.append((truth <= law.at(median), truth <= law.at(tail)))
