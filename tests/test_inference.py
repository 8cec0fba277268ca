import json
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.gateway.growth import unclosed
from concertmaster.gateway.identity import Identity
from concertmaster.gateway.inference import (
    ANSWERS_TOOL,
    EXTENDS,
    GROWS,
    NEW,
    WorkflowInference,
)

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "You are a careful agent. " * 400}

texts = st.text(max_size=60)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts}
)


def infer(inference: WorkflowInference, prompt: object, **style: Any) -> Identity:  # noqa: ANN401
    return inference.infer(memoryview(json.dumps(prompt, **style).encode()))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def asks_tool(*ids: str) -> Message:
    calls = [{"id": one, "type": "function", "function": {"name": "f"}} for one in ids]
    return {"role": "assistant", "tool_calls": calls}


def tool(call_id: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": "42"}


@given(
    first=st.lists(messages, min_size=1, max_size=4),
    turns=st.lists(st.lists(messages, min_size=1, max_size=3), max_size=6),
    spaced=st.booleans(),
)
def test_a_transcript_that_grows_is_one_workflow(
    first: list[Message], turns: list[list[Message]], *, spaced: bool
) -> None:
    inference = WorkflowInference()
    style = {"indent": 1} if spaced else {"separators": (",", ":")}
    transcript = list(first)
    began = infer(inference, transcript, **style)
    assert (began.stage, began.confidence, began.dialect) == (0, NEW, "inferred")
    for number, turn in enumerate(turns, start=1):
        transcript += turn
        found = infer(inference, transcript, **style)
        assert (found.workflow_id, found.stage) == (began.workflow_id, number)
        assert found.confidence == EXTENDS


@given(
    goals=st.lists(texts, min_size=2, max_size=6, unique=True),
    order=st.lists(st.integers(0, 5), max_size=30),
)
def test_interleaved_workflows_are_kept_apart(goals: list[str], order: list[int]) -> None:
    inference = WorkflowInference()
    transcripts = [[SYSTEM, user(goal)] for goal in goals]
    ids = [infer(inference, transcript).workflow_id for transcript in transcripts]
    assert len(set(ids)) == len(goals), "one system prompt does not make one workflow"
    for number in order:
        chosen = number % len(goals)
        transcripts[chosen] += [assistant("ok"), user("go on")]
        assert infer(inference, transcripts[chosen]).workflow_id == ids[chosen]


def test_hundreds_of_workflows_with_one_long_system_prompt_are_all_followed() -> None:
    inference = WorkflowInference()
    rng = random.Random(4)
    transcripts = [[SYSTEM, user(f"task {number}")] for number in range(300)]
    ids = [infer(inference, transcript).workflow_id for transcript in transcripts]
    for _ in range(3):
        for number in rng.sample(range(300), k=300):
            transcripts[number] += [assistant("same"), user("words")]
            assert infer(inference, transcripts[number]).workflow_id == ids[number]


def test_a_prompt_that_is_sent_again_does_not_go_on_with_itself() -> None:
    inference = WorkflowInference()
    prompt = [SYSTEM, user("hello")]

    first, second = infer(inference, prompt), infer(inference, prompt)

    assert first.workflow_id != second.workflow_id
    assert (second.stage, second.confidence) == (0, NEW)


def test_a_later_turn_that_is_sent_again_stays_in_its_workflow_and_stage() -> None:
    inference = WorkflowInference()
    began = infer(inference, [user("a")])
    turn = [user("a"), assistant("b"), user("c")]

    for _ in range(3):
        found = infer(inference, turn)
        assert (found.workflow_id, found.stage) == (began.workflow_id, 1)


def test_twins_are_gone_on_with_one_after_the_other() -> None:
    inference = WorkflowInference()
    ids = [infer(inference, [SYSTEM, user("same")]).workflow_id for _ in range(3)]

    found = [
        infer(inference, [SYSTEM, user("same"), assistant(f"answer {number}"), user("more")])
        for number in range(3)
    ]

    assert [one.workflow_id for one in found] == ids


def test_a_turn_that_begins_with_half_a_message_is_another_workflow() -> None:
    inference = WorkflowInference()
    began = infer(inference, [user("write a poem about rain")])

    found = infer(inference, [user("write a poem about rain and snow"), assistant("no")])

    assert found.workflow_id != began.workflow_id


def test_a_shortened_transcript_is_known_by_its_tool_calls() -> None:
    inference = WorkflowInference()
    goal = [SYSTEM, user("goal")]
    began = infer(inference, goal)
    turn = [*goal, asks_tool("call_1"), tool("call_1")]
    infer(inference, turn)
    compacted = [SYSTEM, user("summary so far"), *turn[2:], asks_tool("call_2"), tool("call_2")]

    found = infer(inference, compacted)

    assert (found.workflow_id, found.stage) == (began.workflow_id, 2)
    assert found.confidence == ANSWERS_TOOL


def test_a_tool_call_of_a_noted_answer_is_known() -> None:
    inference = WorkflowInference()
    began = infer(inference, [user("goal")])
    inference.note_tool_calls([b"call_9"], began.workflow_id, 0)

    found = infer(inference, [user("no history kept"), asks_tool("call_9"), tool("call_9")])

    assert (found.workflow_id, found.stage) == (began.workflow_id, 1)


def test_tool_call_ids_that_two_workflows_use_tell_nothing() -> None:
    inference = WorkflowInference()
    ids = []
    for goal in ("a", "b"):
        ids.append(infer(inference, [user(goal)]).workflow_id)
        turn = [user(goal), asks_tool("functions.get:0"), tool("functions.get:0")]
        assert infer(inference, turn).workflow_id == ids[-1]

    found = infer(inference, [user("c"), asks_tool("functions.get:0"), tool("functions.get:0")])

    assert found.workflow_id not in ids
    assert found.confidence == NEW


def test_prompts_that_are_no_list_of_messages_are_workflows_of_their_own() -> None:
    inference = WorkflowInference()

    prompts: list[object] = ["once", "once upon", 17, {}, [1, 2], []]
    found = [infer(inference, prompt) for prompt in prompts]

    assert len({one.workflow_id for one in found}) == 6
    assert {one.confidence for one in found} == {NEW}


def test_only_so_much_is_remembered() -> None:
    inference = WorkflowInference(max_prompts=3, max_tool_calls=2)
    for number in range(10):
        infer(inference, [user(f"goal {number}"), tool(f"call_{number}")])
    for _ in range(50):
        infer(inference, [user("twin")])

    assert len(inference._ends) == 3
    assert len(inference._tool_calls) == 2
    assert max(map(len, inference._ends.values())) <= 16


def test_a_prompt_still_in_use_is_remembered_longest() -> None:
    inference = WorkflowInference(max_prompts=3)
    base = [user("branches")]
    began = infer(inference, base)
    for number in range(6):
        found = infer(inference, [*base, assistant(f"branch {number}"), user("go")])
        assert found.workflow_id == began.workflow_id


def test_twins_are_told_apart_by_the_tool_calls_of_their_answers() -> None:
    inference = WorkflowInference()
    ids = [infer(inference, [SYSTEM, user("same")]).workflow_id for _ in range(3)]
    for number, workflow_id in enumerate(ids):
        inference.note_tool_calls([b"call_%d" % number], workflow_id, 0)

    for number in (2, 0, 1):
        call = f"call_{number}"
        found = infer(inference, [SYSTEM, user("same"), asks_tool(call), tool(call)])
        assert found.workflow_id == ids[number]


def named(inference: WorkflowInference, name: str, prompt: object, **more: Any) -> Identity:  # noqa: ANN401
    text = memoryview(json.dumps(prompt).encode())
    return inference.infer(text, request_id=name, **more)


def test_what_a_call_goes_on_with_is_its_parent() -> None:
    inference = WorkflowInference()
    prompt = [user("goal")]
    began = named(inference, "a", prompt)
    prompt += [assistant("ok"), user("more")]
    then = named(inference, "b", prompt)
    inference.note_tool_calls([b"call_1"], then.workflow_id, 1, request_id="b")
    last = named(inference, "c", [user("summary"), asks_tool("call_1"), tool("call_1")])

    assert [one.parents for one in (began, then, last)] == [(), ("a",), ("b",)]


SCRATCHPAD = "Task: find the largest file below /srv and say who owns it."


@pytest.mark.parametrize("goal", [SCRATCHPAD, SCRATCHPAD * 5])
@pytest.mark.parametrize("ends", ["", "]", '"', " \n"])
def test_a_scratchpad_in_one_message_is_one_workflow(goal: str, ends: str) -> None:
    inference = WorkflowInference()
    text, ids = goal + ends, []
    for turn in range(4):
        told = named(inference, str(turn), [SYSTEM, user(text)])
        ids.append(told.workflow_id)
        assert (told.stage, told.confidence) == (turn, GROWS if turn else NEW)
        text += f"\n> du {turn}\n{turn} MB{ends}"
    assert len(set(ids)) == 1


def test_a_text_is_gone_on_with_after_a_whole_word_and_if_it_is_long_enough() -> None:
    inference = WorkflowInference()
    for first, then in ((SCRATCHPAD[:-1], SCRATCHPAD[:-1] + "s"), ("go", "go on")):
        prompts = ([user(first)], [user(then)])
        ids = {infer(inference, prompt).workflow_id for prompt in prompts}
        assert len(ids) == 2


def test_a_scratchpad_behind_another_system_prompt_is_another_workflow() -> None:
    inference = WorkflowInference()
    began = infer(inference, [SYSTEM, user(SCRATCHPAD)])
    other = infer(inference, [user("be brief"), user(SCRATCHPAD + "\n> ls")])

    assert other.workflow_id != began.workflow_id


def test_of_twins_the_odds_are_told_and_those_gone_on_with_or_silent_are_none() -> None:
    inference = WorkflowInference()
    first, then = [user("same")], [user("same"), assistant("x"), user("on")]
    silent = named(inference, "a", first, now_s=0.0)
    twins = [named(inference, name, first, now_s=700.0) for name in "bc"]
    told = [named(inference, f"{i}", [*then, user(str(i))], now_s=710.0) for i in range(2)]

    assert [one.workflow_id for one in told] == [twin.workflow_id for twin in twins]
    assert [one.confidence for one in told] == [EXTENDS / 2, EXTENDS]
    fresh = named(inference, "d", first, now_s=720.0)
    late = named(inference, "e", [*then, user("late")], now_s=730.0)
    assert late.workflow_id == fresh.workflow_id != silent.workflow_id


def test_growing_texts_are_bounded_in_number() -> None:
    inference = WorkflowInference(max_prompts=100)
    for number in range(300):
        infer(inference, [user(f"{number} " * 60)])
        infer(inference, [user(SCRATCHPAD + "x" * number)])
    assert len(inference._growth) <= 100


def edges(*, goals: int, notes_answers: bool) -> tuple[float, float]:
    """Interleave tool loops, some compacted, over so many goals; precision and recall."""
    rng = random.Random(11)
    inference = WorkflowInference()
    live: list[tuple[int, list[Message]]] = []
    owner: dict[str, int] = {}
    true = found = right = 0
    for step in range(3000):
        fresh = len(live) < 60 or rng.random() < 0.1
        if fresh:
            live.append((step, [SYSTEM, user(f"task {rng.randrange(goals)}")]))
        place = len(live) - 1 if fresh else rng.randrange(len(live))
        workflow, transcript = live[place]
        if len(transcript) > 12 and rng.random() < 0.3:
            transcript[1:7] = [user(f"summary {rng.random()}")]
        told = infer(inference, transcript)
        call = f"call_{rng.getrandbits(60):x}"
        transcript += [asks_tool(call), tool(call)]
        if notes_answers:
            inference.note_tool_calls([call.encode()], told.workflow_id, told.stage or 0)
        true += not fresh
        if told.confidence > NEW:
            found += 1
            right += owner.get(told.workflow_id) == workflow
        else:
            owner[told.workflow_id] = workflow
    return right / found, right / true


def test_edges_are_found_with_high_precision_and_recall() -> None:
    assert min(edges(goals=10**9, notes_answers=False)) > 0.99


def test_edges_of_many_equal_first_prompts_are_found_with_the_answers_tool_calls() -> None:
    assert min(edges(goals=100, notes_answers=True)) > 0.99
    assert min(edges(goals=1000, notes_answers=False)) > 0.85


CLOSING = re.compile(rb'(?:"\s*,\s*"(?:role|type)"\s*:\s*"\w+)?["}\]\s]*\Z')
scraps = st.sampled_from(
    [b'"', b"}", b"]", b" ", b"\n", b",", b":", b"role", b"type", b"user", b"x"]
)


@given(st.lists(scraps, max_size=16).map(b"".join))
def test_what_closes_a_message_is_its_last_marks_and_its_role(message: bytes) -> None:
    assert unclosed(message) == CLOSING.sub(b"", message, count=1)
    whole = message + b'", "role": "user"}]'
    assert unclosed(whole) == CLOSING.sub(b"", whole, count=1)
