"""The truth as a forecast: only what is asked for, and only of calls that will be made."""

import pytest

from builders import Notebook, a_call, a_plan, a_request, a_workload
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.policy import Truth
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.sim.clairvoyant import Clairvoyant
from concertmaster.workload.plan import ModelOutcome, WorkflowPlan

GOOD, BAD, OTHER = ModelName("good"), ModelName("bad"), ModelName("other")
W = WorkflowId("w1")
GUESS = Forecast(
    output_tokens=Quantiles.exactly(7.0), success={OTHER: 0.5}, tool_call=0.25, source="guess"
)


class Guesser(Notebook):
    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        super().predict(request, prompt)
        return GUESS


def outcomes(tokens: int) -> dict[ModelName, ModelOutcome]:
    return {
        GOOD: ModelOutcome(correct=1.0, output_tokens=tokens),
        BAD: ModelOutcome(correct=0.0, output_tokens=2 * tokens),
    }


def a_checked_answer(doubt: float | None = 0.5) -> WorkflowPlan:
    """A planner, a solver, a verifier, and the solver again if its work is sent back."""
    return a_plan(
        "w1",
        a_call(0, output_tokens=10, role="planner"),
        a_call(1, output_tokens=99, role="solver", outcomes=outcomes(100)),
        a_call(2, output_tokens=30, role="verifier"),
        a_call(3, output_tokens=88, role="solver", outcomes=outcomes(200), doubt=doubt),
    )


def told(stage: int, *tells: Truth, plan: WorkflowPlan | None = None) -> Forecast:
    oracle = Clairvoyant(a_workload(plan or a_checked_answer()), Guesser(), frozenset(tells))
    return oracle.predict(a_request(workflow_id=W, stage=stage))


def exactly(law: Quantiles | None) -> float | None:
    return None if law is None else law.median


def test_told_lengths_it_leaves_success_to_the_other_predictor() -> None:
    forecast = told(1, "length")

    assert forecast.success == GUESS.success
    assert (exactly(forecast.output_law(GOOD)), exactly(forecast.output_law(BAD))) == (100, 200)
    assert forecast.tool_call == 0.25
    assert forecast.source == "truth"


def test_told_success_it_leaves_lengths_to_the_other_predictor() -> None:
    forecast = told(1, "success")

    assert forecast.success == {GOOD: 1.0, BAD: 0.0}
    assert forecast.output_tokens == GUESS.output_tokens
    assert forecast.output_tokens_on == {}
    assert forecast.remaining_tokens is None


def test_told_both_it_tells_both() -> None:
    forecast = told(3, "length", "success")

    assert forecast.success == {GOOD: 1.0, BAD: 0.0}
    assert exactly(forecast.output_law(BAD)) == 400


@pytest.mark.parametrize("stage", [0, 2])
def test_a_call_without_a_grade_has_that_of_the_answer_it_helps(stage: int) -> None:
    assert told(stage, "success").success == {GOOD: 1.0, BAD: 0.0}


def test_a_call_that_will_not_be_made_counts_only_for_the_model_whose_work_is_sent_back() -> None:
    """The draw is 0.5: a verifier sends wrong answers back, and lets right ones pass."""
    left = [told(stage, "length") for stage in range(4)]

    assert [exactly(one.remaining_on(GOOD)) for one in left] == [140, 130, 30, 200]
    assert [exactly(one.remaining_on(BAD)) for one in left] == [640, 630, 430, 400]
    always = told(0, "length", plan=a_checked_answer(doubt=None))
    assert exactly(always.remaining_on(GOOD)) == 340
    assert exactly(always.remaining_tokens) == 10 + 99 + 30 + 88
    assert exactly(always.remaining_calls) == 4


def test_the_other_predictor_is_asked_and_learns_all_that_it_would_have() -> None:
    inner = Guesser()
    oracle = Clairvoyant(a_workload(a_checked_answer()), inner, frozenset({"length"}))
    request = a_request(workflow_id=W, stage=1)

    oracle.predict(request)
    oracle.learn(request, Completion(model=GOOD, output_tokens=9))
    oracle.close(W, 0.5)

    assert oracle.reads_prompts is inner.reads_prompts
    assert len(inner.asked) == 1
    assert [(one.output_tokens, asked) for asked, one, _ in inner.learnt] == [(9, request)]
    assert inner.closed == [(W, 0.5)]
