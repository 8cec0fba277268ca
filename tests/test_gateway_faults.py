import asyncio
import json
from collections.abc import Mapping

import openai
import pytest

from builders import READY_S, a_fleet, a_policy, a_pool, a_request
from concertmaster.core.events import ReplicaDied, ReplicaReady, RequestFailed
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.engines import control
from concertmaster.engines.faults import Faults
from concertmaster.gateway import health
from concertmaster.gateway.exchange import Exchange
from concertmaster.policies.admission import BoundedLine
from gateway_rig import (
    CHAT,
    STREAM_HEAD,
    Heard,
    Script,
    Upstream,
    Wire,
    a_call,
    a_chunk,
    a_rig,
    an_answer,
    cuts,
    events,
    exactly,
    hangs,
    over_engines,
    over_upstreams,
    play,
    says_hello,
    until,
)
from test_gateway_hedging import Deaf

LONG = exactly(5000)
FRAME = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


def fails(status: str, words: str) -> Script:
    body = json.dumps({"error": {"message": words}}).encode()

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(body, status))

    return script


async def dead_url() -> str:
    """Return an address where nobody listens."""
    async with Upstream() as upstream:
        return upstream.url


# Callers that leave.


@pytest.mark.parametrize("fields", [{"stream": True}, {}], ids=["stream", "whole answer"])
def test_a_caller_that_leaves_stops_the_engine(fields: Mapping[str, object]) -> None:
    async def main() -> None:
        async with over_engines(speedup=1.0) as (rig, (engine,)):
            wire = await rig.wire()
            wire.send(a_call(**LONG, **fields))
            if fields:
                await wire.head()
            await until(lambda: engine.live_calls == 1)
            await wire.close()
            await until(lambda: engine.live_calls == 0, "the engine stops")
            await rig.idle()
            assert engine.engine.running_requests == 0
            assert await rig.metric('concertmaster_requests_total{code="499"}') == 1

    play(main())


def test_a_caller_that_leaves_the_line_is_never_dispatched() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, fleet=a_fleet(a_pool(max_sequences=1))) as (rig, upstream):
            first, second = [await rig.wire() for _ in range(2)]
            first.send(a_call())
            await until(lambda: upstream.heard)
            second.send(a_call())
            await until(lambda: len(rig.gateway.scheduler.line) == 1)
            await second.close()
            await until(lambda: len(rig.gateway.scheduler.line) == 0)
            await first.close()
            await until(lambda: upstream.lost == 1)
            await rig.idle()
            assert len(upstream.heard) == 1

    play(main())


def test_a_caller_that_leaves_while_its_call_connects_costs_nothing() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: rig.gateway.open_exchanges == 1)
            await wire.close()
            await rig.idle()
            upstream.script = says_hello
            assert (await rig.call()).status == 200
            assert len(upstream.heard) <= 2

    play(main())


def test_callers_that_leave_at_any_time_leave_nothing_behind() -> None:
    async def one(wire: Wire, number: int) -> None:
        wire.send(a_call(stream=bool(number % 2), **exactly(50)))
        await asyncio.sleep(0.003 * (number % 20))
        await wire.close()

    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=4), replicas=2)
        async with over_engines(fleet=fleet, speedup=5.0) as (rig, engines):
            await asyncio.gather(*[one(await rig.wire(), number) for number in range(60)])
            await rig.idle()
            await until(lambda: not any(engine.live_calls for engine in engines))
            assert (await rig.call({**exactly(2)})).status == 200

    play(main())


# Engines that are not there.


def test_a_dead_engine_is_a_503_that_says_so() -> None:
    async def main() -> None:
        async with a_rig({"p-0": await dead_url()}) as rig:
            for _ in range(2):  # the call that finds out, and one that comes after
                reply = await asyncio.wait_for(rig.call(), 2)
                assert reply.status in {502, 503}
                assert reply.error["code"] in {"no_replica", "replica_died"}
                assert reply.error["type"] in {"overloaded_error", "server_error"}
            assert reply.error["message"] == "no replica of this model is alive"
            assert int(reply.headers["retry-after-ms"]) >= 1
            await rig.idle()

    play(main())


