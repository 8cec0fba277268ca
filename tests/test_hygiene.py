"""What a gateway must not believe, pass on, wait for or write down."""

import asyncio
import json
import logging
import re
import socket
import ssl
import subprocess
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import a_fleet
from concertmaster import forecaster
from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.gateway import agent, identity
from concertmaster.gateway.agent import Message
from concertmaster.gateway.heads import engine_head
from concertmaster.gateway.reach import tls_of
from concertmaster.observe.trace import Header, TraceWriter
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
from gateway_rig import (
    CHAT,
    Heard,
    Wire,
    a_body,
    a_call,
    a_message,
    an_answer,
    over_upstreams,
    play,
)

BODY = json.dumps(a_body()).encode()


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_LINGER_S", 0.05)


def posted(*headers: bytes, body: bytes = BODY) -> bytes:
    return b"\r\n".join([b"POST " + CHAT.encode() + b" HTTP/1.1", *headers, b"", body])


# Where does a message end? All who read it must agree.

LENGTH = b"content-length: %d" % len(BODY)
CHUNKS = b"transfer-encoding: chunked"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = {
    "length and chunks": posted(LENGTH, CHUNKS, body=CHUNKED),
    "chunks and length": posted(CHUNKS, LENGTH, body=CHUNKED),
    "two lengths": posted(LENGTH, b"content-length: 3"),
    "two equal lengths": posted(LENGTH, LENGTH),
    "a list of lengths": posted(b"content-length: %d, %d" % (len(BODY), len(BODY))),
    "a length with a sign": posted(b"content-length: +%d" % len(BODY)),
    "a negative length": posted(b"content-length: -1"),
    "a length in hex": posted(b"content-length: 0x10"),
    "no length": posted(b"content-length:"),
    "an endless length": posted(b"content-length: " + b"9" * 40),
    "chunks not last": posted(b"transfer-encoding: chunked, identity", body=CHUNKED),
    "chunks by halves": posted(b"transfer-encoding: xchunked", body=CHUNKED),
    "chunks with a space": posted(b"transfer-encoding : chunked", body=CHUNKED),
    "a chunk size of letters": posted(CHUNKS, body=b"zz\r\n" + BODY),
    "a chunk size with a sign": posted(CHUNKS, body=b"-1\r\n" + BODY),
    "a chunk size beyond 64 bits": posted(CHUNKS, body=b"f" * 17 + b"\r\n" + BODY),
    "a chunk that is too short": posted(CHUNKS, body=b"2\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a header split by a bare return": posted(LENGTH, b"a: b\rcontent-length: 3"),
    "a header with a nought": posted(LENGTH, b"a: b\x00c"),
    "a name with a space": posted(LENGTH, b"a b: c"),
    "a header without a name": posted(LENGTH, b": c"),
    "lines that end in a line feed": posted(LENGTH).replace(b"\r\n", b"\n"),
    "a folded header": posted(LENGTH, b"a: b\r\n content-length: 3"),
}


@pytest.mark.parametrize("message", SMUGGLED.values(), ids=SMUGGLED.keys())
def test_a_message_whose_end_is_in_doubt_is_refused_and_nothing_after_it_is_read(
    message: bytes,
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            wire.send(message)
            wire.send(a_message("GET", "/version"))
            status, _ = await wire.answer()
            assert status in {400, 413}
            assert await wire.rest() == b""
            assert not upstream.heard

    play(main())


def test_what_a_body_hides_is_no_second_request() -> None:
    hidden = a_message("GET", "/state").decode()

    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call(x=hidden))
            assert (await wire.answer())[0] == 200
            wire.send(a_message("GET", "/version"))
            assert b"version" in (await wire.answer())[1]
            assert [heard.json["x"] for heard in upstream.heard] == [hidden]

    play(main())


def test_a_header_of_a_call_cannot_end_the_head_that_an_engine_gets() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call(session_id="a\r\nx-injected: 1", metadata={"session_id": "b\n\nc"}))
            head = await wire.head()
            assert b"x-injected: 1" not in head.split(b"\r\n")
            assert upstream.heard[0].headers.keys() <= {"host", "content-length", "x-request-id"}

    play(main())


# Headers that stop here.

TOKEN = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=12).map(str.encode)


