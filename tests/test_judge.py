"""Success learns while it serves: from grades of whole workflows, one label each."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from builders import a_request
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors import judge as judge_module
from concertmaster.predictors.encoder import Vectors
from concertmaster.predictors.evidence import Evidence
from concertmaster.predictors.interface import Completion, Prompt
from concertmaster.predictors.judge import Judge
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.store import DEFAULT, judge_of, read_store
from store_builders import BIG, SMALL, a_success_head, an_encoder

NEWCOMER, OTHER = ModelName("newcomer"), ModelName("someone")
MODELS = (NEWCOMER, OTHER)
TASK = Prompt(text="what is + ?")


class Counting:
    """An encoder that counts the texts it was asked for."""

    def __init__(self) -> None:
        self._inner = an_encoder()
        self.name, self.dims, self.texts = self._inner.name, self._inner.dims, 0

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.texts += len(texts)
        return self._inner.encode(texts)


def a_judge() -> Judge:
    return Judge(a_success_head(), an_encoder())


def a_predictor(judge: Judge | None = None, *, adapt: bool = True) -> LearnedPredictor:
    return LearnedPredictor(Evidence(), None, models=MODELS, judge=judge or a_judge(), adapt=adapt)


def asked(i: int, workflow: str = "w") -> Request:
    return a_request(f"{workflow}/{i}", workflow_id=WorkflowId(workflow), stage=i)


def serve(
    predictor: LearnedPredictor,
    grade: float | None,
    *models: ModelName,
    workflow: str = "w",
    prompts: Sequence[str] = (),
) -> None:
    """Let one call after another of a workflow be answered, then grade it."""
    for i, model in enumerate(models):
        prompt = Prompt(text=prompts[i]) if prompts else TASK
        predictor.predict(asked(i, workflow), prompt)
        predictor.learn(asked(i, workflow), Completion(model=model, output_tokens=9), prompt)
    predictor.close(WorkflowId(workflow), grade)


def loading(predictor: LearnedPredictor, model: ModelName) -> list[float]:
    assert predictor.judge is not None
    found = predictor.judge.head._loadings.get(model)
    return [] if found is None else found[0].tolist()


def chance(predictor: LearnedPredictor, model: ModelName, prompt: Prompt = TASK) -> float | None:
    return predictor.predict(a_request("asks"), prompt).success.get(model)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_a_model_that_nobody_knows_is_known_after_two_hundred_grades(rate: float) -> None:
    judge = judge_of(read_store(DEFAULT))
    assert judge is not None
    predictor, rng = a_predictor(judge), random.Random(1)
    assert chance(predictor, NEWCOMER) is None
    tasks = [f"Sum up page {i} of the report on {'sales' if i % 2 else 'rain'}" for i in range(250)]

    for i, task in enumerate(tasks[:200]):
        solved = float(rng.random() < rate)
        serve(predictor, solved, NEWCOMER, workflow=f"w{i}", prompts=[task])

    said = [chance(predictor, NEWCOMER, Prompt(text=task)) or 0.0 for task in tasks[200:]]
    assert sum(said) / len(said) == pytest.approx(rate, abs=0.08)


def test_a_workflow_is_one_label_however_many_calls_it_has() -> None:
    one, many = a_predictor(), a_predictor()
    serve(one, 1.0, NEWCOMER)
    serve(many, 1.0, *[NEWCOMER] * 20)

    assert loading(one, NEWCOMER) == loading(many, NEWCOMER) != []


def test_models_share_a_label_by_their_calls() -> None:
    predictor, head = a_predictor(), a_success_head()
    serve(predictor, 1.0, NEWCOMER, NEWCOMER, NEWCOMER, OTHER)

    traits = head.traits(TASK.text, an_encoder().encode([TASK.text])[0])
    for model, worth in ((NEWCOMER, 0.75), (OTHER, 0.25)):
        head.learn_from(traits, model, 1.0, worth=worth)
        assert loading(predictor, model) == head._loadings[model][0].tolist()


def test_half_a_label_twice_is_about_one() -> None:
    whole, halves, ones = a_success_head(), a_success_head(), np.ones(2, np.float32)
    whole.learn_from(ones, NEWCOMER, 1.0)
    for _ in range(2):
        halves.learn_from(ones, NEWCOMER, 1.0, worth=0.5)

    expected = whole.predict_from(ones, [NEWCOMER])[NEWCOMER]
    assert halves.predict_from(ones, [NEWCOMER])[NEWCOMER] == pytest.approx(expected, abs=0.02)
    known, half_known = (head._loadings[NEWCOMER][1] for head in (whole, halves))
    np.testing.assert_allclose(half_known, known, rtol=0.05)


def test_the_first_prompt_that_a_model_answered_is_what_it_learns_from() -> None:
    first, last = a_predictor(), a_predictor()
    serve(first, 1.0, OTHER, NEWCOMER, NEWCOMER, prompts=["", "what", "is + ?"])
    serve(last, 1.0, OTHER, NEWCOMER, NEWCOMER, prompts=["", "what", ""])

    assert loading(first, NEWCOMER) == loading(last, NEWCOMER) != []


def test_nothing_is_embedded_twice() -> None:
    encoder = Counting()
    predictor = a_predictor(Judge(a_success_head(), encoder))
    serve(predictor, 1.0, NEWCOMER, OTHER, NEWCOMER, prompts=["what", "is + ?", "what"])

    assert encoder.texts == 2


def test_a_prompt_is_read_for_a_grade_and_not_for_an_answer() -> None:
    encoder = Counting()
    predictor = a_predictor(Judge(a_success_head(), encoder))
    serve(predictor, None, NEWCOMER, OTHER, prompts=["what", "is + ?"])
    assert encoder.texts == 0
    predictor.close(WorkflowId("w"), 1.0)

    assert encoder.texts == 2


def test_old_prompts_are_let_go_of_unread_where_nobody_ever_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge_module, "MOST_UNREAD", 2)
    encoder = Counting()
    predictor = a_predictor(Judge(a_success_head(), encoder))
    for i in range(5):
        serve(predictor, None, NEWCOMER, workflow=f"w{i}", prompts=[f"what {i}"])
    predictor.close(WorkflowId("w0"), 1.0)
    assert loading(predictor, NEWCOMER) == []
    predictor.close(WorkflowId("w4"), 1.0)

    assert loading(predictor, NEWCOMER) != []
    assert encoder.texts == 1


def test_old_prompts_that_were_read_are_kept_though_nobody_ever_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge_module, "MOST_UNREAD", 2)
    predictor = a_predictor()
    for i in range(5):
        call = a_request(f"r{i}", workflow_id=WorkflowId(f"w{i}"), models=(BIG, NEWCOMER))
        assert predictor.predict(call, TASK).success[BIG] > 0
        predictor.learn(call, Completion(model=NEWCOMER, output_tokens=9), TASK)
    predictor.close(WorkflowId("w0"), 1.0)

    assert loading(predictor, NEWCOMER) != []


def test_old_prompts_are_kept_for_a_late_grade_where_grades_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge_module, "MOST_UNREAD", 2)
    late, early = a_predictor(), a_predictor()
    for predictor in (late, early):
        serve(predictor, 1.0, OTHER)
    serve(late, None, NEWCOMER, workflow="late")
    for i in range(5):
        serve(late, None, OTHER, workflow=f"w{i}", prompts=[f"what {i}"])
    late.close(WorkflowId("late"), 0.0)
    serve(early, 0.0, NEWCOMER)

    assert loading(late, NEWCOMER) == loading(early, NEWCOMER) != []


def test_a_grade_after_the_end_counts_and_only_once() -> None:
    predictor = a_predictor()
    serve(predictor, None, NEWCOMER)
    assert loading(predictor, NEWCOMER) == []
    predictor.close(WorkflowId("w"), 0.0)
    once = loading(predictor, NEWCOMER)
    predictor.close(WorkflowId("w"), 0.0)

    assert once == loading(predictor, NEWCOMER) != []


@pytest.mark.parametrize("grade", [math.nan, math.inf, -0.1, 1.1])
def test_a_grade_that_is_none_teaches_nothing(grade: float) -> None:
    predictor = a_predictor()
    serve(predictor, grade, NEWCOMER)

    assert loading(predictor, NEWCOMER) == []


def test_a_frozen_predictor_learns_nothing_of_success() -> None:
    predictor = a_predictor(adapt=False)
    before = loading(predictor, BIG), loading(predictor, SMALL)
    serve(predictor, 0.0, BIG, NEWCOMER)

    assert (loading(predictor, BIG), loading(predictor, SMALL)) == before
    assert loading(predictor, NEWCOMER) == []


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "MOST_OPEN", 3)
    judge = a_judge()
    predictor = a_predictor(judge)
    for i in range(9):
        serve(predictor, None, NEWCOMER, workflow=f"w{i}")
        predictor.predict(asked(0, f"lost{i}"), TASK)

    assert list(judge._parts) == ["w6", "w7", "w8"]
    assert list(judge._asked) == ["lost6/0", "lost7/0", "lost8/0"]


def test_the_prompt_of_a_call_that_failed_is_let_go() -> None:
    judge = a_judge()
    predictor = a_predictor(judge)
    for i in range(3):
        predictor.predict(asked(i), TASK)
    predictor.failed(asked(1).request_id)
    predictor.failed(RequestId("nobody"))

    assert list(judge._asked) == ["w/0", "w/2"]


def test_traits_that_were_read_wait_for_a_grade_as_bytes() -> None:
    judge = Judge(a_success_head(), an_encoder(), at_once=True)
    serve(a_predictor(judge), None, NEWCOMER, OTHER, NEWCOMER)

    traits = judge.head.traits(TASK.text, an_encoder().encode([TASK.text])[0]).tobytes()
    assert [(model, calls) for model, _, calls in judge._parts[WorkflowId("w")]] == [
        (NEWCOMER, 2),
        (OTHER, 1),
    ]
    held = [held.traits for _, held, _ in judge._parts[WorkflowId("w")]]
    assert [one and one._found for one in held] == [traits, traits]


def test_a_call_that_was_not_forecast_teaches_nothing() -> None:
    predictor = a_predictor()
    predictor.learn(asked(0), Completion(model=NEWCOMER, output_tokens=9), TASK)
    predictor.close(WorkflowId("w"), 1.0)

    assert loading(predictor, NEWCOMER) == []
