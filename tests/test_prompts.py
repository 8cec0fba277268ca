"""What predictors may read of a call that came in through the gateway."""

import json

import pytest

from concertmaster.gateway.openai_api import CallBody, parse_call
from concertmaster.gateway.prompts import CUT_MARK, END_CHARS, MAX_EXACT_BYTES, read_prompt
from concertmaster.predictors.interface import Prompt

TOOL = {"type": "function", "function": {"name": "look_up"}}


def said(role: str, content: object, **fields: object) -> dict[str, object]:
    return {"role": role, "content": content, **fields}


def chat(*messages: object, **fields: object) -> CallBody:
    body = {"model": "m", "messages": messages or [said("user", "Say it.")], **fields}
    return parse_call(json.dumps(body).encode(), chat=True)


def text_call(prompt: object) -> CallBody:
    return parse_call(json.dumps({"model": "m", "prompt": prompt}).encode(), chat=False)


def test_the_texts_of_all_messages_are_read() -> None:
    parts = [{"type": "text", "text": 'Say "it".\nTwice.'}, {"type": "image_url", "image_url": {}}]
    call = chat(
        said("system", "Be brief."), said("user", parts), said("assistant", None), {"role": "user"}
    )

    text = 'Be brief.\nSay "it".\nTwice.\n\n\n'
    assert read_prompt(call) == Prompt(text=text, chars=len(text), after_tool=False)


@pytest.mark.parametrize(
    ("prompt", "text"), [("Once upon", "Once upon"), (["a", "b"], "a\nb"), ([1, 2, 3], "")]
)
def test_the_prompt_of_a_completion_is_read_if_it_is_text(prompt: object, text: str) -> None:
    assert read_prompt(text_call(prompt)) == Prompt(text=text, chars=len(text))


def test_of_a_long_prompt_both_ends_are_kept() -> None:
    story = "".join(f"Line {i}. " for i in range(3000))
    short = story[: MAX_EXACT_BYTES // 2]

    exact, skimmed = (read_prompt(chat(said("user", text))) for text in (short, 4 * story))

    assert exact.text == short[:END_CHARS] + CUT_MARK + short[-END_CHARS:]
    assert exact.chars == len(short)
    head, _, tail = skimmed.text.partition(CUT_MARK)
    assert head.removeprefix("[") in story
    assert tail.removesuffix('"}]') in story
    assert 2 * END_CHARS - 100 < len(head) + len(tail) <= 2 * END_CHARS
    assert abs(skimmed.chars - 4 * len(story)) < 100


def test_the_ends_of_a_long_prompt_hold_no_frames_between_messages() -> None:
    messages = [said(("user", "assistant")[i % 2], f'Say "{i}"\n') for i in range(3000)]

    text = read_prompt(chat(*messages)).text

    assert 'Say "1"\n' in text
    assert text.count('{"role"') <= 1, "at most one that the cut went through"


@pytest.mark.parametrize(
    ("last", "after_tool"),
    [
        (said("tool", "42", tool_call_id="c1"), True),
        (said("function", "42", name="look_up"), True),
        ({"content": "42", "tool_call_id": "c1", "role": "tool"}, True),
        (said("user", 'He wrote {"role": "tool"} to me.'), False),
        (said("tool", "x" * 30_000), True),
        (said("tool", "x" * 300_000), None),
        ({"content": "nobody's"}, False),
    ],
)
def test_whether_a_tool_has_answered_is_told_by_the_last_role(
    last: object, *, after_tool: bool | None
) -> None:
    first = said("user", "Go.")

    assert read_prompt(chat(first, last)).after_tool is after_tool


def test_tools_are_counted() -> None:
    assert read_prompt(chat(tools=[TOOL, TOOL])).tools == 2
    assert read_prompt(chat(tools="none")).tools == 0


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": 3}, False),
        ({"reasoning": {"effort": "low"}}, True),
        ({"reasoning": {"effort": "minimal"}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"reasoning": "much"}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": [1]}, False),
    ],
)
def test_reasoning_is_asked_for_in_many_words(fields: dict[str, object], *, thinks: bool) -> None:
    assert read_prompt(chat(**fields)).thinking is thinks


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":{"role":"user"},"thinking":[3]}',
        b'{"model":"m","messages":"Say it."}',
        b'{"model":"m","messages":[7, null]}',
    ],
)
def test_what_cannot_be_read_is_left_out_and_never_refused(body: bytes) -> None:
    prompt = read_prompt(parse_call(body, chat=True))

    assert (prompt.text, prompt.thinking) == ("", False)
