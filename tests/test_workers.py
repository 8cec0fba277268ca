"""Several workers for one scheduler: what one process promises, several keep."""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.config_files import load_fleet
from concertmaster.core.errors import InputError
from concertmaster.gateway.trails import LATEST, MOST_GROWING, PromptTrail
from concertmaster.gateway.workers.carrier import Carrier
from concertmaster.gateway.workers.frames import Frame, FromWorker, Gone, Progress, Say
from concertmaster.gateway.workers.opening import told as told_of
from concertmaster.gateway.workers.wire import Wire
from concertmaster.serving import check_workers
from crew import over_engines, over_upstreams
from gateway_rig import (
    CHAT,
    STREAM_HEAD,
    Heard,
    a_body,
    a_call,
    a_chunk,
    a_message,
    an_answer,
    cuts,
    events,
    exactly,
    hangs,
    play,
    says_hello,
    until,
)
from gateway_rig import Wire as Line
from test_engine_watch import _certificate
from test_gateway_keys import Safe


async def one_token_then_more(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(STREAM_HEAD + a_chunk(b'data: {"n":1}\n\n'))
    await asyncio.sleep(0.4)
    out.write(events({"n": 2}))


async def one_token_then_cut(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(STREAM_HEAD + a_chunk(b'data: {"n":1}\n\n'))
    await asyncio.sleep(0.1)
    out.transport.abort()


async def fails(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(an_answer(b"no", "500 Internal Server Error"))


async def slowly(_: Heard, out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.4)
    out.write(an_answer(b'{"usage":{"completion_tokens":1}}'))


# What they do together.


def test_calls_over_two_workers_are_all_answered_by_one_scheduler() -> None:
    async def main() -> None:
        async with over_engines() as crew:
            wires = [await crew.wire(number % 2) for number in range(12)]
            for wire in wires:
                wire.send(a_call(**exactly(8)))
                wire.send(a_call(stream=False, **exactly(5)))
            for wire in wires:
                for tokens in (8, 5):
                    status, body = await wire.answer()
                    assert status == 200
                    assert json.loads(body)["usage"]["completion_tokens"] == tokens
            await crew.idle()
            assert [line.calls for line in crew.hub.lines.values()] == [12, 12]
            assert crew.rig.gateway.metrics.by_status[200] == 24
            assert crew.rig.gateway.metrics.output_tokens == 12 * 13

    play(main())


def test_a_stream_goes_through_byte_for_byte_and_the_core_hears_of_it() -> None:
    async def main() -> None:
        async with over_upstreams(one_token_then_more) as (crew, _):
            wire = await crew.wire(1)
            wire.send(a_call(stream=True))
            head = await wire.head()
            assert b"x-concertmaster-replica: p-0\r\n" in head
            body = await wire.reader.readuntil(b"\r\n0\r\n\r\n")
            assert body == a_chunk(b'data: {"n":1}\n\n') + events({"n": 2})
            await crew.idle()
            told = [type(event).__name__ for event in crew.rig.history]
            assert "TokensStreamed" in told
            assert told[-1] == "RequestFinished"

    play(main())


def test_a_turn_that_comes_to_another_worker_goes_on_with_its_workflow() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
            workflows = set()
            for turn in range(4):
                wire = await crew.wire(turn % 2)
                wire.send(a_call(messages=messages))
                head = await wire.head()
                workflows.add(head.partition(b"workflow-id: ")[2].partition(b"\r\n")[0])
                messages += [
                    {"role": "assistant", "content": "x"},
                    {"role": "user", "content": "y"},
                ]
            assert workflows == {b"inferred-1"}

    play(main())


def test_a_sub_agent_of_a_sub_agent_is_counted_to_a_root_that_another_worker_saw() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            named = []
            for number, (session, parent) in enumerate([("a", ""), ("b", "a"), ("c", "b")]):
                wire = await crew.wire(number % 2)
                headers = {"x-session-id": session}
                headers |= {"x-parent-session-id": parent} if parent else {}
                wire.send(a_message("POST", CHAT, json.dumps(a_body()).encode(), headers))
                head = await wire.head()
                named.append(head.partition(b"workflow-id: ")[2].partition(b"\r\n")[0])
            assert named == [b"a", b"a", b"a"]

    play(main())


def test_a_limit_of_a_tenant_is_one_for_all_workers(tmp_path: Path) -> None:
    safe = Safe(tmp_path / "keys.sqlite")
    key = {"authorization": f"Bearer {safe.key(requests_per_min=5)}"}

    async def main() -> None:
        async with over_upstreams(keys=str(safe.path)) as (crew, upstream):
            statuses = []
            for number in range(10):
                wire = await crew.wire(number % 2)
                wire.send(a_message("POST", CHAT, json.dumps(a_body()).encode(), key))
                statuses.append((await wire.answer())[0])
            assert statuses == [200] * 5 + [429] * 5
            assert len(upstream.heard) == 5
            assert "authorization" not in upstream.heard[0].headers
            wire = await crew.wire(0)
            wire.send(a_call())
            assert (await wire.answer())[0] == 401
            wire = await crew.wire(1)
            wire.send(a_message("GET", "/v1/models", b"", key))
            assert (await wire.answer())[0] == 200
            wire.send(a_message("GET", "/metrics", b"", key))
            assert (await wire.answer())[0] == 403
            await until(lambda: crew.rig.gateway.metrics.by_status[401] == 1)
            await crew.idle()

    play(main())


def test_requests_in_flight_are_counted_over_all_workers(tmp_path: Path) -> None:
    safe = Safe(tmp_path / "keys.sqlite")
    key = {"authorization": f"Bearer {safe.key(in_flight=1)}"}
    message = a_message("POST", CHAT, json.dumps(a_body()).encode(), key)

    async def main() -> None:
        async with over_upstreams(slowly, keys=str(safe.path)) as (crew, upstream):
            first, second = await crew.wire(0), await crew.wire(1)
            first.send(message)
            await until(lambda: upstream.heard)
            second.send(message)
            assert (await second.answer())[0] == 429
            assert (await first.answer())[0] == 200
            second.send(message)
            assert (await second.answer())[0] == 200

    play(main())


# Answers of the gateway.


@pytest.mark.parametrize(
    ("call", "status", "code"),
    [
        (a_call(model="other"), 404, "model_not_found"),
        (a_call(max_tokens=0), 400, "invalid_request"),
        (a_message("POST", CHAT, b"{"), 400, "invalid_request"),
        (a_message("POST", CHAT, b"{}", {"x-concertmaster-stage": "x"}), 400, "invalid_request"),
        (a_message("GET", CHAT), 405, "method_not_allowed"),
        (a_message("POST", "/nowhere"), 404, "not_found"),
    ],
)
def test_a_call_that_cannot_be_served_is_told_why(call: bytes, status: int, code: str) -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, upstream):
            wire = await crew.wire(1)
            wire.send(call)
            found, body = await wire.answer()
            assert (found, json.loads(body)["error"]["code"]) == (status, code)
            assert not upstream.heard
            wire.send(a_call())
            assert (await wire.answer())[0] == 200
            await crew.idle()

    play(main())


def test_what_is_no_call_is_answered_by_the_scheduler_and_liveness_by_each() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            wire = await crew.wire(0)
            for path in ("/livez", "/readyz", "/v1/models", "/state"):
                wire.send(a_message("GET", path))
                assert (await wire.answer())[0] == 200
            wire.send(a_message("HEAD", "/v1/models"))
            assert b"200 OK" in await wire.head()
            wire.send(a_message("GET", "/v1/models"))
            assert b'"auto"' in (await wire.answer())[1]
            await until(lambda: crew.hub.lines[1].cpu_s > 0)
            text = (await crew.rig.ask("GET", "/metrics")).body.decode()
            for number in (0, 1):
                assert f'concertmaster_worker_connections{{worker="{number}"}}' in text
                assert f'concertmaster_worker_cpu_seconds_total{{worker="{number}"}}' in text
            assert "concertmaster_scheduler_cpu_seconds_total" in text

    play(main())


def test_the_responses_api_goes_on_at_another_worker() -> None:
    async def says(_: Heard, out: asyncio.StreamWriter) -> None:
        message = {"role": "assistant", "content": "hi"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = {"id": "c", "model": "m", "choices": [choice], "usage": usage}
        out.write(an_answer(json.dumps(body).encode(), headers=["content-type: application/json"]))

    async def main() -> None:
        async with over_upstreams(says) as (crew, upstream):
            previous: dict[str, str] = {}
            for number in (0, 1):
                wire = await crew.wire(number)
                body = json.dumps({"model": "m", "input": "hello", **previous}).encode()
                wire.send(a_message("POST", "/v1/responses", body))
                status, answer = await wire.answer()
                assert status == 200
                previous = {"previous_response_id": json.loads(answer)["id"]}
            assert len(upstream.heard[1].json["messages"]) == 3
            await crew.idle()

    play(main())


def test_an_error_is_worded_in_the_api_of_the_call() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            wire = await crew.wire(0)
            body = {"model": "other", "max_tokens": 9, "messages": a_body()["messages"]}
            wire.send(a_message("POST", "/v1/messages", json.dumps(body).encode()))
            status, answer = await wire.answer()
            assert status == 404
            assert json.loads(answer)["type"] == "error"

    play(main())


# Engines that fail.


def test_an_attempt_that_fails_is_made_again_elsewhere() -> None:
    async def main() -> None:
        async with over_upstreams(fails, says_hello) as (crew, upstreams):
            wire = await crew.wire(0)
            for _ in range(4):
                wire.send(a_call())
                assert (await wire.answer())[0] == 200
            assert upstreams[0].heard
            await crew.idle()

    play(main())


def test_a_call_that_no_engine_answers_is_refused_with_the_reason() -> None:
    async def main() -> None:
        async with over_upstreams(cuts, cuts, cuts, may_log=True) as (crew, _):
            wire = await crew.wire(1)
            wire.send(a_call())
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (502, "engine_error")
            await crew.idle()

    play(main())


def test_a_stream_that_breaks_ends_with_an_error_and_never_cleanly() -> None:
    async def main() -> None:
        async with over_upstreams(one_token_then_cut) as (crew, _):
            wire = await crew.wire(0)
            wire.send(a_call(stream=True))
            rest = await wire.rest()
            assert b'"code":"engine_error"' in rest
            assert not rest.endswith(b"0\r\n\r\n")
            await crew.idle()

    play(main())


def test_silence_of_an_engine_ends_in_time() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, first_byte_timeout_s=0.2, retry_ratio=0.0) as (crew, _):
            wire = await crew.wire(0)
            wire.send(a_call(stream=True))
            assert b"50" in (await wire.head())[:12]
            await crew.idle()

    play(main())


def test_a_call_that_takes_too_long_as_a_whole_is_refused() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, total_timeout_s=0.3) as (crew, upstream):
            wire = await crew.wire(0)
            wire.send(a_call())
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (504, "timed_out")
            await until(lambda: upstream.lost == 1)
            await crew.idle()

    play(main())


# Who goes away.


def test_an_agent_that_leaves_frees_its_engine_and_the_ledgers() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (crew, upstream):
            wire = await crew.wire(1)
            wire.send(a_call())
            await until(lambda: upstream.heard)
            await wire.close()
            await until(lambda: upstream.lost == 1)
            await crew.idle()

    play(main())


def test_calls_of_a_worker_that_is_gone_leave_the_ledgers_and_those_of_others_stay() -> None:
    async def main() -> None:
        async with over_upstreams(slowly) as (crew, upstream):
            lost, kept = await crew.wire(0), await crew.wire(1)
            lost.send(a_call())
            kept.send(a_call())
            await until(lambda: len(upstream.heard) == 2)
            assert len(crew.rig.replica().in_flight) == 2
            line = crew.hub.lines[0]
            assert line._wire._transport is not None
            line._wire._transport.abort()
            await until(lambda: len(crew.rig.replica().in_flight) == 1)
            assert (await kept.answer())[0] == 200
            assert (await lost.answer())[0] == 200  # its engine still had it
            await crew.idle()
            assert crew.rig.gateway.metrics.by_status == {499: 1, 200: 1}

    play(main())


def test_without_a_scheduler_calls_are_refused_and_those_at_engines_end() -> None:
    async def main() -> None:
        async with over_upstreams(one_token_then_more, may_log=True) as (crew, _):
            streams, waits = await crew.wire(0), await crew.wire(0)
            streams.send(a_call(stream=True))
            assert b"200 OK" in await streams.head()
            carrier = crew.carrier(0)
            waits.send(a_call(stream=True))
            await until(lambda: carrier.open_calls == 2)
            crew.lose_scheduler()
            await until(lambda: len(carrier._orphans) == 2)
            body = await streams.reader.readuntil(b"0\r\n\r\n")
            assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            await until(lambda: carrier._wire is not None)
            again = await crew.wire(0)
            again.send(a_call(stream=True))
            assert b"200 OK" in await again.head()
            await again.reader.readuntil(b"0\r\n\r\n")
            await crew.idle()

    play(main())


def test_calls_that_wait_for_a_word_of_a_dead_scheduler_get_503_and_when_to_try_again() -> None:
    async def main() -> None:
        async with over_upstreams(may_log=True) as (crew, _):
            carrier, wire = crew.carrier(0), await crew.wire(0)
            line = crew.hub.lines[0]
            assert line._wire._transport is not None
            line._wire._transport.pause_reading()  # it hangs, then dies
            wire.send(a_call())
            await until(lambda: carrier.open_calls)
            crew.lose_scheduler()
            head = await wire.head()
            assert b"503" in head
            assert b"retry-after: 1\r\n" in head
            assert not carrier.open_calls

    play(main())


def test_a_broken_answer_of_nobodys_call_is_told_by_the_worker() -> None:
    async def cut_late(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(cut_late, may_log=True) as (crew, upstream):
            wire = await crew.wire(0)
            wire.send(a_call())
            await until(lambda: upstream.heard)
            crew.lose_scheduler()
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (502, "engine_error")

    play(main())


def test_while_it_drains_new_calls_are_refused_and_open_ones_end() -> None:
    async def main() -> None:
        async with over_upstreams(slowly) as (crew, upstream):
            opened, late = await crew.wire(0), await crew.wire(1)
            opened.send(a_call())
            await until(lambda: upstream.heard)
            crew.rig.gateway.draining = True
            late.send(a_call())
            assert (await late.answer())[0] == 503
            late.send(a_message("GET", "/readyz"))
            assert (await late.answer())[0] == 503
            assert (await opened.answer())[0] == 200

    play(main())


def test_a_larger_limit_reaches_workers_while_they_serve() -> None:
    async def main() -> None:
        async with over_upstreams(max_body_mb=0.001) as (crew, _):
            big = a_call(messages=[{"role": "user", "content": "x" * 2000}])
            wire = await crew.wire(0)
            wire.send(big)
            assert (await wire.answer())[0] == 413
            crew.rig.gateway.max_body_bytes = 10_000
            await until(lambda: crew.carrier(0).max_body_bytes == 10_000)
            wire = await crew.wire(0)
            wire.send(big)
            assert (await wire.answer())[0] == 200

    play(main())


def test_each_worker_speaks_tls(tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path)
    trust = ssl.create_default_context(cafile=certificate)
    trust.check_hostname = False

    async def main() -> None:
        async with over_upstreams(tls_cert=str(certificate), tls_key=str(key)) as (crew, _):
            for _ in range(6):
                wire = Line(*await asyncio.open_connection("127.0.0.1", crew.rig.port, ssl=trust))
                wire.send(a_call())
                assert (await wire.answer())[0] == 200
                await wire.close()
            await crew.idle()

    play(main())


# Frames.

frames = st.one_of(
    st.builds(Gone, st.integers(0, 2**40)),
    st.builds(
        Progress,
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))),
        st.lists(st.integers(100, 599)),
        st.integers(0, 9),
        st.floats(0, 9),
    ),
)


