"""The official Anthropic client against the gateway."""

import asyncio
import json
from typing import Any

import anthropic
import pytest

from concertmaster.core.request import Request
from concertmaster.predictors.interface import Completion
from concertmaster.predictors.recent import RecentLengths
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    an_answer,
    events,
    hangs,
    over_engines,
    over_upstreams,
    play,
)

MESSAGES = [{"role": "user", "content": "Say it."}]
WEATHER = {
    "name": "weather",
    "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def a_client(rig: Rig) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=rig.url, api_key="secret", max_retries=0, timeout=5, http_client=None
    )


def asking(**fields: Any) -> Any:  # noqa: ANN401
    return {"model": "m", "max_tokens": 20, "messages": MESSAGES, **fields}


def a_completion(message: object, finish_reason: str = "stop", **more: object) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, **more}
    return json.dumps({"id": "c", "model": "m", "choices": [choice], "usage": USAGE}).encode()


def a_delta(finish_reason: str | None = None, **delta: object) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "model": "m", "choices": [choice]}


def calls(arguments: str, *, call_id: str | None = "call_1") -> list[dict[str, object]]:
    named = {"name": "weather"} if call_id else {}
    return [{"index": 0, "id": call_id, "function": {**named, "arguments": arguments}}]


def test_a_message_of_an_emulated_engine() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _):
            async with a_client(rig) as client:
                raw = await client.messages.with_raw_response.create(
                    **asking(max_tokens=5), extra_headers={"x-request-id": "mine"}
                )
                message = await raw.parse()
            assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
            assert message.usage.input_tokens > 0
            assert message.content[0].type == "text"
            assert message._request_id == "mine"
            assert raw.headers["x-request-id"] == "mine"
            assert raw.headers["x-concertmaster-replica"] == "p-0"
            await rig.idle()

    play(main())


def test_a_stream_of_an_emulated_engine() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _):
            async with (
                a_client(rig) as client,
                client.messages.stream(**asking(max_tokens=7)) as stream,
            ):
                text = "".join([piece async for piece in stream.text_stream])
                message = await stream.get_final_message()
            assert message.content[0].type == "text"
            assert message.content[0].text == text != ""
            assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 7)
            assert message.usage.input_tokens > 0
            await rig.idle()

    play(main())


def test_a_conversation_with_tools_reaches_the_engine_in_its_own_words() -> None:
    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        message = {"content": "It is", "tool_calls": calls('{"city":"Bonn"}')}
        out.write(an_answer(a_completion(message, "tool_calls")))

    async def main() -> None:
        async with over_upstreams(answers) as (rig, upstream), a_client(rig) as client:
            message = await client.messages.create(
                **asking(
                    system=[{"type": "text", "text": "Be short.", "cache_control": None}],
                    messages=[
                        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                        {
                            "role": "assistant",
                            "content": [
                                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                                {"type": "tool_use", "id": "t1", "name": "weather", "input": {}},
                            ],
                        },
                        {
                            "role": "user",
                            "content": [
                                {
                                    "type": "tool_result",
                                    "tool_use_id": "t1",
                                    "content": [{"type": "text", "text": "no city"}],
                                    "is_error": True,
                                },
                                {"type": "text", "text": "In Bonn."},
                            ],
                        },
                    ],
                    tools=[WEATHER],
                    tool_choice={"type": "any", "disable_parallel_tool_use": True},
                    stop_sequences=["END"],
                    extra_body={"temperature": 0.5},
                    metadata={"user_id": json.dumps({"session_id": "ses-1"})},
                )
            )
            (heard,) = upstream.heard
            assert heard.line.startswith("POST /v1/chat/completions ")
            assert heard.headers["authorization"] == "Bearer secret"
            assert "x-api-key" not in heard.headers
            assert heard.json == {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": "Weather?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {
                                "id": "t1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": "{}"},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "t1", "content": "Error: no city"},
                    {"role": "user", "content": "In Bonn."},
                ],
                "max_tokens": 20,
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "weather",
                            "description": "Tell the weather.",
                            "parameters": WEATHER["input_schema"],
                        },
                    }
                ],
                "parallel_tool_calls": False,
                "tool_choice": "required",
                "stop": ["END"],
                "temperature": 0.5,
            }
            assert message.stop_reason == "tool_use"
            text, tool = message.content
            assert (text.type, tool.type) == ("text", "tool_use")
            assert tool.type == "tool_use"
            assert (tool.id, tool.input) == ("call_1", {"city": "Bonn"})
            usage = message.usage
            assert (usage.input_tokens, usage.cache_read_input_tokens) == (7, 2)

    play(main())


def test_a_session_in_the_metadata_names_the_workflow() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), a_client(rig) as client:
            raw = await client.messages.with_raw_response.create(
                **asking(max_tokens=1, metadata={"user_id": json.dumps({"session_id": "ses-1"})})
            )
            assert raw.headers["x-concertmaster-workflow-id"] == "ses-1"
            raw = await client.messages.with_raw_response.create(
                **asking(max_tokens=1), extra_headers={"x-claude-code-session-id": "ses-2"}
            )
            assert raw.headers["x-concertmaster-workflow-id"] == "ses-2"

    play(main())


