"""What is watched: lengths by call, what remained and success by workflow."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_request
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, WorkflowId
from concertmaster.learning import watching
from concertmaster.learning.drift import RUN_LABELS, Change, Drift, DriftWatch
from concertmaster.learning.labels import LEVELS
from concertmaster.learning.watching import Watching
from concertmaster.predictors.chances import Chances
from concertmaster.predictors.interface import Completion

M, N = ModelName("m"), ModelName("n")
SUMS = np.exp(np.random.default_rng(9).normal(5.0, 0.5, (20_000, 3))).sum(axis=1)
REMAINING = Quantiles(LEVELS, tuple(np.quantile(SUMS, LEVELS).tolist()))
"""What three calls of log-normal lengths need together."""

REST, GRADES = ("remaining_tokens", "chat", "coder"), ("success", "chat", "m")


@dataclass
class Stage:
    """A ``Watching`` that sees one workflow after the other."""

    watch: DriftWatch = field(default_factory=DriftWatch)
    alarms: list[Drift] = field(default_factory=list)
    workflows: int = 0

    def __post_init__(self) -> None:
        self.watching = Watching(self.watch)

    def serve(
        self,
        *tokens: float,
        said: Forecast | None = None,
        model: ModelName = M,
        over: bool = True,
        grade: float | None = None,
    ) -> WorkflowId:
        self.workflows += 1
        name = WorkflowId(f"w{self.workflows}")
        for i, length in enumerate(tokens):
            self.answer(name, i, length, says() if said is None else said, model)
        if over:
            self.alarms += self.watching.close(name, grade)
        return name

    def answer(
        self, name: WorkflowId, i: int, length: float, said: Forecast, model: ModelName = M
    ) -> None:
        request = a_request(f"{name}/{i}", workflow_id=name, app="chat", role="coder", stage=i)
        at_s = 10.0 * self.workflows + i
        completion = Completion(model=model, output_tokens=round(length), finished_s=at_s)
        drift = self.watching.learn(request, completion, said, "h200")
        self.alarms += [] if drift is None else [drift]

    def labels(self, group: tuple[str, ...]) -> int:
        health = self.watch.health(group)
        return 0 if health is None else health.labels


def says(success: Mapping[ModelName, float] | None = None) -> Forecast:
    return Forecast(remaining_tokens=REMAINING, success=success or {})


def lengths(seed: int, workflows: int, factor: float = 1.0) -> list[list[float]]:
    drawn = factor * np.exp(np.random.default_rng(seed).normal(5.0, 0.5, (workflows, 3)))
    return [list(map(float, row)) for row in drawn]


def first_alarm(seed: int, workflows: int, factor: float = 1.0) -> Drift | None:
    stage = Stage()
    for row in lengths(seed, workflows, factor):
        stage.serve(*row)
        if stage.alarms:
            return stage.alarms[0]
    return None


# What remained.


def test_workflows_as_long_as_said_raise_no_more_alarms_than_stated() -> None:
    alarms = [first_alarm(seed, 500) for seed in range(60)]

    assert sum(alarm is not None for alarm in alarms) <= 60 * 500 / RUN_LABELS


@pytest.mark.parametrize(("factor", "kind"), [(1.25, Change.HIGHER), (0.75, Change.LOWER)])
def test_workflows_that_grow_or_shrink_are_found_and_named(factor: float, kind: Change) -> None:
    found = [first_alarm(seed, 300, factor) for seed in range(10)]

    assert [drift and drift.group for drift in found] == [REST] * 10
    assert sum(drift is not None and drift.kind is kind for drift in found) >= 8
    assert found[0] is not None
    assert found[0].health.bias == pytest.approx(math.log(factor), abs=0.1)


def test_a_workflow_is_one_label_of_what_remained() -> None:
    stage = Stage()
    for row in lengths(0, 7):
        stage.watching.close(stage.serve(*row))

    assert stage.labels(REST) == 7


def test_what_was_said_at_the_first_answered_call_counts() -> None:
    stage = Stage()
    name = stage.serve(100, over=False)
    stage.answer(name, 1, 200, Forecast(remaining_tokens=Quantiles.exactly(1e6)))
    stage.watching.close(name)

    health = stage.watch.health(REST)
    assert health is not None
    assert health.bias == pytest.approx(math.log(300 / REMAINING.median))


def test_a_workflow_that_lost_a_call_says_nothing_of_what_remained() -> None:
    stage = Stage()
    early, late = WorkflowId("w1"), stage.serve(9, over=False)
    stage.watching.cut(late)
    stage.watching.cut(WorkflowId("before any answer"))
    stage.answer(WorkflowId("before any answer"), 1, 9, says())
    for name in (early, late, WorkflowId("before any answer")):
        stage.watching.close(name)

    assert stage.labels(REST) == 0


def test_what_the_watched_predictor_did_not_say_is_not_held_against_it() -> None:
    stage = Stage()
    stage.serve(9, 9, said=NO_FORECAST, grade=1.0)

    assert stage.watch.groups == ()


# Success.


def test_a_grade_is_held_against_the_chance_of_the_model_with_most_calls() -> None:
    stage = Stage()
    name = stage.serve(9, said=says({M: 0.25, N: 0.75}), model=N, over=False)
    for i in (1, 2):
        stage.answer(name, i, 9, says({M: 0.25 + 0.5 * (i - 1), N: 0.9}))
    stage.watching.close(name, 1.0)

    health = stage.watch.health(GRADES)
    assert health is not None
    assert (health.labels, health.bias) == (1, 0.75)


def test_a_grade_may_come_after_the_end_and_counts_once() -> None:
    stage = Stage()
    name = stage.serve(9, said=says({M: 0.5}))
    assert stage.labels(GRADES) == 0
    for _ in range(2):
        stage.watching.close(name, 1.0)

    assert (stage.labels(GRADES), stage.labels(REST)) == (1, 1)


def test_success_below_its_chances_is_found_and_named() -> None:
    stage, rng = Stage(), np.random.default_rng(0)
    for row in lengths(1, 400):
        stage.serve(*row, said=says({M: 0.8}), grade=float(rng.random() < 0.5))

    assert [(drift.group, drift.kind) for drift in stage.alarms] == [(GRADES, Change.LOWER)]
    assert stage.alarms[0].health.bias == pytest.approx(-0.3, abs=0.15)


def test_success_as_said_is_no_drift() -> None:
    stage, rng = Stage(), np.random.default_rng(0)
    for row in lengths(1, 2_000):
        stage.serve(*row, said=says({M: 0.8}), grade=float(rng.random() < 0.8))

    assert stage.alarms == []


class Listening(DriftWatch):
    """Takes down what is held against grades."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[tuple[str, ...], float, float, float]] = []

    def add_grade(
        self, group: tuple[str, ...], chance: float, grade: float, at_s: float
    ) -> Drift | None:
        self.heard.append((group, chance, grade, at_s))
        return None


