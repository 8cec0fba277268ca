"""The learnt predictor: monotone, capped, honest about what it does not know."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_request
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.evidence import FEATURES, Evidence
from concertmaster.predictors.heads import LEVELS, Heads
from concertmaster.predictors.interface import Completion, Prompt
from concertmaster.predictors.learned import LearnedPredictor
from learned_builders import some_heads

SMALL, BIG = ModelName("small"), ModelName("big")


def asked(i: int = 0, workflow: str = "w", **changes: object) -> Request:
    facts: dict[str, object] = {
        "workflow_id": WorkflowId(workflow),
        "app": "app",
        "role": "coder",
        "stage": i,
        "max_output_tokens": 4096,
    }
    return a_request(f"{workflow}/{i}", **{**facts, **changes})


def answered(tokens: int, model: ModelName = SMALL) -> Completion:
    return Completion(model=model, output_tokens=tokens)


def laws_of(forecast: Forecast) -> list[Quantiles]:
    laws = [
        forecast.output_tokens,
        forecast.remaining_tokens,
        forecast.remaining_calls,
        forecast.remaining_tool_s,
        *forecast.output_tokens_on.values(),
    ]
    return [law for law in laws if law is not None]


def taught(predictor: LearnedPredictor, rng: random.Random, workflows: int = 60) -> None:
    for i in range(workflows):
        for stage in range(3):
            request = asked(stage, f"w{i}")
            forecast = predictor.predict(request)
            predictor.learn(request, answered(rng.randint(50, 150)), forecast=forecast)
        predictor.close(WorkflowId(f"w{i}"))


@given(
    text=st.text(max_size=50),
    cap=st.integers(1, 5000),
    tokens=st.lists(st.integers(1, 9000), max_size=10),
    seed=st.integers(0, 50),
)
def test_every_forecast_is_monotone_and_never_above_the_cap(
    text: str, cap: int, tokens: list[int], seed: int
) -> None:
    predictor = LearnedPredictor(Evidence(), some_heads(seed=seed), models=(SMALL, BIG))
    for i, count in enumerate(tokens):
        predictor.learn(asked(i), answered(count), forecast=predictor.predict(asked(i)))

    forecast = predictor.predict(asked(99, max_output_tokens=cap), Prompt(text=text))

    for law in laws_of(forecast):
        assert law.levels == LEVELS
        assert all(np.isfinite(law.values))
        assert min(law.values) >= 0
    for law in forecast.output_tokens_on.values():
        assert law.values[-1] <= cap
    assert set(forecast.output_tokens_on) == {SMALL, BIG}


def test_it_knows_that_it_does_not_know() -> None:
    predictor = LearnedPredictor(Evidence(), some_heads())
    taught(predictor, random.Random(1))

    known, unknown = predictor.predict(asked()), predictor.predict(asked(app="new"))

    assert (known.source, unknown.source) == ("role", "global")
    assert known.output_tokens is not None
    assert unknown.output_tokens is not None
    assert unknown.output_tokens.at(0.95) >= known.output_tokens.at(0.95)


def test_without_heads_the_laws_answer() -> None:
    predictor = LearnedPredictor(Evidence(), None)
    taught(predictor, random.Random(1))

    forecast = predictor.predict(asked())

    assert forecast.tool_call is None
    assert forecast.output_tokens is not None
    assert forecast.output_tokens.median == pytest.approx(100, rel=0.15)
    assert forecast.remaining_calls is not None
    assert forecast.remaining_calls.median == pytest.approx(3, abs=0.6)


def test_heads_that_are_wrong_lose_their_say() -> None:
    predictor = LearnedPredictor(Evidence(), some_heads(lift=6.0))
    before = predictor.predict(asked()).output_tokens
    taught(predictor, random.Random(1), workflows=200)

    after = predictor.predict(asked()).output_tokens

    assert before is not None
    assert after is not None
    assert before.median > 500
    assert after.median == pytest.approx(100, rel=0.2)


def test_models_answer_at_their_own_length() -> None:
    predictor = LearnedPredictor(Evidence(), None, models=(SMALL, BIG))
    for i in range(100):
        predictor.learn(asked(i, f"w{i}"), answered(50, SMALL))
        predictor.learn(asked(i, f"v{i}"), answered(800, BIG))

    forecast = predictor.predict(asked())

    assert forecast.output_tokens_on[SMALL].median < 100
    assert forecast.output_tokens_on[BIG].median > 600


def test_a_frozen_predictor_learns_nothing_but_remembers_the_workflow() -> None:
    predictor = LearnedPredictor(Evidence(), some_heads(seed=3), adapt=False)
    before = predictor.predict(asked(0, "other"))
    for i in range(20):
        predictor.learn(asked(i), answered(999), forecast=predictor.predict(asked(i)))
    features = predictor.evidence.look(asked(20), Prompt()).features
    predictor.close(WorkflowId("w"))

    assert predictor.predict(asked(0, "other")) == before
    assert features[FEATURES.index("all_calls")] == pytest.approx(np.log1p(20))


def test_the_same_history_gives_the_same_forecast() -> None:
    one, other = (LearnedPredictor(Evidence(), some_heads(seed=2)) for _ in range(2))
    taught(one, random.Random(5), workflows=5)
    taught(other, random.Random(5), workflows=5)

    assert one.predict(asked()) == other.predict(asked())


def test_kept_heads_answer_as_before() -> None:
    heads = some_heads(seed=4)
    figures = np.random.default_rng(0).normal(size=len(FEATURES)).astype(np.float32)

    restored = Heads.from_arrays(heads.arrays())

    asks, odds = heads.predict(figures, "sort this")
    asks_too, odds_too = restored.predict(figures, "sort this")
    assert asks == asks_too
    np.testing.assert_allclose(odds, odds_too, rtol=2e-3)


def test_an_outcome_without_a_forecast_is_learnt_all_the_same() -> None:
    predictor = LearnedPredictor(Evidence(), some_heads())
    predictor.learn(asked(), answered(10), forecast=NO_FORECAST)

    assert predictor.predict(asked(1)).source == "role"
