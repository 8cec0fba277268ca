"""The truth as a forecast, for named oracles only; nothing else may read a realised future."""

from collections.abc import Iterable

from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import Request, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.workload.plan import Call, WorkflowPlan


class Clairvoyant:
    """Knows each call's length and success on every model, and what its workflow still needs."""

    reads_prompts = False

    def __init__(self, plans: Iterable[WorkflowPlan]) -> None:
        self._calls: dict[tuple[WorkflowId, int], tuple[Call, int, int]] = {}
        for plan in plans:
            remaining_tokens = 0
            for remaining_calls, call in enumerate(reversed(plan.calls), start=1):
                remaining_tokens += call.output_tokens
                known = (call, remaining_tokens, remaining_calls)
                self._calls[plan.workflow_id, call.stage] = known

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Look the call up."""
        assert request.stage is not None, "an oracle knows calls by their stage"
        call, tokens, calls = self._calls[request.workflow_id, request.stage]
        return Forecast(
            output_tokens=Quantiles.exactly(call.output_tokens),
            output_tokens_on={
                model: Quantiles.exactly(one.output_tokens) for model, one in call.outcomes.items()
            },
            success={model: one.correct for model, one in call.outcomes.items()},
            remaining_tokens=Quantiles.exactly(tokens),
            remaining_calls=Quantiles.exactly(calls),
            source="truth",
        )

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Nothing is left to learn."""

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Nothing is left to learn."""
