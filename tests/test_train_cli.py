import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from concertmaster.cli import app
from concertmaster.learning import fit_heads, trainer
from concertmaster.learning.fit_success import Labelled
from concertmaster.learning.rehearsal import remaining
from concertmaster.learning.trainer import Trained
from concertmaster.predictors.encoder import Encoder
from concertmaster.predictors.store import load_predictor, read_store
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.split import held_out
from store_builders import a_store, some_parts, some_plans, some_questions
from test_cli import Shell

Lines = list[dict[str, Any]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> list[WorkflowPlan]:
    """What a trainer that grows no trees was given."""
    given: list[WorkflowPlan] = []

    def train(
        plans: Sequence[WorkflowPlan],
        questions: Sequence[Labelled],
        *,
        encoder: Encoder,
        seed: int,
        progress: trainer.Progress,
    ) -> Trained:
        assert (encoder.dims > 0, seed) == (True, 0)
        progress("counting", 0.5)
        given.extend(plans)
        parts: dict[str, dict[str, npt.NDArray[Any]]] = some_parts(plans)
        kept = {name: parts[name] for name in ("laws", "heads", "calibration")}
        return Trained(kept, {"loss": 0.25, "trees": 3}, (f"{len(questions)} questions",))

    monkeypatch.setattr(trainer, "train", train)
    return given


def rows_of(plans: Sequence[WorkflowPlan]) -> Lines:
    return [
        {
            "workflow_id": plan.workflow_id,
            "task_group": plan.task,
            "app": plan.app,
            "stage_index": call.stage,
            "parents": list(call.parents),
            "role": call.role,
            "prompt_tokens": call.prompt_tokens,
            "output_tokens": call.output_tokens,
            "prompt_text": call.prompt_text,
            "tool_s": call.tool_s,
            "model": call.model,
        }
        for plan in plans
        for call in plan.calls
    ]


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    return write(tmp_path / "calls.jsonl", rows_of(some_plans(60)))


@pytest.fixture
def routing(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow", reason="routing sets are Parquet: needs the extra data")
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    questions = some_questions(80)
    asked = [
        {"question_id": q.question_id, "source": q.source, "question": q.labelled.text}
        for q in questions
    ]
    graded = [
        {"question_id": q.question_id, "source": q.source, "model": m, "harness": "", "correct": g}
        for q in questions
        for m, g in q.labelled.correct.items()
    ]
    for name, rows in (("questions", asked), ("outcomes", graded)):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"routing_{name}.parquet")
    return tmp_path


# Help.


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_both_commands_have_help_with_an_example(command: str) -> None:
    told = CliRunner().invoke(app, [command, "--help"])

    assert told.exit_code == 0
    assert f"Example: concertmaster {command}" in " ".join(told.output.split())


# Training.


def test_a_fifth_of_the_groups_is_held_back(
    shell: Shell, taught: list[WorkflowPlan], workload: Path, tmp_path: Path
) -> None:
    said = shell("train", "-w", workload, "-o", tmp_path / "s")

    assert said.code == 0, said
    assert {plan.task for plan in taught} == {
        plan.task for plan in some_plans(60) if not held_out(plan.task)
    }
    about = read_store(tmp_path / "s").manifest
    assert about.trained_on.workflows == len(taught) < 60
    assert about.trained_on.names == (workload.name,)
    assert about.trained_on.held_out
    assert about.figures == {"loss": 0.25, "trees": 3}
    assert about.notes == ("0 questions",)
    assert f"store             {tmp_path / 's'}" in said.out
    assert "held out          " in said.out


def test_all_of_the_groups_are_taken_if_so_asked(
    shell: Shell, taught: list[WorkflowPlan], workload: Path, tmp_path: Path
) -> None:
    assert shell("train", "-w", workload, "-o", tmp_path / "s", "--all").code == 0

    assert len(taught) == 60
    assert not read_store(tmp_path / "s").manifest.trained_on.held_out


def test_a_store_holds_the_baselines_of_what_it_was_trained_on(
    shell: Shell, taught: list[WorkflowPlan], workload: Path, tmp_path: Path
) -> None:
    shell("train", "-w", workload, "-o", tmp_path / "s")

    wanted = some_parts(taught)["baselines"]["quantiles"].tolist()
    assert read_store(tmp_path / "s").parts["baselines"]["quantiles"].tolist() == wanted


def test_a_folder_of_other_things_is_refused_before_any_training(
    shell: Shell, taught: list[WorkflowPlan], workload: Path, tmp_path: Path
) -> None:
    line = shell.refuses("train", "-w", workload, "-o", tmp_path)

    assert line == (
        f'{tmp_path}: expected a store or nothing, found "calls.jsonl" there '
        "(name another place: it would be replaced)"
    )
    assert not taught


def test_workloads_that_cannot_be_trained_on_are_refused(
    shell: Shell, taught: list[WorkflowPlan], tmp_path: Path
) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    other = write(tmp_path / "other.jsonl", [{"colour": "red"}])
    nan = tmp_path / "nan.jsonl"
    lines = rows_of(some_plans(1))
    nan.write_text(json.dumps(lines[0] | {"output_tokens": float("nan")}) + "\n")
    held = [plan for plan in some_plans(60) if held_out(plan.task)]
    back = write(tmp_path / "back.jsonl", rows_of(held))
    out = ("-o", tmp_path / "s")

    assert shell.refuses("train", "-w", empty, *out) == (
        f"{empty}: expected at least one row, found none (check the file)"
    )
    assert "expected columns workflow_id" in shell.refuses("train", "-w", other, *out)
    assert f"{nan}: line 1: expected a JSON object" in shell.refuses("train", "-w", nan, *out)
    assert shell.refuses("train", "-w", back, *out) == (
        "--workload: expected workflows to train on, found none "
        "(add a workload, or --all to hold none back)"
    )
    assert "nowhere: expected a workload file" in shell.refuses("train", "-w", "nowhere", *out)
    assert not taught


def test_too_few_questions_are_refused(
    shell: Shell, taught: list[WorkflowPlan], workload: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow", reason="routing sets are Parquet: needs the extra data")
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    asked = {"question_id": ["a"], "source": ["s"], "question": ["1+1?"]}
    graded = {"question_id": ["a"], "source": ["s"], "model": ["m"], "harness": [""]}
    pq.write_table(pa.table(asked), tmp_path / "routing_questions.parquet")
    pq.write_table(pa.table(graded | {"correct": [1.0]}), tmp_path / "routing_outcomes.parquet")

    line = shell.refuses("train", "-w", workload, "-r", tmp_path, "-o", tmp_path / "s", "--all")

    assert line.startswith("--routing: expected at least 6 questions, found 1")
    assert not taught


# Evaluating.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was trained on what is not held out of the workload."""
    plans = [plan for plan in some_plans(60) if not held_out(plan.task)]
    return a_store(tmp_path_factory.mktemp("trained") / "s", plans)


def test_what_was_held_out_is_measured(
    shell: Shell, trained: Path, workload: Path, routing: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"

    said = shell(
        "evaluate", "-m", trained, "-w", workload, "-r", routing, "--held-out", "--json", out
    )

    assert said.code == 0, said
    report = json.loads(out.read_text())
    held = [plan for plan in some_plans(60) if held_out(plan.task)]
    assert report["workflows"] == len(held) > 0
    assert report["calls"] == sum(len(plan.calls) for plan in held)
    assert report["held_out"] is True
    assert report["store"] == str(trained)
    assert report["names"] == [str(workload), str(routing)]
    assert set(report["output_tokens"]["coverage"]) == {"0.5", "0.9", "0.95", "0.99"}
    assert report["success"]["auc"] is not None
    mean = sum(remaining(plan)[0]["remaining_tokens"] for plan in held) / len(held)
    assert 0 < report["remaining_tokens"]["mae"] < mean
    for told in ("output tokens", "remaining calls", "wrong order", "gap recovered", "sums"):
        assert told in said.out


def test_what_was_trained_on_is_refused(shell: Shell, trained: Path, workload: Path) -> None:
    line = shell.refuses("evaluate", "-m", trained, "-w", workload)

    tasks = len({plan.task for plan in some_plans(60) if not held_out(plan.task)})
    assert line.startswith(f"{trained}: it was trained on {tasks} tasks and ")
    assert 'for example workflow "chat-0-' in line
    assert line.endswith("(measure with --held-out, or on other data)")


def test_a_store_trained_on_everything_has_nothing_held_out(
    shell: Shell, workload: Path, tmp_path: Path
) -> None:
    store = a_store(tmp_path / "s", some_plans(60))

    line = shell.refuses("evaluate", "-m", store, "-w", workload, "--held-out")

    assert line.endswith("(measure on other data, or train it without --all)")


def test_a_workload_without_held_out_groups_is_refused(
    shell: Shell, trained: Path, tmp_path: Path
) -> None:
    kept = [plan for plan in some_plans(60) if not held_out(plan.task)]
    path = write(tmp_path / "kept.jsonl", rows_of(kept))

    line = shell.refuses("evaluate", "-m", trained, "-w", path, "--held-out")

    assert line.startswith("--held-out: expected groups that are held out, found none among ")


def test_other_data_needs_no_split(shell: Shell, trained: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "other.jsonl", rows_of(some_plans(8, seed=5)))

    said = shell("evaluate", "-m", trained, "-w", path)

    assert said.code == 0, said
    assert "8 workflows" in said.out


def test_online_figures_are_told_beside_the_frozen_ones(
    shell: Shell, trained: Path, workload: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"

    said = shell("evaluate", "-m", trained, "-w", workload, "--held-out", "--online", "--json", out)

    report = json.loads(out.read_text())
    assert set(report["online"]["output_tokens"]) > set(report["output_tokens"])
    assert report["online"]["output_tokens"]["first_labels"]["rows"] > 0
    assert "each call is forecast before it is learnt" in said.out


def test_pictures_are_drawn(
    shell: Shell, trained: Path, workload: Path, routing: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra plots")
    folder = tmp_path / "pictures"

    said = shell(
        "evaluate", "-m", trained, "-w", workload, "-r", routing, "--held-out", "--plot", folder
    )

    assert said.code == 0, said
    names = {"coverage.png", "error_by_role.png", "pinball.png", "reliability.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_size > 5000 for path in folder.iterdir())


def test_pictures_cannot_go_into_a_file(shell: Shell, trained: Path, workload: Path) -> None:
    line = shell.refuses("evaluate", "-m", trained, "-w", workload, "--plot", workload)

    assert line == f'--plot: expected a folder, found the file "{workload}"'


def test_a_store_that_cannot_be_read_is_refused(
    shell: Shell, trained: Path, workload: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    (broken / "heads.npz").write_bytes(b"half")

    assert "heads.npz: expected sha256 " in shell.refuses(
        "evaluate", "-m", broken, "-w", workload, "--held-out"
    )
    assert shell.refuses("evaluate", "-m", "nowhere", "-w", workload) == (
        "nowhere: expected the folder of a store, found nothing there "
        "(concertmaster train writes one)"
    )


def test_something_to_measure_on_must_be_named(shell: Shell, trained: Path) -> None:
    assert shell.refuses("evaluate", "-m", trained) == (
        "--workload: expected a workload or a routing set, found neither "
        "(for example -w sample, or -r FOLDER)"
    )


# Both, for real.


def test_training_and_measuring_fit_together(
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    workload: Path,
    routing: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("lightgbm", reason="training needs the extra train")
    pytest.importorskip("scipy", reason="training needs the extra train")
    for module in (fit_heads, trainer):
        monkeypatch.setattr(module, "ROUNDS", 3, raising=False)
        monkeypatch.setattr(module, "TOOL_CALL_ROUNDS", 2, raising=False)
    store = tmp_path / "s"

    said = shell("train", "-w", workload, "-r", routing, "-o", store)
    assert said.code == 0, said

    said = shell("evaluate", "-m", store, "-w", workload, "-r", routing, "--held-out")
    assert said.code == 0, said
    assert load_predictor(store).evidence.laws["output_tokens"] is not None