def test_a_replica_that_is_taken_for_dead_does_not_answer_what_is_sent_elsewhere() -> None:
    async def late(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        out.write(an_answer(b'{"usage":{"completion_tokens":1}}'))

    async def main() -> None:
        async with over_upstreams(late) as (rig, upstream):
            reply = asyncio.create_task(rig.call())
            await until(lambda: upstream.heard)
            rig.gateway.feed(ReplicaDied(ReplicaId("p-0")))
            await until(lambda: upstream.lost == 1, "its connection is dropped")
            assert len(rig.gateway.scheduler.line) == 1
            rig.gateway.feed(ReplicaReady(ReplicaId("p-0")))
            assert (await reply).status == 200
            assert len(upstream.heard) == 2
            await rig.idle()

    play(main())


def test_a_connection_that_comes_about_after_its_replica_is_gone_is_not_used() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            link = rig.gateway.links[ReplicaId("p-0")]
            wire = await rig.wire()
            call = Exchange(a_request(), Deaf(), b"", b"", model_named="", streams=True)
            link.send(call, a_call())
            link.close()
            await asyncio.sleep(0.1)
            assert not upstream.heard
            wire.send(a_call())
            assert (await wire.answer())[0] == 200

    play(main())


def test_a_call_that_waits_for_a_connection_is_not_sent_to_a_replica_that_is_gone() -> None:
    async def main() -> None:
        settings = {"most_connections": 1, "fleet": a_fleet(a_pool(max_sequences=8))}
        async with over_upstreams(hangs, **settings) as (rig, upstream):
            wires = [await rig.wire() for _ in range(2)]
            for wire in wires:
                wire.send(a_call())
            await until(lambda: upstream.heard and len(rig.replica().in_flight) == 2)
            rig.gateway.feed(ReplicaDied(ReplicaId("p-0")))
            await until(lambda: upstream.lost == 1)
            await asyncio.sleep(0.1)
            assert len(upstream.heard) == 1
            upstream.script = says_hello
            rig.gateway.feed(ReplicaReady(ReplicaId("p-0")))
            for wire in wires:
                assert (await wire.answer())[0] == 200
            await rig.idle()

    play(main())


def test_a_dead_engine_costs_nothing_while_another_lives() -> None:
    async def main() -> None:
        async with Upstream() as upstream:
            urls = {"p-0": await dead_url(), "p-1": upstream.url}
            async with a_rig(urls, policy=a_policy("round-robin")) as rig:
                replies = await asyncio.gather(*(rig.call() for _ in range(6)))
                assert [reply.status for reply in replies] == [200] * 6
                assert not rig.replica("p-0").alive
                await rig.idle()

    play(main())


def test_the_watch_finds_an_idle_engine_dead_and_sees_it_come_back() -> None:
    async def main() -> None:
        async with over_upstreams(health_interval_s=0.02) as (rig, upstream):
            assert (await rig.call()).status == 200
            upstream.healthy = False
            await until(lambda: not rig.replica().alive)
            assert (await rig.ask("GET", "/readyz")).status == 503
            assert (await rig.call()).status == 503
            upstream.healthy = True
            await until(lambda: rig.replica().alive)
            assert (await rig.call()).status == 200
            upstream.hang_up()
            await until(lambda: not rig.replica().alive)
            await upstream.listen()
            await until(lambda: rig.replica().alive)
            assert (await rig.call()).status == 200
            changes = [type(e) for e in rig.history if isinstance(e, ReplicaDied | ReplicaReady)]
            assert changes == [ReplicaDied, ReplicaReady] * 2

    play(main())


def test_an_engine_too_busy_for_a_health_check_or_two_is_not_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with over_upstreams(health_interval_s=0.001) as (rig, upstream):
            watch = rig.gateway.service.health
            upstream.healthy = None
            await until(lambda: watch._silent_probes[rig.replica().replica_id] == 2)
            assert rig.replica().alive
            await until(lambda: not rig.replica().alive)
            upstream.healthy = True
            await until(lambda: rig.replica().alive)

    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.05)
    play(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_on_an_engine_found_dead_moves_to_another_and_is_answered_once(
    *, stream: bool
) -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, health_interval_s=0.02) as (rig, upstreams):
            reply = asyncio.ensure_future(rig.call({"stream": stream}))
            await until(lambda: upstreams[0].heard or upstreams[1].heard)
            first, other = sorted(upstreams, key=lambda one: -len(one.heard))
            other.script = says_hello
            first.healthy = False
            assert (await reply).json == {"usage": {"completion_tokens": 1}}
            await until(lambda: first.lost, "the dead engine's connection is dropped")
            await rig.idle()

    play(main())


