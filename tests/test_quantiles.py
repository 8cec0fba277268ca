"""Distributions as quantiles, against Monte Carlo and against algebra."""

import math
from functools import cache
from itertools import combinations_with_replacement, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import a_forecast
from concertmaster.core.forecast import GRID, NO_FORECAST, UNKNOWN_OUTPUT_TOKENS, Quantiles
from concertmaster.core.request import ModelName

Samples = npt.NDArray[np.float64]

COUNT = 400_000
PERCENTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
LEVELS = (
    *(0.0001, 0.001, 0.005),
    *(i / 100 for i in range(1, 98)),
    *(1 - 0.02 * 0.75**i for i in range(18)),
    0.9999,
)
# The bimodal law has its jump at level 0.6, so that no percentile tested falls onto a jump of
# it, of a sum, or of a mixture: there a quantile is an interval, and any answer in it is right.
LAWS = ("log-normal", "bimodal", "heavy-tailed")
PAIRS = list(combinations_with_replacement(LAWS, 2))
ALPHA, SMALLEST = 2.5, 100.0


@cache
def draw(law: str, seed: int) -> Samples:
    rng = np.random.default_rng([seed, LAWS.index(law)])
    if law == "log-normal":
        return rng.lognormal(5.0, 1.0, COUNT)
    if law == "bimodal":
        low, high = rng.normal(100.0, 10.0, COUNT), rng.normal(1000.0, 100.0, COUNT)
        return np.where(rng.random(COUNT) < 0.6, low, high)
    return SMALLEST * (1 + rng.pareto(ALPHA, COUNT))


@cache
def quantiles(law: str) -> Quantiles:
    return Quantiles(LEVELS, tuple(float(v) for v in np.quantile(draw(law, 1), LEVELS)))


def assert_agrees(found: Quantiles, samples: Samples) -> None:
    truth = [float(v) for v in np.quantile(samples, PERCENTILES)]
    assert [found.at(level) for level in PERCENTILES] == pytest.approx(truth, rel=0.02)
    assert found.mean == pytest.approx(float(samples.mean()), rel=0.02)
    worst = samples[samples >= truth[2]]
    assert found.tail_mean(0.9) == pytest.approx(float(worst.mean()), rel=0.02)


@pytest.mark.parametrize("law", LAWS)
def test_mean_and_tail_mean_of_a_law_agree_with_monte_carlo(law: str) -> None:
    assert_agrees(quantiles(law), draw(law, 2))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_sum_of_independent_laws_agrees_with_monte_carlo(one: str, other: str) -> None:
    assert_agrees(quantiles(one).compose(quantiles(other)), draw(one, 2) + draw(other, 3))


@pytest.mark.parametrize(("one", "other"), list(product(LAWS, LAWS)))
def test_a_mixture_of_laws_agrees_with_monte_carlo(one: str, other: str) -> None:
    which = np.random.default_rng(4).random(COUNT) < 1 / 3
    samples = np.where(which, draw(one, 2), draw(other, 3))

    assert_agrees(Quantiles.mix([(1.0, quantiles(one)), (2.0, quantiles(other))]), samples)


def test_a_sum_of_six_steps_of_a_workflow_agrees_with_monte_carlo() -> None:
    found = quantiles("log-normal")
    samples = draw("log-normal", 2)
    for seed, law in enumerate(("bimodal", "heavy-tailed", "log-normal", "bimodal", "bimodal"), 3):
        found = found.compose(quantiles(law))
        samples = samples + draw(law, seed)

    assert_agrees(found, samples)


def test_the_tail_of_a_sum_is_far_below_the_sum_of_the_tails() -> None:
    law = quantiles("log-normal")
    total = law.compose(law).compose(law).compose(law)

    assert total.at(0.95) < 0.75 * 4 * law.at(0.95)
    assert total.median > 1.2 * 4 * law.median


@pytest.mark.parametrize("level", [0.0, 0.5, 0.9, 0.95, 0.99])
def test_tail_mean_of_a_heavy_tail_is_near_its_closed_form(level: float) -> None:
    levels = (*(i / 200 for i in range(199)), *(1 - 0.005 * 0.8**i for i in range(18)), 0.9999)
    pareto = Quantiles(levels, tuple(SMALLEST * (1 - level) ** (-1 / ALPHA) for level in levels))

    truth = ALPHA / (ALPHA - 1) * SMALLEST * (1 - level) ** (-1 / ALPHA)
    assert pareto.tail_mean(level) == pytest.approx(truth, rel=0.05)


def test_tail_mean_of_the_very_last_case_is_the_largest_value() -> None:
    assert Quantiles((0.5, 1.0), (1.0, 7.0)).tail_mean(1.0) == 7.0


def test_levels_are_finer_towards_the_tails() -> None:
    assert list(GRID) == sorted(set(GRID))
    assert GRID[0] < 0.001
    assert GRID[-1] > 0.9999


# Algebra.

levels = st.lists(
    st.floats(0.001, 0.9999).map(lambda x: round(x, 4)), min_size=1, max_size=12, unique=True
).map(lambda found: tuple(sorted(found)))


