"""Each reader on a tiny file of the kind it reads."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.workload import columns, routing, servegen, traces
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import ModelOutcome, WorkflowPlan, Workload
from concertmaster.workload.staged import CUT_MARK

Row = dict[str, object]
POISSON = ArrivalSpec(kind="poisson")


def parquet(path: Path, rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    pq.write_table(pa.table(columns), str(path))
    return str(path)


def lines(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def call(workflow_id: str, stage: int, **columns: object) -> Row:
    return {
        "workflow_id": workflow_id,
        "stage_index": stage,
        "parents": [stage - 1] if stage else [],
        "prompt_tokens": 1000,
        "output_tokens": 50,
    } | columns


def load(spec: str, **options: float) -> Workload:
    return load_workloads([spec], seed=1, rate_rps=options.get("rate_rps"))


def untimed(spec: str) -> dict[str, WorkflowPlan]:
    workload = load_workloads([spec], seed=1, arrivals=POISSON, rate_rps=1.0)
    return {plan.workflow_id: plan for plan in workload}


def request(source: str, t_s: float, **columns: object) -> Row:
    return {"source": source, "t_s": t_s, "input_tokens": 1100, "output_tokens": 9} | columns


def test_each_request_of_a_trace_is_a_workflow_named_after_its_position(tmp_path: Path) -> None:
    rows = [request("a", 0.0), request("b", 1.0), request("a", 2.5, model="m")]
    workload = load(parquet(tmp_path / "r.parquet", rows) + "#a")
    assert [plan.workflow_id for plan in workload] == ["a:000000", "a:000001"]
    assert [plan.arrival_s for plan in workload] == [0.0, 2.5]
    assert [plan.calls[0].model for plan in workload] == [None, "m"]
    assert (workload.requests, workload.prompt_tokens, workload.output_tokens) == (2, 2200, 18)


def test_a_model_that_is_not_disclosed_is_unknown(tmp_path: Path) -> None:
    rows = [request("a", 0.0, model="azure-openai (undisclosed)")]
    assert load(parquet(tmp_path / "r.parquet", rows)).workflows[0].calls[0].model is None


def test_a_trace_without_sources_is_named_after_its_file(tmp_path: Path) -> None:
    rows: list[Row] = [{"t_s": 3.0, "input_tokens": 5, "output_tokens": 6}]
    workload = load(lines(tmp_path / "monday.jsonl", rows))
    assert workload.workflows[0].workflow_id == "monday:000000"
    assert workload.apps == ("monday",)


def test_blocks_of_512_tokens_become_two_hashes_and_only_whole_chunks_count(
    tmp_path: Path,
) -> None:
    rows = [
        request("a", 0.0, block_ids=[1, 2, 3]),
        request("a", 1.0, block_ids=[1, 2, 4], input_tokens=1536),
        request("b", 1.0, block_ids=[1]),
    ]
    workload = load(parquet(tmp_path / "r.parquet", rows))
    hashes = {str(plan.workflow_id): plan.calls[0].prefix_hashes for plan in workload}
    first, second = hashes["a:000000"], hashes["a:000001"]
    assert (len(first), len(second)) == (1100 // 256, 1536 // 256)
    assert first == second[:4]
    assert hashes["b:000000"][0] != first[0]


def test_classes_and_deadlines_are_read_where_they_are_recorded(tmp_path: Path) -> None:
    rows = [request("a", 0.0), request("a", 1.0, service_class="batch", deadline_s=30)]
    first, second = load(lines(tmp_path / "r.jsonl", rows))
    assert (first.service_class, first.deadline_s) == (ServiceClass.INTERACTIVE, None)
    assert (second.service_class, second.deadline_s) == (ServiceClass.BATCH, 30.0)


def test_calls_come_in_an_order_in_which_parents_are_first(tmp_path: Path) -> None:
    rows = [
        call("w", 2, parents=[0, 1]),
        call("w", 1, parents=[3]),
        call("w", 0, parents=[]),
        call("w", 3, parents=[]),
    ]
    plan = untimed(parquet(tmp_path / "w.parquet", rows))["w"]
    assert [one.stage for one in plan.calls] == [0, 3, 1, 2]


def test_zero_tokens_are_read_as_one_and_the_notes_say_so(tmp_path: Path) -> None:
    spec = lines(tmp_path / "w.jsonl", [call("w", 0, prompt_tokens=0, arrival_s=0)])
    workload = load(spec)
    assert workload.prompt_tokens == 1
    assert workload.notes == (f"{spec}: prompt_tokens 0 read as 1: 1 times, first in line 1",)


def test_the_cap_is_the_recorded_one_or_says_little_about_the_length(tmp_path: Path) -> None:
    tokens = [(50, None), (5000, None), (50, 128)]
    rows = [
        call("w", stage, output_tokens=output, max_output_tokens=cap)
        for stage, (output, cap) in enumerate(tokens)
    ]
    plan = untimed(lines(tmp_path / "w.jsonl", rows))["w"]
    assert [one.max_output_tokens for one in plan.calls] == [4096, 8192, 128]


def test_think_time_is_tool_time(tmp_path: Path) -> None:
    rows = [call("w", 0, think_s=0.0), call("w", 1, think_s=12.5)]
    plan = untimed(parquet(tmp_path / "w.parquet", rows))["w"]
    assert [one.tool_s for one in plan.calls] == [0.0, 12.5]


def test_tool_time_is_what_start_and_wall_times_leave(tmp_path: Path) -> None:
    rows = [
        call("w", 0, t_start_s=0.0, wall_s=2.0),
        call("w", 1, t_start_s=5.0, wall_s=None),
        call("w", 2, t_start_s=9.0, wall_s=1.0),
        call("w", 3, t_start_s=9.5, wall_s=1.0),
    ]
    plan = untimed(parquet(tmp_path / "w.parquet", rows))["w"]
    assert [one.tool_s for one in plan.calls] == [0.0, 3.0, 0.0, 0.0]


def test_a_parent_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    rows = [call("w", 0), call("w", 1, parents=[0, 0])]
    plan = untimed(lines(tmp_path / "w.jsonl", rows))["w"]
    assert plan.calls[1].parents == (0,)


def test_prefix_hits_make_the_leading_hashes_those_of_the_last_call_of_the_role(
    tmp_path: Path,
) -> None:
    hits = [("main", 0), ("sub", 0), ("main", 640), ("sub", 512)]
    rows = [
        call("w", stage, role=role, prefix_hit_tokens=hit) for stage, (role, hit) in enumerate(hits)
    ]
    plan = untimed(parquet(tmp_path / "w.parquet", rows))["w"]
    main, sub, main_again, sub_again = (one.prefix_hashes for one in plan.calls)
    assert len(main) == 3
    assert (main_again[:2], sub_again[:2]) == (main[:2], sub[:2])
    assert len({main[0], sub[0]}) == 2
    assert main_again[2] != main[2]


def test_a_hit_longer_than_the_roles_last_prompt_is_on_an_earlier_call(tmp_path: Path) -> None:
    rows = [
        call("w", 0, role="main", prefix_hit_tokens=0, prompt_tokens=1024),
        call("w", 1, role="main", prefix_hit_tokens=0, prompt_tokens=512),
        call("w", 2, role="main", prefix_hit_tokens=768),
    ]
    plan = untimed(parquet(tmp_path / "w.parquet", rows))["w"]
    assert plan.calls[2].prefix_hashes[:3] == plan.calls[0].prefix_hashes[:3]


TEXT = "Look for the parser in the tree. " * 20


@pytest.mark.parametrize(
    ("texts", "sources", "shared_chunks"),
    [
        ((TEXT, TEXT + "more"), ("", ""), 3),
        ((TEXT + "one", "Another start. " + TEXT), ("", ""), 0),
        ((TEXT + "one way", TEXT + "two ways"), ("", ""), 3),
        (("Hello", "Bye"), ("cl100k_ctx", "cl100k_ctx"), 3),
        ((TEXT + CUT_MARK + "end", TEXT + CUT_MARK + "stop"), ("", ""), 3),
        (("", ""), ("", ""), 0),
    ],
    ids=["grows", "parts at once", "parts late", "whole context", "cut", "no text"],
)
def test_prompts_of_one_role_share_what_their_texts_share(
    tmp_path: Path, texts: tuple[str, str], sources: tuple[str, str], shared_chunks: int
) -> None:
    rows = [
        call("w", stage, role="a", prompt_text=text, token_source=sources[stage])
        for stage, text in enumerate(texts)
    ]
    first, second = untimed(parquet(tmp_path / "w.parquet", rows))["w"].calls
    pairs = zip(first.prefix_hashes, second.prefix_hashes, strict=True)
    assert sum(one == other for one, other in pairs) == shared_chunks


def test_what_predictors_may_see_is_read(tmp_path: Path) -> None:
    rows = [
        call("w", 0, input_kinds="text", output_kinds="text+tool_use", prompt_chars=9000),
        call("w", 1, input_kinds="text+tool_result+tool_use", output_kinds="text"),
        call("w", 2, input_kinds="", output_kinds="", stop="tool_use"),
        call("w", 3, output_kinds="thinking", stop="tool_use"),
        call("w", 4, stop="end_turn"),
        call("w", 5, stop=""),
    ]
    named = [row | {"harness": "react", "stage_name": f"step {i}"} for i, row in enumerate(rows)]

    plan = untimed(lines(tmp_path / "w.jsonl", named))["w"]

    assert (plan.template, plan.calls[2].step) == ("react", "step 2")
    assert [one.prompt_chars for one in plan.calls] == [9000, 0, 0, 0, 0, 0]
    assert [one.after_tool for one in plan.calls] == [False, True, None, None, None, None]
    assert [one.tool_call for one in plan.calls] == [True, False, True, True, False, None]


def test_a_workflow_has_one_harness(tmp_path: Path) -> None:
    rows = [call("w", 0, harness="react"), call("w", 1, harness="plan")]

    with pytest.raises(InputError, match=r"harness: expected react as in line 1"):
        untimed(lines(tmp_path / "w.jsonl", rows))


def test_outcomes_are_read_a_model(tmp_path: Path) -> None:
    outcomes = {"small": {"correct": 0, "output_tokens": 70}}
    rows = [call("w", 0, outcomes=outcomes, success=0.5, arrival_s=4.0), call("v", 0, arrival_s=9)]
    plan = load(lines(tmp_path / "w.jsonl", rows)).workflows[0]
    small = ModelName("small")
    assert plan.calls[0].outcomes == {small: ModelOutcome(correct=0.0, output_tokens=70)}
    assert plan.calls[0].output_tokens_by(small) == 70
    assert plan.calls[0].output_tokens_by(ModelName("other")) == 50
    assert (plan.deciding_call, plan.success) == (plan.calls[0], 0.5)


def test_the_models_that_may_answer_are_read(tmp_path: Path) -> None:
    asked: list[object] = [["big", "small", "big"], ["big"], [], None]
    rows = [call("w", at, arrival_s=0, models=names) for at, names in enumerate(asked)]
    workload = load(lines(tmp_path / "w.jsonl", rows))

    calls = workload.workflows[0].calls
    assert [one.models for one in calls] == [("big", "small"), ("big",), (), ()]
    assert workload.models_asked == (("big", "small"), ("big",))


def test_each_part_starts_at_zero(tmp_path: Path) -> None:
    rows = [call("w", 0, arrival_s=1.7e9), call("v", 0, arrival_s=1.7e9 + 5)]
    assert [plan.arrival_s for plan in load(lines(tmp_path / "w.jsonl", rows))] == [0.0, 5.0]


def test_a_name_selects_one_app(tmp_path: Path) -> None:
    rows = [call("w", 0, app="a", arrival_s=0), call("v", 0, app="b", arrival_s=1)]
    workload = load(lines(tmp_path / "w.jsonl", rows) + "#b")
    assert (workload.name, workload.apps, len(workload)) == ("w.jsonl#b", ("b",), 1)


def test_zstd_is_read_in_either_format(tmp_path: Path) -> None:
    rows = [call("w", 0, arrival_s=0.0, app="x")]
    for name, write in (("w.jsonl", lines), ("w.parquet", parquet)):
        plain = Path(write(tmp_path / name, rows))
        packed = tmp_path / f"{name}.zst"
        packed.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
        assert load(str(packed)).workflows == load(str(plain)).workflows


def test_zstd_may_have_several_frames(tmp_path: Path) -> None:
    rows = [json.dumps(call("w", stage, arrival_s=0)).encode() + b"\n" for stage in range(2)]
    packed = tmp_path / "w.jsonl.zst"
    packed.write_bytes(b"".join(zstandard.ZstdCompressor().compress(row) for row in rows))
    assert load(str(packed)).requests == 2


def test_json_lines_are_known_by_their_first_byte(tmp_path: Path) -> None:
    assert load(lines(tmp_path / "noname", [call("w", 0, arrival_s=0)])).requests == 1


def test_columns_that_no_reader_knows_are_noted(tmp_path: Path) -> None:
    spec = lines(tmp_path / "w.jsonl", [call("w", 0, arrival_s=0, tool_z=1)])
    assert load(spec).notes == (f"{spec}: columns not used: tool_z",)


def test_a_half_written_trace_replays_up_to_the_break_and_says_so(tmp_path: Path) -> None:
    spec = lines(tmp_path / "w.jsonl", [call("w", 0, arrival_s=0), call("w", 1, arrival_s=0)])
    with Path(spec).open("a") as file:
        file.write('{"workflow_id": "w", "stage_in')
    workload = load(spec)
    assert workload.requests == 2
    assert workload.notes == (
        f"{spec}: broken off: line 3 is half a line; the 2 rows before it are used",
        f'{spec}: workflow "w" stands before the break: calls may be missing',
    )


def test_half_a_zstd_file_replays_up_to_the_break(tmp_path: Path) -> None:
    rows = [call(f"w{count}", 0, arrival_s=count, role=f"{count:x}" * 9) for count in range(5000)]
    plain = Path(lines(tmp_path / "w.jsonl", rows)).read_bytes()
    packed = tmp_path / "w.jsonl.zst"
    whole = zstandard.ZstdCompressor().compress(plain)
    packed.write_bytes(whole[: len(whole) // 2])
    workload = load(str(packed))
    assert 0 < workload.requests < 5000
    assert "broken off" in workload.notes[0]


def test_a_workflow_that_the_break_left_without_its_parents_is_left_out(tmp_path: Path) -> None:
    spec = lines(tmp_path / "w.jsonl", [call("v", 0, arrival_s=0), call("w", 1, arrival_s=0)])
    with Path(spec).open("a") as file:
        file.write('{"workflow')
    workload = load(spec)
    assert [plan.workflow_id for plan in workload] == ["v"]
    assert any("left out" in note for note in workload.notes)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        call("w", 0, arrival_s=0, app="x", role="r", prefix_hit_tokens=0, model="m"),
        call("w", 1, arrival_s=0, app="x", role="r", prefix_hit_tokens=600, tool_s=1.25),
        call("v", 0, arrival_s=2, service_class="batch", deadline_s=9, max_output_tokens=64),
        call("v", 7, parents=[0], arrival_s=2, service_class="batch", deadline_s=9, success=1)
        | {
            "outcomes": {"m": {"correct": 0.25, "output_tokens": 3}},
            "prompt_text": "é",
            "prompt_chars": 900,
        },
        call("v", 8, parents=[0], arrival_s=2, service_class="batch", deadline_s=9, success=1)
        | {"stage_name": "vote", "input_kinds": "text", "output_kinds": "tool_use"}
        | {"models": ["m", "n"]},
    ]
    first = load(
        lines(tmp_path / "in.jsonl", [row | {"success": 1, "harness": "h"} for row in rows])
    )
    for name in ("out.jsonl", "out.jsonl.zst"):
        write_jsonl(first, tmp_path / name)
        assert load(str(tmp_path / name)).workflows == first.workflows


SERVEGEN: Row = {"workload": "w", "client_id": 1}


def servegen_files(folder: Path, windows: Sequence[tuple[int, float, float]]) -> str:
    levels = ("q01", "q05", "q10", "q25", "q50", "q75", "q90", "q95", "q99", "qmax")
    fields = {"output_tokens": 5, "input_tokens": 100}
    parquet(
        folder / "servegen_lengths.parquet",
        [
            SERVEGEN
            | {"window_start_s": 0, "field": name}
            | {level: least + at for at, level in enumerate(levels)}
            for name, least in fields.items()
        ],
    )
    rows = [
        SERVEGEN | {"window_start_s": start_s, "rate_rps": rate_rps, "cv": cv}
        for start_s, rate_rps, cv in windows
    ]
    return parquet(folder / "servegen_arrivals.parquet", rows)


def test_servegen_windows_give_arrivals_at_their_rate(tmp_path: Path) -> None:
    spec = servegen_files(tmp_path, [(0, 2.0, 1.0), (600, 8.0, 3.0), (1200, 99.0, 1.0)])
    workload = load(f"{spec}#w@0+1200")
    early = sum(plan.arrival_s < 600 for plan in workload)
    assert early == pytest.approx(1200, rel=0.1)
    assert len(workload) - early == pytest.approx(4800, rel=0.2)
    tokens = [plan.calls[0] for plan in workload]
    assert {one.prompt_tokens for one in tokens} == set(range(100, 110))
    assert fmean(one.output_tokens for one in tokens) == pytest.approx(9, abs=0.5)


def test_servegen_rates_take_a_factor_or_are_cut_to_a_size_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servegen, "MOST_REQUESTS", 2000)
    spec = servegen_files(tmp_path, [(36000, 40.0, 1.0)])
    assert len(load(f"{spec}#w*0.25")) == pytest.approx(6000, rel=0.1)
    workload = load(spec)
    assert len(workload) == pytest.approx(2000, rel=0.1)
    assert workload.notes == (
        f"{spec}: rates times 0.0833, for 2,000 of 24,000 requests (write #WORKLOAD*1 for all)",
    )


def test_clients_without_lengths_borrow_those_of_the_others(tmp_path: Path) -> None:
    spec = servegen_files(tmp_path, [(36000, 1.0, 1.0)])
    rows = [SERVEGEN | {"window_start_s": 36000, "rate_rps": 1.0, "cv": 1.0, "client_id": 2}]
    for clients, ratio in (([], "100%"), ([rows[0] | {"client_id": 1}], "50%")):
        workload = load(parquet(Path(spec), rows + clients))
        assert {plan.calls[0].prompt_tokens for plan in workload} <= set(range(100, 110))
        assert workload.notes == (
            (
                f"w: {ratio} of the rate is of clients without lengths: "
                "they borrow those of the others, drawn by rate"
            ),
        )


def test_an_image_prompt_is_its_text_and_each_image(tmp_path: Path) -> None:
    levels = ("q01", "q05", "q10", "q25", "q50", "q75", "q90", "q95", "q99", "qmax")
    fields = {"text_tokens": 50, "image_tokens": 200, "image_count": 3, "output_tokens": 7}
    servegen_files(tmp_path, [(36000, 0.1, 1.0)])
    parquet(
        tmp_path / "servegen_lengths.parquet",
        [
            SERVEGEN | {"window_start_s": 0, "field": name} | dict.fromkeys(levels, value)
            for name, value in fields.items()
        ],
    )
    workload = load(str(tmp_path / "servegen_arrivals.parquet"))
    assert {plan.calls[0].prompt_tokens for plan in workload} == {650}


def test_a_rate_scales_a_recorded_trace(tmp_path: Path) -> None:
    spec = lines(tmp_path / "r.jsonl", [request("a", float(at)) for at in range(11)])
    workload = load(spec, rate_rps=4.0)
    assert math.isclose(workload.rate_rps or 0.0, 4.0)
    assert workload.workflows[3].arrival_s == pytest.approx(0.75)


DOCS = Path(__file__).parents[1] / "docs" / "workloads.md"
ALL_COLUMNS = {*columns.COLUMNS, *traces.COLUMNS, *servegen.COLUMNS}


@pytest.mark.parametrize("column", sorted(ALL_COLUMNS | set(routing.OUTCOME_COLUMNS)))
def test_every_column_that_is_read_is_documented(column: str) -> None:
    assert f"| `{column}` |" in DOCS.read_text()


def test_the_documented_example_loads(tmp_path: Path) -> None:
    example = DOCS.read_text().partition("```json\n")[2].partition("```")[0]
    (tmp_path / "w.jsonl").write_text(example)
    planner, coder = load(str(tmp_path / "w.jsonl")).workflows[0].calls
    assert (planner.role, coder.role, coder.tool_s) == ("planner", "coder", 2.5)
