"""Bytes that no client should send: every answer is HTTP, an error in its API's words, and no 500.

What is written here goes straight into a connection, so that it is cut exactly where it says.
"""

import asyncio
import json
import re
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concertmaster.gateway import agent
from concertmaster.gateway.agent import AgentConnection
from concertmaster.gateway.apis.anthropic_answer import speaks
from concertmaster.gateway.receipts import Receipts
from gateway_rig import CHAT, TEXT, Rig, a_body, a_call, a_message, over_upstreams, play, until
from live_gateway import Live, answers_anything, live

fuzz = settings(
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
OURS = frozenset({200, 204, 400, 404, 405, 413, 431})
"""What may be answered where engines and gateway are well."""


@pytest.fixture(scope="module", name="gateway")
def _gateway() -> Iterator[Live]:
    with live(over_upstreams(answers_anything, max_body_mb=0.05)) as running:
        yield running


# A wire that is cut where the test says.


class Pipe(asyncio.Transport):
    """The transport of a connection that nobody is at the other end of."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:  # noqa: ANN401  # as the base class has it
        assert not self.closed, "written after the end"
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Go on: the test has written all there is."""

    def resume_reading(self) -> None:
        """Go on."""


async def said_to(rig: Rig, packets: Sequence[bytes]) -> bytes:
    """Return what is answered to packets, once nothing more is to come."""
    connection, pipe = AgentConnection(rig.gateway), Pipe()
    connection.connection_made(pipe)
    for packet in packets:
        connection.data_received(packet)
    try:
        await until(lambda: pipe.closed or connection.gone or not connection.busy, "an answer")
    finally:
        connection.connection_lost(None)
    return pipe.written


class Answers:
    """Reads answers as an independent client would.

    Attributes:
        found: Status, media type and body of each that is whole.
        open: Whether one is not.
    """

    def __init__(self, data: bytes) -> None:
        self.found: list[tuple[int, str, bytes]] = []
        self.open = False
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.open, self._body, self._type = True, b"", ""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._type = value.decode()

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        self.open = False
        if (status := self._parser.get_status_code()) != 100:
            self.found.append((status, self._type, self._body))


def check(data: bytes, sent: bytes) -> list[int]:
    """Judge all that was answered; return the statuses."""
    answers = Answers(data)
    assert not answers.open, data
    for status, kind, body in answers.found:
        assert status in OURS, (status, body)
        if status >= 400:
            assert kind == "application/json"
            check_error(json.loads(body), sent)
    return [status for status, _, _ in answers.found]


def check_error(answer: Any, sent: bytes) -> None:  # noqa: ANN401
    """An error is in the words of the API that was asked; where both were, of either."""
    anthropics = MESSAGES.encode() in sent
    if anthropics and answer.get("type") == "error":
        assert {*answer} <= {"type", "error", "request_id"}
        assert {*answer["error"]} == {"type", "message"}
        return
    assert list(answer) == ["error"]
    assert list(answer["error"]) == ["message", "type", "param", "code"]
    if answer["error"]["message"].startswith("request: "):
        return  # it was no HTTP, so no API was asked
    only = re.findall(rb"[A-Z]+ (\S+) HTTP", sent)
    assert not (only and all(map(speaks, only))), answer


async def is_well(rig: Rig) -> None:
    """It serves, and nothing of what came before is left."""
    await rig.idle()
    receipts: Receipts = rig.gateway.metrics.witnesses[1]  # type: ignore[assignment]
    assert not receipts._open
    assert not rig.gateway.scheduler.line.lanes
    assert (await rig.call()).status == 200


# What is sent.

CHATS = [
    a_body(),
    a_body(stream=True),
    a_body(model="auto", max_tokens=3, metadata={"session_id": "s"}),
    a_body(model=["m", "x"], tools=[{"type": "function"}]),
    {"model": "m", "prompt": "Say it."},
    {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Say it."}]},
    {"model": "m", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": []}]},
    {"model": "m", "input": "Say it."},
    {"model": "m", "input": [{"role": "user", "content": "Say it."}], "stream": True},
]
PATHS = [
    CHAT, TEXT, MESSAGES, f"{MESSAGES}/count_tokens", RESPONSES, "/v1/embeddings", "/v1/models",
    "/v1/decisions", "/v1/decisions/cm-1", "/v1/workflows/w/grade", f"{RESPONSES}/resp_1",
    "/openapi.json", "/state", "/metrics", "/version", "/livez", "/readyz", "/", "//", "/v1",
    f"{MESSAGES}?beta=true", f"{CHAT}?x=%ff%00", "/%2e%2e/%ff", "*", "http://x/", "/v1/messagesx",
]  # fmt: skip
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just("m")
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def wrong_fields(draw: st.DrawFn) -> bytes:
    """A body some of whose fields, at any depth, are something else."""
    fields: Any = json.loads(json.dumps(draw(st.sampled_from(CHATS))))
    for _ in range(draw(st.integers(0, 3))):
        place = fields
        while isinstance(place, list | dict) and place:
            keys = list(range(len(place))) if isinstance(place, list) else [*place]
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], list | dict) or draw(st.booleans()):
                place[key] = draw(values)
                break
            place = place[key]
    return json.dumps(fields).encode()


@st.composite
def broken_bytes(draw: st.DrawFn) -> bytes:
    """A body with bytes changed, lost or added: bad JSON, bad UTF-8."""
    body = bytearray(draw(wrong_fields()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(body)


bodies = st.one_of(
    wrong_fields(),
    broken_bytes(),
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"[" * 3000, b'{"a":' * 3000, b"9" * 400, b'"\\ud800"', b"\xef\xbb\xbf{}"]
    ),
)
LINES = [
    b"x-request-id: \xff\xfe", b"x-concertmaster-deadline-ms: 1e9", b"x-concertmaster-stage: -1",
    b"x-concertmaster-class: batch", b"x-concertmaster-class: \xe9", b"expect: 100-continue",
    b"connection: close", b"connection: keep-alive, x-a", b"connection: upgrade\r\nupgrade: h2c",
    b"accept-encoding: gzip", b"content-encoding: gzip", b"x-session-id: " + b"s" * 3000,
    b"a: " + b"v" * 70_000, b"content-type: text/plain", b"host: a\r\nhost: b", b"x-a:",
    b"session-id: %ff%00", b"x-claude-code-session-id: \x80", b"te: trailers",
    b"cookie: " + b"c" * 900,
]  # fmt: skip
FLOOD = b"\r\n".join(b"h%d: v" % number for number in range(200))


@st.composite
def chunked(draw: st.DrawFn, body: bytes) -> bytes:
    """The chunks of a body, some of them nonsense."""
    sizes = draw(st.lists(st.integers(1, 40), max_size=5))
    framed, at = b"", 0
    for size in [*sizes, len(body)]:
        if part := body[at : at + size]:
            framed += b"%x%b\r\n%b\r\n" % (len(part), draw(st.sampled_from([b"", b";e=1"])), part)
        at += size
    end = draw(
        st.sampled_from([b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"0\r\n\r\n", b"zz\r\n"])
    )
    return framed + end


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A request, good or bad."""
    method = draw(st.sampled_from([b"POST"] * 6 + [b"GET", b"DELETE", b"PUT", b"get", b"OPTIONS"]))
    path = draw(st.sampled_from(PATHS[:7] * 2 + PATHS)).encode()
    body = draw(bodies)
    lines = draw(st.lists(st.sampled_from(LINES), max_size=3))
    if draw(st.integers(0, 20)) == 0:
        lines.append(FLOOD)
    framing = draw(st.sampled_from(["length"] * 5 + ["chunks"] * 2 + ["both", "short", "none"]))
    if framing in ("chunks", "both"):
        lines.append(b"transfer-encoding: chunked")
        body = draw(chunked(body))
    if framing in ("length", "both", "short"):
        length = len(body) - (framing == "short" and len(body) // 2)
        lines.append(b"content-length: %d" % length)
    version = draw(st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/2.0", b""]))
    return b"\r\n".join([b"%b %b %b" % (method, path, version), *lines, b"", body])


@st.composite
def wires(draw: st.DrawFn) -> list[bytes]:
    """Requests in a row, cut anywhere into packets."""
    data = b"".join(draw(st.lists(messages(), min_size=1, max_size=4)))
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[i:j] for i, j in zip([0, *at], [*at, len(data)], strict=True)]


# What must hold.


@fuzz
@given(packets=wires())
def test_whatever_comes_is_answered_in_form_and_never_with_a_500_of_ours(
    packets: list[bytes], gateway: Live
) -> None:
    check(gateway.do(said_to(gateway.rig, packets)), b"".join(packets))
    gateway.do(gateway.rig.idle())


@fuzz
@given(message=messages(), data=st.data())
def test_where_packets_are_cut_changes_nothing(
    message: bytes, data: st.DataObject, gateway: Live
) -> None:
    whole = gateway.do(said_to(gateway.rig, [message]))
    if data.draw(st.integers(0, 9)) == 0 and len(message) < 2000:
        packets = [bytes([byte]) for byte in message]
    else:
        at = data.draw(st.integers(0, len(message)))
        packets = [message[:at], message[at:]]
    cut = gateway.do(said_to(gateway.rig, packets))
    assert check(cut, message) == check(whole, message)


def test_bad_utf_8_reaches_no_engine(gateway: Live) -> None:
    for path in (CHAT, TEXT):
        message = a_message("POST", path, b'{"model":"m","messages":["\xff"],"prompt":"\xff\xff"}')
        answer = gateway.do(said_to(gateway.rig, [message]))
        assert b"400 Bad Request" in answer
        assert b"expected a JSON object in UTF-8" in answer


@fuzz
@given(body=bodies, path=st.sampled_from(PATHS[:6]))
def test_a_body_of_anything_is_served_or_refused_with_400(
    body: bytes, path: str, gateway: Live
) -> None:
    answer = gateway.do(said_to(gateway.rig, [a_message("POST", path, body)]))
    assert len(check(answer, a_message("POST", path))) == 1


def test_nothing_is_left_of_all_that(gateway: Live) -> None:
    gateway.do(is_well(gateway.rig))


# Large bodies.


@pytest.mark.parametrize("framing", ["content-length: 100000000", "transfer-encoding: chunked"])
def test_100_mb_are_refused_early_and_not_kept(
    framing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_LINGER_S", 0.5)
    piece = b"186a0\r\n" + b"x" * 100_000 + b"\r\n"

    async def main() -> None:
        async with over_upstreams(answers_anything, max_body_mb=1.0) as (rig, upstream):
            wire = await rig.wire()
            wire.send(f"POST {CHAT} HTTP/1.1\r\n{framing}\r\n\r\n".encode())
            tracemalloc.start()
            try:
                for _ in range(1000):
                    if wire.writer.transport.is_closing():
                        break  # refused, and cut off in the end
                    wire.send(piece)
                    await wire.writer.drain()
                    if tracemalloc.get_traced_memory()[1] > 8_000_000:
                        break
            except ConnectionError:
                pass  # the same
            _, most_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert most_bytes < 8_000_000
            assert (await wire.answer())[0] == 413
            assert not upstream.heard
            await is_well(rig)

    play(main())


def test_a_refused_body_is_let_go_at_once() -> None:
    async def main() -> None:
        async with over_upstreams(answers_anything, max_body_mb=1.0) as (rig, _):
            connection, pipe = AgentConnection(rig.gateway), Pipe()
            connection.connection_made(pipe)
            connection.data_received(
                f"POST {CHAT} HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".encode()
            )
            for _ in range(11):
                connection.data_received(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
            assert Answers(pipe.written).found[0][0] == 413
            assert not connection._body
            connection.connection_lost(None)

    play(main())


# Slow readers.


def test_a_call_whose_caller_does_not_read_holds_up_nobody_else(gateway: Live) -> None:
    async def main() -> None:
        wire = await gateway.rig.wire()
        wire.send(a_call(stream=True) * 40)
        for _ in range(5):
            assert (await gateway.rig.call()).status == 200
        await wire.close()
        await is_well(gateway.rig)

    gateway.do(main())
