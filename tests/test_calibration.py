"""Calibration: what is stated is what is delivered, whatever the labels do."""

import random

import numpy as np
import pytest

from concertmaster.core.forecast import Quantiles
from concertmaster.predictors.calibration import MOST_OFFSET, Calibration, log_pinball
from concertmaster.predictors.laws import Floats, LawTree, expit, logit, path_of

LEVELS = (0.05, 0.5, 0.95)
APP = path_of("app", "role")


def quantiles(tree: LawTree, odds: object) -> Quantiles:
    return Quantiles(LEVELS, tuple(tree.law(()).at(expit(odds)).tolist()))  # type: ignore[arg-type]


def a_tree(rng: random.Random) -> LawTree:
    tree = LawTree()
    for _ in range(2000):
        tree.add((), rng.lognormvariate(5, 0.5))
    return tree


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.8])
def test_coverage_returns_after_the_labels_shift(factor: float) -> None:
    rng = random.Random(1)
    tree, calibration = a_tree(rng), Calibration(LEVELS)
    covered = np.zeros(3)
    for i in range(1500):
        odds = np.maximum.accumulate(logit(LEVELS) + calibration.offsets("tokens", APP))
        stated = quantiles(tree, odds)
        truth = factor * rng.lognormvariate(5, 0.5)
        if i >= 500:
            covered += [truth <= value for value in stated.values]
        calibration.learn("tokens", APP, stated, quantiles(tree, logit(LEVELS)), truth)

    np.testing.assert_allclose(covered / 1000, LEVELS, atol=0.03)


def test_a_group_begins_with_its_parents_offsets() -> None:
    calibration, law = Calibration(LEVELS), Quantiles(LEVELS, (1.0, 2.0, 3.0))
    for _ in range(50):
        calibration.learn("tokens", APP, law, law, 100.0)

    offsets = calibration.offsets("tokens", path_of("app", "another role"))

    np.testing.assert_array_equal(offsets, calibration.offsets("tokens", path_of("app")))
    assert (offsets > 0).all()
    assert (calibration.offsets("calls", APP) == 0).all()


def test_trust_goes_to_what_was_nearer() -> None:
    near, far = Quantiles(LEVELS, (90.0, 100.0, 110.0)), Quantiles(LEVELS, (1.0, 10.0, 1000.0))
    heads_win, law_wins = Calibration(LEVELS), Calibration(LEVELS)
    for _ in range(30):
        heads_win.learn("tokens", APP, near, far, 100.0)
        law_wins.learn("tokens", APP, far, near, 100.0)

    assert heads_win.trust("tokens", APP) > 0.95
    assert law_wins.trust("tokens", APP) < 0.05


def test_trust_in_one_app_says_nothing_of_another() -> None:
    calibration, law = Calibration(LEVELS), Quantiles(LEVELS, (1.0, 10.0, 1000.0))
    sure = Quantiles(LEVELS, (100.0, 100.0, 100.0))
    for _ in range(30):
        calibration.learn("tokens", APP, sure, law, 100.0)
        calibration.learn("tokens", path_of("new"), law, law, 100.0)

    assert calibration.trust("tokens", path_of("new")) == pytest.approx(0.5)


def test_offsets_are_bounded() -> None:
    calibration, law = Calibration(LEVELS), Quantiles(LEVELS, (1.0, 2.0, 3.0))
    for _ in range(3000):
        calibration.learn("tokens", APP, law, law, 1e9)

    assert calibration.offsets("tokens", APP).max() <= MOST_OFFSET


def test_labels_of_one_workflow_move_it_less() -> None:
    law = Quantiles(LEVELS, (1.0, 2.0, 3.0))
    whole, part = Calibration(LEVELS), Calibration(LEVELS)
    whole.learn("tokens", APP, law, law, 100.0)
    part.learn("tokens", APP, law, law, 100.0, worth=0.1)

    np.testing.assert_allclose(
        part.offsets("tokens", APP), 0.1 * whole.offsets("tokens", APP), rtol=1e-9
    )


def test_what_was_kept_is_restored() -> None:
    calibration, law = Calibration(LEVELS), Quantiles(LEVELS, (1.0, 2.0, 3.0))
    for truth in (0.5, 2.5, 9.0):
        calibration.learn("tokens", APP, law, Quantiles.exactly(2.0), truth)
    restored = Calibration(LEVELS)
    restored.restore(calibration.arrays())

    for path in (APP, path_of("app"), (), path_of("other")):
        np.testing.assert_allclose(
            restored.offsets("tokens", path), calibration.offsets("tokens", path), rtol=1e-6
        )
        assert restored.trust("tokens", path) == pytest.approx(calibration.trust("tokens", path))


def test_groups_beyond_the_bound_use_their_parents() -> None:
    calibration, law = Calibration(LEVELS, most_groups=1), Quantiles(LEVELS, (1.0, 2.0, 3.0))
    calibration.learn("tokens", APP, law, law, 100.0)

    np.testing.assert_array_equal(
        calibration.offsets("tokens", APP), calibration.offsets("tokens", ())
    )


def test_pinball_is_least_at_the_true_quantiles() -> None:
    rng = random.Random(3)
    truths = sorted(rng.lognormvariate(4, 1) for _ in range(2001))
    true = Quantiles(LEVELS, tuple(truths[int(level * 2000)] for level in LEVELS))

    def loss(law: Quantiles) -> float:
        return sum(log_pinball(law, truth) for truth in truths)

    assert loss(true) < loss(true.scale(1.3))
    assert loss(true) < loss(true.scale(0.7))


def fitted(odds: Floats, truths: Floats, *, paths: list[tuple[str, ...]]) -> Calibration:
    calibration = Calibration(LEVELS)
    calibration.fit("tokens", paths, odds, truths, np.ones(len(truths)))
    return calibration


def test_a_fit_makes_wrong_heads_cover_what_they_say() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=4000)
    truths = centres + 0.3 * rng.normal(size=4000)
    odds = centres[:, None] + 0.1 * logit(LEVELS)

    calibration = fitted(odds, truths, paths=[APP] * 4000)

    trust = calibration.trust("tokens", APP)
    stated = trust * odds + (1 - trust) * logit(LEVELS) + calibration.offsets("tokens", APP)
    np.testing.assert_allclose((truths[:, None] <= stated).mean(axis=0), LEVELS, atol=0.02)
    assert trust > 0.8


def test_a_fit_gives_no_trust_to_heads_that_know_nothing() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.uniform(0.001, 0.999, 3000)
    odds = 3 * rng.normal(size=3000)[:, None] + logit(LEVELS)

    calibration = fitted(odds, np.asarray(logit(ranks)), paths=[APP] * 3000)

    assert calibration.trust("tokens", APP) < 0.1


def test_a_group_of_few_labels_leans_on_its_parent() -> None:
    rng = np.random.default_rng(0)
    many, few = path_of("many"), path_of("few")
    truths = np.concatenate((logit(rng.uniform(0, 1, 1000)), np.full(2, 6.0)))
    odds = np.tile(logit(LEVELS), (1002, 1))

    calibration = fitted(odds, truths, paths=[many] * 1000 + [few] * 2)

    assert 0 < calibration.offsets("tokens", few)[1] < 2


def test_a_hundred_workflows_move_offsets_by_a_quarter_of_what_they_say() -> None:
    truths = np.full(100, 1.0)
    odds = np.tile(logit(LEVELS), (100, 1))

    calibration = fitted(odds, truths, paths=[path_of("app")] * 100)

    assert calibration.offsets("tokens", path_of("app"))[1] == pytest.approx(0.25, abs=0.01)
