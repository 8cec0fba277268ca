"""Calls of other APIs whose model does not run, whose engine fails, or whose agent leaves."""

import asyncio
import json

import anthropic
import pytest

from concertmaster.engines import control as engine_control
from concertmaster.gateway import control, holding, service
from gateway_rig import STREAM_HEAD, Heard, a_chunk, an_answer, events, hangs, over_upstreams, play
from test_api_messages import a_client, a_completion, a_delta, asking
from test_gateway_holding import asleep


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_control, "POLL_S", 0.005)
    monkeypatch.setattr(engine_control, "RETRY_S", 0.005)
    monkeypatch.setattr(service, "LOOK_S", 0.01)
    monkeypatch.setattr(holding, "FIRST_S", 0.05)
    monkeypatch.setattr(holding, "EVERY_S", 0.1)


def test_a_held_message_is_kept_by_comments_and_answered_once() -> None:
    async def main() -> None:
        async with asleep() as (rig, _):
            body = json.dumps(asking(stream=True, max_tokens=5)).encode()
            text = (await rig.ask("POST", "/v1/messages", body)).body.decode()
            told, _, answer = text.partition("event: message_start")
            assert told.count(": waking m") >= 3
            assert ": x-concertmaster-replica: p-0\n" in told
            assert answer.count("event: message_stop") == 1
            assert '"output_tokens":5' in answer
            async with (
                a_client(rig) as client,
                client.messages.stream(**asking(max_tokens=4)) as stream,
            ):
                assert (await stream.get_final_message()).usage.output_tokens == 4
            await rig.idle()

    play(main())


@pytest.mark.parametrize(
    ("path", "body", "bad", "good"),
    [
        ("/v1/messages", asking(stream=True), b"error", b"message_stop"),
        (
            "/v1/responses",
            {"model": "m", "input": "x", "stream": True},
            b"response.failed",
            b"response.completed",
        ),
    ],
)
def test_a_held_stream_that_is_refused_ends_with_the_apis_own_error(
    path: str, body: object, bad: bytes, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with asleep(wakes="never") as (rig, _):
            reply = await rig.ask("POST", path, json.dumps(body).encode())
            assert reply.status == 200
            assert b": waking m" in reply.body
            assert reply.body.count(b"event: %b\n" % bad) == 1
            assert b"m did not wake" in reply.body
            assert good not in reply.body
            await rig.idle()

    monkeypatch.setattr(control, "LEAST_PATIENCE_S", 0.3)
    monkeypatch.setattr(control, "PATIENCE", 0.0)
    play(main())


def test_an_engine_that_fails_before_it_answers_is_followed_by_another() -> None:
    async def fails(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(b"no", "500 Internal Server Error"))

    async def answers(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(a_completion({"content": "ok"})))

    async def main() -> None:
        async with over_upstreams(fails, answers) as (rig, _), a_client(rig) as client:
            for _ in range(4):
                message = await client.messages.create(**asking())
                assert message.content[0].type == "text"
                assert message.content[0].text == "ok"
            await rig.idle()

    play(main())


@pytest.mark.parametrize("ends_in_frame", [True, False])
def test_a_stream_that_breaks_ends_with_an_error_and_no_stop(*, ends_in_frame: bool) -> None:
    async def breaks(_: Heard, out: asyncio.StreamWriter) -> None:
        frame = b"data: " + json.dumps(a_delta(content="It")).encode() + b"\n\n"
        out.write(STREAM_HEAD + a_chunk(frame if ends_in_frame else frame + b"data: {"))
        await out.drain()
        await asyncio.sleep(0.05)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(breaks) as (rig, _):
            body = json.dumps(asking(stream=True)).encode()
            reply = await rig.ask("POST", "/v1/messages", body)
            assert b"message_stop" not in reply.body
            assert reply.body.count(b"event: error") == 1
            assert reply.body.endswith(b"\n\n")
            async with a_client(rig) as client:
                with pytest.raises(anthropic.APIStatusError):
                    async with client.messages.stream(**asking()) as stream:
                        await stream.get_final_message()
            await rig.idle()

    play(main())


def test_a_whole_answer_that_breaks_is_an_error() -> None:
    async def breaks(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(a_completion({"content": "It"}))[:-20])
        await out.drain()
        await asyncio.sleep(0.05)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(breaks) as (rig, _), a_client(rig) as client:
            with pytest.raises(anthropic.InternalServerError) as caught:
                await client.messages.create(**asking())
            assert caught.value.status_code == 502
            await rig.idle()

    play(main())


def test_an_engine_that_ends_without_a_reason_is_no_clean_finish() -> None:
    async def breaks(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD + events(a_delta(content="It")))

    async def main() -> None:
        async with over_upstreams(breaks) as (rig, _):
            body = json.dumps(asking(stream=True)).encode()
            reply = await rig.ask("POST", "/v1/messages", body)
            assert b"message_stop" not in reply.body
            assert reply.body.count(b"event: error") == 1

    play(main())


def test_an_agent_that_leaves_frees_the_engine() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, upstream):
            wire = await rig.wire()
            body = json.dumps(asking()).encode()
            wire.send(b"POST /v1/messages HTTP/1.1\r\nhost: g\r\n")
            wire.send(b"content-length: %d\r\n\r\n" % len(body) + body)
            while not upstream.heard:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await wire.close()
            await rig.idle()

    play(main())