def test_thoughts_text_and_tool_calls_stream_as_blocks_of_their_own() -> None:
    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        out.write(
            events(
                a_delta(role="assistant", content=""),
                a_delta(reasoning_content="Hm."),
                a_delta(content="It "),
                a_delta(content="is"),
                a_delta(tool_calls=calls("")),
                a_delta(tool_calls=calls('{"city":', call_id=None)),
                a_delta(tool_calls=calls('"Bonn"}', call_id=None)),
                a_delta("tool_calls"),
                {"choices": [], "usage": USAGE},
            )
        )

    async def main() -> None:
        async with over_upstreams(answers) as (rig, upstream), a_client(rig) as client:
            async with client.messages.stream(**asking(tools=[WEATHER])) as stream:
                kinds = [event.type async for event in stream]
                message = await stream.get_final_message()
            assert upstream.heard[0].json["stream_options"] == {"include_usage": True}
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
            assert message.content[-1].type == "tool_use"
            assert message.content[-1].input == {"city": "Bonn"}
            assert (message.stop_reason, message.usage.input_tokens) == ("tool_use", 7)
            assert kinds[0] == "message_start"
            assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
            assert kinds[-2:] == ["message_delta", "message_stop"]

    play(main())


@pytest.mark.parametrize(
    ("status", "expected", "kind"),
    [
        ("400 Bad Request", anthropic.BadRequestError, "invalid_request_error"),
        ("401 Unauthorized", anthropic.AuthenticationError, "authentication_error"),
        ("403 Forbidden", anthropic.PermissionDeniedError, "permission_error"),
        ("404 Not Found", anthropic.NotFoundError, "not_found_error"),
    ],
)
def test_what_an_engine_refuses_becomes_the_clients_own_error(
    status: str, expected: type[anthropic.APIStatusError], kind: str
) -> None:
    async def refuses(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(b'{"error":{"message":"no such thing"}}', status))

    async def main() -> None:
        async with over_upstreams(refuses) as (rig, _), a_client(rig) as client:
            with pytest.raises(expected) as caught:
                await client.messages.create(**asking(), extra_headers={"x-request-id": "mine"})
            assert caught.value.body == {
                "type": "error",
                "error": {"type": kind, "message": "no such thing"},
                "request_id": "mine",
            }
            assert caught.value.request_id == "mine"

    play(main())


def test_overload_has_anthropics_status_and_says_when_to_come_back() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, _), a_client(rig) as client:
            rig.gateway.draining = True
            with pytest.raises(anthropic.InternalServerError) as caught:
                await client.messages.create(**asking())
            assert caught.value.status_code == 529
            assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]
            assert caught.value.response.headers["retry-after"] == "1"

    play(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            (
                "messages.0.content.0.type: expected text, as engines are given nothing else "
                "here, found image"
            ),
        ),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, found 0"),
        ({"messages": []}, "messages: expected at least one message, found none"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}},
            "tool_choice.name: expected a tool with an input_schema, found other",
        ),
        ({"messages": "hi"}, "messages: expected array, got str"),
        (
            {"mcp_servers": [{}]},
            "mcp_servers: expected none, as engines run no tools themselves, found [{}]",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    fields: dict[str, object], message: str
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            body = json.dumps(asking(**fields)).encode()
            reply = await rig.ask("POST", "/v1/messages", body, x_request_id="mine")
            assert (reply.status, reply.json["type"]) == (400, "error")
            assert reply.headers["request-id"] == reply.json["request_id"] == "mine"
            error = {"type": "invalid_request_error", "message": message}
            assert reply.json["error"] == error
            assert not upstream.heard

    play(main())


def test_a_body_that_is_too_large_is_refused_in_anthropics_words() -> None:
    async def main() -> None:
        async with over_upstreams(max_body_mb=0.001) as (rig, _), a_client(rig) as client:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(**asking(system="x" * 2000))
            assert caught.value.status_code == 413
            assert caught.value.body["error"]["type"] == "request_too_large"  # type: ignore[index]

    play(main())


def test_tools_that_anthropic_would_run_are_left_out_and_named() -> None:
    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(a_completion({"content": "no"})))

    async def main() -> None:
        async with over_upstreams(answers) as (rig, upstream):
            tools = [{"type": "web_search_20250305", "name": "web_search"}]
            body = json.dumps(asking(tools=tools, tool_choice={"type": "auto"})).encode()
            reply = await rig.ask("POST", "/v1/messages", body, x_api_key="secret")
            assert reply.headers["x-concertmaster-left-out"] == "web_search_20250305"
            assert upstream.heard[0].headers["authorization"] == "Bearer secret"
            assert "x-api-key" not in upstream.heard[0].headers
            assert {"tools", "tool_choice"}.isdisjoint(upstream.heard[0].json)

    play(main())


class Listening(RecentLengths):
    def __init__(self) -> None:
        super().__init__()
        self.learnt: list[int] = []

    def learn(self, request: Request, completion: Completion, *_: Any) -> None:  # noqa: ANN401
        self.learnt.append(completion.output_tokens)


def test_tokens_are_counted_by_the_engine_and_teach_nothing() -> None:
    async def main() -> None:
        predictor = Listening()
        async with over_engines(predictor=predictor) as (rig, _), a_client(rig) as client:
            counted = await client.messages.count_tokens(model="m", messages=MESSAGES)  # type: ignore[arg-type]
            message = await client.messages.create(**asking(max_tokens=2))
            assert counted.input_tokens == message.usage.input_tokens > 0
            assert predictor.learnt == [2]

    play(main())
