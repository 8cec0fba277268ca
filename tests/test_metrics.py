import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from builders import a_call, a_plan
from concertmaster.learning.baselines import Baselines, fit_baselines
from concertmaster.learning.metrics import (
    coverage,
    kendall_tau_distance,
    pinball,
    random_pairs,
    skill,
)
from concertmaster.predictors.evidence import TARGETS
from concertmaster.predictors.heads import LEVELS
from store_builders import some_plans

Floats = npt.NDArray[np.float64]

counts = arrays(np.float64, st.integers(1, 60), elements=st.integers(0, 1000).map(float))
distinct = st.lists(st.integers(0, 10_000), min_size=2, max_size=40, unique=True).map(
    lambda values: np.array(values, float)
)


def all_pairs(count: int) -> npt.NDArray[np.int64]:
    return np.array([(i, j) for i in range(count) for j in range(i)], dtype=np.int64)


def everywhere(values: Floats, truth: Floats) -> Floats:
    return np.tile(values, (len(truth), 1))


# Pinball.


@given(counts, st.lists(st.floats(-50, 50), min_size=len(LEVELS), max_size=len(LEVELS)))
def test_the_quantiles_of_the_truth_itself_lose_least(truth: Floats, shifts: list[float]) -> None:
    best = np.quantile(truth, LEVELS, method="inverted_cdf")

    least = pinball(truth, everywhere(best, truth), LEVELS)

    assert (least <= pinball(truth, everywhere(best + shifts, truth), LEVELS) + 1e-9).all()


def test_a_level_weighs_what_it_misses() -> None:
    truth, stated = np.array([10.0, 10.0]), np.array([[0.0], [20.0]])

    assert pinball(truth, stated, (0.9,)) == pytest.approx((9 + 1) / 2)
    assert pinball(truth, stated, (0.1,)) == pytest.approx((1 + 9) / 2)
    assert pinball(truth[:1], stated[:1], (0.9,)) == pytest.approx(9.0)


@given(counts)
def test_what_is_known_beforehand_loses_nothing(truth: Floats) -> None:
    stated = np.tile(truth[:, None], len(LEVELS))

    assert (pinball(truth, stated, LEVELS) == 0).all()


# Skill.


@given(st.floats(0.01, 1e6))
def test_a_baseline_has_no_skill_against_itself(loss: float) -> None:
    assert skill(loss, loss) == 0
    assert skill(0.0, loss) == 1


def test_nothing_can_be_saved_where_nothing_is_lost() -> None:
    assert skill(1.0, 0.0) is None


# Coverage.


@given(counts)
def test_infinity_covers_all_and_less_than_nothing_covers_none(truth: Floats) -> None:
    stated = everywhere(np.array([-1.0, np.inf]), truth)

    assert coverage(truth, stated).tolist() == [0.0, 1.0]


@given(counts, st.lists(st.floats(0, 1000), min_size=2, max_size=2).map(sorted))
def test_more_is_covered_by_more(truth: Floats, stated: list[float]) -> None:
    low, high = coverage(truth, everywhere(np.array(stated), truth))

    assert 0 <= low <= high <= 1


def test_what_equals_the_quantile_is_covered() -> None:
    assert coverage(np.array([5.0]), np.array([[5.0]])).tolist() == [1.0]


# Order.


@given(distinct)
def test_the_true_order_has_no_distance_and_its_reverse_is_farthest(truth: Floats) -> None:
    pairs = all_pairs(len(truth))

    assert kendall_tau_distance(truth, truth * 3 + 1, pairs) == 0
    assert kendall_tau_distance(truth, -truth, pairs) == 1


@given(distinct)
def test_saying_the_same_of_all_is_half_right(truth: Floats) -> None:
    assert kendall_tau_distance(truth, np.zeros_like(truth), all_pairs(len(truth))) == 0.5


def test_pairs_that_are_equal_in_truth_do_not_count() -> None:
    truth, stated = np.array([1.0, 1.0, 2.0]), np.array([1.0, 9.0, 3.0])

    assert kendall_tau_distance(truth, stated, all_pairs(3)) == 0.5
    assert kendall_tau_distance(truth, stated, np.array([[0, 1]])) is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_pairs_are_drawn_within_groups_never_with_themselves(found: list[int], seed: int) -> None:
    groups = np.array(found, dtype=np.int64)

    pairs = random_pairs(groups, partners=3, seed=seed)

    assert (groups[pairs[:, 0]] == groups[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    several = np.bincount(groups)[groups] > 1
    assert len(pairs) == 3 * several.sum()
    assert (pairs == random_pairs(groups, partners=3, seed=seed)).all()


# Baselines.


def test_a_group_answers_with_its_own_quantiles_and_an_unknown_one_with_the_coarser() -> None:
    plans = some_plans(30) + some_plans(30, seed=1, app="search")
    baselines = Baselines(fit_baselines(plans))

    coder = [c.output_tokens for p in plans[:30] for c in p.calls if c.role == "coder"]
    app = [c.output_tokens for p in plans[:30] for c in p.calls]
    every = [c.output_tokens for p in plans for c in p.calls]

    assert baselines.of("chat", "coder")[0].tolist() == np.quantile(coder, LEVELS).tolist()
    assert baselines.of("chat", "critic")[0].tolist() == np.quantile(app, LEVELS).tolist()
    assert baselines.of("web", "coder")[0].tolist() == np.quantile(every, LEVELS).tolist()


def test_tool_time_that_nobody_recorded_is_not_taken_as_none() -> None:
    timed = some_plans(30)
    untimed = [a_plan(f"u{i}", a_call(0), a_call(1), app="search") for i in range(30)]
    found = Baselines(fit_baselines(timed + untimed))
    alone = Baselines(fit_baselines(timed))
    at = TARGETS.index("remaining_tool_s")

    assert found.of("search", "")[at].tolist() == alone.of("", "")[at].tolist()
    assert not Baselines(fit_baselines(untimed)).of("search", "")[at].any()


def test_baselines_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one call"):
        fit_baselines([])
