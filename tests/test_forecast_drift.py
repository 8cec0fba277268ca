"""The drift experiment: its measures on sequences made by hand, and a tiny week."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from builders import a_call, a_plan
from concertmaster.core.errors import InputError
from concertmaster.workload.plan import WorkflowPlan

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "forecast_drift.py"
PLANS = [
    a_plan(f"{app} {i}", *(a_call(k, output_tokens=n) for k in range(3)), app=app)
    for app, n in (("intercode_sql", 20), ("other", 90))
    for i in range(40)
]


@pytest.fixture(scope="module")
def drift() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("forecast_drift", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["forecast_drift"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["forecast_drift"]


@pytest.fixture(scope="module")
def figures(drift: ModuleType) -> ModuleType:
    return sys.modules[drift.figures.__module__]


def hits(*parts: tuple[int, int]) -> "np.typing.NDArray[np.bool_]":
    """Parts of so many labels of which every n-th is missed; 1 misses all, 0 none."""
    return np.array(
        [bool(every == 0 or i % every) for labels, every in parts for i in range(labels)],
        dtype=np.bool_,
    )


def test_coverage_that_never_left_is_back_at_once(figures: ModuleType) -> None:
    assert figures.labels_until_back(hits((1000, 20))) == 0


def test_labels_until_back_count_what_was_missed_beyond_the_band(figures: ModuleType) -> None:
    # 500 labels may miss 40; of a window that begins at n, 200 - n and a twentieth are missed
    back = figures.labels_until_back(hits((200, 1), (2000, 20)))
    assert back is not None
    window = hits((200, 1), (2000, 20))[back : back + 500]
    assert window.mean() == pytest.approx(0.92)
    assert 160 < back < 200


def test_too_much_coverage_is_not_back_either(figures: ModuleType) -> None:
    assert figures.labels_until_back(hits((2000, 0))) is None


def test_coverage_that_stays_away_is_never_back(figures: ModuleType) -> None:
    assert figures.labels_until_back(hits((2000, 5))) is None


def test_fewer_than_five_hundred_labels_say_nothing(figures: ModuleType) -> None:
    assert figures.labels_until_back(hits((499, 20))) is None


def test_an_interval_is_student_s_and_asks_for_two_values(figures: ModuleType) -> None:
    mean, half = figures.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(1.963, abs=0.01)
    assert math.isnan(figures.interval([1.0])[1])
    assert math.isnan(figures.interval([])[0])


def a_run(figures: ModuleType) -> object:
    labels = [
        figures.Label(float(i), float(i), "l40s" if i % 2 else "a100", i >= 300, i % 2 == 0)
        for i in range(600)
    ]
    return figures.Played(0, "on", labels)


def test_hits_are_those_of_calls_that_arrived_in_the_span(figures: ModuleType) -> None:
    run = a_run(figures)
    assert figures.hits_of(run, "tokens", (200.0, 400.0)).tolist() == [False] * 100 + [True] * 100
    assert figures.hits_of(run, "seconds", (0.0, 600.0)).mean() == 0.5
    slowed = figures.hits_of(run, "seconds, slowed pool", (0.0, 600.0))
    assert len(slowed) == 300
    assert not slowed.any()


def test_sliding_coverage_begins_once_the_window_is_full(figures: ModuleType) -> None:
    line = figures.coverage(a_run(figures), "tokens", np.array([100.0, 249.0, 424.0, 599.0]))
    assert math.isnan(line[0])
    assert line[1:].tolist() == [0.0, 0.5, 1.0]


def test_apps_change_after_a_third_and_the_same_seed_draws_the_same_week(
    drift: ModuleType,
) -> None:
    plan = drift.Plan(60, 900.0, "none")
    week = drift.week_of(PLANS, plan, 1)
    assert week == drift.week_of(PLANS, plan, 1)
    assert week != drift.week_of(PLANS, plan, 2)
    firsts = {app: min(p.arrival_s for p in week if p.app == app) for app in week.apps}
    assert firsts["intercode_sql"] < 300.0 <= firsts["other"]
    assert sum(len(p.calls) for p in week if p.app == "other") == 120


def test_a_mix_without_workflows_is_an_error(drift: ModuleType) -> None:
    only_before = [plan for plan in PLANS if plan.app == "intercode_sql"]
    with pytest.raises(InputError, match="apps other than intercode_sql and intercode_bash"):
        drift.week_of(only_before, drift.Plan(60, 900.0, "none"), 0)


def played(drift: ModuleType, arm: str, plans: list[WorkflowPlan] = PLANS) -> object:
    return drift.play(plans, drift.Plan(60, 90_000.0, "none"), 0, arm)


def test_a_tiny_week_is_labelled_in_full_and_repeats(drift: ModuleType) -> None:
    run = played(drift, "on")
    assert len(run.labels) == 180  # type: ignore[attr-defined]
    assert run == played(drift, "on")


def test_without_adaptation_apps_never_seen_are_not_covered(
    drift: ModuleType, figures: ModuleType
) -> None:
    span = (45_000.0, math.inf)
    on, off = played(drift, "on"), played(drift, "off from the first change")
    assert figures.hits_of(on, "tokens", span).mean() > 0.9
    assert figures.hits_of(off, "tokens", span).mean() < 0.1
    assert figures.hits_of(off, "seconds", span).mean() < 0.1


def test_the_slowed_pool_alone_takes_longer_after_the_second_change(
    drift: ModuleType,
) -> None:
    off = played(drift, "off from the second change")
    last = [label for label in off.labels if label.arrived_s >= 60_000.0]  # type: ignore[attr-defined]
    assert not any(label.seconds_in for label in last if label.pool == "l40s")
    assert all(label.seconds_in for label in last if label.pool == "a100")


def test_rows_and_picture_are_made_of_a_tiny_week(
    drift: ModuleType, figures: ModuleType, tmp_path: Path
) -> None:
    plan = drift.Plan(60, 90_000.0, "none")
    runs = [drift.play(PLANS, plan, 0, arm) for arm in figures.ARMS]
    rows = list(figures.figures(runs, plan))
    assert len(rows) == 27
    assert sum(rows[i]["labels"][0] for i in range(3)) == 180
    assert "1 of 1 never" in figures.show(rows[0])
    pytest.importorskip("matplotlib")
    drift.draw(runs, plan, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected an integer >= 1, got 0"),
        (["--plot", "drift.txt"], 'expected a file that ends in .png or .svg, found "drift.txt"'),
        (["--data", "no-such-file.parquet"], "no-such-file.parquet"),
    ],
)
def test_bad_input_is_refused_with_a_message(
    drift: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["forecast_drift.py", "--data", str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as stop:
        drift.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_is_not_there_is_said_and_left_out(
    drift: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forecast_drift.py"])
    drift.main()
    assert "nothing is measured" in capsys.readouterr().out
