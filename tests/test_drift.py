"""Drift: quiet while forecasts hold, quick on both sides when they do not."""

import math
from collections.abc import Iterable
from statistics import NormalDist, median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.forecast import Quantiles
from concertmaster.learning.drift import RUN_LABELS, Change, Drift, DriftWatch, Health
from concertmaster.learning.labels import LEVELS

LAW = Quantiles(LEVELS, tuple(math.exp(5 + 0.5 * NormalDist().inv_cdf(x)) for x in LEVELS))
"""A forecast of log-normal tokens, sigma 0.5."""

GROUP = ("coder", "m", "h200")
Labels = Iterable[float]


def labels(seed: int, count: int, *, factor: float = 1.0, sigma: float = 0.5) -> list[float]:
    """Return outcomes in whole tokens; with the settings as they are the forecast holds."""
    normal = np.random.default_rng(seed).normal(5.0, sigma, count)
    return [float(round(tokens)) for tokens in factor * np.exp(normal)]


def first_alarm(
    outcomes: Labels, watch: DriftWatch | None = None, law: Quantiles = LAW
) -> tuple[int, Drift] | None:
    """Return after how many labels the first alarm came; label i is known at second i."""
    watch = watch or DriftWatch()
    for i, tokens in enumerate(outcomes, start=1):
        drift = watch.add(GROUP, law, tokens, float(i))
        if drift is not None:
            return i, drift
    return None


# The rate of false alarms.


def test_false_alarms_are_rarer_than_stated() -> None:
    """At most n / RUN_LABELS of all streams of n labels: 2 % of these, four of 200."""
    alarms = [first_alarm(labels(seed, 2_000)) for seed in range(200)]

    assert sum(alarm is not None for alarm in alarms) <= 200 * 2_000 / RUN_LABELS


def test_the_bound_holds_for_a_rate_that_is_met_often() -> None:
    """With a run of 2,000 labels, at most every tenth stream of 200 may alarm."""
    alarms = [first_alarm(labels(s, 200), DriftWatch(run_labels=2_000)) for s in range(300)]

    assert sum(alarm is not None for alarm in alarms) <= 30


@pytest.mark.parametrize("factor", [1.04, 1 / 1.04])
def test_an_error_within_the_band_is_no_drift(factor: float) -> None:
    alarms = [first_alarm(labels(seed, 2_000, factor=factor)) for seed in range(30)]

    assert sum(alarm is not None for alarm in alarms) <= 1


def test_answers_that_are_all_alike_and_foretold_are_no_drift() -> None:
    assert first_alarm([1.0] * 5_000, law=Quantiles.exactly(1.0)) is None


