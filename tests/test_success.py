"""The success head: probabilities that are calibrated, learn, and survive a file."""

import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertmaster.core.model_names import canonical
from concertmaster.core.request import ModelName
from concertmaster.learning import fit_success as fitting
from concertmaster.learning.fit_success import FOLDS, Labelled, fit_success
from concertmaster.learning.loadings import EVIDENCE_LABELS, Sample, fit_loadings
from concertmaster.learning.networks import Net, Task
from concertmaster.learning.success_metrics import (
    SHARES,
    auc,
    average_precision,
    brier,
    ece,
    gap_recovered,
    mean_average_precision,
    reliability,
)
from concertmaster.predictors.encoder import Vectors
from concertmaster.predictors.hashing import HashedEncoder
from concertmaster.predictors.lexical import NAMES, READ_CHARS, lexical
from concertmaster.predictors.model_names import billions, tells_strength
from concertmaster.predictors.success import MAX_MODELS, SuccessHead

ENCODER = HashedEncoder(16)
SKILL = {"small-7b": -0.5, "middle-30b": 0.5, "big-70b-chat": 1.5}
ANY_TEXT = st.text(st.characters(codec=None), max_size=80)


def question(rng: random.Random) -> tuple[str, float]:
    """A question, and how hard it is: the more numbers, the harder; history is hard too."""
    numbers = rng.randrange(6)
    subject, hard = rng.choice((("history", 1.0), ("cooking", -1.0)))
    text = f"A question about {subject} with " + " and ".join(
        str(rng.randrange(100)) for _ in range(numbers)
    )
    return text, (numbers - 2.5) * 0.8 + hard


def made_questions(
    count: int, *, seed: int, models: Sequence[str] = tuple(SKILL)
) -> list[Labelled]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        text, hard = question(rng)
        chances = {model: 1 / (1 + math.exp(hard - SKILL[model])) for model in models}
        correct = {ModelName(model): float(rng.random() < p) for model, p in chances.items()}
        made.append(Labelled(text=text, correct=correct, group=f"{seed}:{number}", source="made"))
    return made


@cache
def fitted() -> SuccessHead:
    return fit_success(made_questions(900, seed=0), ENCODER, seed=0)


def fresh_head() -> SuccessHead:
    return SuccessHead.from_arrays(fitted().arrays())


def forecasts(
    head: SuccessHead, questions: Sequence[Labelled], model: str
) -> tuple[Vectors, Vectors]:
    rows = ENCODER.encode([asked.text for asked in questions])
    name = ModelName(model)
    pairs = [
        (asked.correct[name], head.predict(asked.text, row, [name])[name])
        for asked, row in zip(questions, rows, strict=True)
    ]
    correct, forecast = np.array(pairs, np.float32).T
    return correct, forecast


def ranks_well(head: SuccessHead, model: str) -> float:
    found = auc(*forecasts(head, made_questions(600, seed=1), model))
    assert found is not None
    return found


def test_forecasts_rank_and_are_calibrated_on_questions_not_seen() -> None:
    unseen = made_questions(900, seed=1)
    every = [forecasts(fitted(), unseen, model) for model in SKILL]
    assert all((auc(*pair) or 0) > 0.7 for pair in every)
    correct, forecast = (np.concatenate(part) for part in zip(*every, strict=True))
    assert ece(correct, forecast) < 0.05


def test_a_stronger_model_has_the_higher_forecast() -> None:
    row = ENCODER.encode(["A question about history with 3"])[0]
    said = fitted().predict("A question about history with 3", row, fitted().models)
    assert said[ModelName("small-7b")] < said[ModelName("middle-30b")]
    assert said[ModelName("middle-30b")] < said[ModelName("big-70b-chat")]


@given(text=ANY_TEXT)
def test_any_text_gives_probabilities_and_asking_changes_nothing(text: str) -> None:
    row = ENCODER.encode([text])[0]
    first = fitted().predict(text, row, fitted().models)
    assert set(first) == set(fitted().models)
    assert all(0 <= chance <= 1 for chance in first.values())
    assert fitted().predict(text, row, fitted().models) == first