# Engines that fail.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        cuts,
        fails("500 Internal Server Error", "oops"),
        fails("503 Service Unavailable", "asleep"),
        fails("429 Too Many Requests", "full"),
    ],
    ids=["cut", "500", "503", "429"],
)
def test_a_call_that_fails_before_its_first_byte_is_tried_on_another_replica(
    script: Script, *, stream: bool
) -> None:
    async def main() -> None:
        policy = a_policy("round-robin")
        async with over_upstreams(script, says_hello, policy=policy) as (rig, (bad, good)):
            for _ in range(2):
                reply = await rig.call({"stream": stream})
                assert (reply.status, reply.json) == (200, {"usage": {"completion_tokens": 1}})
            assert (len(bad.heard), len(good.heard)) in {(1, 2), (2, 2)}
            assert bad.heard[0].body == good.heard[0].body
            await rig.idle()

    play(main())


def test_a_stream_that_breaks_before_its_first_token_is_tried_again() -> None:
    attempts = 0

    async def head_then_cut(_: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        out.write(STREAM_HEAD)
        if attempts == 1:
            await out.drain()
            await asyncio.sleep(0.02)
            out.transport.abort()
        else:
            out.write(events({"n": 1}))

    async def main() -> None:
        async with over_upstreams(head_then_cut) as (rig, _):
            reply = await rig.call({"stream": True})
            assert reply.status == 200
            assert reply.body == b'data: {"n": 1}\n\ndata: [DONE]\n\n'
            assert attempts == 2
            await rig.idle()

    play(main())


def test_a_storm_of_errors_is_met_three_times_and_ends_in_the_engines_words() -> None:
    async def main() -> None:
        storm = fails("500 Internal Server Error", "CUDA error: out of cards")
        async with over_upstreams(storm, storm) as (rig, upstreams):
            reply = await rig.call()
            assert reply.status == 502
            assert reply.error["code"] == "engine_error"
            assert "CUDA error: out of cards" in reply.error["message"]
            assert reply.headers["x-request-id"]
            assert sum(len(one.heard) for one in upstreams) == 3
            assert sum(isinstance(event, RequestFailed) for event in rig.history) == 3
            await rig.idle()
            assert rig.replica("p-0").alive

    play(main())


def test_an_emulated_engine_that_always_fails_gives_a_502_and_then_recovers() -> None:
    async def main() -> None:
        async with over_engines(engine={"faults": Faults(error_ratio=1.0)}) as (rig, (engine,)):
            async with rig.sdk() as client:
                with pytest.raises(openai.InternalServerError, match="told to fail"):
                    await client.chat.completions.create(
                        model="auto", messages=[{"role": "user", "content": "hi"}]
                    )
            engine.faults = Faults()
            assert (await rig.call({**exactly(2)})).status == 200

    play(main())


def test_an_engine_that_speaks_no_http_is_a_502() -> None:
    async def babble(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(b"220 smtp ready\r\n")

    async def main() -> None:
        async with over_upstreams(babble) as (rig, upstream):
            reply = await rig.call()
            assert reply.status == 502
            assert "the engine sent no HTTP" in reply.error["message"]
            assert len(upstream.heard) == 3

    play(main())


def test_a_stream_that_breaks_after_it_began_ends_in_an_error_and_never_looks_done() -> None:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD + a_chunk(FRAME))
        await out.drain()
        await asyncio.sleep(0.02)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(script, script) as (rig, upstreams):
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            text = await wire.rest()
            assert FRAME in text
            assert b'data: {"error":{"message":"the engine closed the connection"' in text
            assert b"[DONE]" not in text
            assert not text.endswith(b"0\r\n\r\n")
            await rig.idle()
            async with rig.sdk() as client:
                with pytest.raises(openai.APIError, match="the engine closed the connection"):
                    async for _ in await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": "hi"}], stream=True
                    ):
                        pass
            assert sum(len(one.heard) for one in upstreams) == 2, "what was seen is not repeated"

    play(main())


