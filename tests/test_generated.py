"""Workloads drawn from a law: their shape, what prompts tell of lengths, and their settings."""

import random
from collections import Counter
from pathlib import Path
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_fleet, a_pool
from concertmaster.compose import simulate
from concertmaster.core.errors import InputError
from concertmaster.workload import research
from concertmaster.workload.arrivals import POISSON
from concertmaster.workload.drawing import hashes
from concertmaster.workload.generated import GENERATORS, generate
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Call, WorkflowPlan, Workload

DOCS = Path(__file__).parents[1] / "docs"
SESSIONS = Path(__file__).parents[1] / "../shared/data/public/workflow_stages_codingagent.parquet"
DRAWN = ("research", "research:fanout=four-peak", "video")

with_sessions = pytest.mark.skipif(not SESSIONS.exists(), reason="the coding sessions are absent")
every_drawn = pytest.mark.parametrize("spec", DRAWN)


def load(spec: str, *, seed: int = 1, rate_rps: float = 1.0) -> Workload:
    return load_workloads([spec], seed=seed, arrivals=POISSON, rate_rps=rate_rps)


def of_role(workload: Workload, role: str) -> list[Call]:
    return [call for plan in workload for call in plan.calls if call.role == role]


def lengths(calls: list[Call], words: str) -> list[int]:
    return [call.output_tokens for call in calls if words in call.prompt_text]


# All of them.


@every_drawn
def test_a_seed_fixes_a_workload_and_another_draws_another(spec: str) -> None:
    assert generate(spec, seed=1) == generate(spec, seed=1)
    first, other = ({plan.workflow_id for plan in generate(spec, seed=s).plans} for s in (1, 2))
    assert len(first) == 300
    assert not first & other


@every_drawn
def test_every_call_names_one_model_and_fits_its_cap(spec: str) -> None:
    for plan in load(spec):
        for call in plan.calls:
            assert len(call.models) == 1
            assert 1 <= call.output_tokens <= call.max_output_tokens
            assert all(parent < call.stage for parent in call.parents)


@every_drawn
def test_a_drawn_workload_is_written_and_read_back(spec: str, tmp_path: Path) -> None:
    drawn = load(spec)
    write_jsonl(drawn, tmp_path / "w.jsonl")

    assert load_workloads([str(tmp_path / "w.jsonl")], seed=0).workflows == drawn.workflows


@every_drawn
def test_prompts_share_the_system_text_of_their_role_and_nothing_else(spec: str) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    for plan in load(spec):
        for call in plan.calls:
            seen.update((call.role, one) for one in set(call.prefix_hashes))
    shared = {key for key, count in seen.items() if count > 1}

    assert len({one for _, one in shared}) == len(shared)
    assert all(count >= 300 for key, count in seen.items() if key in shared)
    assert len(shared) == (2 if spec == "video" else 10)


def test_a_generated_workload_needs_arrivals() -> None:
    with pytest.raises(InputError) as caught:
        load_workloads(["research:workflows=3"], seed=0)

    assert str(caught.value) == (
        "research:workflows=3: arrivals: expected recorded arrivals, found none "
        "(add --arrivals poisson --rate 2)"
    )


def test_a_simulation_serves_each_call_by_the_model_it_names() -> None:
    fleet = a_fleet(a_pool("b", model="big"), a_pool("s", model="small"))
    workload = load("research:workflows=5,big=big,small=small")
    run = simulate(fleet, workload, "least-tokens", seed=0)

    assert all(one.outcome == "completed" for one in run.workflows)
    assert {(one.role, one.model) for one in run.calls} == {
        ("planner", "big"),
        ("searcher", "small"),
        ("reader", "small"),
        ("merge", "big"),
    }