@settings(max_examples=20)
@given(
    outcomes=st.lists(
        st.tuples(ANY_TEXT, st.sampled_from(["small-7b", "other-3b", "nameless"]), st.floats(0, 1)),
        max_size=30,
    )
)
def test_whatever_is_learnt_forecasts_stay_probabilities(
    outcomes: list[tuple[str, str, float]],
) -> None:
    head = fresh_head()
    for text, model, grade in outcomes:
        head.learn(text, ENCODER.encode([text])[0], ModelName(model), grade)
    asked = [ModelName(model) for model in ("small-7b", "other-3b", "nameless")]
    said = head.predict("x", ENCODER.encode(["x"])[0], asked)
    assert all(0 <= chance <= 1 for chance in said.values())


def test_a_model_is_found_under_other_spellings() -> None:
    row = ENCODER.encode(["x"])[0]
    names = [ModelName("small-7b"), ModelName("owner/Small_7B".replace("_", "-"))]
    first, second = fitted().predict("x", row, names).values()
    assert first == second


def test_a_model_without_labels_is_judged_by_its_name_or_left_out() -> None:
    row = ENCODER.encode(["x"])[0]
    asked = [ModelName("unseen-13b"), ModelName("unseen")]
    assert list(fitted().predict("x", row, asked)) == ["unseen-13b"]


def test_a_few_labels_move_a_model_without_history() -> None:
    head, strong, weak = fresh_head(), ModelName("newcomer-a"), ModelName("newcomer-b")
    for asked in made_questions(60, seed=2):
        row = ENCODER.encode([asked.text])[0]
        head.learn(asked.text, row, strong, 1.0)
        head.learn(asked.text, row, weak, 0.0)
    row = ENCODER.encode(["A question about cooking with 3"])[0]
    said = head.predict("A question about cooking with 3", row, [strong, weak])
    assert said[strong] > 0.8
    assert said[weak] < 0.2


def test_a_model_held_out_of_training_ranks_as_well_after_200_labels() -> None:
    without = fit_success(
        made_questions(900, seed=0, models=("small-7b", "big-70b-chat")), ENCODER, seed=0
    )
    for asked in made_questions(200, seed=3):
        grade = asked.correct[ModelName("middle-30b")]
        row = ENCODER.encode([asked.text])[0]
        without.learn(asked.text, row, ModelName("middle-30b"), grade)
    assert ranks_well(without, "middle-30b") > ranks_well(fitted(), "middle-30b") - 0.05


def test_outcomes_that_contradict_training_win_in_the_end() -> None:
    head, model = fresh_head(), ModelName("big-70b-chat")
    text = "A question about cooking with 3"
    row = ENCODER.encode([text])[0]
    before = head.predict(text, row, [model])[model]
    for _ in range(2_000):
        head.learn(text, row, model, 0.0)
    assert before > 0.8
    assert head.predict(text, row, [model])[model] < 0.2


def test_a_model_that_changes_is_noticed_after_any_number_of_outcomes() -> None:
    head, model = fresh_head(), ModelName("middle-30b")
    traits = head.traits("x", ENCODER.encode(["x"])[0])
    for number in range(12_000):
        head.learn_from(traits, model, float(number % 2))
    assert head.predict_from(traits, [model])[model] == pytest.approx(0.5, abs=0.1)
    for _ in range(200):
        head.learn_from(traits, model, 0.0)
    assert head.predict_from(traits, [model])[model] < 0.3


def test_training_counts_for_a_bounded_number_of_labels() -> None:
    labels = 5 * EVIDENCE_LABELS
    sample = Sample(np.ones((labels, 1)), (np.arange(labels) % 2).astype(np.float64), np.ones(1))
    spread = float(fit_loadings([sample]).covariances[0, 0, 0])
    assert spread == pytest.approx(4 / EVIDENCE_LABELS, rel=0.1)


def task(rows: int = 60) -> Task:
    rng = np.random.default_rng(0)
    inputs = np.repeat(np.linspace(0, 1, rows, dtype=np.float32)[:, None], 4, axis=1)
    labels = (rng.random((rows, 5)) < 0.8).astype(np.float32)
    return Task(inputs, labels, np.zeros(rows, np.int64))


def test_a_column_starts_from_its_mean_not_from_chance() -> None:
    start = Net(task(), epochs=0, seed=0)
    said = 1 / (1 + np.exp(-start.outputs(task().inputs)[:, :5]))
    assert np.abs(said - task().labels.mean(axis=0)).max() < 0.1


