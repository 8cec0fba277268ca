import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from concertmaster.gateway import agent, openai_api
from gateway_rig import (
    CHAT,
    TEXT,
    Heard,
    a_body,
    a_call,
    a_chunk,
    a_message,
    an_answer,
    over_upstreams,
    play,
)


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_LINGER_S", 0.3)


# Bodies and framing.


def test_a_body_of_19_mb_passes_and_one_of_21_mb_is_refused() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            for megabytes, status in ((19, 200), (21, 413)):
                wire = await rig.wire()
                body = json.dumps(a_body(x="y" * (megabytes * 1_000_000))).encode()
                wire.send(a_message("POST", CHAT, body))
                found, answer = await wire.answer()
                assert found == status
            assert len(upstream.heard) == 1
            assert len(upstream.heard[0].body) > 19_000_000
            error = json.loads(answer)["error"]
            assert error["message"] == f"body: expected at most 20000000 bytes, found {len(body)}"
            assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")

    play(main())


def test_a_chunked_body_is_read_up_to_the_limit() -> None:
    async def parts(count: int) -> AsyncIterator[bytes]:
        yield b'{"model":"m","messages":[{"role":"user","content":"'
        for _ in range(count):
            yield b"x" * 10_000
        yield b'"}]}'

    async def main() -> None:
        async with over_upstreams(max_body_mb=0.1) as (rig, upstream):
            async with rig.http.post(CHAT, data=parts(3)) as response:
                assert response.status == 200
            assert "transfer-encoding" not in upstream.heard[0].headers
            assert len(upstream.heard[0].json["messages"][0]["content"]) == 30_000
            wire = await rig.wire()
            wire.send(b"POST " + CHAT.encode() + b" HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(11):
                wire.send(a_chunk(b"x" * 10_000))
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")

    play(main())


def test_calls_in_one_packet_are_answered_in_order() -> None:
    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.002 * (3 - int(heard.json["n"]) % 3))
        out.write(an_answer(str(heard.json["n"]).encode()))

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            wire = await rig.wire()
            wire.send(b"".join(a_call(n=n) for n in range(20)))
            answers = [await wire.answer()]
            wire.send(b"".join(a_call(n=n) for n in range(20, 40)) + a_message("GET", "/version"))
            answers += [await wire.answer() for _ in range(40)]
            assert [body for _, body in answers[:-1]] == [b"%d" % n for n in range(40)]
            assert b"version" in answers[-1][1]

    play(main())


def test_a_call_that_comes_byte_by_byte_is_one_call() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            for byte in a_call():
                wire.send(bytes([byte]))
                await asyncio.sleep(0)
            assert (await wire.answer())[0] == 200
            assert len(upstream.heard) == 1

    play(main())


def test_a_client_that_asks_to_close_is_closed_after_its_answer() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            for closing in (
                a_call().replace(b"host: gateway", b"connection: close"),
                a_call().replace(b"HTTP/1.1", b"HTTP/1.0"),
            ):
                wire = await rig.wire()
                wire.send(closing)
                assert (await wire.rest()).endswith(b'{"usage":{"completion_tokens":1}}')

    play(main())


def test_a_client_that_asks_first_is_told_to_send_its_body() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            wire.send(a_call().replace(b"host: gateway", b"expect: 100-continue"))
            assert await wire.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert (await wire.answer())[0] == 200

    play(main())


def test_an_offer_of_another_protocol_is_ignored() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c"
            wire.send(a_call().replace(b"host: gateway", offer))
            assert (await wire.answer())[0] == 200
            assert "upgrade" not in upstream.heard[0].headers
            wire.send(b"CONNECT elsewhere:443 HTTP/1.1\r\n\r\n")
            assert (await wire.answer())[0] == 400

    play(main())


# Refusals.


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        (CHAT, b"", "body: expected a JSON object, found Input data was truncated", None),
        (CHAT, b'{"model"', "body: expected a JSON object, found Input data was truncated", None),
        (CHAT, b"[1]", "body: expected object, got array", None),
        (
            CHAT,
            b'{"model": "m"}',
            "messages: expected a list of messages, found nothing",
            "messages",
        ),
        (TEXT, b'{"model": "m"}', "prompt: expected a prompt, found nothing", "prompt"),
        (
            CHAT,
            b'{"messages": [{}]}',
            'model: expected a model name, a list of names or "auto", found nothing',
            "model",
        ),
        (CHAT, b'{"max_tokens": "5"}', "max_tokens: expected int | null, got str", "max_tokens"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_bad_request(
    path: str, body: bytes, message: str, param: str | None
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            reply = await rig.ask("POST", path, body)
            assert reply.status == 400
            assert reply.headers["content-type"] == "application/json"
            assert reply.error == {
                "message": message,
                "type": "invalid_request_error",
                "param": param,
                "code": "invalid_request",
            }
            assert not upstream.heard

    play(main())


def test_a_bad_header_of_ours_is_a_bad_request() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            reply = await rig.call(x_concertmaster_deadline_ms="soon")
            assert reply.status == 400
            assert reply.error["message"] == (
                "x-concertmaster-deadline-ms: expected milliseconds from 1 to 86400000, "
                "found 'soon'"
            )

    play(main())


HEADERS = b"".join(b"h%d: %b\r\n" % (i, b"v" * 90) for i in range(800))


@pytest.mark.parametrize(
    ("flood", "packet_bytes"),
    [
        (b"GET /livez HTTP/1.1\r\n" + HEADERS + b"\r\n", 100_000),
        (b"GET /livez HTTP/1.1\r\n" + HEADERS, 10_000),
        (b"GET /livez HTTP/1.1\r\nendless: " + b"v" * 400_000, 10_000),
        (b"GET /" + b"v" * 400_000, 10_000),
    ],
    ids=["a whole head", "many headers", "an endless header", "an endless target"],
)
def test_a_flood_of_headers_is_refused(flood: bytes, packet_bytes: int) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            for start in range(0, len(flood), packet_bytes):
                if wire.writer.transport.is_closing():
                    break  # it was refused, and cut off in the end
                wire.send(flood[start : start + packet_bytes])
                await asyncio.sleep(0.001)
            status, body = await wire.answer()
            assert status == 431
            error = json.loads(body)["error"]
            assert error["message"] == "headers: expected at most 65536 bytes"
            assert await wire.rest() == b""

    play(main())


def test_what_is_no_http_is_a_bad_request_after_the_calls_before_it() -> None:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.01)
        out.write(an_answer(b"served"))

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call() + b"\x16\x03\x01 hello\r\n\r\n")
            assert await wire.answer() == (200, b"served")
            status, body = await wire.answer()
            assert status == 400
            assert json.loads(body)["error"]["message"].startswith("request: expected HTTP/1.1")
            assert await wire.rest() == b""

    play(main())


def test_a_fault_of_our_own_is_a_500_and_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        async with over_upstreams(may_log=True) as (rig, _):
            with monkeypatch.context() as patch:
                patch.setattr(openai_api, "parse_call", broken)
                reply = await rig.call()
            assert reply.status == 500
            assert reply.error == {
                "message": "internal error; the log says more",
                "type": "server_error",
                "param": None,
                "code": "internal",
            }
            await rig.idle()
            assert (await rig.call()).status == 200
        assert f"b'POST' b'{CHAT}' failed" in caplog.text

    play(main())