# Settings.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "research:fanot=uniform",
            (
                'workload research: unknown setting "fanot" (did you mean "fanout"? known: big, '
                "deadline_s, fanout, small, told, workflows)"
            ),
        ),
        (
            "research:fanout=flat",
            'workload research: fanout: expected uniform or four-peak, found "flat"',
        ),
        (
            "video:workflows=0",
            'workload video: workflows: expected a whole number, at least 1, found "0"',
        ),
        (
            "video:told=2",
            'workload video: told: expected a number, 0 to 1, found "2"',
        ),
        ("video:renderer=", 'workload video: renderer: expected a name, found ""'),
        (
            "coding:sessions=no/such.parquet",
            "no/such.parquet: expected a workload file, found nothing there",
        ),
    ],
)
def test_a_wrong_setting_is_named(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(spec)

    assert str(caught.value).startswith(message)


def test_settings_change_what_they_say() -> None:
    workload = load("video:workflows=7,writer=w,renderer=r,deadline_s=90")

    assert len(workload) == 7
    assert workload.models_asked == (("w",), ("r",))
    assert {plan.deadline_s for plan in workload} == {90.0}


@pytest.mark.parametrize("name", GENERATORS)
def test_every_setting_is_documented(name: str) -> None:
    text = (DOCS / "workloads.md").read_text()
    section = text.partition(f"### `{name}`")[2].partition("\n#")[0]

    assert [row.split("`")[1] for row in section.splitlines() if row.startswith("| `")] == list(
        GENERATORS[name].settings
    )


# Research.


def shape(plan: WorkflowPlan) -> tuple[int, bool]:
    """Count the queries, and say whether each is searched, read and merged in this order."""
    planner, *queries, merge = plan.calls
    pairs = list(zip(queries[::2], queries[1::2], strict=True))
    right = (
        (planner.role, merge.role) == ("planner", "merge")
        and all(search.parents == (planner.stage,) for search, _ in pairs)
        and all(read.parents == (search.stage,) for search, read in pairs)
        and merge.parents == tuple(read.stage for _, read in pairs)
    )
    return len(pairs), right


@given(st.integers(0, 999), st.sampled_from(["uniform", "four-peak"]))
def test_research_is_planned_queried_in_parallel_and_merged(seed: int, fanout: str) -> None:
    for plan in generate(f"research:workflows=3,fanout={fanout}", seed=seed).plans:
        queries, right = shape(plan)
        assert right
        assert research.FEWEST <= queries <= research.MOST


def test_fan_outs_follow_their_law_and_have_the_same_mean() -> None:
    counts = {
        fanout: Counter(
            shape(plan)[0]
            for plan in generate(f"research:workflows=4000,fanout={fanout}", seed=1).plans
        )
        for fanout in ("uniform", "four-peak")
    }

    assert all(count > 4000 / 12 * 0.8 for count in counts["uniform"].values())
    assert len(counts["uniform"]) == 12
    for peak in research.PEAKS:
        assert counts["four-peak"][peak] > 4000 / 4 * 0.65
    means = [fmean(one.elements()) for one in counts.values()]
    assert means[0] == pytest.approx(means[1], rel=0.03) == pytest.approx(6.5, rel=0.03)


def test_words_of_a_prompt_tell_its_length_only_as_often_as_they_are_true() -> None:
    told, silent = (
        of_role(load(f"research:workflows=600,told={share}"), "reader") for share in (1, 0)
    )

    for calls, least, most in ((told, 5.0, 30.0), (silent, 0.7, 1.4)):
        ratio = median(lengths(calls, "transcript")) / median(lengths(calls, "abstract"))
        assert least < ratio < most
    assert median(lengths(told, "every detail")) > 2 * median(lengths(told, "key points"))


def test_lengths_have_a_tail_that_no_word_tells() -> None:
    calls = of_role(load("research:workflows=600,told=1"), "reader")
    notes = sorted(lengths(calls, "this abstract and write down an outline"))

    assert notes[int(0.995 * len(notes))] > 3 * median(notes)


def test_a_longer_question_begins_like_one() -> None:
    plans = generate("research:workflows=400,told=1", seed=3).plans
    few, many = research.BREADTHS[0], research.BREADTHS[-1]
    queries = {
        words: [shape(plan)[0] for plan in plans if plan.calls[0].prompt_text.startswith(words)]
        for words in (few, many)
    }

    assert max(queries[few]) < min(queries[many])


# Video.


def test_renders_have_two_modes_that_the_prompt_tells() -> None:
    renders = of_role(load("video:workflows=800,told=1"), "renderer")
    low, high = (sorted(lengths(renders, words)) for words in ("480p", "720p"))

    assert len(low) + len(high) == len(renders)
    assert low[int(0.99 * len(low))] < high[int(0.01 * len(high))]
    assert median(high) > 2 * median(low)


def test_the_writer_comes_first() -> None:
    for plan in load("video:workflows=20"):
        writer, render = plan.calls
        assert render.parents == (writer.stage,)
        assert render.prompt_tokens == writer.output_tokens


# Coding.


@with_sessions
def test_people_are_answered_by_the_planner_and_tools_by_the_actor() -> None:
    workload = load(f"coding:sessions={SESSIONS},workflows=60,planner=big,actor=small")
    roles = {
        (call.role, call.models[0], bool(call.after_tool) or call.step != "main")
        for plan in workload
        for call in plan.calls
    }

    assert roles == {("planner", "big", False), ("actor", "small", True)}


@with_sessions
def test_sessions_are_cut_where_their_settings_say() -> None:
    spec = f"coding:sessions={SESSIONS},workflows=60,calls=9,prompt_tokens=40000,pause_s=5"
    workload = load(spec)

    assert 0 < len(workload) <= 60
    for plan in workload:
        stages = [call.stage for call in plan.calls]
        assert 1 <= len(stages) <= 9
        for at, call in enumerate(plan.calls):
            assert call.prompt_tokens <= 40_000
            assert call.tool_s <= 5.0
            assert {*call.parents} <= {*stages[:at]}


@with_sessions
def test_no_session_is_drawn_twice() -> None:
    names = [plan.workflow_id for plan in load(f"coding:sessions={SESSIONS},workflows=9999")]

    assert len(names) == len(set(names)) > 400


@with_sessions
def test_no_session_is_in_both_parts() -> None:
    spec = f"coding:sessions={SESSIONS},workflows=9999,part="
    test, train = ({plan.workflow_id for plan in load(spec + part)} for part in ("test", "train"))

    assert not test & train
    assert 4 * len(test) == pytest.approx(len(train), rel=0.3)


def test_prompts_with_one_system_text_begin_alike() -> None:
    rng = random.Random(1)
    first, second = (hashes("role", 600, 600 + rng.randint(0, 3000), name) for name in "ab")

    assert first[:2] == second[:2]
    assert not {*first[2:]} & {*second[2:]}
