"""Refit: labels move laws, quantiles and calibration; what reads texts stays as it was."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from builders import a_request
from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.background import BackgroundTrainer, Done, Running
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.refit import HALF_LIFE_LABELS, SERIAL, refit, replayed, weights
from concertmaster.predictors.evidence import Evidence
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS
from concertmaster.predictors.interface import Completion
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.store import load_predictor, read_store, unpack_laws
from store_builders import a_store

M = ModelName("m")
WORKFLOWS, CALLS = 150, 2
quickly = partial(refit, min_labels=200, rounds=8)
PATIENCE_S = 600
"""For a training that gives way to whatever else the machine does."""


def a_call(workflow: int, stage: int) -> Request:
    return a_request(
        f"{workflow}/{stage}",
        workflow_id=WorkflowId(f"w{workflow}"),
        app="chat",
        role="coder",
        stage=stage,
        arrival_s=10.0 * workflow + stage,
        prompt_tokens=100,
        max_output_tokens=4096,
    )


def some_labels(
    path: Path, predictor: LearnedPredictor, *, workflows: int = WORKFLOWS, closed: bool = True
) -> Path:
    """Answers of some 600 tokens, with the figures that the heads of the store saw."""
    rng = random.Random(1)
    with FeedbackStore(path) as store:
        for i in range(workflows):
            for stage in range(CALLS):
                request = a_call(i, stage)
                forecast, figures = predictor.foresee(request)
                tokens = rng.randint(500, 700)
                done = Completion(model=M, output_tokens=tokens, finished_s=request.arrival_s + 0.5)
                store.asked(request, forecast, features=figures)
                store.answered(RequestId(request.request_id), done)
            if closed:
                store.closed(WorkflowId(f"w{i}"))
    return path


@pytest.fixture
def champion(tmp_path: Path) -> Path:
    return a_store(tmp_path / "champion")


@pytest.fixture
def labels(tmp_path: Path, champion: Path) -> Path:
    return some_labels(tmp_path / "labels.sqlite", load_predictor(champion))


def median_of(folder: Path) -> float:
    law = load_predictor(folder).predict(a_call(999, 0)).output_law(M)
    assert law is not None
    return law.median


def test_a_refit_store_loads_and_says_what_labels_said(
    tmp_path: Path, champion: Path, labels: Path
) -> None:
    pytest.importorskip("lightgbm")
    before = read_store(champion)
    out = quickly(champion, labels, tmp_path / "out", 0)
    after = read_store(out)

    assert median_of(champion) < 300
    assert 500 <= median_of(out) <= 700
    same = ("words.weights", "words.rarity", "tool_call.leaves", "tool_call.features")
    for name in same:
        np.testing.assert_array_equal(before.parts["heads"][name], after.parts["heads"][name])
    assert after.parts["heads"]["quantiles.leaves"].shape[0] == 8 * len(HEAD_TARGETS) * len(LEVELS)
    for name in ("success", "encoder", "baselines"):
        assert after.parts[name].keys() == before.parts[name].keys()
    assert after.manifest.figures["refit_labels"] == WORKFLOWS * CALLS
    assert after.manifest.figures["loss"] == before.manifest.figures["loss"]
    assert after.seen.tolist() == before.seen.tolist()
    assert len(after.parts["calibration"]["targets"]) > 0


def test_the_same_labels_and_seed_give_the_same_store(
    tmp_path: Path, champion: Path, labels: Path
) -> None:
    pytest.importorskip("lightgbm")
    first, second = (
        read_store(quickly(champion, labels, tmp_path / name, 3)).manifest.files
        for name in ("one", "two")
    )

    assert first == second


def test_labels_are_added_to_laws_once(tmp_path: Path, champion: Path, labels: Path) -> None:
    pytest.importorskip("lightgbm")
    once = quickly(champion, labels, tmp_path / "once", 0)
    twice = quickly(once, labels, tmp_path / "twice", 0)

    assert read_store(once).manifest.figures[SERIAL] == WORKFLOWS * CALLS
    for name, array in read_store(once).parts["laws"].items():
        np.testing.assert_array_equal(array, read_store(twice).parts["laws"][name])


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"workflows": 50}, "expected at least 200 labels with figures, found 100"),
        ({"closed": False}, "expected 50 labels of closed workflows, found 0"),
        ({"workflows": 0}, "found 0"),
    ],
)
def test_too_few_labels_are_declined(
    tmp_path: Path, champion: Path, facts: dict[str, int], problem: str
) -> None:
    path = some_labels(tmp_path / "few.sqlite", load_predictor(champion), **facts)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=problem):
        quickly(champion, path, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_a_label_is_ranked_before_the_laws_know_it(champion: Path, labels: Path) -> None:
    known = FeedbackStore(labels).latest(1_000)
    evidence = unpack_laws(read_store(champion).parts["laws"])
    rows = replayed(known, evidence)

    first, last = rows.odds[:20, 0].mean(), rows.odds[-100:, 0].mean()
    assert first > last
    assert abs(last) < 0.8
    assert rows.held.sum() == pytest.approx(WORKFLOWS * CALLS / 4, abs=CALLS)
    assert rows.held[-1]
    assert not rows.held[0]
    assert rows.worths == pytest.approx(CALLS**-0.5)


def test_the_first_label_of_all_is_ranked_by_a_law_that_says_nothing() -> None:
    evidence = Evidence()
    nothing = evidence.laws["output_tokens"].law(()).rank(700.0)
    assert replayed([], evidence).odds.shape == (0, len(HEAD_TARGETS))
    assert evidence.laws["output_tokens"].law(()).rank(700.0) == nothing


def test_labels_without_figures_move_laws_alone(tmp_path: Path, champion: Path) -> None:
    path = tmp_path / "plain.sqlite"
    wrong = np.zeros(len(FIGURES) - 1, np.float32)
    with FeedbackStore(path) as store:
        for i, features in enumerate((None, wrong)):
            store.asked(a_call(i, 0), features=features)
            done = Completion(model=M, output_tokens=9, finished_s=1e3)
            store.answered(a_call(i, 0).request_id, done)
    evidence = unpack_laws(read_store(champion).parts["laws"])
    before = evidence.laws["output_tokens"].law(("chat",)).rank(20.0)
    rows = replayed(FeedbackStore(path).latest(10), evidence)

    assert len(rows.worths) == 0
    assert evidence.laws["output_tokens"].law(("chat",)).rank(20.0) != before


def test_newer_labels_weigh_more_and_rare_apps_are_not_drowned() -> None:
    same = weights(np.array(["a"] * (HALF_LIFE_LABELS + 1)))
    assert same[-1] == pytest.approx(2 * same[0])
    assert same.mean() == pytest.approx(1.0)
    mixed = weights(np.array(["a", *["b"] * 50]))
    assert mixed[0] > mixed[1]


def test_it_runs_in_the_background(tmp_path: Path, champion: Path, labels: Path) -> None:
    pytest.importorskip("lightgbm")
    with BackgroundTrainer() as trainer:
        assert trainer.start(0.0, quickly, champion, labels, tmp_path / "out", 0)
        assert trainer._run is not None
        trainer._run.process.join(PATIENCE_S)
        state = trainer.poll(1.0)

    assert not isinstance(state, Running)
    assert isinstance(state, Done), state
    assert 500 <= median_of(state.path) <= 700
