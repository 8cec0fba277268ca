"""Predictors: they answer before they know, learn late, and an answer teaches them nothing."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_call, a_plan, a_request, a_workload
from concertmaster.core.forecast import NO_FORECAST, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.predictors.evidence import Evidence
from concertmaster.predictors.interface import Completion, Predictor
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.recent import MIN_LENGTHS, RecentLengths
from concertmaster.sim.clairvoyant import Clairvoyant
from concertmaster.workload.plan import ModelOutcome
from learned_builders import some_heads

M, SMALL = ModelName("m"), ModelName("small")


def the_oracle() -> Clairvoyant:
    outcomes = {
        M: ModelOutcome(correct=1.0, output_tokens=50),
        SMALL: ModelOutcome(correct=0.0, output_tokens=70),
    }
    calls = [a_call(i, output_tokens=10 * (i + 1), outcomes=outcomes if i else {}) for i in (0, 1)]
    plans = a_workload(a_plan("w1", *calls))
    return Clairvoyant(plans, RecentLengths(), frozenset({"length", "success"}))


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "recent": RecentLengths,
    "recent, window of eight": lambda: RecentLengths(window=8),
    "recent, one group": lambda: RecentLengths(max_groups=1),
    "learned, laws alone": lambda: LearnedPredictor(Evidence(), None),
    "learned, with heads": lambda: LearnedPredictor(Evidence(), some_heads(seed=1)),
    "clairvoyant": the_oracle,
}

every_predictor = pytest.mark.parametrize("make", PREDICTORS.values(), ids=PREDICTORS.keys())
histories = st.lists(
    st.tuples(st.sampled_from(("coder", "critic")), st.integers(1, 2000)), max_size=40
)


def asked_by(role: str = "coder", app: str = "chat") -> Request:
    return a_request(workflow_id=WorkflowId("w1"), role=role, app=app, stage=0)


# The contract.


@every_predictor
def test_it_answers_before_anything_was_learned(make: Callable[[], Predictor]) -> None:
    forecast = make().predict(asked_by())

    assert 1 <= forecast.output_at(M, 0.9, 4096) <= 4096


@every_predictor
@given(history=histories)
def test_predicting_teaches_nothing(
    make: Callable[[], Predictor], history: list[tuple[str, int]]
) -> None:
    asked, unasked = make(), make()
    for role, tokens in history:
        asked.predict(asked_by(role))
        for predictor in (asked, unasked):
            predictor.learn(asked_by(role), Completion(model=M, output_tokens=tokens))

    for role in ("coder", "critic", "new"):
        assert asked.predict(asked_by(role)) == unasked.predict(asked_by(role))


@every_predictor
@given(history=histories)
def test_the_same_history_gives_the_same_answer(
    make: Callable[[], Predictor], history: list[tuple[str, int]]
) -> None:
    one, other = make(), make()
    for predictor in (one, other):
        for role, tokens in history:
            predictor.learn(asked_by(role), Completion(model=M, output_tokens=tokens))

    assert one.predict(asked_by()) == other.predict(asked_by())


@every_predictor
@given(history=histories)
def test_a_higher_level_never_promises_fewer_tokens(
    make: Callable[[], Predictor], history: list[tuple[str, int]]
) -> None:
    predictor = make()
    for role, tokens in history:
        predictor.learn(asked_by(role), Completion(model=M, output_tokens=tokens))

    forecast = predictor.predict(asked_by())
    tokens_at = [forecast.output_at(M, level, 4096) for level in (0.05, 0.5, 0.9, 0.99)]
    assert tokens_at == sorted(tokens_at)


# Recent lengths.


def taught(*answers: tuple[str, str, int], **settings: int) -> RecentLengths:
    predictor = RecentLengths(**settings)
    for app, role, tokens in answers:
        predictor.learn(asked_by(role, app), Completion(model=M, output_tokens=tokens))
    return predictor


def median_and_source(predictor: RecentLengths, role: str, app: str) -> tuple[int, str]:
    forecast = predictor.predict(asked_by(role, app))
    return forecast.output_at(M, 0.5, 10_000), forecast.source


def test_the_finest_group_that_has_seen_enough_answers() -> None:
    predictor = taught(
        *[("chat", "coder", 500)] * 8, *[("chat", "critic", 20)] * 30, *[("rag", "coder", 9)] * 7
    )

    assert median_and_source(predictor, "coder", "chat") == (500, "role")
    assert median_and_source(predictor, "planner", "chat") == (20, "app")
    assert median_and_source(predictor, "coder", "rag") == (20, "global")


def test_too_few_answers_are_no_forecast() -> None:
    few = taught(*[("chat", "coder", 5)] * (MIN_LENGTHS - 1))

    assert few.predict(asked_by()) is NO_FORECAST


def test_levels_are_nearest_ranks_of_what_was_seen() -> None:
    """Lengths go round in a circle, so that any hundred in a row are 1 to 100."""
    answers = [("chat", "coder", 1 + 37 * i % 100) for i in range(300)]

    forecast = taught(*answers, window=100).predict(asked_by())

    found = [forecast.output_at(M, level, 4096) for level in (0.05, 0.5, 0.9, 0.99)]
    assert found == [6, 51, 90, 99]


def test_old_answers_leave_the_window() -> None:
    predictor = taught(*[("chat", "coder", 900)] * 50, *[("chat", "coder", 10)] * 40, window=40)

    assert predictor.predict(asked_by()).output_at(M, 0.99, 4096) == 10


def test_fresh_answers_count_before_an_eighth_of_the_window_has_changed() -> None:
    predictor = taught(*[("chat", "coder", 900)] * 200)
    for _ in range(125):
        predictor.learn(asked_by(), Completion(model=M, output_tokens=10))

    assert predictor.predict(asked_by()).output_at(M, 0.5, 4096) == 10


def test_groups_beyond_the_most_fall_back() -> None:
    predictor = taught(*[("a", "x", 5)] * 8, *[("b", "y", 50)] * 80, max_groups=3)

    assert median_and_source(predictor, "x", "a") == (5, "role")
    assert median_and_source(predictor, "y", "b") == (50, "global")


# The truth.


def test_the_oracle_knows_lengths_success_and_what_remains() -> None:
    oracle = the_oracle()

    first = oracle.predict(a_request(workflow_id=WorkflowId("w1"), stage=0))
    second = oracle.predict(a_request(workflow_id=WorkflowId("w1"), stage=1))

    assert first.output_at(M, 0.5, 4096) == 10
    assert first.remaining_tokens == Quantiles.exactly(30)
    assert (second.output_at(M, 0.9, 4096), second.output_at(SMALL, 0.9, 4096)) == (50, 70)
    assert second.success == {M: 1.0, SMALL: 0.0}
    assert second.remaining_tokens == Quantiles.exactly(20)
