"""Calls of other APIs whose model does not run, or whose engine fails before it answers."""

import asyncio
import json

import pytest

from concertmaster.engines import control as engine_control
from concertmaster.gateway import control, holding, service
from gateway_rig import Heard, an_answer, over_upstreams, play
from test_api_messages import a_client, a_completion, asking
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