def heard_of(headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
    message = Message(b"POST", b"/v1/chat/completions", headers, b"", keep_alive=True)
    _, *lines = engine_head(message, "id").removesuffix(b"\r\n").split(b"\r\n")
    return dict(line.split(b": ", 1) for line in lines)


@given(st.dictionaries(TOKEN, TOKEN, min_size=1, max_size=12), st.data())
def test_what_connection_names_goes_no_further(
    headers: dict[bytes, bytes], data: st.DataObject
) -> None:
    hops = data.draw(st.lists(st.sampled_from([*headers, b"absent"]), max_size=4))
    sent = {**headers, b"connection": b" , ".join([*hops, b"Close"])}
    heard = heard_of(sent)
    assert not {b"connection", *hops} & heard.keys() - {b"x-request-id"}
    assert heard[b"x-request-id"] == b"id"
    assert all(headers[name] == value for name, value in heard.items() if name != b"x-request-id")


@pytest.mark.parametrize(
    "name",
    [
        "connection",
        "keep-alive",
        "proxy-authorization",
        "proxy-authenticate",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "x-vllm-priority",
        "x-concertmaster-model",
        "x-concertmaster-replica",
        "x-concertmaster-why",
        "x-concertmaster-workflow-confidence",
        "x-concertmaster-anything-else",
    ],
)
def test_a_header_of_one_hop_or_of_ours_goes_no_further(name: str) -> None:
    assert heard_of({name.encode(): b"spoofed", b"kept": b"1"}) == {
        b"kept": b"1",
        b"x-request-id": b"id",
    }


def test_headers_that_tell_who_calls_reach_the_engine() -> None:
    sent = dict.fromkeys(identity.CALLERS_HEADERS | {b"session-id", b"x-session-id"}, b"1")
    assert heard_of(sent) == {**sent, b"x-request-id": b"id"}


def test_an_engine_cannot_speak_in_our_name() -> None:
    async def spoofs(_: Heard, out: asyncio.StreamWriter) -> None:
        headers = ("X-Concertmaster-Model: best", "x-concertmaster-why: bribed", "X-Request-Id: z")
        out.write(an_answer(b"x-concertmaster-model: in the body", headers=(*headers, "kept: 1")))

    async def main() -> None:
        async with over_upstreams(spoofs) as (rig, _):
            reply: Any = await rig.call(x_request_id="mine")
            assert reply.headers.getall("x-concertmaster-model") == ["m"]
            assert reply.headers.getall("x-request-id") == ["mine"]
            assert "bribed" not in reply.headers.getall("x-concertmaster-why")
            assert reply.headers["kept"] == "1"
            assert reply.body == b"x-concertmaster-model: in the body"

    play(main())


def test_no_call_makes_the_gateway_turn_to_another_host() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setblocking(False)  # noqa: FBT003
            elsewhere = f"127.0.0.1:{listener.getsockname()[1]}"
            spoofed = {
                "host": elsewhere,
                "x-forwarded-host": elsewhere,
                "forwarded": f"host={elsewhere}",
                "x-session-id": elsewhere,
                "x-gateway-destination-endpoint": elsewhere,
                "x-concertmaster-replica": elsewhere,
            }
            assert (await rig.call({"api_base": elsewhere}, **spoofed)).status == 200
            assert upstream.heard[0].headers["host"] == upstream.url.removeprefix("http://")
            wire = await rig.wire()
            target = f"http://{elsewhere}{CHAT}"
            wire.send(a_message("POST", target, BODY))
            assert (await wire.head()).split()[1] == b"404"
            with pytest.raises(BlockingIOError):
                listener.accept()
            listener.close()

    play(main())


# Limits.


@pytest.mark.parametrize(("count", "status"), [(128, 200), (129, 431)])
def test_a_head_has_at_most_128_headers(count: int, status: int) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            lines = b"".join(b"a: %d\r\n" % number for number in range(count))
            wire.send(b"GET /livez HTTP/1.1\r\n" + lines + b"\r\n")
            assert (await wire.head()).split()[1] == b"%d" % status

    play(main())


async def drip(wire: Wire, data: bytes) -> None:
    for at in range(len(data)):
        wire.send(data[at : at + 1])
        await asyncio.sleep(0.02)


PARTS = {
    "headers": (b"", a_call()[:60]),
    "body": (a_call().partition(b"\r\n\r\n")[0] + b"\r\n\r\n", b'{"model": "m", "messages": ['),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("drips", [True, False])
@pytest.mark.parametrize("again", [True, False], ids=["second", "first"])
def test_a_client_that_does_not_get_on_is_told_so_and_cut_off(
    part: str, *, drips: bool, again: bool
) -> None:
    async def main() -> None:
        timeouts = {f"{part}_timeout_s".replace("headers", "head"): 0.1}
        async with over_upstreams(**timeouts) as (rig, upstream):
            wire = await rig.wire()
            if again:
                wire.send(a_call())
                assert (await wire.answer())[0] == 200
            at_once, slow = PARTS[part]
            wire.send(at_once + slow[:1])
            dripping = asyncio.ensure_future(drip(wire, slow[1:] if drips else b""))
            status, body = await wire.answer()
            assert status == 408
            assert json.loads(body)["error"]["message"] == f"{part}: expected within 0.1 s"
            with suppress(ConnectionResetError):  # it may be cut off amid a drop
                assert await wire.rest() == b""
            dripping.cancel()
            assert len(upstream.heard) == again

    play(main())


def test_who_connects_and_says_nothing_is_cut_off_and_who_rests_between_calls_is_not() -> None:
    async def main() -> None:
        async with over_upstreams(head_timeout_s=0.1) as (rig, _):
            silent, resting = await rig.wire(), await rig.wire()
            resting.send(a_call())
            await resting.answer()
            assert await silent.rest() == b""
            await asyncio.sleep(0.3)
            resting.send(a_call())
            assert (await resting.answer())[0] == 200

    play(main())


def test_an_answer_that_takes_long_is_no_slow_client() -> None:
    async def slow(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        out.write(an_answer(b"late"))

    async def main() -> None:
        async with over_upstreams(slow, head_timeout_s=0.1, body_timeout_s=0.1) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call() + b"POST")
            assert await wire.answer() == (200, b"late")
            wire.send(a_call()[4:])
            assert await wire.answer() == (200, b"late")

    play(main())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from([*SMUGGLED.values(), a_call(), b"\x00\xff", b"\r\n"]), max_size=4))
