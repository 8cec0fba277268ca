"""Stands beside the forecasts of a run: notes what they promise, and may keep grades back."""

from collections.abc import Mapping

from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt


class Witness:
    """Passes forecasts on, and remembers what success they promised.

    Args:
        inner: Makes the forecasts.
        graded: Whether it is told the grades of workflows that are over.
    """

    def __init__(self, inner: Predictor, *, graded: bool = True) -> None:
        self.reads_prompts = inner.reads_prompts
        self.promised: dict[RequestId, Mapping[ModelName, float]] = {}
        self._inner = inner
        self._graded = graded

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Note what is promised."""
        forecast = self._inner.predict(request, prompt)
        self.promised[request.request_id] = forecast.success
        return forecast

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Pass on."""
        self._inner.learn(request, completion, prompt, forecast)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Pass on, without the grade if grades are kept back."""
        self._inner.close(workflow_id, success if self._graded else None)
