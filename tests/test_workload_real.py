"""Each reader on the public data it was written for, where that is at hand."""

from functools import cache
from pathlib import Path
from statistics import fmean, median

import pytest

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Workload

FOLDER = Path(__file__).parents[1].parent / "shared" / "data" / "public"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"the public data is not in {FOLDER}: see docs/workloads.md"
)


@cache
def load(name: str) -> Workload:
    return load_workloads([f"{FOLDER}/{name}"], seed=1)


@cache
def load_drawn(name: str) -> Workload:
    spec = f"{FOLDER}/{name}" if name[0] != "#" else f"{FOLDER}{name}"
    return load_workloads([spec], seed=1, arrivals=ArrivalSpec(kind="poisson"), rate_rps=2.0)


def app_of_staged(app: str) -> Workload:
    plans = [plan for plan in load_drawn("workflow_stages.parquet") if plan.app == app]
    return Workload(name=app, workflows=tuple(plans))


def shared_ratio(workload: Workload) -> float:
    hashes = [one for plan in workload for call in plan.calls for one in call.prefix_hashes]
    return (len(hashes) - len(set(hashes))) * PREFIX_CHUNK_TOKENS / workload.prompt_tokens


@pytest.mark.parametrize(
    ("source", "requests", "duration_s", "prompt_tokens"),
    [
        ("azure2023_conv", 16_495, 2801, 1014),
        ("mooncake_conversation", 9_408, 2829, 7098),
        ("mooncake_synthetic", 3_993, 1022, 11_587),
    ],
)
def test_request_traces_are_read_whole(
    source: str, requests: int, duration_s: float, prompt_tokens: int
) -> None:
    workload = load(f"requests.parquet#{source}")
    assert (workload.requests, len(workload)) == (requests, requests)
    assert workload.duration_s == pytest.approx(duration_s, abs=1)
    prompts = [call.prompt_tokens for plan in workload for call in plan.calls]
    assert median(prompts) == pytest.approx(prompt_tokens, rel=0.02)
    assert not workload.notes


@pytest.mark.parametrize(
    ("source", "ratio"), [("mooncake_conversation", 0.362), ("mooncake_synthetic", 0.651)]
)
def test_blocks_give_the_published_hit_ratio(source: str, ratio: float) -> None:
    assert shared_ratio(load(f"requests.parquet#{source}")) == pytest.approx(ratio, abs=0.01)


def test_sampled_servegen_hours_are_read() -> None:
    workload = load("requests_servegen_sampled.parquet#servegen_sampled:language/m-small")
    assert workload.requests == 13_637


def test_servegen_tables_give_lengths_like_the_sampled_hours() -> None:
    workload = load("servegen_arrivals.parquet#language/m-large@36000+1200*0.02")
    outputs = [call.output_tokens for plan in workload for call in plan.calls]
    prompts = [call.prompt_tokens for plan in workload for call in plan.calls]
    assert workload.rate_rps == pytest.approx(296 * 0.02, rel=0.15)
    assert 20 < median(outputs) < 180
    assert 240 < median(prompts) < 2100
    assert workload.notes == (
        (
            "language/m-large: 85% of the rate is of clients without lengths: "
            "they borrow those of the others, drawn by rate"
        ),
    )


def test_every_app_of_the_staged_workflows_is_read() -> None:
    workload = load_drawn("workflow_stages.parquet")
    assert (len(workload), workload.requests) == (14_849, 87_871)
    assert len(workload.apps) == 11
    assert [note.split(": ", 1)[1] for note in workload.notes] == [
        "prompt_tokens 0 read as 1: 6 times, first in row 84927",
        "output_tokens 0 read as 1: 148 times, first in row 317",
    ]
    assert all(call.prompt_text for plan in workload.workflows[:50] for call in plan.calls)


def test_a_tree_of_thought_joins_five_proposals() -> None:
    plan = app_of_staged("tot_writing").workflows[0]
    assert [len(call.parents) for call in plan.calls].count(5) >= 5
    assert len(plan.calls) == 20


def test_chats_with_their_whole_context_share_their_prefixes() -> None:
    assert shared_ratio(app_of_staged("taubench_airline")) > 0.6


def test_coding_sessions_keep_their_pauses_and_prefix_hits() -> None:
    workload = load_drawn("workflow_stages_codingagent.parquet")
    assert (len(workload), workload.requests) == (536, 36_084)
    assert shared_ratio(workload) == pytest.approx(0.963, abs=0.005)
    pauses_s = [call.tool_s for plan in workload for call in plan.calls]
    assert median(pauses_s) == pytest.approx(10, abs=2)


@pytest.mark.parametrize(
    ("spec", "workflows", "calls"),
    [
        ("#zeroeval_math_l5:planner-solver-verifier-solver", 562, 4),
        ("#mapcoder_humaneval:planner-coder-tester-coder", 140, 4),
        ("#intercode_sql:planner-agent", 824, 2),
        ("#routellm_mmlu", 11_044, 1),
    ],
)
def test_routing_sets_become_chains(spec: str, workflows: int, calls: int) -> None:
    workload = load_drawn(spec)
    assert (len(workload), workload.requests) == (workflows, workflows * calls)


def test_outcomes_agree_with_the_published_accuracies() -> None:
    workload = load_drawn("#zeroeval_math_l5:planner-solver-verifier-solver")
    last = [plan.calls[-1].outcomes for plan in workload]
    for name, accuracy in (("qwen2.5-7b-instruct", 0.512), ("qwen2.5-32b-instruct", 0.578)):
        found = fmean(entry[ModelName(name)].correct for entry in last)
        assert found == pytest.approx(accuracy, abs=0.001)


def test_real_workflows_survive_writing_and_reading(tmp_path: Path) -> None:
    write_jsonl(app_of_staged("whowhen_captain"), tmp_path / "w.jsonl.zst")
    once = load_workloads([str(tmp_path / "w.jsonl.zst")], seed=1)
    write_jsonl(once, tmp_path / "again.jsonl")
    again = load_workloads([str(tmp_path / "again.jsonl")], seed=1)
    assert (len(once), once.requests) == (104, 652)
    assert once.workflows == again.workflows


def test_several_parts_are_merged() -> None:
    names = ["requests.parquet#azure2023_conv", "requests.parquet#mooncake_synthetic"]
    workload = load_workloads([f"{FOLDER}/{name}" for name in names], seed=1, limit=5000)
    assert len(workload) == 5000
    assert workload.apps == ("azure2023_conv", "mooncake_synthetic")