@given(answers=st.lists(st.tuples(st.sampled_from([M, N]), st.booleans()), min_size=1, max_size=8))
def test_a_late_grade_counts_as_one_at_the_end_would(
    answers: list[tuple[ModelName, bool]],
) -> None:
    """However often the workflow was taken to be over, and came back, before."""
    watch = Listening()
    stage, name = Stage(watch), WorkflowId("w")
    for i, (model, over) in enumerate(answers):
        stage.answer(name, i, 5, says({M: i / 10, N: 1 - i / 10}), model)
        if over:
            stage.watching.close(name)
    stage.watching.close(name, 0.5)

    models = [model for model, _ in answers]
    most = max(dict.fromkeys(models), key=models.count)
    first = models.index(most) / 10
    chance = first if most == M else 1 - first
    assert watch.heard == [(("success", "chat", most), chance, 0.5, len(answers) - 1.0)]


# Bounds.


def test_of_a_workflow_that_is_over_a_few_figures_are_kept() -> None:
    stage = Stage()
    name = stage.serve(5, 5, said=says(Chances([M, N], lambda: [0.5, 0.6])))

    app, ended_s, parts = stage.watching._open[name]  # type: ignore[misc]
    assert (app, ended_s) == ("chat", 11.0)
    assert [(part.model, part.calls, part.is_read) for part in parts] == [(M, 2, False)]


def test_what_remained_counts_once_though_the_workflow_comes_back() -> None:
    stage = Stage()
    name = stage.serve(9)
    stage.answer(name, 1, 9, says())
    stage.watching.close(name)

    assert stage.labels(REST) == 1
    assert [group for group in stage.watch.groups if group[0] == REST[0]] == [REST]


def test_workflows_that_never_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_WORKFLOWS", 2)
    stage = Stage()
    names = [stage.serve(9, over=False) for _ in range(5)]

    assert list(stage.watching._open) == names[-2:]


def test_a_reset_forgets_what_another_fit_had_said() -> None:
    stage = Stage()
    name = stage.serve(9, over=False)
    stage.watching.reset()
    stage.watching.close(name, 1.0)

    assert stage.watch.groups == ()


class Asked:
    """Chances that count how often they were worked out."""

    def __init__(self) -> None:
        self.times = 0

    def said(self) -> Chances:
        return Chances([M], self.make)

    def make(self) -> list[float]:
        self.times += 1
        return [0.5]


def test_chances_are_read_once_a_grade_comes_and_not_before() -> None:
    stage, asked = Stage(), Asked()
    name = stage.serve(5, 5, said=says(asked.said()), over=False)
    stage.watching.close(name)
    assert asked.times == 0
    stage.watching.close(name, 1.0)

    assert asked.times == 1
    assert stage.labels(GRADES) == 1


def test_old_chances_are_let_go_of_unread_where_nobody_ever_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "MOST_UNREAD", 2)
    stage, asked = Stage(), Asked()
    names = [stage.serve(5, said=says(asked.said()), over=False) for _ in range(5)]
    for name in names:
        stage.watching.close(name, 1.0)

    assert stage.labels(GRADES) == asked.times == 2


def test_old_chances_that_were_read_are_kept_though_nobody_ever_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "MOST_UNREAD", 2)
    stage, asked = Stage(), Asked()
    read = asked.said()
    assert read[M] == 0.5
    names = [stage.serve(5, said=says(read), over=False) for _ in range(5)]
    for name in names:
        stage.watching.close(name, 1.0)

    assert stage.labels(GRADES) == 5


def test_old_chances_are_kept_for_a_late_grade_where_grades_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "MOST_UNREAD", 2)
    stage, asked = Stage(), Asked()
    stage.serve(5, said=says({M: 0.5}), grade=1.0)
    names = [stage.serve(5, said=says(asked.said()), over=False) for _ in range(5)]
    assert asked.times == 3
    for name in names:
        stage.watching.close(name, 1.0)

    assert stage.labels(GRADES) == 6
    assert asked.times == 5
