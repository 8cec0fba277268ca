"""The truth as a forecast, for named oracles only; nothing else may read a realised future."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.policy import Truth
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.workload.plan import Call, WorkflowPlan


class _Known(NamedTuple):
    """One call in its workflow.

    Attributes:
        before: Calls of its workflow that come first in the plan.
        rest: The call, and the calls after it.
    """

    before: Sequence[Call]
    rest: Sequence[Call]


class Clairvoyant:
    """Tells the truth of what it is asked to, and else what another predictor says.

    Args:
        plans: The workflows as they will run.
        inner: Forecasts the rest.
        tells: What it tells the truth of.
    """

    def __init__(
        self, plans: Iterable[WorkflowPlan], inner: Predictor, tells: frozenset[Truth]
    ) -> None:
        self.reads_prompts = inner.reads_prompts
        self._inner = inner
        self._tells = tells
        self._calls: dict[tuple[WorkflowId, int], _Known] = {
            (plan.workflow_id, call.stage): _Known(plan.calls[:i], plan.calls[i:])
            for plan in plans
            for i, call in enumerate(plan.calls)
        }

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Look the call up."""
        assert request.stage is not None, "an oracle knows calls by their stage"
        known = self._calls[request.workflow_id, request.stage]
        forecast = self._inner.predict(request, prompt)
        if "length" in self._tells:
            forecast = with_lengths(forecast, known.before, known.rest)
        if "success" in self._tells:
            forecast = replace(forecast, success=grades(known.rest))
        return replace(forecast, source="truth")

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Let the other one learn."""
        self._inner.learn(request, completion, prompt, forecast)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Let the other one learn."""
        self._inner.close(workflow_id, success)


def grades(rest: Sequence[Call]) -> dict[ModelName, float]:
    """Grade each model's answer to the first call; if that is not graded, to the last that is."""
    outcomes = rest[0].outcomes or next((c.outcomes for c in reversed(rest) if c.outcomes), {})
    return {model: one.correct for model, one in outcomes.items()}


def still_made(before: Sequence[Call], rest: Sequence[Call], model: ModelName) -> list[Call]:
    """Return the calls that are made from here on if a model answers them, as it did before.

    The first of ``rest`` is being made; a call after it is left out if nobody sends the
    model's work back.
    """
    graded = [call.outcomes[model].correct for call in before if model in call.outcomes]
    grade = graded[-1] if graded else 0.0
    made: list[Call] = []
    for call in rest:
        if made and not call.is_called_for(grade):
            continue
        made.append(call)
        if model in call.outcomes:
            grade = call.outcomes[model].correct
    return made


def with_lengths(forecast: Forecast, before: Sequence[Call], rest: Sequence[Call]) -> Forecast:
    """Put the true lengths of a call and of the rest of its workflow into a forecast.

    Where no model is named, every call of the plan counts.
    """
    call = rest[0]
    models = dict.fromkeys(model for one in rest for model in one.outcomes)
    return replace(
        forecast,
        output_tokens=Quantiles.exactly(call.output_tokens),
        output_tokens_on={m: Quantiles.exactly(call.output_tokens_by(m)) for m in models},
        remaining_tokens=Quantiles.exactly(sum(one.output_tokens for one in rest)),
        remaining_tokens_on={
            m: Quantiles.exactly(
                sum(one.output_tokens_by(m) for one in still_made(before, rest, m))
            )
            for m in models
        },
        remaining_calls=Quantiles.exactly(len(rest)),
    )
