"""A forecast that is late, broken or senseless must not hold up, break or mislead a decision.

A predictor is a plain function call and cannot be stopped half way. So the budget is kept by
foresight: what a prompt of this size took lately decides whether the predictor is asked at
all. The first call of a kind that is slow is waited for, and counted as late.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable

from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, RequestId, WorkflowId
from concertmaster.learning.notices import Notices, describe
from concertmaster.predictors.chances import Chances
from concertmaster.predictors.interface import NO_PROMPT, Awaiting, Completion, Predictor, Prompt

BUDGET_S = 0.02
LOG_EVERY_S = 60.0
MOST_OPEN = 10_000
"""Calls that the fallback answered and that are remembered until their outcome."""

_SMOOTH = 0.2
_FADE = 0.98
"""Each skipped call takes this from what is expected, so that the predictor is tried again."""


class BudgetedPredictor:
    """Answers with a predictor while it keeps to a budget, else with a fallback.

    What either answers rests on what it has learned; which of the two is asked, on measured
    time alone. Both learn from every completion.
    A predictor that has become slow is tried again after 35 skipped calls where it took twice
    the budget, after 115 where it took ten times that.

    Args:
        predictor: The one to keep in check.
        fallback: Answers in its place; should be quick. Its errors are kept in check too.
        clock: Seconds.
        budget_s: Seconds that a forecast may take.

    Attributes:
        reads_prompts: Whether either of the two does.
    """

    def __init__(
        self,
        predictor: Predictor,
        fallback: Predictor,
        clock: Callable[[], float],
        *,
        budget_s: float = BUDGET_S,
    ) -> None:
        self.reads_prompts = predictor.reads_prompts or fallback.reads_prompts
        self._predictor = predictor
        self._fallback = fallback
        self._clock = clock
        self._budget_s = budget_s
        self._expected_s: dict[int, float] = {}
        self._faded: set[int] = set()
        self._fell_back: OrderedDict[RequestId, bool] = OrderedDict()
        self._notices = Notices("forecast", every_s=LOG_EVERY_S)

    @property
    def counts(self) -> Counter[str]:
        """How calls were answered, for metrics.

        "in_time"; "late" (answered all the same); by the fallback: "skipped", "failed",
        "senseless". Beside them "not_learned", and "fallback_failed" (answered by nobody).
        """
        counts: Counter[str] = Counter()
        for kind, count in self._notices.counts.items():
            counts[kind.partition(" ")[0]] += count
        return counts

    def expected_s(self, prompt: Prompt) -> float:
        """Seconds that a forecast for a prompt of this size is expected to take.

        Sizes are told apart by powers of two; for one not seen yet, the next smaller counts.
        """
        size = _size(prompt)
        expected_s = self._expected_s.get(size)
        if expected_s is not None:
            return expected_s
        smaller = [known for known in self._expected_s if known < size]
        return self._expected_s[max(smaller)] if smaller else 0.0

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer within the budget, as far as can be foreseen."""
        return self.predict_within(self._budget_s, request, prompt)

    def predict_within(
        self, left_s: float, request: Request, prompt: Prompt = NO_PROMPT
    ) -> Forecast:
        """Answer within what is left of the budget, where part of it has been spent."""
        if self.expected_s(prompt) > left_s:
            self._notices.count("skipped")
            self._fade(prompt)
            return self._fall_back(request, prompt)
        began_s = self._clock()
        forecast = self._ask(request, prompt)
        now_s = self._clock()
        self._measure(prompt, now_s - began_s)
        if forecast is None:
            return self._fall_back(request, prompt)
        if now_s - began_s <= left_s:
            self._notices.count("in_time")
        else:
            self._notices.warn("late", now_s=now_s, took_s=now_s - began_s, chars=prompt.chars)
        return forecast

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Teach both, each beside what it said itself; errors of one do not touch the other."""
        fell_back = self._fell_back.pop(request.request_id, False)
        mine, other = (NO_FORECAST, forecast) if fell_back else (forecast, NO_FORECAST)
        for each, said in ((self._predictor, mine), (self._fallback, other)):
            try:
                each.learn(request, completion, prompt, said)
            except Exception as error:  # noqa: BLE001 - it may be broken in any way
                self._warn("not_learned", error)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Tell both that a workflow is over."""
        for each in (self._predictor, self._fallback):
            try:
                each.close(workflow_id, success)
            except Exception as error:  # noqa: BLE001 - it may be broken in any way
                self._warn("not_learned", error)

    def failed(self, request_id: RequestId) -> None:
        """Tell both that no answer will come of a call."""
        self._fell_back.pop(request_id, None)
        for each in (self._predictor, self._fallback):
            if not isinstance(each, Awaiting):
                continue
            try:
                each.failed(request_id)
            except Exception as error:  # noqa: BLE001 - it may be broken in any way
                self._warn("not_learned", error)

    def _ask(self, request: Request, prompt: Prompt) -> Forecast | None:
        try:
            forecast = self._predictor.predict(request, prompt)
        except Exception as error:  # noqa: BLE001 - it may be broken in any way
            self._warn("failed", error)
            return None
        if not makes_sense(forecast):
            self._notices.warn("senseless", now_s=self._clock())
            return None
        return forecast

    def _fall_back(self, request: Request, prompt: Prompt) -> Forecast:
        self._fell_back[request.request_id] = True
        if len(self._fell_back) > MOST_OPEN:
            self._fell_back.popitem(last=False)
        try:
            return self._fallback.predict(request, prompt)
        except Exception as error:  # noqa: BLE001 - it may be broken in any way
            self._warn("fallback_failed", error)
            return NO_FORECAST

    def _warn(self, kind: str, error: Exception) -> None:
        """Each type of error is a kind of its own in the log."""
        name = f"{kind} {type(error).__name__}"
        self._notices.warn(name, now_s=self._clock(), error=describe(error))

    def _measure(self, prompt: Prompt, took_s: float) -> None:
        size = _size(prompt)
        before_s = took_s if size in self._faded else self._expected_s.get(size, took_s)
        self._faded.discard(size)
        self._expected_s[size] = before_s + _SMOOTH * (took_s - before_s)

    def _fade(self, prompt: Prompt) -> None:
        size = _size(prompt)
        self._expected_s[size] = self.expected_s(prompt) * _FADE
        self._faded.add(size)


def makes_sense(forecast: Forecast) -> bool:
    """Whether a forecast is made of numbers that can be decided upon.

    >>> makes_sense(Forecast(tool_call=1.5))
    False
    """
    rest = (forecast.remaining_tokens, forecast.remaining_calls, forecast.remaining_tool_s)
    for law in (forecast.output_tokens, *forecast.output_tokens_on.values(), *rest):
        if law is not None and not (law.values[0] >= 0.0 and math.isfinite(sum(law.values))):
            return False
    success = forecast.success
    if isinstance(success, Chances) and not success.read:  # made of odds, so they make sense
        success = {}
    ratios = (forecast.tool_call, *success.values())
    return all(ratio is None or 0.0 <= ratio <= 1.0 for ratio in ratios)


def _size(prompt: Prompt) -> int:
    return max(prompt.chars, len(prompt.text)).bit_length()
