"""Properties of the translations: however an answer is cut into pieces, its events are the same."""

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertmaster.core.errors import InvalidRequestError
from concertmaster.gateway.apis.anthropic_answer import MessageAnswer
from concertmaster.gateway.apis.anthropic_request import messages_request
from concertmaster.gateway.apis.events import EventReader
from concertmaster.gateway.apis.responses_answer import ResponseAnswer
from concertmaster.gateway.apis.responses_request import response_body, response_request
from concertmaster.gateway.apis.translating import TranslatingCaller, Translation
from concertmaster.gateway.stream import unchunked
from gateway_rig import STREAM_HEAD, a_chunk, an_answer

texts = st.text(min_size=1, max_size=8)
spoken = st.tuples(st.sampled_from(["content", "reasoning", "tool"]), st.lists(texts, max_size=3))
answers = st.lists(spoken, max_size=5)
finishes = st.sampled_from(["stop", "length", "tool_calls"])
cuts = st.lists(st.integers(0, 4000), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "name", "input", "id", "format"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = [
    "messages",
    "input",
    "system",
    "tools",
    "tool_choice",
    "metadata",
    "text",
    "thinking",
    "output_config",
    "conversation",
    "instructions",
    "model",
    "stream",
]
Parts = list[tuple[str, list[str]]]
MODELS: dict[str, Any] = {"model": "m", "max_tokens": 5}


class Agent:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent = b""
        self.ends: list[str] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def finished(self, *, keep_alive: bool) -> None:
        self.ends.append("kept" if keep_alive else "closed")

    def abort(self) -> None:
        self.ends.append("cut")

    @property
    def events(self) -> list[dict[str, Any]]:
        body = unchunked(self.sent.partition(b"\r\n\r\n")[2])
        return [json.loads(one.payload) for one in EventReader().feed(body) if one.payload]


def deltas(parts: Sequence[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, (kind, pieces) in enumerate(parts):
        if kind != "tool":
            found += [{kind: piece} for piece in pieces]
            continue
        named = {"index": index, "id": f"c{index}", "function": {"name": "f"}}
        found.append({"tool_calls": [named]})
        found += [
            {"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces
        ]
    return found


def frames(parts: Sequence[tuple[str, list[str]]], finish_reason: str, newline: str) -> bytes:
    choices = [{"index": 0, "delta": delta} for delta in deltas(parts)]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish_reason})
    payloads: list[Any] = [{"model": "m", "choices": [choice]} for choice in choices]
    payloads.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    lines = [f": wait{newline}{newline}"]
    lines += [f"data: {json.dumps(one)}{newline}{newline}" for one in payloads]
    return "".join([*lines, f"data: [DONE]{newline}{newline}"]).encode()


def a_translation(api: str) -> Translation:
    if api == "messages":
        return MessageAnswer()
    asked = response_request(response_body(b'{"model":"m","input":"x"}'))
    return ResponseAnswer(asked, "resp_1", lambda *_: None)


def played(api: str, wire: bytes, at: Sequence[int], *, streams: bool = True) -> Agent:
    agent = Agent()
    translation = a_translation(api)
    caller = TranslatingCaller(agent, translation, streams=streams, takes_chunks=True)
    places = sorted({min(place, len(wire)) for place in at} | {0, len(wire)})
    for start, end in itertools.pairwise(places):
        caller.write(wire[start:end])
    caller.finished(keep_alive=True)
    return agent


@settings(max_examples=60, deadline=None)
@given(
    api=st.sampled_from(["messages", "responses"]),
    answer=st.tuples(answers, finishes, st.sampled_from(["\n", "\r\n"])),
    body_cuts=cuts,
    wire_cuts=cuts,
)
def test_events_are_the_same_however_the_answer_is_cut(
    api: str, answer: tuple[Parts, str, str], body_cuts: list[int], wire_cuts: list[int]
) -> None:
    body = frames(*answer)
    places = sorted({min(place, len(body)) for place in body_cuts} | {0, len(body)})
    chunks = [a_chunk(body[a:b]) for a, b in itertools.pairwise(places)]
    cut = played(api, STREAM_HEAD + b"".join(chunks) + b"0\r\n\r\n", wire_cuts)
    plain = frames(*answer[:2], "\n")
    whole = played(api, STREAM_HEAD + a_chunk(plain) + b"0\r\n\r\n", [])
    assert cut.events == whole.events
    kinds = {"message_stop", "response.completed", "response.incomplete"}
    assert cut.events[-1]["type"] in kinds
    assert cut.ends == ["kept"]
    assert cut.sent.endswith(b"\r\n0\r\n\r\n")


@settings(max_examples=60, deadline=None)
@given(parts=answers, finish_reason=finishes)
def test_a_stream_says_what_the_whole_message_says(
    parts: list[tuple[str, list[str]]], finish_reason: str
) -> None:
    body = frames(parts, finish_reason, "\n")
    events = played("messages", STREAM_HEAD + a_chunk(body) + b"0\r\n\r\n", []).events
    said: dict[int, str] = {}
    open_block: int | None = None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block = event["index"]
            assert open_block == len(said)
            said[open_block] = ""
        elif event["type"] == "content_block_delta":
            assert event["index"] == open_block
            (text,) = [value for key, value in event["delta"].items() if key != "type"]
            said[event["index"]] += text
        else:
            assert event == {"type": "content_block_stop", "index": open_block}
            open_block = None
    assert open_block is None
    assert "".join(said.values()) == "".join("".join(pieces) for _, pieces in parts)
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]


@settings(max_examples=60, deadline=None)
@given(
    api=st.sampled_from(["messages", "responses"]),
    parts=answers,
    share=st.floats(0, 1),
)
def test_a_stream_that_is_cut_anywhere_ends_with_one_error_or_was_complete(
    api: str, parts: list[tuple[str, list[str]]], share: float
) -> None:
    body = frames(parts, "stop", "\n")
    agent = Agent()
    caller = TranslatingCaller(agent, a_translation(api), streams=True, takes_chunks=True)
    caller.write(STREAM_HEAD + a_chunk(body[: int(share * len(body))]))
    caller.abort()
    kinds = [event["type"] for event in agent.events]
    good = {"message_stop", "response.completed"}
    bad = {"error", "response.failed"}
    assert sum(kind in good | bad for kind in kinds) == 1
    assert kinds[-1] in (good if int(share * len(body)) == len(body) else bad)
    assert agent.ends == ["closed"]


@pytest.mark.parametrize("trouble", [b'{"error":{"message":"out of memory"}}', b"[]", b"{"])
def test_nothing_follows_an_error_of_the_engine(trouble: bytes) -> None:
    body = b"data: %b\n\n" % trouble + frames([("content", ["hi"])], "stop", "\n")
    agent = played("messages", STREAM_HEAD + a_chunk(body) + b"0\r\n\r\n", [])
    assert [event["type"] for event in agent.events] == ["error"]
    assert agent.ends == ["kept"]


def test_an_engine_that_does_not_stream_is_made_to() -> None:
    choice = {"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}
    body = json.dumps({"model": "m", "choices": [choice]}).encode()
    wire = an_answer(body, headers=["content-type: application/json"])
    kinds = [event["type"] for event in played("messages", wire, []).events]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_agents_of_the_first_http_get_no_chunks() -> None:
    agent = Agent()
    caller = TranslatingCaller(agent, MessageAnswer(), streams=True, takes_chunks=False)
    caller.write(STREAM_HEAD + a_chunk(frames([("content", ["hi"])], "stop", "\n")))
    caller.finished(keep_alive=True)
    head, _, body = agent.sent.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b": wait\n\nevent: message_start\n")
    assert agent.ends == ["closed"]


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(FIELDS),
        json_values,
        max_size=5,
    ),
    items=st.lists(st.dictionaries(st.sampled_from(["type", "role", "content"]), json_values)),
)
def test_whatever_is_sent_is_translated_or_refused(
    fields: dict[str, Any], items: list[dict[str, Any]]
) -> None:
    body = json.dumps({**MODELS, "messages": items, "input": items, **fields}).encode()
    with contextlib.suppress(InvalidRequestError):
        messages_request(body)
    with contextlib.suppress(InvalidRequestError):
        response_request(response_body(body))


def test_a_kind_of_tool_cannot_end_a_header() -> None:
    tools = [{"type": "a\r\nx: y"}, {"type": ["b"]}]
    body = json.dumps({**MODELS, "messages": [{"role": "user", "content": "x"}], "tools": tools})
    assert messages_request(body.encode())[0].left_out == ("ax y", "no type")
