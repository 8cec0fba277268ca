"""Packed trees answer as the trees they were packed from."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.predictors.forest import Forest

Floats = npt.NDArray[np.float32]


def a_forest(*, trees: int = 6, depth: int = 3, outputs: int = 2, seed: int = 0) -> Forest:
    rng = np.random.default_rng(seed)
    inner = 2**depth - 1
    return Forest(
        rng.integers(0, 4, (trees, inner)).astype(np.int16),
        rng.normal(size=(trees, inner)).astype(np.float32),
        rng.normal(size=(trees, inner + 1)).astype(np.float16).astype(np.float32),
        outputs=outputs,
    )


def walked(forest: Forest, figures: Floats) -> Floats:
    """One tree after the other, one node after the other."""
    arrays = forest.arrays()
    inner = arrays["features"].shape[1]
    values = []
    for features, thresholds, leaves in zip(
        arrays["features"], arrays["thresholds"], arrays["leaves"], strict=True
    ):
        node = 0
        while node < inner:
            node = 2 * node + 1 + int(figures[int(features[node])] > thresholds[node])
        values.append(float(leaves[node - inner]))
    sums: Floats = np.array(values, dtype=np.float32).reshape(forest.outputs, -1).sum(axis=1)
    return sums


@given(figures=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4))
def test_one_walk_goes_through_all_trees(figures: list[float]) -> None:
    forest, call = a_forest(), np.array(figures, dtype=np.float32)

    np.testing.assert_array_equal(forest.predict(call), walked(forest, call))


def test_a_figure_equal_to_the_threshold_goes_left() -> None:
    forest = Forest(
        np.zeros((1, 1), dtype=np.int16),
        np.array([[1.5]], dtype=np.float32),
        np.array([[10.0, 20.0]], dtype=np.float32),
        outputs=1,
    )

    assert forest.predict(np.array([1.5], dtype=np.float32)) == 10
    assert forest.predict(np.array([1.5000001], dtype=np.float32)) == 20


def test_many_calls_are_answered_as_each_alone() -> None:
    calls = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    together = a_forest().predict_many(calls)

    assert together.shape == (5, 2)
    np.testing.assert_array_equal(together[3], a_forest().predict(calls[3]))


def test_a_forest_of_many_questions_answers_and_is_kept_as_it_was_given() -> None:
    rng = np.random.default_rng(2)
    features = rng.integers(0, 40, (900, 63)).astype(np.int16)
    thresholds = rng.normal(size=(900, 63)).astype(np.float32)
    leaves = rng.normal(size=(900, 64)).astype(np.float16).astype(np.float32)
    forest = Forest(features, thresholds, leaves, outputs=3)
    call = rng.normal(size=44).astype(np.float32)

    np.testing.assert_array_equal(forest.predict(call), walked(forest, call))
    for name, told in (("features", features), ("thresholds", thresholds), ("leaves", leaves)):
        np.testing.assert_array_equal(forest.arrays()[name], told)


def test_a_kept_forest_answers_as_before() -> None:
    forest, call = a_forest(), np.array([0.1, -0.2, 0.3, 1.0], dtype=np.float32)

    restored = Forest.from_arrays(forest.arrays())

    assert restored.trees == 6
    np.testing.assert_allclose(restored.predict(call), forest.predict(call), rtol=1e-6)


def test_packed_trees_answer_as_lightgbm() -> None:
    lightgbm = pytest.importorskip("lightgbm", reason="training is an extra")
    from concertmaster.learning.trees import GROWTH, grow  # noqa: PLC0415

    rng = np.random.default_rng(0)
    figures = rng.normal(size=(2000, 5)).astype(np.float32)
    figures[:, 4] = np.round(figures[:, 4])
    labels = figures[:, 0] * 2 + figures[:, 4] + rng.normal(size=2000)
    weights = np.ones(2000)
    objective = {"objective": "quantile", "alpha": 0.9}

    forest = grow(figures, [labels], [objective], weights, rounds=20, seed=3)

    settings = {**GROWTH, **objective, "seed": 3, "num_threads": 1}
    booster = lightgbm.train(settings, lightgbm.Dataset(figures, labels, weight=weights), 20)
    np.testing.assert_allclose(
        forest.predict_many(figures[:300])[:, 0], booster.predict(figures[:300]), atol=1e-4
    )
