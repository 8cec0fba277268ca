"""A workload with anything wrong: one line with where, expected, found, remedy."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from concertmaster.core.errors import InputError
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.load import load_workloads

Row = dict[str, object]


def call(**columns: object) -> Row:
    return {
        "workflow_id": "w",
        "stage_index": 0,
        "parents": [],
        "prompt_tokens": 10,
        "output_tokens": 5,
        "arrival_s": 0.0,
    } | columns


def lines(folder: Path, rows: Sequence[object], name: str = "w.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def complaint(spec: str, folder: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_workloads([spec], seed=1, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "")


OUTCOME = "line 1, outcomes.m"
MEND = "(mend or remove this line)"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [call(), call(stage_index=1, prompt_tokens=-4)],
            f"line 2, prompt_tokens: expected a whole number >= 0, found -4 {MEND}",
        ),
        (
            [call(output_tokens="9")],
            f'line 1, output_tokens: expected a whole number >= 0, found "9" {MEND}',
        ),
        (
            [call(output_tokens=None)],
            f"line 1, output_tokens: expected a whole number >= 0, found nothing {MEND}",
        ),
        (
            [call(tool_s=-1)],
            f"line 1, tool_s: expected a number >= 0 or nothing, found -1 {MEND}",
        ),
        (
            [call(success=2)],
            f"line 1, success: expected a number in 0…1 or nothing, found 2 {MEND}",
        ),
        (
            [call(max_output_tokens=0)],
            f"line 1, max_output_tokens: expected a whole number >= 1 or nothing, found 0 {MEND}",
        ),
        ([call(role=3)], f"line 1, role: expected a text, found 3 {MEND}"),
        (
            [call(workflow_id="")],
            f'line 1, workflow_id: expected a text that is not empty, found "" {MEND}',
        ),
        (
            [call(parents=None)],
            "line 1, parents: expected a list of stages, found nothing ([] if it waits for none)",
        ),
        (
            [call(parents="0")],
            f'line 1, parents: expected a list of whole numbers, found "0" {MEND}',
        ),
        (
            [call(parents=[0.5])],
            f"line 1, parents: expected a list of whole numbers, found [0.5] {MEND}",
        ),
        (
            [call(service_class="slow")],
            f'line 1, service_class: expected interactive or batch, found "slow" {MEND}',
        ),
        (
            [call(), call(stage_index=1, arrival_s=2.0)],
            "line 2, arrival_s: expected 0.0 as in line 1 of the same workflow, found 2.0 " + MEND,
        ),
        (
            [call(), call(workflow_id="v", arrival_s=None)],
            "line 2, arrival_s: expected an arrival in every row or in none, found nothing " + MEND,
        ),
        (
            [call(), call()],
            (
                'line 2, workflow "w": expected each stage once, found stage 0 twice '
                "(number its stages 0, 1, 2, …)"
            ),
        ),
        (
            [call(), call(stage_index=1, parents=[0, 9])],
            (
                'line 2, workflow "w": expected stage 1 to wait for stages of its workflow (0, 1), '
                "found 9 (mend parents, or add that stage)"
            ),
        ),
        (
            [call(), call(stage_index=1, parents=[2]), call(stage_index=2, parents=[0, 1])],
            (
                'line 2, workflow "w": expected parents without a cycle, found 1 waits for 2 waits '
                "for 1 (remove one of these dependencies)"
            ),
        ),
        (
            [call(prefix_from=3, prefix_keep=1, prefix_hashes=[])],
            "line 1, prefix_keep: expected at most the 0 hashes of stage 3 before it, found 1 "
            + MEND,
        ),
        (
            [call(outcomes={"m": {"correct": 2, "output_tokens": 1}})],
            f"{OUTCOME}.correct: expected a number in 0…1, found 2 {MEND}",
        ),
        (
            [call(outcomes={"m": {"correct": 1}})],
            f"{OUTCOME}.output_tokens: expected a whole number >= 1, found nothing {MEND}",
        ),
        (
            [call(models="big")],
            f'line 1, models: expected a list of names or nothing, found "big" {MEND}',
        ),
        (
            [call(models=["big", ""])],
            f"line 1, models: expected a list of names or nothing, found ['big', ''] {MEND}",
        ),
        (
            [call(outcomes=[1])],
            "line 1, outcomes: expected an object {model: {correct, output_tokens}}, found [1] "
            + MEND,
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, rows: Sequence[Row], text: str
) -> None:
    assert complaint(lines(tmp_path, rows), tmp_path) == f"w.jsonl: {text}"


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    text = complaint(lines(tmp_path, [call(), 7, call(workflow_id="v")]), tmp_path)
    assert text.startswith("w.jsonl: line 2: expected a JSON object, found: ")
    assert text.endswith(MEND)


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    rows = [{"workflow_id": "w", "stage_index": 0, "parents": []}]
    assert complaint(lines(tmp_path, rows), tmp_path) == (
        "w.jsonl: columns: expected columns prompt_tokens, output_tokens in a workflow file, "
        "found parents, stage_index, workflow_id (add or rename them: see docs/workloads.md)"
    )


def test_a_file_of_no_known_kind_says_what_is_expected(tmp_path: Path) -> None:
    assert complaint(lines(tmp_path, [{"x": 1}]), tmp_path) == (
        "w.jsonl: columns: expected columns workflow_id, stage_index, parents, prompt_tokens, "
        "output_tokens (workflows), found none that is known "
        "(see docs/workloads.md for every format)"
    )


def test_totals_of_workflows_are_no_workload(tmp_path: Path) -> None:
    assert complaint(lines(tmp_path, [{"workflow_id": "w", "n_calls": 3}]), tmp_path) == (
        "w.jsonl: columns: expected one row a call, found totals of whole workflows "
        "(its calls are not in it: take workflow_stages.parquet)"
    )


def test_an_unknown_name_comes_with_the_nearest_known_one(tmp_path: Path) -> None:
    spec = lines(tmp_path, [call(app="coding"), call(workflow_id="v", app="data")])
    assert complaint(f"{spec}#codin", tmp_path) == (
        'w.jsonl: #codin: unknown app "codin" (did you mean "coding"? known: coding, data)'
    )


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    lines(tmp_path, [call()], "other.jsonl")
    assert complaint(str(tmp_path / "w.jsonl"), tmp_path) == (
        "w.jsonl: expected a workload file, found nothing there (in that folder: other.jsonl)"
    )
    assert complaint(str(tmp_path / "nowhere" / "w.jsonl"), tmp_path) == (
        "nowhere/w.jsonl: expected a workload file, found nothing there (check the path)"
    )


def test_a_folder_without_a_routing_set_is_no_workload(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    assert "d: expected a workload file, found a folder" in complaint(f"{tmp_path}/d", tmp_path)


def test_a_file_of_another_format_is_named_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("a,b\n")
    assert complaint(str(tmp_path / "w.csv"), tmp_path) == (
        "w.csv: expected Parquet or JSON Lines (.zst allowed), found bytes b'a,b\\n' "
        "(name it .parquet, .jsonl or .jsonl.zst)"
    )


def test_an_empty_file_is_no_workload(tmp_path: Path) -> None:
    text = "w.jsonl: expected at least one row, found none (check the file)"
    assert complaint(lines(tmp_path, []), tmp_path) == text


def test_half_a_parquet_file_cannot_be_replayed(tmp_path: Path) -> None:
    for name in ("w.parquet", "w.parquet.zst"):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd PAR1 half")
        text = complaint(str(tmp_path / name), tmp_path)
        assert text.startswith(f"{name}: expected a whole Parquet file, found: ")
        assert text.endswith(
            "(Parquet cannot be read up to a break: write the file again, or as .jsonl)"
        )


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("w.parquet", "pyarrow.parquet", "pyarrow"), ("w.jsonl.zst", "zstandard", "zstandard")],
)
def test_a_missing_package_comes_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"PAR1")
    assert complaint(str(tmp_path / name), tmp_path) == (
        f"{name}: expected the package {package} to read this file, found it not installed "
        '(pip install "concertmaster[data]")'
    )


def test_no_workload_at_all_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        load_workloads([], seed=1)
    assert str(caught.value) == (
        "--workload: expected at least one workload, found none (for example -w sample)"
    )


POISSON = ArrivalSpec(kind="poisson")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected recorded arrivals, found none (add --arrivals poisson --rate 2)"),
        (
            {"arrivals": POISSON},
            "expected recorded arrivals, found none (add a rate, for example --rate 2)",
        ),
    ],
)
def test_a_trace_without_arrivals_needs_a_law_and_a_rate(
    tmp_path: Path, options: dict[str, object], text: str
) -> None:
    spec = lines(tmp_path, [call(arrival_s=None)])
    assert complaint(spec, tmp_path, **options) == f"w.jsonl: arrivals: {text}"


def test_one_instant_cannot_be_scaled_to_a_rate(tmp_path: Path) -> None:
    spec = lines(tmp_path, [call(), call(workflow_id="v")])
    assert complaint(spec, tmp_path, rate_rps=2.0) == (
        "w.jsonl: arrivals: expected arrivals that differ, to scale them to a rate, found one "
        "instant (add --arrivals poisson)"
    )
    assert "add a rate" in complaint(spec, tmp_path, arrivals=POISSON)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate_rps": 0.0}, "--rate: expected a number > 0, found 0 (for example --rate 2.5)"),
        (
            {"rate_scale": -1.0},
            "--rate-scale: expected a number > 0, found -1 (for example --rate-scale 2.5)",
        ),
        (
            {"limit": 0},
            "--limit: expected a whole number >= 1, found 0 (leave it out for all workflows)",
        ),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, object], text: str) -> None:
    assert complaint("sample", tmp_path, **options) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gama:2",
            (
                '--arrivals: unknown kind of arrivals "gama" (did you mean "gamma"? '
                "known: burst, gamma, poisson, step, trace)"
            ),
        ),
        (
            "gamma:many",
            '--arrivals: expected a number after "gamma:", found "many" (for example gamma:3)',
        ),
        (
            "poisson:2",
            (
                '--arrivals: expected "poisson" without a burstiness, found "poisson:2" '
                "(write gamma:2)"
            ),
        ),
        (
            "burst:5:30",
            (
                "--arrivals: expected burst:FACTOR:ON_S:OFF_S with numbers > 0, "
                'found "burst:5:30" (for example burst:5:30:270)'
            ),
        ),
        (
            "step:0:60",
            (
                "--arrivals: expected step:FACTOR:AT_S with numbers > 0, "
                'found "step:0:60" (for example step:2:600)'
            ),
        ),
        (
            "gamma:-1",
            (
                "--arrivals: cv: expected a burstiness of 0 to 100, found -1 "
                "(1 is Poisson, 3 is bursty)"
            ),
        ),
    ],
)
def test_wrong_arrivals_are_named(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ArrivalSpec.parse(text)
    assert str(caught.value) == message


ARRIVAL = {"workload": "w", "client_id": 1, "window_start_s": 0, "rate_rps": 1.0, "cv": 1.0}


def test_a_wrong_slice_of_servegen_shows_the_right_form(tmp_path: Path) -> None:
    spec = lines(tmp_path, [ARRIVAL])
    for text in ("w@later", "w*0"):
        assert complaint(f"{spec}#{text}", tmp_path) == (
            f'w.jsonl: #: expected WORKLOAD@START_S+DURATION_S*FACTOR, found "{text}" '
            "(for example #language/m-large@36000+3600*0.1)"
        )
    assert complaint(f"{spec}#w@600+600", tmp_path) == (
        "w.jsonl: #w@600+600: expected windows in 600…1200 s, found none "
        "(windows are 600 s long from 0)"
    )


def test_servegen_arrivals_need_their_lengths(tmp_path: Path) -> None:
    text = complaint(lines(tmp_path, [ARRIVAL]) + "#w@0+600", tmp_path)
    assert text.startswith("servegen_lengths.parquet: expected a workload file, found nothing")
