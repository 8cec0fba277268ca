"""A baseline that is hard to shame: the answer lengths seen lately for the same role."""

from collections import deque
from dataclasses import replace

from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import Request, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.predictors.shares import ModelShares

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
MIN_LENGTHS = 8
"""Lengths below which a step of the fallback does not answer."""

REFRESH_SHARE = 8
"""Quantiles are read again once this fraction, one eighth, of the lengths is fresh."""


class _Window:
    """The latest lengths, and their quantiles, which are brought up to date now and then.

    They are read again while learning, never while predicting: what is asked in between
    must not change later answers.
    """

    __slots__ = ("_latest", "_source", "_stale", "forecast")

    def __init__(self, window: int, source: str) -> None:
        self._latest: deque[int] = deque(maxlen=window)
        self._source = source
        self._stale = 0
        self.forecast: Forecast | None = None

    def add(self, tokens: int) -> None:
        self._latest.append(tokens)
        self._stale += 1
        count = len(self._latest)
        if count >= MIN_LENGTHS and self._stale * REFRESH_SHARE >= count:
            ranked = sorted(self._latest)
            values = tuple(float(ranked[round(level * (count - 1))]) for level in LEVELS)
            law = Quantiles(LEVELS, values)
            self.forecast = Forecast(output_tokens=law, source=self._source)
            self._stale = 0


class RecentLengths:
    """Quantiles of the last answers, by (app, role), else by app, else of all.

    Args:
        window: Answers to remember for each of them.
        max_groups: Apps and roles to remember; those beyond fall back to the next step.
    """

    reads_prompts = False

    def __init__(self, *, window: int = 200, max_groups: int = 1000) -> None:
        self._window = window
        self._max_groups = max_groups
        self._by_group: dict[tuple[str, ...], _Window] = {}
        self._shares = ModelShares(most_groups=max_groups)

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer with the finest group that has seen enough; none at all before that."""
        forecast, shares = self._lengths(request), self._shares.of(request)
        return replace(forecast, remaining_by=shares) if shares else forecast

    def _lengths(self, request: Request) -> Forecast:
        for _, group in _steps(request):
            window = self._by_group.get(group)
            if window is not None and window.forecast is not None:
                return window.forecast
        return NO_FORECAST

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Remember one length in each group of the call."""
        self._shares.note(request, completion)
        for source, group in _steps(request):
            window = self._by_group.get(group)
            if window is None:
                if len(self._by_group) >= self._max_groups:
                    continue
                window = self._by_group[group] = _Window(self._window, source)
            window.add(completion.output_tokens)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Learn which models it asked."""
        self._shares.close(workflow_id)


def _steps(request: Request) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the groups of a call from fine to coarse, with the name of the step."""
    return (
        ("role", (request.app, request.role)),
        ("app", (request.app,)),
        ("global", ()),
    )