def test_no_bytes_bring_the_parser_down(parts: list[bytes]) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            for part in parts:
                wire.send(part)
                await asyncio.sleep(0)
            await wire.close()
            assert (await rig.call()).status == 200

    play(main())


# What is written down.

MARKER = "zanzibar-7731"


def test_a_prompt_is_in_no_log_and_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(heard: Heard, out: asyncio.StreamWriter) -> None:
        status = "500 Oops" if b"fail" in heard.body else "200 OK"
        out.write(an_answer(b'{"error":"' + heard.body[:80].replace(b'"', b"'") + b'"}', status))

    section = GatewaySection(feedback=str(tmp_path / "labels.sqlite"))
    predictor = forecaster.serving_predictor(section, a_fleet(), trains=False)
    key, secret = new_key("team", now_s=1.0)
    with closing(KeyFile(tmp_path / "keys.sqlite")) as store:
        store.create(key)
    header = Header(trace=1, fleet="f", policy="p", seed=0)

    async def main() -> None:
        settings: Any = {"predictor": predictor, "keys": str(tmp_path / "keys.sqlite")}
        async with over_upstreams(fails, may_log=True, **settings) as (rig, up):
            rig.http.headers["x-api-key"] = secret
            rig.gateway._observe = writer
            said = [{"role": "user", "content": f"tell of {MARKER}"}]
            assert (await rig.call({"messages": said})).status == 200
            assert (await rig.call({"messages": said, "fail": 1})).status == 502
            assert (await rig.call({"messages": said, "max_tokens": 0})).status == 400
            broken = json.dumps(a_body(messages=said)).encode()[:-3]
            assert (await rig.ask("POST", CHAT, broken)).status == 400
            assert MARKER in repr(up.heard)

    with caplog.at_level(logging.DEBUG), TraceWriter(tmp_path / "a.trace.jsonl", header) as writer:
        play(main())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"labels.sqlite", "keys.sqlite", "a.trace.jsonl"} <= {path.name for path in files}
    assert b"RequestFinished" in (tmp_path / "a.trace.jsonl").read_bytes()
    for written in (caplog.text.encode(), *(path.read_bytes() for path in files)):
        for secret_text in (MARKER, secret):
            assert secret_text.encode() not in written


# TLS.


@pytest.fixture(name="pem", scope="module")
def _pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(  # noqa: S603
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_it_speaks_tls_with_the_files_it_is_given(pem: tuple[str, str]) -> None:
    async def main() -> None:
        async with over_upstreams(tls_cert=pem[0], tls_key=pem[1]) as (rig, _):
            trust = ssl.create_default_context(cafile=pem[0])
            streams = await asyncio.open_connection(
                "127.0.0.1", rig.port, ssl=trust, server_hostname="localhost"
            )
            wire = Wire(*streams)
            wire.send(a_call(x="y" * 300_000))
            assert (await wire.answer())[0] == 200
            assert wire.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
            await wire.close()
            plain = await rig.wire()
            plain.send(a_call())
            assert not re.match(rb"HTTP/1.1 200", await plain.rest())

    play(main())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tls_cert": "CERT"}, "gateway.tls_key: TLS needs both tls_cert and tls_key"),
        ({"tls_key": "KEY"}, "gateway.tls_cert: TLS needs both tls_cert and tls_key"),
        ({"tls_cert": "CERT", "tls_key": "/no/such.pem"}, "gateway.tls_cert: no certificate"),
        ({"tls_cert": "KEY", "tls_key": "CERT"}, "gateway.tls_cert: no certificate"),
    ],
)
def test_tls_files_that_do_not_fit_are_refused_at_the_start(
    files: dict[str, str], message: str, pem: tuple[str, str]
) -> None:
    named: dict[str, Any] = {
        name: value.replace("CERT", pem[0]).replace("KEY", pem[1]) for name, value in files.items()
    }
    with pytest.raises(InputError, match=re.escape(f"fleet.toml: {message}")):
        tls_of("fleet.toml", GatewaySection(**named))