@pytest.mark.parametrize(
    "sent",
    [
        STREAM_HEAD + a_chunk(FRAME) + b"ff\r\ndata: {",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf",
    ],
    ids=["within a chunk", "within a whole answer"],
)
def test_an_answer_that_breaks_where_no_frame_fits_is_cut(sent: bytes) -> None:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(sent)
        await out.drain()
        await asyncio.sleep(0.02)
        out.transport.abort()

    async def main() -> None:
        async with over_upstreams(script) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call(stream=sent.startswith(STREAM_HEAD)))
            await wire.head()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await wire.reader.readexactly(1000)
            assert len(upstream.heard) == 1
            await rig.idle()

    play(main())


def test_emulated_engines_that_die_in_their_answers_never_end_in_a_clean_stream() -> None:
    async def main() -> None:
        faults = {"faults": Faults(death_ratio=1.0)}
        async with over_engines(2, engine=faults) as (rig, _):
            for _ in range(5):
                wire = await rig.wire()
                wire.send(a_call(stream=True, **exactly(40)))
                try:
                    text = await wire.rest()
                except ConnectionResetError:
                    continue
                assert b"[DONE]" not in text
            await rig.idle()

    play(main())


# Connections.


def test_a_kept_connection_that_the_engine_closed_is_replaced_in_silence() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            for _ in range(3):
                assert (await rig.call()).status == 200
                upstream.cut_connections()
            assert upstream.connections == 3
            assert rig.replica().alive
            assert not any(isinstance(event, RequestFailed) for event in rig.history)

    play(main())


def test_a_kept_connection_that_closes_as_it_is_used_is_replaced_in_silence() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):

            async def once(_: Heard, out: asyncio.StreamWriter) -> None:
                if len(upstream.heard) == 2:
                    out.transport.abort()  # the engine's idle time was over as the call came
                else:
                    out.write(an_answer(b"{}"))

            upstream.script = once
            assert (await rig.call()).status == 200
            assert (await rig.call()).status == 200
            assert (len(upstream.heard), upstream.connections) == (3, 2)
            assert not any(isinstance(event, RequestFailed) for event in rig.history)

    play(main())


def test_connections_are_kept_and_used_again() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            for _ in range(5):
                assert (await rig.call()).status == 200
            assert (len(upstream.heard), upstream.connections) == (5, 1)

    play(main())


def test_an_engine_that_closes_after_each_answer_is_served_all_the_same() -> None:
    async def closing(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(b"{}", headers=("connection: close",)))
        await out.drain()
        out.close()

    async def main() -> None:
        async with over_upstreams(closing) as (rig, upstream):
            for _ in range(3):
                assert (await rig.call()).status == 200
            assert upstream.connections == 3

    play(main())


# Waiting, waking, draining.


def test_a_call_that_has_waited_too_long_is_told_so() -> None:
    async def main() -> None:
        policy = a_policy(admission=BoundedLine(max_wait_s=0.05))
        fleet = a_fleet(a_pool(max_sequences=1))
        async with over_upstreams(hangs, fleet=fleet, policy=policy) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: rig.gateway.open_exchanges == 1)
            reply = await rig.call()
            assert (reply.status, reply.error["code"]) == (503, "waited_too_long")
            assert reply.error["message"] == "no replica had room within the longest allowed wait"
            await wire.close()
            await rig.idle()

    play(main())


def test_a_sleeping_engine_is_woken_for_a_call_that_waits_meanwhile() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool(ready_s=READY_S), states={"p-0": Readiness.SLEEPING})
        async with over_engines(fleet=fleet, engine={"wake_s": 1.0}) as (rig, (engine,)):
            asleep = asyncio.Event()
            assert engine.fall_asleep(asleep.set)
            await asleep.wait()
            reply = await rig.call({**exactly(2)})
            assert reply.status == 200
            assert float(reply.headers["x-concertmaster-queue-wait-ms"]) > 900
            assert engine.residency == "awake"
            await rig.idle()

    play(main())


