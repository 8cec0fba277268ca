"""The official OpenAI client against the gateway's Responses and Embeddings."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from builders import a_fleet, a_pool
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.gateway.apis.responses_store import ResponseStore, StoredResponse
from concertmaster.gateway.peers import Peer
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    Upstream,
    a_chunk,
    a_rig,
    an_answer,
    events,
    over_engines,
    over_upstreams,
    play,
)
from test_api_messages import a_completion, a_delta, calls

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def test_a_response_of_an_emulated_engine() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            response = await client.responses.create(
                model="m",
                input="Say it.",
                max_output_tokens=5,
                extra_headers={"x-request-id": "mine", "session-id": "ses-1"},
            )
            assert (response.status, response._request_id) == ("incomplete", "mine")
            assert response.incomplete_details is not None
            assert response.incomplete_details.reason == "max_output_tokens"
            assert response.usage is not None
            assert response.usage.output_tokens == 5
            assert response.output_text
            kept = rig.gateway.apis.responses
            assert [one.workflow_id for one in kept._by_id.values()] == ["ses-1"]
            await rig.idle()

    play(main())


def test_a_conversation_goes_on_from_a_kept_response_in_its_workflow() -> None:
    async def answers(heard: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(a_completion({"content": f"#{len(heard.json['messages'])}"})))

    async def main() -> None:
        async with over_upstreams(answers) as (rig, upstream), rig.sdk() as client:
            first = await client.responses.with_raw_response.create(
                model="m", instructions="Be short.", input="One."
            )
            second = await client.responses.with_raw_response.create(
                model="m", input="Two.", previous_response_id=first.parse().id
            )
            assert upstream.heard[1].json["messages"] == [
                {"role": "user", "content": "One."},
                {"role": "assistant", "content": "#2"},
                {"role": "user", "content": "Two."},
            ]
            workflows = [one.headers["x-concertmaster-workflow-id"] for one in (first, second)]
            assert workflows[0] == workflows[1]

    play(main())


def test_kept_responses_are_read_and_deleted_by_whoever_made_them() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _), rig.sdk() as client:
            made = await client.responses.create(model="m", input="x", max_output_tokens=1)
            unkept = await client.responses.create(
                model="m", input="x", max_output_tokens=1, store=False
            )
            stranger = client.with_options(api_key="other")
            assert (await client.responses.retrieve(made.id)).output_text == made.output_text
            with pytest.raises(openai.NotFoundError):
                await stranger.responses.retrieve(made.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(unkept.id)
            with pytest.raises(openai.NotFoundError):
                await stranger.responses.delete(made.id)
            await client.responses.delete(made.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made.id)
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model="m", input="x", previous_response_id=made.id)
            assert caught.value.code == "previous_response_not_found"

    play(main())


def test_a_stream_has_its_event_types_in_order() -> None:
    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        out.write(
            events(
                a_delta(role="assistant", content=""),
                a_delta(reasoning="Hm."),
                a_delta(content="It is"),
                a_delta(tool_calls=calls("")),
                a_delta(tool_calls=calls('{"city":"Bonn"}', call_id=None)),
                a_delta("tool_calls"),
                {"choices": [], "usage": USAGE},
            )
        )

    async def main() -> None:
        async with over_upstreams(answers) as (rig, _), rig.sdk() as client:
            stream = await client.responses.create(
                model="m", input="Weather?", tools=[WEATHER], stream=True
            )
            seen = [event async for event in stream]
            assert [event.type.removeprefix("response.") for event in seen] == [
                "created",
                "in_progress",
                "output_item.added",
                "reasoning_text.delta",
                "reasoning_text.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "completed",
            ]
            assert [event.sequence_number for event in seen] == list(range(len(seen)))
            last = seen[-1]
            assert last.type == "response.completed"
            assert [item.type for item in last.response.output] == [
                "reasoning",
                "message",
                "function_call",
            ]
            assert last.response.usage is not None
            assert last.response.usage.total_tokens == 13
            async with client.responses.stream(model="m", input="W", tools=[WEATHER]) as helped:
                final = await helped.get_final_response()
            assert final.output_text == "It is"

    play(main())


def test_items_reach_the_engine_as_messages() -> None:
    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(a_completion({"content": "ok"})))

    async def main() -> None:
        async with over_upstreams(answers) as (rig, upstream), rig.sdk() as client:
            items: Any = [
                {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
                {"role": "user", "content": "Weather?"},
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ]
            await client.responses.create(
                model="m",
                instructions="Be short.",
                input=items,
                tools=[WEATHER, {"type": "web_search"}],
                tool_choice={"type": "function", "name": "weather"},
                text={"format": {"type": "json_schema", "name": "a", "schema": {}}},
                metadata={"session_id": "s"},
            )
            sent = upstream.heard[0].json
            function = {key: WEATHER[key] for key in ("name", "description", "parameters")}
            assert sent == {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "Be short.\n\nBe kind."},
                    {"role": "user", "content": "Weather?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {
                                "id": "c1",
                                "type": "function",
                                "function": {"name": "weather", "arguments": "{}"},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                ],
                "tools": [{"type": "function", "function": {**function, "strict": False}}],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {}},
                },
            }

    play(main())


@pytest.mark.parametrize("ends_in_frame", [True, False])
def test_a_stream_that_breaks_ends_with_response_failed(*, ends_in_frame: bool) -> None:
    async def breaks(_: Heard, out: asyncio.StreamWriter) -> None:
        frame = b"data: " + json.dumps(a_delta(content="It")).encode() + b"\n\n"
        out.write(STREAM_HEAD + a_chunk(frame if ends_in_frame else frame + b"data: {"))
        await out.drain()
        await asyncio.sleep(0.05)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(breaks) as (rig, _), rig.sdk() as client:
            stream = await client.responses.create(model="m", input="x", stream=True)
            seen = [event async for event in stream]
            assert seen[-1].type == "response.failed"
            assert seen[-1].response.error is not None
            assert not any(event.type == "response.completed" for event in seen)
            assert len(rig.gateway.apis.responses) == 0
            await rig.idle()

    play(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type: expected a message, "),
        ({"max_output_tokens": 0}, "max_output_tokens: expected at least 1, found 0"),
        ({"background": True}, "background: expected none"),
        ({"tool_choice": "weather"}, "tool_choice: expected auto, none, required or a function"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type: expected text, as engines are given nothing else, found ",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    fields: dict[str, object], message: str
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            body = json.dumps({"model": "m", "input": "x", **fields}).encode()
            reply = await rig.ask("POST", "/v1/responses", body)
            assert reply.status == 400
            assert reply.error["message"].startswith(message)
            assert not upstream.heard

    play(main())


def test_json_of_any_depth_is_served_or_refused() -> None:
    async def main() -> None:
        async with over_upstreams(chats) as (rig, _):
            found = set()
            for depth in (10, *range(850, 1010, 8)):
                nested = b'{"a":' * depth + b"1" + b"}" * depth
                tool = b'{"type":"function","name":"t","parameters":%b}' % nested
                body = b'{"model":"m","input":"x","tools":[%b]}' % tool
                found.add((await rig.ask("POST", "/v1/responses", body)).status)
            assert found == {200, 400}

    play(main())


def test_an_engine_error_and_an_unknown_model_keep_their_codes() -> None:
    async def refuses(_: Heard, out: asyncio.StreamWriter) -> None:
        error = {"message": "no", "type": "t", "param": None, "code": "engine_code"}
        out.write(an_answer(json.dumps({"error": error}).encode(), "400 Bad Request"))

    async def main() -> None:
        async with over_upstreams(refuses) as (rig, _), rig.sdk() as client:
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="m", input="x")
            assert refused.value.code == "engine_code"
            assert refused.value.request_id
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.responses.create(model="other", input="x")
            assert unknown.value.code == "model_not_found"

    play(main())


def test_the_store_is_bounded_by_count_and_bytes() -> None:
    def a_response(size: int) -> StoredResponse:
        return StoredResponse(owner=b"o", body=b"x" * size, messages=b"", workflow_id="w")

    store = ResponseStore(max_responses=2, max_bytes=10)
    for name in ("a", "b", "c"):
        store.add(name, a_response(3))
        assert store.find("a", b"o") is not None
    assert [store.find(name, b"o") is None for name in ("a", "b", "c")] == [False, True, False]
    store.add("large", a_response(11))
    assert (len(store), store.size_bytes) == (0, 0)


# Embeddings.


async def embeds(_: Heard, out: asyncio.StreamWriter) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    body = {"object": "list", "model": "e", "data": data, "usage": usage}
    out.write(an_answer(json.dumps(body).encode(), headers=["content-type: application/json"]))


async def chats(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(an_answer(a_completion({"content": "ok"})))


@asynccontextmanager
async def over_two(
    fleet: Fleet, peers: dict[ReplicaId, Peer]
) -> AsyncIterator[tuple[Rig, list[Upstream]]]:
    async with (
        Upstream(chats) as p,
        Upstream(embeds) as q,
        a_rig({"p-0": p.url, "q-0": q.url}, fleet=fleet, peers=peers) as rig,
    ):
        yield rig, [p, q]


def test_embeddings_go_to_the_pool_that_serves_them_and_chats_do_not() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool("p"), a_pool("q", model="e"))
        peers = {ReplicaId("q-0"): Peer(serves="embeddings")}
        async with over_two(fleet, peers) as (rig, upstreams), rig.sdk() as client:
            for model in ("e", "auto"):
                made = await client.embeddings.create(
                    model=model, input="x", encoding_format="float"
                )
                assert made.data[0].embedding == [0.5, 1.0]
            for _ in range(4):
                await rig.call({"model": "auto"})
            assert [len(one.heard) for one in upstreams] == [4, 2]
            assert upstreams[1].heard[0].line == "POST /v1/embeddings HTTP/1.1"
            assert upstreams[1].heard[1].json["model"] == "e"
            with pytest.raises(openai.NotFoundError) as caught:
                await client.embeddings.create(model="m", input="x")
            assert 'expected one of e or "auto", found "m"' in str(caught.value)
            await rig.idle()

    play(main())


def test_without_a_pool_that_embeds_the_answer_says_what_is_missing() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            body = json.dumps({"model": "m", "input": "x"}).encode()
            reply = await rig.ask("POST", "/v1/embeddings", body)
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")
            assert reply.error["message"].startswith("no pool serves embeddings: ")
            empty = await rig.ask("POST", "/v1/embeddings", b'{"model":"m"}')
            assert (empty.status, empty.error["param"]) == (400, "input")
            assert not upstream.heard

    play(main())
