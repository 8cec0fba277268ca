"""Pairing and intervals: what claims are computed from."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.observe.compare import half_width, student_t
from concertmaster.reproduce.results import Cell, Results
from concertmaster.reproduce.study import Claim, Direction, Estimate, Table, cell_text, interval
from study_builders import a_cell


def results(values: dict[Cell, float]) -> Results:
    return Results({cell: {"s": value} for cell, value in values.items()})


def test_values_come_in_the_order_of_seeds_whatever_that_of_the_cells() -> None:
    found = results({a_cell(seed=seed): float(seed) for seed in (2, 0, 1)})

    assert found.values("s", setting="s", arm="mine", load=0.5) == [0.0, 1.0, 2.0]


@given(st.lists(st.floats(1.0, 1e6), min_size=2, max_size=8), st.floats(0.1, 10.0), st.randoms())
def test_ratios_are_paired_by_seed(seconds: list[float], factor: float, rng: object) -> None:
    """However seeds differ, a constant factor is found exactly, with no interval."""
    cells = {a_cell("theirs", seed=i): s for i, s in enumerate(seconds)}
    cells |= {a_cell(seed=i): factor * s for i, s in enumerate(seconds)}
    shuffled = sorted(cells.items(), key=lambda _: rng.random())  # type: ignore[attr-defined]

    ratios = results(dict(shuffled)).ratios("s", "mine", "theirs", settings=["s"], loads=[0.5])

    assert ratios == pytest.approx([factor] * len(seconds))


def test_ratios_are_paired_by_setting_and_load_and_averaged_by_seed() -> None:
    scale = {("s", 0.5): 1.0, ("s", 1.0): 10.0, ("t", 0.5): 100.0, ("t", 1.0): 1000.0}
    ratio = {("s", 0.5): 0.1, ("s", 1.0): 0.2, ("t", 0.5): 0.3, ("t", 1.0): 0.4}
    cells = {}
    for (setting, load), one in scale.items():
        for seed in (0, 1):
            cells[a_cell("theirs", setting=setting, load=load, seed=seed)] = one
            mine = one * ratio[setting, load] * (1 + seed)
            cells[a_cell(setting=setting, load=load, seed=seed)] = mine
    found = results(cells)

    ratios = found.ratios("s", "mine", "theirs", settings=("s", "t"), loads=(0.5, 1.0))
    seconds = found.per_seed("s", "theirs", settings=("s", "t"), loads=(0.5, 1.0))
    assert ratios == pytest.approx([0.25, 0.5])
    assert seconds == pytest.approx([277.75, 277.75])
    assert found.differences("s", "mine", "theirs", settings=["t"], loads=[1.0]) == pytest.approx(
        [-600.0, -200.0]
    )


def test_axes_are_listed() -> None:
    found = results({a_cell(arm, load=load): 0.0 for load in (1.0, 0.5) for arm in ("b", "a")})

    assert (found.settings, found.arms, found.loads, found.seeds) == (
        ("s",),
        ("b", "a"),
        (0.5, 1.0),
        (0,),
    )
    assert found.has(setting="s", arm="a", load=1.0)
    assert not found.has(setting="s", arm="c", load=1.0)


def test_a_series_is_kept_by_seed() -> None:
    found = Results({a_cell(seed=seed): {"all": [1.0, seed]} for seed in (0, 1)})

    assert found.series("all", setting="s", arm="mine", load=0.5) == [[1.0, 0.0], [1.0, 1.0]]


def test_what_is_missing_is_named() -> None:
    found = results({a_cell(): 1.0})

    with pytest.raises(LookupError, match="seed 0: has no figure 'x'; it has s"):
        found.value("x", a_cell())
    with pytest.raises(LookupError, match=r"s, other, load 0\.5, seed 0: not among the cells"):
        found.value("s", a_cell("other"))


# Intervals.


def test_an_interval_is_around_the_mean_and_none_for_one_seed() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0.0, 0.0)

    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(half_width([1.0, 2.0, 3.0]))
    assert interval([1.0]) is None


def test_student_falls_without_a_jump_to_the_normal_law() -> None:
    steps = [student_t(n) - student_t(n + 1) for n in range(10, 200)]

    assert all(step > 0 for step in steps)
    assert all(later < step + 1e-3 for step, later in pairwise(steps))
    assert student_t(30) == pytest.approx(2.04227, abs=1e-5)
    assert student_t(60) == pytest.approx(2.00030, abs=1e-5)
    assert student_t(10**9) == pytest.approx(1.95996, abs=1e-5)


# Claims and tables.


@pytest.mark.parametrize(
    ("direction", "measured", "met"),
    [
        ("at least", 1.1, True),
        ("at least", 1.0, True),
        ("at least", 0.9, False),
        ("at most", 0.9, True),
        ("at most", 1.0, True),
        ("at most", 1.1, False),
    ],
)
def test_a_claim_is_met_on_its_side_of_the_target(
    direction: Direction, measured: float, *, met: bool
) -> None:
    values = [measured - 5.0, measured, measured + 5.0]

    claim = Claim.over_seeds("id", "it holds", values, direction, 1.0)

    assert claim.measured == pytest.approx(measured)
    assert Claim.over_seeds("id", "it holds", [measured], direction, 1.0).met is met


def test_a_claim_shows_its_unit_and_a_ratio_in_percent() -> None:
    seconds = Claim.over_seeds("a", "", [1.0, 3.0], "at most", 4.0, unit="s")
    share = Claim.over_seeds("b", "", [0.123], "at least", 0.5, unit="%")

    assert (seconds.measured_text, seconds.target_text) == ("2 ± 12.7 s", "at most 4 s")
    assert (share.measured_text, share.target_text) == ("12.3 %", "at least 50 %")


def test_a_cell_of_a_table_is_shown_once_and_a_crooked_row_is_refused() -> None:
    assert cell_text(Estimate.of([1.0, 3.0])) == "2 ± 12.7"
    assert cell_text(Estimate.of([math.pi])) == "3.14"
    with pytest.raises(ValueError, match="expected 2 cells a row, found 1"):
        Table(title="t", columns=("a", "b"), rows=(("x",),))


@pytest.mark.parametrize(
    ("direction", "by_interval", "values", "met"),
    [
        ("at most", False, [0.9, 1.2], False),
        ("at most", True, [0.9, 1.2], True),
        ("at most", True, [1.2, 1.2001], False),
        ("at least", False, [0.9, 1.05], False),
        ("at least", True, [0.9, 1.05], True),
        ("at least", True, [0.9, 0.9001], False),
        ("at most", True, [1.2], False),
    ],
)
def test_a_claim_by_its_interval_is_missed_only_if_all_of_it_lies_beyond(
    direction: Direction, values: list[float], *, by_interval: bool, met: bool
) -> None:
    claim = Claim.over_seeds("id", "s", values, direction, 1.0, by_interval=by_interval)

    assert claim.met is met
    assert claim.target_text.endswith("beyond the interval") is by_interval
