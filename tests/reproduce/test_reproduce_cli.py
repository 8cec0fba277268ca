"""``concertmaster reproduce``: what it prints, writes, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from concertmaster import cli
from concertmaster.observe.draw_plots import draw_plots
from concertmaster.observe.plot_kinds import (
    CdfPlot,
    Frontier,
    FrontierPlot,
    Line,
    LinePlot,
    Mark,
    Plot,
    Span,
    StatePlot,
    TimelinePlot,
)
from concertmaster.reproduce import orders, registry
from concertmaster.reproduce.orders import STUDY

ROOT = Path(__file__).parents[2]
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
from concertmaster.cli import main
from concertmaster.reproduce.registry import STUDIES
STUDIES["slow"] = "study_builders:SLOW"
main()
"""
TOYS = {"toy": "study_builders:TOY", "loser": "study_builders:LOSER"}


class Cli:
    """Runs ``reproduce`` in this process, in a folder of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["concertmaster", "reproduce", *map(str, args)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return code, *self._capture.readouterr()


@pytest.fixture
def reproduce(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Cli:
    monkeypatch.chdir(tmp_path)
    for name, place in TOYS.items():
        monkeypatch.setitem(registry.STUDIES, name, place)
    return Cli(monkeypatch, capsys)


def test_claims_that_are_met_end_well(reproduce: Cli) -> None:
    code, out, err = reproduce("toy", "--jobs", 1, "--seeds", 3)

    assert (code, err) == (0, "")
    assert "A toy   3 seeds, default grid, 6 runs, mean ± 95 % interval over seeds" in out
    assert " ".join(out.split()).count("0.5 ± 0 at most 0.6 yes") == 1
    assert "10 ± 12.4 s  at least 1 s  yes" in out
    assert out.rstrip().endswith("it is a toy")
    assert "missed" not in out


def test_a_claim_that_is_missed_stays_listed_and_ends_with_1(reproduce: Cli) -> None:
    code, out, _ = reproduce("loser", "--jobs", 1, "--json", "out.json")

    assert code == 1
    assert "missed: mine | theirs: 0.5 ± 0, at most 0.4" in out
    claims = json.loads(Path("out.json").read_text())["claims"]
    assert [claim["met"] for claim in claims] == [False, True]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("toi",), 'reproduce: unknown study "toi" (did you mean "toy"? known: '),
        (("toy", "--seeds", 0), "--seeds: expected at least 1, found 0"),
        (("toy", "--jobs", 0), "--jobs: expected at least 1, found 0"),
        (("toy", "--plots", "file"), '--plots: expected a folder, found the file "file"'),
        (("toy", "--jobs", 1, "--markdown", "file/x.md"), "file/x.md: cannot write: "),
    ],
)
def test_bad_input_is_one_line(reproduce: Cli, args: tuple[object, ...], line: str) -> None:
    Path("file").write_text("")

    code, _, err = reproduce(*args)

    assert code == 2
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_the_json_has_the_keys_of_the_contract(reproduce: Cli) -> None:
    reproduce("toy", "--jobs", 1, "--seeds", 2, "--full", "--json", "deep/out.json")

    found = json.loads(Path("deep/out.json").read_text())
    assert {"system", "seeds", "grid", "claims", "tables"} <= set(found)
    assert (found["system"], found["seeds"], found["grid"]) == ("toy", 2, "full")
    for claim in found["claims"]:
        assert {"id", "statement", "measured", "ci95", "target", "met", "command"} <= set(claim)
        assert claim["command"] == "concertmaster reproduce toy --seeds 2 --full"
    assert found["claims"][0]["ci95"] == [0.5, 0.5]
    (table,) = found["tables"]
    assert table["rows"][0][1]["mean"] == 7.5
    assert table["rows"][1] == ["theirs", None]


def test_one_seed_has_no_interval(reproduce: Cli) -> None:
    _, out, _ = reproduce("toy", "--jobs", 1, "--seeds", 1, "--json", "out.json")

    assert "1 seed," in out
    assert json.loads(Path("out.json").read_text())["claims"][0]["ci95"] is None


def test_the_page_has_the_command_the_claims_and_links_that_hold(reproduce: Cli) -> None:
    reproduce("toy", "--jobs", 1, "--plots", "plots", "--markdown", "pages/toy.md")

    text = Path("pages/toy.md").read_text()
    assert text.startswith(
        "# A toy\n\n```sh\nconcertmaster reproduce toy --seeds 5\n```\n\n"
        "5 seeds, default grid, 10 runs; mean ± 95 % interval over seeds.\n\n## Claims\n\n"
        "| claim | measured | target | met |\n| --- | ---: | ---: | --- |\n"
        "| mine \\| theirs | 0.5 ± 0 | at most 0.6 | yes |\n"
    )
    assert "\n## Seconds\n\n| arm | s |\n| --- | ---: |\n| mine | 15 ± 9.81 |\n" in text
    assert "| theirs | – |\n\na note\n" in text
    assert "![Lines](../plots/toy-lines.png)" in text
    assert Path("plots/toy-lines.png").read_bytes().startswith(b"\x89PNG")
    assert text.endswith("## Notes\n\n- it is a toy\n")


def test_fresh_forgets_what_was_finished(reproduce: Cli) -> None:
    ledger = Path("runs/reproduce/toy.jsonl")
    reproduce("toy", "--jobs", 1, "--seeds", 2)
    reproduce("toy", "--jobs", 1, "--seeds", 2)
    assert len(ledger.read_text().splitlines()) == 4

    reproduce("toy", "--jobs", 1, "--seeds", 1, "--fresh")

    assert len(ledger.read_text().splitlines()) == 2


def test_studies_whose_module_is_not_there_are_not_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.STUDIES, "gone", "concertmaster.reproduce.gone:STUDY")

    assert "gone" not in registry.available()
    assert "orders" in registry.available()
    assert registry.study_named("orders") is STUDY


@pytest.mark.parametrize("name", registry.available())
def test_every_study_has_its_name_and_a_grid_that_full_only_adds_to(name: str) -> None:
    study = registry.study_named(name)

    default, full = study.cells(seeds=2, full=False), study.cells(seeds=2, full=True)

    assert study.name == name
    assert len(set(default)) == len(default)
    assert set(default) <= set(full)
    assert {cell.seed for cell in default} == {0, 1}


def is_alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", CODE, "reproduce", "slow", "--seeds", "200", "--jobs", "2"]
    with subprocess.Popen(  # noqa: S603  # ours
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        ledger = tmp_path / "runs/reproduce/slow.jsonl"
        for _ in range(600):
            if ledger.exists() and ledger.read_text().count("\n") >= 2:
                break
            time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)  # to all of them, as a terminal does
        try:
            _, err = child.communicate(timeout=30)
        finally:
            left = is_alive(child.pid)
            if left:
                os.killpg(child.pid, signal.SIGKILL)

    assert not left
    assert child.returncode == 130
    kept = ledger.read_text().count("\n")
    assert f"{kept} of 400 runs are kept: the same command goes on from there\n" in err
    assert "Traceback" not in err


# The one that ships.


def test_a_run_of_orders_measures_what_its_claims_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orders, "WORKFLOWS", 40)
    monkeypatch.setattr(orders, "capacity_rps", lambda *_, **__: 1.0)
    cell = STUDY.cells(seeds=1, full=False)[-1]

    found = STUDY.run(cell)

    assert {"makespan_s.mean", "makespan_s.p95", "capacity_rps", "makespans_s"} <= set(found)


# Plots.

LINES = [Line(label="a", x=[1.0, 2.0], y=[1.0, 3.0], half=[None, 0.5])]
PLOTS: dict[str, Plot] = {
    "lines": LinePlot(
        title="t", x_label="x", y_label="y", panels={str(i): LINES for i in range(4)}, log_y=True
    ),
    "frontier": FrontierPlot(
        title="t",
        x_label="seconds",
        y_label="success",
        panels={
            "s": Frontier(
                label="ours",
                curve=[Mark(label="0.1", x=1.0, y=0.5), Mark(label="0.9", x=2.0, y=0.8)],
                others=[Mark(label="other", x=1.5, y=0.4, x_half=0.1, y_half=0.05)],
            )
        },
    ),
    "cdf": CdfPlot(title="t", x_label="seconds", panels={"s": {"a": [3.0, 1.0, 2.0]}}),
    "timeline": TimelinePlot(
        title="t", bands={"queue": LINES, "replicas": LINES}, events={1.5: "a replica dies"}
    ),
    "states": StatePlot(
        title="t",
        rows={"r0": [Span(start_s=0.0, end_s=2.0, state="up")], "r1": []},
        states=["up", "down"],
    ),
}


def test_every_kind_of_plot_is_drawn(tmp_path: Path) -> None:
    paths = draw_plots(PLOTS, tmp_path / "plots")

    assert [path.name for path in paths] == [f"{name}.png" for name in PLOTS]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_folder_of_data_that_is_not_there_is_bad_input(reproduce: Cli, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        code, _, err = reproduce("chimera", "--data", folder)

        assert code == 2
        assert "--data: expected a folder with routing_questions.parquet, found none at" in err
