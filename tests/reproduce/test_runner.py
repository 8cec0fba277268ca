"""Every cell runs once, whatever stops a study in between."""

from dataclasses import replace
from pathlib import Path

import pytest

from concertmaster.core.errors import InputError
from concertmaster.reproduce import fingerprint as prints
from concertmaster.reproduce.fingerprint import fingerprint
from concertmaster.reproduce.ledger import Ledger
from concertmaster.reproduce.results import Results
from concertmaster.reproduce.runner import checked, ledger_of, run_study
from study_builders import Toy, a_cell, an_input_error


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(calls=tmp_path / "calls")


def run(toy: Toy, folder: Path, *, seeds: int = 3, jobs: int = 1) -> Results:
    cells = toy.cells(seeds=seeds, full=False)
    return run_study(toy, cells, ledger_of(toy, folder), jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_are_in_the_order_of_the_cells_however_they_were_run(
    toy: Toy, tmp_path: Path, jobs: int
) -> None:
    found = run(toy, tmp_path, jobs=jobs)

    assert list(found.figures) == toy.cells(seeds=3, full=False)
    assert found.value("s", a_cell(seed=2)) == 15.0
    assert found.series("all_s", setting="s", arm="mine", load=0.5)[0] == [1.0, 2.0]
    assert len(toy.called()) == 6


def test_finished_cells_are_not_run_again_and_more_seeds_only_add(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path, seeds=2)
    first = toy.called()
    told: list[int] = []

    run(toy, tmp_path, seeds=2)
    assert toy.called() == first
    cells = toy.cells(seeds=3, full=False)
    run_study(toy, cells, ledger_of(toy, tmp_path), jobs=1, progress=told.append)

    assert toy.called()[len(first) :] == [str(a_cell(arm, seed=2)) for arm in ("mine", "theirs")]
    assert told == [4, 5, 6]


def test_a_study_that_was_interrupted_runs_only_the_rest(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(replace(toy, interrupted_at=2), tmp_path)
    before = toy.called()

    found = run(toy, tmp_path)

    assert len(before) == 2
    assert sorted(toy.called()) == sorted(map(str, toy.cells(seeds=3, full=False)))
    assert len(found.figures) == 6


def test_a_line_that_was_cut_off_is_run_again_and_harms_no_other(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    path = tmp_path / "toy.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    toy.calls.unlink() if toy.calls else None

    run(toy, tmp_path)
    run(toy, tmp_path)

    assert toy.called() == [str(a_cell("theirs", seed=2))]


def test_other_settings_run_again_and_the_old_results_stay(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    other = replace(toy, cost=0.25)

    assert run(other, tmp_path).value("s", a_cell()) == 2.5
    assert len(toy.called()) == 12
    assert run(toy, tmp_path).value("s", a_cell()) == 5.0
    assert len(toy.called()) == 12


def test_a_cleared_ledger_is_empty(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path)
    ledger_of(toy, tmp_path).clear()
    ledger_of(toy, tmp_path).clear()

    assert ledger_of(toy, tmp_path).read() == {}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_raises_is_named_in_a_line_and_the_others_are_kept(
    toy: Toy, tmp_path: Path, jobs: int
) -> None:
    with pytest.raises(InputError) as caught:
        run(replace(toy, broken="mine"), tmp_path, jobs=jobs, seeds=2)

    line = str(caught.value)
    assert line.startswith(
        "reproduce toy: s, mine, load 0.5, seed 1: ZeroDivisionError in study_builders.py:"
    )
    assert "by zero" in line
    assert "\n" not in line
    assert a_cell() in ledger_of(toy, tmp_path).read()


def test_a_fault_of_the_users_is_passed_on_in_its_words(toy: Toy, tmp_path: Path) -> None:
    broken = replace(toy, broken="mine", problem=an_input_error())

    with pytest.raises(InputError, match=r"seed 1: fleet.toml: pools: no such pool \("):
        run(broken, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("nan")]])
def test_a_figure_that_is_no_number_is_refused(value: float | list[float]) -> None:
    with pytest.raises(ValueError, match="figure s is not finite"):
        checked({"s": value})


def test_a_ledger_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    ledger = Ledger(blocked / "toy.jsonl", "x")

    with pytest.raises(InputError, match="cannot keep results"):
        ledger.append(a_cell(), {}, 0.0)


# Fingerprints.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few files in the place of ours."""
    root = tmp_path / "package"
    files = ["core/queue.py", "workload/sample.jsonl", "gateway/app.py", "observe/plots.py"]
    own = [f"reproduce/{name}.py" for name in (*prints.SHARED, "orders", "other")]
    for name in (*files, *own):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(prints, "PACKAGE", root)
    return root


def changes(package: Path, name: str) -> bool:
    prints.code_fingerprint.cache_clear()
    before = fingerprint(Toy())
    (package / name).write_text("changed")
    prints.code_fingerprint.cache_clear()
    after = fingerprint(Toy())
    prints.code_fingerprint.cache_clear()
    return before != after


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("core/queue.py", True),
        ("workload/sample.jsonl", True),
        ("reproduce/draw.py", True),
        ("reproduce/orders.py", True),
        ("reproduce/other.py", False),
        ("gateway/app.py", False),
        ("observe/plots.py", False),
    ],
)
def test_results_outlive_changes_that_no_run_depends_on_and_no_others(
    package: Path, name: str, *, matters: bool
) -> None:
    assert changes(package, name) is matters


def test_a_file_that_is_added_or_renamed_matters(package: Path) -> None:
    assert changes(package, "core/added.py")


def test_every_pattern_of_what_is_unseen_and_every_shared_module_exists() -> None:
    for pattern in prints.UNSEEN:
        assert list(prints.PACKAGE.glob(pattern)), pattern
    for name in prints.SHARED:
        assert (prints.PACKAGE / "reproduce" / f"{name}.py").exists()


def test_settings_matter_but_not_their_order() -> None:
    assert fingerprint(Toy(cost=1.0)) != fingerprint(Toy(cost=2.0))
    assert fingerprint(Toy(title="another")) == fingerprint(Toy())