class _Pipe(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: Any) -> None:  # noqa: ANN401
        self.data += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


@given(batches=st.lists(st.lists(frames, min_size=1, max_size=5), max_size=4), data=st.data())
def test_frames_arrive_whole_and_in_order_wherever_the_bytes_are_split(
    batches: list[list[FromWorker]], data: st.DataObject
) -> None:
    async def main() -> None:
        pipe = _Pipe()
        sender: Wire[FromWorker] = Wire(list[FromWorker], lambda *_: None, lambda _: None)
        sender.connection_made(pipe)
        for batch in batches:
            for frame in batch:
                sender.tell(frame)
            await asyncio.sleep(0)
        heard: list[Frame] = []
        ear: Wire[FromWorker] = Wire(
            list[FromWorker], lambda _, frame: heard.append(frame), lambda _: None
        )
        rest = pipe.data
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            ear.data_received(rest[:size])
            rest = rest[size:]
        assert heard == [frame for batch in batches for frame in batch]

    asyncio.run(main())


ids = st.sampled_from(["t1", "t2", "t3"])
turns = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": st.text(max_size=9)}, optional={"tool_call_id": ids}
)


@given(st.one_of(st.lists(turns, max_size=2 * LATEST), st.text(max_size=9)), st.integers(0, 20))
def test_a_trail_that_is_told_says_what_the_prompt_does(prompt: object, known: int) -> None:
    text = memoryview(json.dumps(prompt).encode())
    here = PromptTrail(text, "team")
    told = told_of(here)
    assert list(told.ends) == list(here.ends)
    assert told.last == here.last
    assert (len(told.last) > 0) == (len(told.ends) <= MOST_GROWING)
    if known <= len(here.ends):
        assert list(told.tool_calls(known)) == list(here.tool_calls(known))


def test_words_for_a_call_that_has_ended_are_passed_over() -> None:
    async def main() -> None:
        async with over_upstreams() as (crew, _):
            carrier: Carrier = crew.carrier(0)
            carrier.hear(None, Say(99, held=False, data=b"x"))  # type: ignore[arg-type]
            crew.hub.lines[0].hear(None, Gone(99))  # type: ignore[arg-type]

    play(main())


# Settings.


def test_engines_that_the_gateway_starts_need_one_process(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    pool = '[[pools]]\nname = "p"\nmodel = "qwen2.5-1.5b-instruct"\ngpu = "a40"\n'
    path.write_text(f'{pool}endpoints = ["http://127.0.0.1:1"]\ncommand = ["run"]\n')
    file = load_fleet(path)
    check_workers("fleet.toml", file, 1)
    with pytest.raises(InputError, match=r'gateway.workers: expected 1 .* pool "p", found 2'):
        check_workers("fleet.toml", file, 2)