SHORT = np.array([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("shares", [(0.49, 0.21, 0.2, 0.06, 0.04), (0.02, 0.3, 0.06, 0.6, 0.02)])
@pytest.mark.parametrize("off", [0.0, 0.2, -0.2])
def test_short_answers_in_whole_tokens_are_no_drift(shares: tuple[float, ...], off: float) -> None:
    """A few lengths fall on many levels, and a fitted quantile lies a little beside them."""
    reached = np.cumsum(shares)
    values = tuple(float(SHORT[np.searchsorted(reached, x - 1e-9)]) + off for x in LEVELS)
    drawn = np.random.default_rng(0).choice(SHORT, 5_000, p=shares)

    assert first_alarm(drawn, law=Quantiles(LEVELS, values)) is None


def test_short_answers_that_grow_are_found() -> None:
    law = Quantiles(LEVELS, (1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0))
    drawn = np.random.default_rng(0).choice(SHORT, 5_000, p=(0.05, 0.1, 0.4, 0.3, 0.15))

    alarm = first_alarm(drawn, law=law)
    assert alarm is not None
    assert alarm[0] < 300


# Detection.


@pytest.mark.parametrize(
    ("factor", "within", "kind"),
    [(1.3, 150, Change.HIGHER), (1 / 1.3, 150, Change.LOWER), (0.5, 40, Change.LOWER)],
)
def test_a_shift_is_found_within_a_stated_median(factor: float, within: int, kind: Change) -> None:
    """After 500 labels of calm; each delay is measured from the label at which it began."""
    found = [
        first_alarm([*labels(seed, 500), *labels(seed + 999, 2_000, factor=factor)])
        for seed in range(25)
    ]

    delays = [one[0] - 500 for one in found if one]
    assert len(delays) == 25
    assert 0 < median(delays) <= within
    assert {one[1].kind for one in found if one} == {kind}
    began_s = median(one[1].since_s for one in found if one)
    assert began_s == pytest.approx(500, abs=15)


@pytest.mark.parametrize(
    ("sigma", "within", "kinds"),
    [
        (1.0, 120, {Change.WIDER, Change.HEAVIER_TAIL}),
        (0.3, 200, {Change.NARROWER, Change.LIGHTER_TAIL}),
    ],
)
def test_a_change_of_spread_is_found_though_the_median_holds(
    sigma: float, within: int, kinds: set[Change]
) -> None:
    found = [first_alarm(labels(seed, 2_000, sigma=sigma)) for seed in range(15)]

    assert median(one[0] for one in found if one) <= within
    assert {one[1].kind for one in found if one} <= kinds


def test_rare_giants_are_found_though_nine_tenths_hold() -> None:
    outcomes = [t * (10 if i % 8 == 0 else 1) for i, t in enumerate(labels(1, 2_000))]

    alarm = first_alarm(outcomes)
    assert alarm is not None
    assert alarm[1].kind is Change.HEAVIER_TAIL


def test_a_tail_that_is_never_reached_is_found() -> None:
    calm = [tokens for tokens in labels(1, 4_000) if tokens <= LAW.at(0.9)]
    body = [tokens for i, tokens in enumerate(calm) if tokens <= LAW.median or i % 10 != 0]

    alarm = first_alarm(body)
    assert alarm is not None
    assert alarm[1].kind is Change.LIGHTER_TAIL


def a_shift_of(factor: float) -> tuple[Drift, float, Health]:
    """Return the first alarm after a calm window, the highest tail ratio, the last figures."""
    watch = DriftWatch()
    assert first_alarm(labels(0, 256), watch) is None
    alarms, healths = [], []
    for i, tokens in enumerate(labels(1, 400, factor=factor)):
        alarms.append(watch.add(GROUP, LAW, tokens, float(i)))
        healths.append(watch.health(GROUP))
    known = [health for health in healths if health]
    first = next(alarm for alarm in alarms if alarm)
    return first, max(health.tail_ratio or 0.0 for health in known), known[-1]


def test_the_one_sided_test_misses_what_this_one_finds() -> None:
    """Mean tail pinball over a window against a bound (SwarmX 2.2).

    It sees answers 30 % longer, and hardly those half as long.
    """
    longer, longest_ratio, _ = a_shift_of(1.3)
    shorter, ratio, health = a_shift_of(0.5)

    assert longer.kind is Change.HIGHER
    assert longest_ratio > 1.5
    assert shorter.kind is Change.LOWER
    assert ratio < 1.25
    assert health.tail_ratio == pytest.approx(1.0, abs=0.2)
    assert (health.coverage_p50, health.coverage_p95) == pytest.approx((0.92, 1.0), abs=0.05)
    assert health.bias == pytest.approx(math.log(0.5), abs=0.1)


# Figures.


def test_figures_are_right_while_forecasts_hold() -> None:
    watch = DriftWatch(window=2_000)
    assert watch.health(GROUP) is None
    assert first_alarm(labels(3, 4_000), watch) is None

    health = watch.health(GROUP)
    assert health is not None
    assert health.labels == 2_000
    assert health.coverage_p50 == pytest.approx(0.5, abs=0.03)
    assert health.coverage_p95 == pytest.approx(0.95, abs=0.015)
    assert health.bias == pytest.approx(0.0, abs=0.04)
    assert health.tail_ratio == pytest.approx(1.0, abs=0.2)


def test_the_tail_has_no_level_to_be_compared_with_before_a_full_window() -> None:
    watch = DriftWatch(window=50)
    first_alarm(labels(0, 49), watch)
    early = watch.health(GROUP)
    first_alarm(labels(0, 1), watch)
    full = watch.health(GROUP)

    assert early is not None
    assert full is not None
    assert early.tail_ratio is None
    assert full.tail_ratio == pytest.approx(1.0)


# Hysteresis, reset, bounds.


def alarms_in(watch: DriftWatch, outcomes: Labels) -> list[int]:
    return [i for i, tokens in enumerate(outcomes) if watch.add(GROUP, LAW, tokens, i) is not None]


def test_an_alarm_is_not_raised_again_until_the_group_is_armed() -> None:
    first, second = alarms_in(DriftWatch(rearm_labels=1_000), labels(0, 2_000, factor=2.0))

    assert first < 50
    assert first + 1_000 < second < first + 1_100


def test_a_reset_arms_a_group_at_once_and_forgets_its_figures() -> None:
    watch = DriftWatch()
    assert len(alarms_in(watch, labels(0, 200, factor=2.0))) == 1
    watch.reset(GROUP)

    assert watch.health(GROUP) is None
    assert len(alarms_in(watch, labels(1, 200, factor=2.0))) == 1
    watch.reset()
    assert watch.groups == ()


def test_groups_are_watched_apart() -> None:
    watch = DriftWatch()
    kinds = set()
    for good, bad in zip(labels(0, 500), labels(1, 500, factor=2.0), strict=True):
        for group, tokens in ((("fine",), good), (("ill",), bad)):
            drift = watch.add(group, LAW, tokens, 0.0)
            kinds |= {drift.group} if drift else set()

    assert kinds == {("ill",)}


def test_the_group_without_labels_for_longest_is_forgotten() -> None:
    watch = DriftWatch(max_groups=3)
    for name in ("a", "b", "c", "a", "d"):
        watch.add((name,), LAW, 5.0, 0.0)

    assert watch.groups == (("c",), ("a",), ("d",))


# Any outcome.


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 1e300])
def test_what_cannot_be_is_ignored(wrong: float) -> None:
    watch = DriftWatch()

    assert watch.add(GROUP, LAW, wrong, 0.0) is None
    assert watch.add(GROUP, Quantiles.exactly(wrong), 5.0, 0.0) is None
    assert watch.health(GROUP) is None