def test_an_engine_that_is_just_falling_asleep_is_woken_as_soon_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        fleet = a_fleet(states={"p-0": Readiness.SLEEPING})
        async with over_engines(fleet=fleet) as (rig, (engine,)):
            assert engine.fall_asleep(lambda: None)
            assert engine.residency == "falling_asleep"
            assert (await rig.call({**exactly(2)})).status == 200

    monkeypatch.setattr(control, "RETRY_S", 0.01)
    play(main())


def test_an_engine_that_comes_back_asleep_is_woken() -> None:
    async def main() -> None:
        async with over_engines(health_interval_s=0.02) as (rig, (engine,)):
            asleep = asyncio.Event()
            engine.fall_asleep(asleep.set)
            await asleep.wait()
            rig.gateway.feed(ReplicaDied(rig.replica().replica_id))
            await until(lambda: rig.replica().alive)
            assert engine.residency == "awake"
            assert (await rig.call({**exactly(2)})).status == 200

    play(main())


def test_an_engine_that_cannot_be_woken_is_dead() -> None:
    async def main() -> None:
        fleet = a_fleet(states={"p-0": Readiness.SLEEPING})
        async with a_rig({"p-0": await dead_url()}, fleet=fleet) as rig:
            reply = await asyncio.wait_for(rig.call(), 2)
            assert reply.status == 503
            assert not rig.replica().alive

    play(main())


def test_a_gateway_that_shuts_down_lets_open_calls_end_and_takes_no_others() -> None:
    release = asyncio.Event()

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD + a_chunk(FRAME))
        await release.wait()
        out.write(events())

    async def main() -> None:
        async with over_upstreams(script, drain_s=5.0) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            await wire.head()
            stopping = asyncio.ensure_future(rig.gateway.stop(drain_s=5.0))
            await asyncio.sleep(0.01)
            assert (await rig.ask("GET", "/livez")).status == 200
            ready = await rig.ask("GET", "/readyz")
            assert (ready.status, ready.error["code"]) == (503, "draining")
            reply = await rig.call()
            assert reply.status == 503
            assert "the gateway is shutting down" in reply.error["message"]
            assert int(reply.headers["retry-after-ms"]) >= 1
            release.set()
            assert b"[DONE]" in await wire.reader.readuntil(b"0\r\n\r\n")
            await stopping

    play(main())


def test_a_gateway_that_shuts_down_answers_what_has_not_begun_in_time() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, drain_s=0.05) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: upstream.heard)
            await rig.gateway.stop(drain_s=0.05)
            status, body = await wire.answer()
            assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
            await until(lambda: upstream.lost == 1)
            await rig.idle()

    play(main())


def test_a_gateway_that_shuts_down_cuts_a_stream_that_does_not_end_in_time() -> None:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD + a_chunk(FRAME))
        await asyncio.sleep(60)

    async def main() -> None:
        async with over_upstreams(script) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            await wire.reader.readuntil(a_chunk(FRAME))
            await rig.gateway.stop(drain_s=0.05)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await wire.reader.readexactly(1)
            await until(lambda: upstream.lost == 1)

    play(main())


def test_health_checks_are_not_fooled_by_a_port_that_speaks_something_else() -> None:
    async def main() -> None:
        async def greet(_: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
            out.write(b"SSH-2.0-OpenSSH\r\n")
            await out.drain()
            out.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with a_rig({"p-0": url}, health_interval_s=0.02) as rig:
            await until(lambda: not rig.replica().alive)
        server.close()
        await server.wait_closed()

    play(main())


def test_calls_go_to_the_text_endpoint_too_when_replicas_fail() -> None:
    async def main() -> None:
        policy = a_policy("round-robin")
        async with over_upstreams(cuts, says_hello, policy=policy) as (rig, (_, good)):
            reply = await rig.ask("POST", "/v1/completions", b'{"model":"auto","prompt":"Once"}')
            assert reply.status == 200
            assert good.heard[0].line == "POST /v1/completions HTTP/1.1"
            assert good.heard[0].json == {"model": "m", "prompt": "Once"}
            assert CHAT not in good.heard[0].line

    play(main())
