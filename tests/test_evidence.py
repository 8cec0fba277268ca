"""What is known of a call at its arrival, and what its workflow remembers."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_call, a_plan, a_request
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.rehearsal import rehearse, remaining, waves
from concertmaster.predictors.evidence import FEATURES, TARGETS, Evidence, settled
from concertmaster.predictors.features import cached_tokens
from concertmaster.predictors.history import MOST_CALLS, MOST_TRACKS, Histories, Track
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt

M = ModelName("m")


def asked(stage: int = 0, **changes: object) -> Request:
    facts: dict[str, object] = {
        "workflow_id": WorkflowId("w"),
        "app": "app",
        "role": "coder",
        "stage": stage,
        "arrival_s": 10.0 * stage,
    }
    return a_request(f"w/{stage}", **{**facts, **changes})


def answered(tokens: int = 100, *, finished_s: float = 0.0, **changes: object) -> Completion:
    return Completion(model=M, output_tokens=tokens, finished_s=finished_s, **changes)  # type: ignore[arg-type]


def figure(evidence: Evidence, name: str, request: Request, prompt: Prompt = NO_PROMPT) -> float:
    return float(evidence.look(request, prompt).features[FEATURES.index(name)])


def test_a_look_has_one_figure_for_each_name() -> None:
    look = Evidence().look(asked(), Prompt(text="sort this"))

    assert look.features.shape == (len(FEATURES),)
    assert look.step == "none"
    assert len(set(FEATURES)) == len(FEATURES)


def test_the_step_of_the_fallback_is_the_finest_group_seen() -> None:
    evidence = Evidence()
    evidence.learn(asked(), answered())

    steps = [
        evidence.look(asked(app=app, role=role, models=(model,)), NO_PROMPT).step
        for app, role, model in (
            ("app", "coder", M),
            ("app", "critic", M),
            ("else", "coder", M),
            ("else", "coder", ModelName("another")),
        )
    ]

    assert steps == ["role", "app", "model", "global"]


def test_looking_changes_nothing() -> None:
    one, other = Evidence(), Evidence()
    for stage in range(5):
        for _ in range(stage):
            other.look(asked(stage), Prompt(text="x"))
        for evidence in (one, other):
            evidence.learn(asked(stage), answered(10 * stage + 1))

    np.testing.assert_array_equal(
        one.look(asked(9), NO_PROMPT).features, other.look(asked(9), NO_PROMPT).features
    )


def test_a_stuck_agent_shows() -> None:
    evidence = Evidence()
    for stage in range(4):
        evidence.learn(asked(stage), answered(35))

    assert figure(evidence, "streak", asked(4)) == 3
    assert figure(evidence, "all_repeats", asked(4)) == 3


def test_the_pause_before_a_call_is_the_time_since_the_last_answer() -> None:
    evidence = Evidence()
    evidence.learn(asked(0), answered(finished_s=4.0))

    assert figure(evidence, "pause_s", asked(1, arrival_s=10.0)) == pytest.approx(np.log1p(6.0))
    assert figure(evidence, "pause_s", asked(1, arrival_s=1.0)) == 0


def test_a_parallel_sibling_waited_for_its_parents_alone() -> None:
    evidence = Evidence()
    evidence.learn(asked(0), answered(finished_s=4.0))
    siblings = [asked(stage, arrival_s=10.0, parents=(RequestId("w/0"),)) for stage in (1, 2)]
    for sibling in siblings:
        evidence.learn(sibling, answered(finished_s=30.0))

    closed = evidence.close(WorkflowId("w"))

    assert [call.truth["remaining_tool_s"] for call in closed] == [0, 6, 12]


def test_roles_of_a_workflow_are_told_apart() -> None:
    evidence = Evidence()
    evidence.learn(asked(0), answered(500))
    evidence.learn(asked(1, role="critic"), answered(5))

    assert figure(evidence, "tokens_last", asked(2)) == pytest.approx(np.log1p(500))
    assert figure(evidence, "all_tokens_last", asked(2)) == pytest.approx(np.log1p(5))


@given(mine=st.lists(st.integers(0, 3), max_size=8), theirs=st.lists(st.integers(0, 3), max_size=8))
def test_cached_tokens_count_the_common_prefix(mine: list[int], theirs: list[int]) -> None:
    def chained(parts: list[int]) -> tuple[int, ...]:
        return tuple(hash(tuple(parts[: i + 1])) for i in range(len(parts)))

    track = Track()
    track.add(asked(prefix_hashes=chained(theirs)), 1, 0.5)
    common = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )

    found = cached_tokens(asked(prefix_hashes=chained(mine), prompt_tokens=100_000), track)

    assert found == 256 * common


@given(texts=st.lists(st.text(max_size=60), max_size=4))
def test_any_prompt_has_finite_figures(texts: list[str]) -> None:
    prompt = Prompt(text="\n".join(texts), chars=3, tools=2, thinking=True, after_tool=False)

    assert np.isfinite(Evidence().look(asked(), prompt).features).all()


def test_what_remained_is_learnt_when_the_workflow_is_over() -> None:
    evidence = Evidence()
    stated = Quantiles.exactly(77.0)
    for stage, tokens in enumerate((10, 20, 30)):
        evidence.learn(
            asked(stage),
            answered(tokens, finished_s=10.0 * stage + 4),
            forecast=Forecast(remaining_tokens=stated),
        )

    closed = evidence.close(WorkflowId("w"))

    assert [call.truth["remaining_tokens"] for call in closed] == [30, 50, 60]
    assert [call.truth["remaining_calls"] for call in closed] == [1, 2, 3]
    assert [call.truth["remaining_tool_s"] for call in closed] == [0, 6, 12]
    assert {call.stated["remaining_tokens"] for call in closed} == {stated}
    assert evidence.laws["remaining_tokens"].law(closed[0].path).depth > 0
    assert evidence.close(WorkflowId("w")) == []


def test_what_is_not_kept_only_its_own_workflow_remembers() -> None:
    evidence = Evidence()
    evidence.learn(asked(0), answered(10), keep=False)

    assert figure(evidence, "calls", asked(1)) > 0
    assert figure(evidence, "calls", asked(1, workflow_id=WorkflowId("other"))) == 0
    evidence.close(WorkflowId("w"), keep=False)
    assert evidence.look(asked(), NO_PROMPT).step == "none"


def test_only_the_workflows_that_were_active_last_are_kept() -> None:
    histories = Histories(most_workflows=2)
    for name in ("a", "b", "a", "c"):
        histories.of(WorkflowId(name))

    assert len(histories) == 2
    assert histories.seen(WorkflowId("b")) is None


def test_a_workflow_without_end_stays_small() -> None:
    evidence = Evidence()
    for stage in range(MOST_CALLS + 5):
        evidence.learn(asked(stage, role=f"role {stage}"), answered(1), keep=False)
    history = evidence.histories.seen(WorkflowId("w"))

    assert history is not None
    assert len(history.by_role) == MOST_TRACKS
    assert len(history.finished) == MOST_CALLS


@pytest.mark.parametrize(("calls", "share"), [(4, 0.05), (300, 0.05), (640, 0.025)])
def test_calls_of_long_workflows_weigh_as_those_of_short_ones_up_to_a_bound(
    calls: int, share: float
) -> None:
    evidence = Evidence()
    for stage in range(calls):
        evidence.learn(asked(stage), answered(1))
    history = evidence.histories.of(WorkflowId("w"))

    assert [call.share for call in settled(history.finished)] == [share] * calls


# Rehearsal


def test_waves_are_the_calls_that_could_be_made_together() -> None:
    plan = a_plan("w", a_call(0), a_call(1, parents=()), a_call(2, parents=(0, 1)), a_call(3))

    assert [[call.stage for call in wave] for wave in waves(plan)] == [[0, 1], [2], [3]]


def test_what_remains_counts_the_call_itself() -> None:
    plan = a_plan(
        "w",
        a_call(0, output_tokens=5),
        a_call(1, output_tokens=7, parents=(0,), tool_s=2.0),
    )

    truth = remaining(plan)

    assert set(truth[0]) == set(TARGETS)
    assert truth[0] == {
        "output_tokens": 5,
        "remaining_tokens": 12,
        "remaining_calls": 2,
        "remaining_tool_s": 2,
    }


def test_a_rehearsal_shows_each_call_as_it_looked_then() -> None:
    plan = a_plan("w", a_call(0), a_call(1, parents=()), a_call(2, parents=(0, 1)))

    rows = list(rehearse([plan], Evidence()))

    seen = [row.look.features[FEATURES.index("all_calls")] for row in rows]
    assert seen == [0, 0, pytest.approx(np.log1p(2))]


def test_a_rehearsal_is_the_same_twice() -> None:
    rng = random.Random(4)
    plans = [
        a_plan(f"w{i}", *[a_call(j, output_tokens=rng.randint(1, 500)) for j in range(4)])
        for i in range(5)
    ]

    first, second = (
        np.stack([row.look.features for row in rehearse(plans, Evidence())]) for _ in range(2)
    )

    np.testing.assert_array_equal(first, second)


def test_a_request_id_names_workflow_and_stage() -> None:
    rows = list(rehearse([a_plan("w", a_call(0))], Evidence()))

    assert rows[0].asked.request.request_id == RequestId("w/0")