@given(
    values=st.lists(st.floats(0, 1e9), min_size=8, max_size=8).map(sorted),
    outcomes=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=50),
)
def test_no_outcome_breaks_the_bets(values: list[float], outcomes: list[float]) -> None:
    watch = DriftWatch()
    for law in (Quantiles(LEVELS, tuple(values)), Quantiles.exactly(values[0])):
        for tokens in outcomes:
            watch.add(GROUP, law, tokens, 0.0)

    for state in watch._groups.values():
        assert all(0.0 <= capital < math.inf for capital in state.capital)


# Grades.

CHANCES = (0.05, 0.3, 0.5, 0.8, 0.97)


def first_alarm_of_grades(seed: int, count: int, off: float = 0.0) -> tuple[int, Drift] | None:
    """Grade calls whose stated chances are true but for ``off``; every third one is a share."""
    rng, watch = np.random.default_rng(seed), DriftWatch()
    for i in range(1, count + 1):
        chance = CHANCES[rng.integers(len(CHANCES))]
        true = min(max(chance + off, 0.0), 1.0)
        grade = (
            rng.beta(9 * true + 1e-9, 9 * (1 - true) + 1e-9) if i % 3 == 0 else rng.random() < true
        )
        drift = watch.add_grade(GROUP, chance, float(grade), float(i))
        if drift is not None:
            return i, drift
    return None


def test_chances_that_hold_raise_no_more_false_alarms_than_stated() -> None:
    alarms = [first_alarm_of_grades(seed, 2_000) for seed in range(200)]

    assert sum(alarm is not None for alarm in alarms) <= 200 * 2_000 / RUN_LABELS


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_certainties_that_hold_are_no_drift(chance: float) -> None:
    watch = DriftWatch()

    assert not any(watch.add_grade(GROUP, chance, chance, float(i)) for i in range(5_000))


@pytest.mark.parametrize(("off", "kind"), [(-0.25, Change.LOWER), (0.25, Change.HIGHER)])
def test_success_that_leaves_its_chances_is_found(off: float, kind: Change) -> None:
    found = [first_alarm_of_grades(seed, 2_000, off) for seed in range(25)]

    assert None not in found
    assert median(one[0] for one in found if one) <= 250
    assert {one[1].kind for one in found if one} == {kind}
    biases = [one[1].health.bias for one in found if one]
    assert median(biases) == pytest.approx(off, abs=0.12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 1.1])
def test_grades_and_chances_that_cannot_be_are_ignored(wrong: float) -> None:
    watch = DriftWatch()

    assert watch.add_grade(GROUP, 0.5, wrong, 0.0) is None
    assert watch.add_grade(GROUP, wrong, 1.0, 0.0) is None
    assert watch.health(GROUP) is None