def test_what_is_said_of_a_fold_comes_from_the_net_that_has_not_seen_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Spy:
        def __init__(self, task: Task, *, epochs: int, seed: int) -> None:
            self.seen = task.inputs[:, 0]

        def outputs(self, inputs: Vectors) -> Vectors:
            return np.repeat(np.isin(inputs[:, :1], self.seen), 6, axis=1).astype(np.float32)

    monkeypatch.setattr(fitting, "Net", Spy)
    folds = np.arange(60) % FOLDS
    said = fitting._cross_fitted(task(), folds, 0, lambda _: None)[1]
    assert len(np.unique(said)) == 1, "each was left out by the net that speaks"
    assert said[0, 0] == pytest.approx(0, abs=1e-6)


def test_nets_do_not_differ_in_their_level() -> None:
    flat = Task(np.zeros((60, 4), np.float32), task().labels, task().domains)
    said = fitting._cross_fitted(flat, np.arange(60) // 10, 0, lambda _: None)[1]
    assert np.ptp(said, axis=0).max() < 1e-5


def test_models_beyond_the_bound_are_not_learnt() -> None:
    head = fresh_head()
    row = ENCODER.encode(["x"])[0]
    for number in range(MAX_MODELS + 5):
        head.learn("x", row, ModelName(f"model-number-{number}"), 1.0)
    assert len(head.arrays()["keys"]) == MAX_MODELS


def test_a_head_survives_a_file_without_pickle_and_with_what_it_learnt(tmp_path: Path) -> None:
    head = fresh_head()
    row = ENCODER.encode(["x"])[0]
    head.learn("x", row, ModelName("newcomer"), 1.0)
    np.savez_compressed(tmp_path / "head.npz", allow_pickle=False, **head.arrays())
    with np.load(tmp_path / "head.npz", allow_pickle=False) as arrays:
        restored = SuccessHead.from_arrays(arrays)
    asked = [*head.models, ModelName("newcomer")]
    assert restored.predict("x", row, asked) == pytest.approx(head.predict("x", row, asked))
    assert restored.models == head.models
    assert restored.encoder == "hashed-16"


def test_a_restored_head_shares_nothing_with_its_arrays() -> None:
    arrays = fitted().arrays()
    head = SuccessHead.from_arrays(arrays)
    before = arrays["means"].copy()
    head.learn("x", ENCODER.encode(["x"])[0], head.models[0], 1.0)
    assert (arrays["means"] == before).all()


def test_traits_stand_for_the_text() -> None:
    head = fresh_head()
    text, row = "A question about history", ENCODER.encode(["A question about history"])[0]
    traits = head.traits(text, row)
    assert head.predict_from(traits, head.models) == head.predict(text, row, head.models)
    other = fresh_head()
    head.learn(text, row, head.models[0], 0.0)
    other.learn_from(traits, head.models[0], 0.0)
    assert head.predict(text, row, head.models) == other.predict(text, row, head.models)


def test_the_same_questions_and_seed_give_the_same_head() -> None:
    asked = made_questions(60, seed=4)
    heads = [fit_success(asked, ENCODER, seed=1) for _ in range(2)]
    for name, value in heads[0].arrays().items():
        assert value.tolist() == heads[1].arrays()[name].tolist(), name


def test_progress_is_told() -> None:
    said: list[str] = []
    fit_success(made_questions(30, seed=5), ENCODER, seed=0, progress=said.append)
    assert said[0] == "success: reading 30 questions"
    assert said[-1].startswith("success: 3 models, ")


def test_wrong_vectors_grades_and_too_few_questions_are_refused() -> None:
    head = fresh_head()
    with pytest.raises(ValueError, match="'hashed-16' with 16 numbers, got 3"):
        head.predict("x", np.zeros(3, np.float32), head.models)
    with pytest.raises(ValueError, match=r"a grade lies in 0…1, got 1.5"):
        head.learn("x", ENCODER.encode(["x"])[0], head.models[0], 1.5)
    with pytest.raises(ValueError, match=f"at least {FOLDS} questions are needed, got 1"):
        fit_success(made_questions(1, seed=0), ENCODER, seed=0)


@given(text=ANY_TEXT)
def test_any_text_has_all_lexical_numbers(text: str) -> None:
    numbers = lexical(text)
    assert numbers.shape == (len(NAMES),)
    assert np.isfinite(numbers).all()


def test_lexical_numbers_say_what_their_names_do() -> None:
    said = dict(
        zip(NAMES, lexical("What is 2.5 + 1,000?\nA. 1002.5\nB. none of these"), strict=True)
    )
    assert said["options"] == 2
    assert said["numbers"] == pytest.approx(math.log1p(2))
    assert said["decimals"] == pytest.approx(math.log1p(1))
    assert said["largest_number"] == pytest.approx(math.log1p(1000))
    assert (said["ends with ?"], said["vague_option"], said["cue 'what'"]) == (1, 1, 1)
    assert said["numeric_options_ratio"] == 0.5


def test_the_middle_of_a_long_text_adds_only_to_its_length() -> None:
    half = "word " * READ_CHARS
    one, other = lexical(half + "7" * 500 + half), lexical(half + "x" * 500 + half)
    assert one.tolist() == other.tolist()


def test_names_give_sizes_and_tiers() -> None:
    assert billions("Llama-3.1-405B-Instruct") == 405
    assert billions("mixtral-8x22b") == 176
    assert billions("Phi-3-mini-4k-instruct") is None
    assert tells_strength("gpt-4o-mini")
    assert canonical("a/B_1-X") == "b.1-x"


# Figures of scikit-learn 1.9 on these ten.
CORRECT = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0], np.float64)
FORECAST = np.array([0.9, 0.8, 0.7, 0.7, 0.7, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_metrics_agree_with_a_known_library() -> None:
    assert auc(CORRECT, FORECAST) == pytest.approx(0.62)
    assert average_precision(CORRECT, FORECAST) == pytest.approx(0.6653968253968254)
    assert brier(CORRECT, FORECAST) == pytest.approx(0.258)


def test_metrics_without_both_outcomes_are_unknown() -> None:
    ones, zeros = np.ones(3), np.zeros(3)
    assert auc(ones, ones) is None
    assert auc(zeros, ones) is None
    assert average_precision(zeros, ones) is None
    assert mean_average_precision([(zeros, ones)]) is None
    assert mean_average_precision([(zeros, ones), (ones, ones)]) == 1


@given(
    pairs=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40),
    bins=st.integers(1, 20),
)
def test_reliability_counts_every_question_once(pairs: list[tuple[bool, float]], bins: int) -> None:
    correct, forecast = np.array(pairs, np.float64).T
    table = reliability(correct, forecast, bins=bins)
    assert sum(row.questions for row in table) == len(pairs)
    assert 0 <= ece(correct, forecast, bins=bins) <= 1
    assert max(row.questions for row in table) - min(row.questions for row in table) <= 1


def test_calibration_error_is_the_distance_within_bins() -> None:
    correct = np.array([0.0, 0.0, 1.0, 1.0])
    assert ece(correct, np.array([0.1, 0.1, 0.9, 0.9]), bins=2) == pytest.approx(0.1)
    assert ece(correct, np.array([0.5, 0.5, 0.5, 0.5]), bins=1) == 0


def test_an_oracle_recovers_all_and_its_reverse_less_than_nothing() -> None:
    small, big = np.array([1.0, 0, 0, 1, 0, 1]), np.array([1.0, 1, 1, 0, 0, 1])
    assert gap_recovered(small, big, big - small).ratio == pytest.approx(1)
    reverse = gap_recovered(small, big, small - big).ratio
    assert reverse is not None
    assert reverse < 0
    assert gap_recovered(small, small, small).ratio is None


def test_gap_recovered_by_hand() -> None:
    small, big = np.array([0.0, 0, 1, 1]), np.array([1.0, 0, 1, 1])
    found = gap_recovered(small, big, np.array([0.2, 0.3, 0.1, 0.0]), shares=(0.25, 0.5))
    assert found.random == (0.5625, 0.625)
    assert found.routed == (0.5, 0.75)
    assert found.oracle == (0.75, 0.75)
    assert found.ratio == pytest.approx((1.25 - 1.1875) / (1.5 - 1.1875))


@given(st.integers(1, 60), st.integers(0, 1_000))
def test_blind_routing_recovers_nothing_on_average_and_shares_are_whole_questions(
    questions: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    small, big = (rng.random((2, questions)) < 0.5).astype(np.float64)
    found = gap_recovered(small, big, rng.random(questions))
    assert len(found.routed) == len(SHARES)
    assert all(o >= r - 1e-9 for o, r in zip(found.oracle, found.random, strict=True))
    assert all(o >= r - 1e-9 for o, r in zip(found.oracle, found.routed, strict=True))
