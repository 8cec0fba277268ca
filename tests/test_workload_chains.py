"""Routing sets turned into workflows by templates."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from concertmaster.core.errors import InputError
from concertmaster.core.model_names import canonical
from concertmaster.core.request import ModelName
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.chains import (
    PREAMBLE_TOKENS,
    ROLE_TOKENS,
    Question,
    Template,
    helper_tokens,
    workflow,
)
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import CAUGHT, FALSE_ALARMS, ModelOutcome, WorkflowPlan, Workload

SMALL, BIG = ModelName("small"), ModelName("big")
OUTCOMES = {
    SMALL: ModelOutcome(correct=0.0, output_tokens=300),
    BIG: ModelOutcome(correct=1.0, output_tokens=500),
}
QUESTION = Question(
    question_id="q:1", source="q", group="q:1", text="Why?", prompt_tokens=90, outcomes=OUTCOMES
)


def planned(
    template: str, *, seed: int = 1, lengths: dict[str, list[int]] | None = None
) -> WorkflowPlan:
    return workflow(QUESTION, Template.parse("d", template), lengths or {}, seed=seed)


@pytest.mark.parametrize(
    "template",
    ["solver", "planner-coder", "planner-coder-tester-coder", "planner-solver-verifier-solver"],
)
def test_a_chain_has_its_roles_in_order_each_on_the_one_before(template: str) -> None:
    plan = planned(template)
    assert "-".join(call.role for call in plan.calls) == template
    assert [call.parents for call in plan.calls] == [
        (stage - 1,) if stage else () for stage in range(len(plan.calls))
    ]
    assert (plan.workflow_id, plan.app) == (f"q:1:{template}", f"q:{template}")


def test_answers_have_each_models_length_and_outcome_and_the_last_decides() -> None:
    plan = planned("planner-coder-tester-coder")
    planner, coder, tester, last = plan.calls
    assert coder.outcomes == last.outcomes == OUTCOMES
    assert not planner.outcomes
    assert not tester.outcomes
    assert coder.output_tokens == 400
    assert plan.deciding_call is last
    assert planned("solver-critic").deciding_call == planned("solver-critic").calls[0]


def test_prompts_grow_by_what_was_said_and_share_all_but_the_role() -> None:
    plan = planned("planner-solver-verifier-solver", lengths={"planner": [700], "verifier": [90]})
    said = 0
    for call in plan.calls:
        assert call.prompt_tokens == PREAMBLE_TOKENS + 90 + said + ROLE_TOKENS
        assert len(call.prefix_hashes) == call.prompt_tokens // 256
        said += call.output_tokens
    for earlier, later in zip(plan.calls, plan.calls[1:], strict=False):
        shared = (earlier.prompt_tokens - ROLE_TOKENS) // 256
        assert later.prefix_hashes[:shared] == earlier.prefix_hashes[:shared]


def test_all_questions_of_a_template_share_its_preamble() -> None:
    other = replace(QUESTION, question_id="q:2", prompt_tokens=900)
    template = Template.parse("d", "solver")
    first, second = (
        workflow(question, template, {}, seed=1).calls[0].prefix_hashes
        for question in (QUESTION, other)
    )
    assert first[:2] == second[:2]
    assert set(first[2:]).isdisjoint(second[2:])


def test_lengths_depend_on_the_question_the_stage_and_the_seed_alone() -> None:
    assert planned("planner-solver") == planned("planner-solver")
    assert planned("planner-solver").calls[0] != planned("planner-solver", seed=2).calls[0]


def test_helper_lengths_are_the_real_ones_or_follow_the_fitted_law() -> None:
    rng = random.Random(1)
    assert {helper_tokens("planner", {"planner": [7, 9]}, rng) for _ in range(50)} == {7, 9}
    drawn = [helper_tokens("verifier", {}, rng) for _ in range(4000)]
    assert median(drawn) == pytest.approx(169, rel=0.1)
    assert max(drawn) <= 2048


def test_an_unknown_role_and_a_chain_without_an_answer_are_errors() -> None:
    with pytest.raises(InputError) as unknown:
        Template.parse("d", "planer-solver")
    assert 'd: template planer-solver: unknown role "planer" (did you mean "planner"?' in str(
        unknown.value
    )
    with pytest.raises(InputError) as mute:
        Template.parse("d", "planner-verifier")
    assert str(mute.value) == (
        "d: template planner-verifier: expected a stage that answers (actor, agent, answerer, "
        "coder, expert, solver), found none (for example planner-verifier-solver)"
    )


def table(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = {name: [row[at] for row in rows] for at, name in enumerate(names)}
    pq.write_table(pa.table(cells), str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table(
        tmp_path / "routing_questions.parquet",
        ("question_id", "source", "question", "prompt_tokens"),
        [
            ("m:1", "m", "One?", 50),
            ("m:2", "m", "Two?", 70),
            ("m:3", "m", "Three?", 9),
            ("n:1", "n", "Else?", 5),
        ],
    )
    table(
        tmp_path / "routing_outcomes.parquet",
        ("question_id", "source", "model", "harness", "correct", "output_tokens"),
        [
            ("m:1", "m", "small", "cot", 0, 100),
            ("m:1", "m", "big", "cot", 1, None),
            ("m:1", "m", "big", "agent:x", 1, 9999),
            ("m:1", "m", "small", "agent:x", 1, 9999),
            ("m:2", "m", "big", "agent:x", 1, 9999),
            ("m:2", "m", "big", "cot", 1, 40),
            ("n:1", "n", "big", "agent:a", 1, None),
            ("n:1", "n", "big", "agent:b", 0, 7),
        ],
    )
    return tmp_path


def load(spec: str) -> Workload:
    return load_workloads([spec], seed=1, arrivals=ArrivalSpec(kind="poisson"), rate_rps=1.0)


def test_a_routing_folder_gives_one_workflow_a_question(folder: Path) -> None:
    workload = load(f"{folder}#m:planner-solver")
    plans = {str(plan.workflow_id): plan for plan in workload}
    assert sorted(plans) == ["m:1:planner-solver", "m:2:planner-solver"]
    solver = plans["m:1:planner-solver"].calls[1]
    assert solver.outcomes[ModelName("big")].output_tokens == 100
    assert solver.prompt_text == "One?\n\nYou are the solver."
    assert workload.notes == (
        'answers of "cot" used, not of agent:x',
        "m: 1 answers of unknown length: taken as the median of that question, else of all (70)",
        f"{folder}: 1 questions without a single answer left out",
        "lengths of stages without recorded answers: log-normal, planner (3.96, 1.58)",
    )


def test_copies_of_a_question_are_attempts_at_one_task(folder: Path) -> None:
    path = folder / "routing_questions.parquet"
    questions = pq.read_table(str(path))
    groups = pa.array(["g", "g", "", None])
    pq.write_table(questions.append_column("dup_group", groups), str(path))

    assert [plan.task for plan in load(f"{folder}#m:solver")] == ["g", "g"]
    assert [plan.task for plan in load(f"{folder}#n:solver")] == ["n:1"]


def test_without_groups_a_question_is_a_task_of_its_own(folder: Path) -> None:
    assert sorted(plan.task for plan in load(f"{folder}#m:solver")) == ["m:1", "m:2"]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),
        ("meta-llama/Meta-Llama-3_1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("gpt-4o", "gpt-4o"),
    ],
)
def test_models_of_a_routing_set_have_the_names_that_fleets_use(
    tmp_path: Path, spelling: str, name: str
) -> None:
    asked(tmp_path, [("m:1", "m", spelling, "cot", 1, 30)])

    assert list(load(f"{tmp_path}#m").workflows[0].calls[0].outcomes) == [ModelName(name)]
    assert canonical(name) == name


def asked(folder: Path, answers: Sequence[tuple[object, ...]]) -> None:
    """A routing folder with one question and these answers to it."""
    table(
        folder / "routing_questions.parquet",
        ("question_id", "source", "question", "prompt_tokens"),
        [("m:1", "m", "One?", 50)],
    )
    names = ("question_id", "source", "model", "harness", "correct", "output_tokens")
    table(folder / "routing_outcomes.parquet", names, answers)


A, B = ("m:1", "m", "a"), ("m:1", "m", "b")


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        # Single answers come before runs, however little they say.
        ([(*A, "x", 0, None), (*A, "agent:y", 1, 5), (*B, "agent:y", 1, 5)], "x"),
        # Lengths of the most models; two spellings are one model.
        ([(*A, "x", 1, 5), ("m:1", "m", "o/A", "x", 1, 5), (*A, "y", 0, 5), (*B, "y", 0, 5)], "y"),
        # Then of the most answers.
        ([(*A, "y", 0, 5), (*A, "y", 0, 6), (*A, "x", 1, 5)], "y"),
        # A length of 0 is none.
        ([(*A, "x", 1, 0), (*A, "y", 0, 5)], "y"),
        # Then the most right answers, then the first name.
        ([(*A, "x", 0, 5), (*A, "y", 1, 5)], "y"),
        ([(*A, "y", 1, 5), (*A, "x", 1, 5)], "x"),
    ],
)
def test_the_harness_that_says_most_of_most_models_is_used(
    tmp_path: Path, answers: Sequence[tuple[object, ...]], chosen: str
) -> None:
    asked(tmp_path, answers)

    assert load(f"{tmp_path}#m").notes[0].startswith(f'answers of "{chosen}" used')


# Stages that are made only if work is sent back.

RETRIED = "planner-solver-verifier-solver?"


def test_a_role_with_a_question_mark_works_only_if_a_verifier_rejects() -> None:
    plan = planned(RETRIED)

    assert [call.role for call in plan.calls] == ["planner", "solver", "verifier", "solver"]
    assert [call.doubt is None for call in plan.calls] == [True, True, True, False]
    assert plan.template == RETRIED
    assert plan.calls[-1].outcomes == OUTCOMES
    firm = planned("planner-solver-verifier-solver")
    assert [call.output_tokens for call in plan.calls] == [c.output_tokens for c in firm.calls]


def test_helper_lengths_are_found_beside_roles_with_a_question_mark(folder: Path) -> None:
    workload = load(f"{folder}#m:{RETRIED}")

    assert len(workload) == 2
    assert "planner (3.96, 1.58); verifier (5.13, 0.87)" in workload.notes[-1]


def test_verdicts_follow_the_shares_that_are_assumed_and_the_seed() -> None:
    plans = [
        workflow(replace(QUESTION, question_id=f"q:{i}"), Template.parse("d", RETRIED), {}, seed=1)
        for i in range(3000)
    ]
    last = [plan.calls[-1] for plan in plans]

    assert fmean(call.is_called_for(0.0) for call in last) == pytest.approx(CAUGHT, abs=0.03)
    assert fmean(call.is_called_for(1.0) for call in last) == pytest.approx(FALSE_ALARMS, abs=0.02)
    halfway = (CAUGHT + FALSE_ALARMS) / 2
    assert fmean(call.is_called_for(0.5) for call in last) == pytest.approx(halfway, abs=0.03)
    assert planned(RETRIED) == planned(RETRIED)
    assert planned(RETRIED).calls[-1].doubt != planned(RETRIED, seed=2).calls[-1].doubt


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("solver?-solver", "solver?"),
        ("planner?-solver", "planner?"),
        ("planner-solver-coder?", "coder?"),
        ("solver-verifier?-solver", "verifier?"),
    ],
)
def test_a_role_with_a_question_mark_needs_a_verifier_before_it(template: str, role: str) -> None:
    with pytest.raises(InputError) as refusal:
        Template.parse("d", template)

    assert str(refusal.value) == (
        f"d: template {template}: expected a verifier before {role}, found none "
        f"(for example solver-verifier-{role})"
    )


def test_verdicts_survive_writing_and_reading(folder: Path, tmp_path: Path) -> None:
    workload = load(f"{folder}#m:{RETRIED}")
    write_jsonl(workload, tmp_path / "w.jsonl")

    again = load_workloads([str(tmp_path / "w.jsonl")], seed=1)

    assert again.workflows == workload.workflows


def test_without_a_template_a_question_is_one_call(folder: Path) -> None:
    plan = load(f"{folder / 'routing_questions.parquet'}#n").workflows[0]
    assert [call.role for call in plan.calls] == ["solver"]
    assert plan.calls[0].outcomes[BIG] == ModelOutcome(correct=0.0, output_tokens=7)


def test_helper_lengths_come_from_a_workflow_file_beside_the_questions(folder: Path) -> None:
    table(
        folder / "workflow_stages.parquet",
        ("role_class", "output_tokens"),
        [("planner", 321), ("coder", 5)],
    )
    workload = load(f"{folder}#m:planner-solver")
    assert fmean(plan.calls[0].output_tokens for plan in workload) == 321
    assert workload.notes[-1].endswith("drawn from 1 of planner")


def test_a_routing_folder_without_a_source_lists_them(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(str(folder))
    assert str(caught.value) == (
        f"{folder}: expected a source after #, found none "
        "(add #SOURCE:planner-solver, where SOURCE is one of m, n)"
    )
    with pytest.raises(InputError) as unknown:
        load(f"{folder}#k:solver")
    assert 'unknown source "k"' in str(unknown.value)
