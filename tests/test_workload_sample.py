"""The sample that ships in the package."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName, ServiceClass
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.load import SAMPLE_PATH, load_workloads

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "make_sample.py"
MODELS = tuple(ModelName(f"qwen2.5-{size}-instruct") for size in ("1.5b", "7b", "32b"))
SAMPLE = load_workloads(["sample"], seed=0)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sample"] = module
    spec.loader.exec_module(module)
    return module


def test_the_shipped_bytes_are_those_that_the_script_makes(
    maker: ModuleType, tmp_path: Path
) -> None:
    workload = maker.build(maker.SEED)
    write_jsonl(workload, tmp_path / "sample.jsonl")
    assert (tmp_path / "sample.jsonl").read_bytes() == SAMPLE_PATH.read_bytes()
    assert SAMPLE.workflows == workload.workflows


def test_another_seed_makes_another_sample(maker: ModuleType) -> None:
    assert maker.build(8).workflows != SAMPLE.workflows


def test_it_is_as_large_as_documented() -> None:
    assert (len(SAMPLE), SAMPLE.requests) == (300, 1629)
    assert SAMPLE.apps == ("coding", "data", "research", "support")
    assert 250 < SAMPLE.duration_s < 350
    assert SAMPLE_PATH.stat().st_size < 1_500_000
    assert not SAMPLE.notes


def test_an_app_of_it_can_be_selected() -> None:
    workload = load_workloads(["sample#coding"], seed=0)
    roles = {tuple(call.role for call in plan.calls[:4]) for plan in workload}
    assert roles == {("planner", "coder", "tester", "coder")}
    assert max(len(plan.calls) for plan in workload) > 4


def test_research_fans_out_and_joins() -> None:
    for plan in load_workloads(["sample#research"], seed=0):
        planner, *queries, merge = plan.calls
        assert all(query.parents == (planner.stage,) for query in queries)
        assert merge.parents == tuple(query.stage for query in queries)


def test_bigger_models_are_right_more_often_and_write_less() -> None:
    outcomes = [call.outcomes for plan in SAMPLE for call in plan.calls]
    correct = [fmean(entry[model].correct for entry in outcomes) for model in MODELS]
    tokens = [fmean(entry[model].output_tokens for entry in outcomes) for model in MODELS]
    assert correct == sorted(correct)
    assert tokens == sorted(tokens, reverse=True)


def test_classes_are_mixed_and_some_have_deadlines() -> None:
    classes = Counter(plan.service_class for plan in SAMPLE)
    promised = sum(plan.deadline_s is not None for plan in SAMPLE)
    assert min(classes[member] for member in ServiceClass) > 50
    assert 60 < promised < 150


def test_system_text_is_shared_across_workflows() -> None:
    hashes = [one for plan in SAMPLE for call in plan.calls for one in call.prefix_hashes]
    chunks = sum(c.prompt_tokens // PREFIX_CHUNK_TOKENS for p in SAMPLE for c in p.calls)
    assert len(hashes) == chunks
    assert 1 - len(set(hashes)) / len(hashes) > 0.6
