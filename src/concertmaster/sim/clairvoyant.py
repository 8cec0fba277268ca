"""The truth as a forecast, for named oracles only; nothing else may read a realised future."""

from collections.abc import Iterable

from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.workload.plan import Call, WorkflowPlan


class Clairvoyant:
    """Knows each call's length and success on every model, and what its workflow still needs."""

    def __init__(self, plans: Iterable[WorkflowPlan]) -> None:
        self._calls: dict[tuple[WorkflowId, int], tuple[Call, int]] = {}
        for plan in plans:
            remaining_tokens = 0
            for call in reversed(plan.calls):
                remaining_tokens += call.output_tokens
                self._calls[plan.workflow_id, call.stage] = (call, remaining_tokens)

    def predict(self, request: Request) -> Forecast:
        """Look the call up."""
        assert request.stage is not None, "an oracle knows calls by their stage"
        call, remaining_tokens = self._calls[request.workflow_id, request.stage]
        return Forecast(
            output_tokens=Quantiles.exactly(call.output_tokens),
            output_tokens_on={
                model: Quantiles.exactly(one.output_tokens) for model, one in call.outcomes.items()
            },
            success={model: one.correct for model, one in call.outcomes.items()},
            remaining_tokens=Quantiles.exactly(remaining_tokens),
            source="truth",
        )

    def learn(self, request: Request, model: ModelName, output_tokens: int) -> None:
        """Nothing is left to learn."""