@st.composite
def laws(draw_one: st.DrawFn) -> Quantiles:
    at = draw_one(levels)
    values = draw_one(st.lists(st.floats(0.0, 1e5), min_size=len(at), max_size=len(at)))
    return Quantiles(at, tuple(sorted(values)))


@given(laws(), st.floats(0.0, 1e4), st.floats(0.0, 100.0), st.floats(0.0, 1.0))
def test_shifting_and_scaling_are_exact_at_every_level(
    law: Quantiles, by: float, factor: float, level: float
) -> None:
    shifted, scaled = law.shift(by), law.scale(factor)
    found = [shifted.at(level), shifted.mean, scaled.at(level), scaled.mean]

    truth = [law.at(level) + by, law.mean + by, law.at(level) * factor, law.mean * factor]
    assert found == pytest.approx(truth, rel=1e-9, abs=1e-6)


@settings(max_examples=25)
@given(laws(), laws())
def test_composing_commutes_and_never_goes_beyond_the_extremes(
    one: Quantiles, other: Quantiles
) -> None:
    both, swapped = one.compose(other), other.compose(one)

    assert both.values == pytest.approx(swapped.values)
    assert both.values[0] >= one.values[0] + other.values[0] - 1e-6
    assert both.values[-1] <= one.values[-1] + other.values[-1] + 1e-6
    assert both.mean == pytest.approx(one.mean + other.mean, rel=0.03, abs=1e-6)


@settings(max_examples=25)
@given(laws(), laws())
def test_every_result_rises_with_the_level(one: Quantiles, other: Quantiles) -> None:
    for law in (one.compose(other), Quantiles.mix([(0.3, one), (0.7, other)]), one.cap(100.0)):
        assert list(law.values) == sorted(law.values)
        assert law.tail_mean(0.5) <= law.tail_mean(0.9) + 1e-6
        assert law.mean <= law.tail_mean(0.1) * (1 + 1e-2) + 1e-6


@settings(max_examples=25)
@given(laws(), st.floats(0.0, 1e4))
def test_adding_a_certain_amount_is_shifting(law: Quantiles, by: float) -> None:
    sum_of_both = law.compose(Quantiles.exactly(by))

    for level in (0.1, 0.5, 0.9):
        near = (law.at(max(0.0, level - 0.02)), law.at(min(1.0, level + 0.02)))
        assert near[0] + by - 1e-6 <= sum_of_both.at(level) <= near[1] + by + 1e-6


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_quantiles_of_samples_run_from_the_least_to_the_largest(samples: list[float]) -> None:
    found = Quantiles.of_samples(samples, (0.0, 0.5, 1.0))

    assert [found.at(0.0), found.at(1.0)] == pytest.approx([min(samples), max(samples)])
    assert found.median == pytest.approx(float(np.quantile(samples, 0.5)))


def test_a_part_without_weight_does_not_count() -> None:
    sure = Quantiles.exactly(3.0)

    assert Quantiles.mix([(0.0, Quantiles.exactly(99.0)), (2.0, sure)]).values == (3.0,) * len(GRID)


def test_capping_touches_only_what_is_above() -> None:
    assert Quantiles((0.1, 0.9), (5.0, 50.0)).cap(20.0).values == (5.0, 20.0)


@pytest.mark.parametrize(
    ("at", "values", "message"),
    [
        ((), (), "quantiles need as many values as levels, at least one"),
        ((0.5,), (1.0, 2.0), "quantiles need as many values as levels, at least one"),
        ((0.5, 0.5), (1.0, 2.0), "levels must increase, got (0.5, 0.5)"),
        ((0.1, 0.9), (2.0, 1.0), "values must not decrease, got (2.0, 1.0)"),
    ],
)
def test_what_is_no_distribution_is_refused(
    at: tuple[float, ...], values: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=r"must|need") as refusal:
        Quantiles(at, values)

    assert str(refusal.value) == message


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a mixture needs a positive weight"):
        Quantiles.mix([(0.0, Quantiles.exactly(1.0))])


# Forecasts.


def test_a_forecast_for_the_model_goes_before_the_general_one() -> None:
    own = {ModelName("small"): Quantiles.exactly(90.0)}
    forecast = a_forecast(20.0, output_tokens_on=own)

    assert forecast.output_at(ModelName("small"), 0.5, 1000) == 90
    assert forecast.output_at(ModelName("large"), 0.5, 1000) == 20


def test_a_predicted_length_stays_between_one_and_the_cap() -> None:
    assert a_forecast(0.0).output_at(ModelName("m"), 0.5, 1000) == 1
    assert a_forecast(2000.0).output_at(ModelName("m"), 0.5, 1000) == 1000
    assert a_forecast(10.2).output_at(ModelName("m"), 0.5, 1000) == 11


def test_without_a_forecast_a_usual_chat_answer_is_expected() -> None:
    assert NO_FORECAST.output_at(ModelName("m"), 0.9, 10_000) == UNKNOWN_OUTPUT_TOKENS


def test_a_value_that_is_no_number_is_refused_between_others() -> None:
    with pytest.raises(ValueError, match="must not decrease"):
        Quantiles((0.1, 0.5, 0.9), (1.0, math.nan, 3.0))
