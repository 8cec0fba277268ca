"""Calls whose model does not run: held while it is woken, and never left without an answer."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from builders import READY_S, a_fleet, a_policy, a_pool, chains
from concertmaster.core.events import ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId, ScalingLimits
from concertmaster.engines import control as engine_control
from concertmaster.engines.control import ControlKind
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.faults import Faults
from concertmaster.gateway import control, holding, service
from concertmaster.gateway.replay import Replay
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.catalog import policy
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    Script,
    Upstream,
    a_body,
    a_call,
    a_chunk,
    a_message,
    a_rig,
    an_answer,
    events,
    exactly,
    over_engines,
    play,
    until,
)

SPEEDUP = 20.0
KINDS: list[ControlKind] = ["vllm", "llama.cpp", "ollama"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_control, "POLL_S", 0.005)
    monkeypatch.setattr(engine_control, "RETRY_S", 0.005)
    monkeypatch.setattr(service, "LOOK_S", 0.01)
    monkeypatch.setattr(holding, "FIRST_S", 0.05)
    monkeypatch.setattr(holding, "EVERY_S", 0.1)


def a_sleeping_fleet(replicas: int = 1, lies: Readiness = Readiness.DISK) -> Fleet:
    states = {f"p-{i}": lies for i in range(replicas)}
    return a_fleet(a_pool(ready_s=READY_S), replicas=replicas, states=states)


@asynccontextmanager
async def asleep(
    replicas: int = 1,
    *,
    kind: ControlKind = "vllm",
    lies: Readiness = Readiness.DISK,
    wakes: str = "well",
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[Rig, list[Emulator]]]:
    """Start a gateway over engines that sleep; each takes 0.4 s to wake, 1 s to read weights."""
    engine = {"lies": lies, "wake_s": 8.0, "reload_s": 20.0, "faults": Faults(wakes=wakes)}  # type: ignore[arg-type]
    fleet = settings.pop("fleet", a_sleeping_fleet(replicas, lies))
    controls: Mapping[ReplicaId, ControlKind] = dict.fromkeys(fleet.replicas, kind)
    async with over_engines(
        fleet=fleet, engine=engine, speedup=SPEEDUP, controls=controls, **settings
    ) as (rig, emulators):
        yield rig, emulators


async def stream_of(rig: Rig, **fields: object) -> str:
    """Make a streamed call; the whole body, whose status must be 200."""
    reply = await rig.call({"stream": True, **fields})
    assert reply.status == 200
    return reply.body.decode()


# Held calls


@every_kind
def test_a_call_waits_while_its_model_is_loaded(kind: ControlKind) -> None:
    async def main() -> None:
        async with asleep(kind=kind) as (rig, (engine,)):
            reply = await rig.call(exactly(3))
            assert (reply.status, reply.json["usage"]["completion_tokens"]) == (200, 3)
            assert engine.residency == "awake"
            assert rig.history.count(ReplicaReady(ReplicaId("p-0"))) == 1
            await rig.idle()

    play(main())


@every_kind
def test_a_stream_is_kept_by_comments_and_answered_once(kind: ControlKind) -> None:
    async def main() -> None:
        async with asleep(kind=kind) as (rig, _):
            text = await stream_of(rig, **exactly(5), stream_options={"include_usage": True})
            told, answer = text.split("\n\ndata: ", 1)
            assert re.match(r": waking m, about 1 s\n\n", told)
            assert told.count(": waking m") >= 3
            assert ": x-concertmaster-replica: p-0\n" in told
            assert answer.count('"content"') == 6
            assert answer.count("[DONE]") == 1
            assert json.loads(answer.split("\n\n")[-3].removeprefix("data: "))["usage"]
            await rig.idle()

    play(main())


def test_a_client_library_reads_a_held_stream_as_any_other() -> None:
    async def main() -> None:
        async with asleep() as (rig, _), rig.sdk() as sdk:
            stream = await sdk.chat.completions.create(
                **a_body(max_tokens=4), stream=True, extra_body={"ignore_eos": True}
            )
            words = [part.choices[0].delta.content async for part in stream if part.choices]
            assert len("".join(word or "" for word in words).split()) == 4
            assert (await rig.call(exactly(1))).status == 200
            await rig.idle()

    play(main())


def test_a_stream_that_was_held_hears_that_it_waits_for_room() -> None:
    async def main() -> None:
        pool = a_pool(ready_s=READY_S, max_sequences=1)
        fleet = a_fleet(pool, states={"p-0": Readiness.SLEEPING})
        async with asleep(fleet=fleet, lies=Readiness.SLEEPING) as (rig, _):
            texts = await asyncio.gather(*(stream_of(rig, **exactly(600)) for _ in range(2)))
            assert sorted(": waiting for room\n\n" in text for text in texts) == [False, True]
            assert [text.count("[DONE]") for text in texts] == [1, 1]
            await rig.idle()
            await until(lambda: not rig.gateway.service.holding._told)

    play(main())


def test_a_replay_sees_through_the_comments_of_held_streams() -> None:
    async def main() -> None:
        async with asleep(hold_s=2.5) as (rig, (engine,)):
            workload = chains(3, gap_s=0.1, seed=1)
            played = Replay(url=rig.url, workload=workload, speedup=SPEEDUP)
            records = await played.run(policy="live", seed=0)
            first = records.calls[0]
            assert (first.model, first.replica_id, first.outcome) == ("m", "p-0", "served")
            assert first.first_token_s is not None
            assert first.dispatched_s is not None
            assert first.first_token_s - first.arrival_s > 20.0
            assert first.first_token_s >= first.dispatched_s - 1.0
            engine.fall_asleep(lambda: None)
            rig.gateway.feed(ReplicaDemoted(ReplicaId("p-0"), Readiness.SLEEPING))
            engine.faults = Faults(wakes="never")
            again = await played.run(policy="live", seed=0)
            assert {call.reason for call in again.calls} == {"waited_too_long"}
            assert {call.outcome for call in again.calls} == {"rejected"}

    play(main())


def test_a_stream_that_hardly_waits_keeps_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with asleep(lies=Readiness.SLEEPING) as (rig, _):
            reply = await rig.call({"stream": True, **exactly(2)})
            assert reply.headers["x-concertmaster-replica"] == "p-0"
            assert b"waking" not in reply.body

    monkeypatch.setattr(holding, "FIRST_S", 5.0)
    play(main())


def test_a_client_of_http_1_0_gets_no_chunks_before_its_answer() -> None:
    async def main() -> None:
        async with asleep(lies=Readiness.SLEEPING) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call(stream=True, **exactly(2)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            head = await wire.head()
            assert b"x-concertmaster-replica: p-0" in head
            await wire.close()

    play(main())


# Wakes that fail or never end


@every_kind
def test_a_wake_that_fails_refuses_those_who_wait_and_says_why(kind: ControlKind) -> None:
    async def main() -> None:
        async with asleep(kind=kind, wakes="fails") as (rig, _):
            reply = await rig.call()
            assert (reply.status, reply.error["code"]) == (503, "no_replica")
            assert "m did not wake: " in reply.error["message"]
            assert int(reply.headers["retry-after"]) >= 1
            await rig.idle()

    play(main())


@every_kind
def test_a_wake_that_never_ends_is_given_up(
    kind: ControlKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with asleep(kind=kind, wakes="never") as (rig, _):
            asked = [rig.call(), rig.call({"stream": True})]
            reply, streamed = await asyncio.gather(*asked)
            assert (reply.status, reply.error["code"]) == (503, "no_replica")
            assert reply.error["message"].endswith("m did not wake: not done within 0 s")
            assert streamed.status == 200
            last = streamed.body.decode().removesuffix("\n\n").split("\n\n")[-1]
            assert re.match(r"retry: \d{4,}\ndata: ", last)
            assert json.loads(last.partition("data: ")[2])["error"]["code"] == "no_replica"
            await rig.idle()

    monkeypatch.setattr(control, "LEAST_PATIENCE_S", 0.3)
    monkeypatch.setattr(control, "PATIENCE", 0.0)
    play(main())


def test_a_client_library_takes_the_refusal_of_a_held_stream_as_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with asleep(wakes="never") as (rig, _), rig.sdk() as sdk:
            with pytest.raises(openai.APIError, match="m did not wake"):
                async for _ in await sdk.chat.completions.create(**a_body(), stream=True):
                    pass

    monkeypatch.setattr(control, "LEAST_PATIENCE_S", 0.3)
    monkeypatch.setattr(control, "PATIENCE", 0.0)
    play(main())


def test_another_replica_is_woken_if_the_first_does_not_come_up() -> None:
    async def main() -> None:
        async with asleep(2) as (rig, (first, second)):
            first.faults = Faults(wakes="fails")
            reply = await rig.call(exactly(2))
            assert (reply.status, reply.headers["x-concertmaster-replica"]) == (200, "p-1")
            assert ReplicaDied(ReplicaId("p-0")) in rig.history
            assert second.residency == "awake"
            await rig.idle()

    play(main())


def test_a_call_that_may_go_elsewhere_does_if_its_model_does_not_come_up() -> None:
    async def main() -> None:
        pools = [a_pool("a", model="small"), a_pool("b", model="big")]
        states = {"a-0": Readiness.DISK, "b-0": Readiness.DISK}
        fleet = a_fleet(*pools, states=states)
        async with asleep(fleet=fleet, policy=policy("random-model")) as (rig, engines):
            for engine in engines[:1]:
                engine.faults = Faults(wakes="fails")
            replies = await asyncio.gather(
                *(rig.call({"model": "auto", **exactly(2)}) for _ in range(8))
            )
            assert {reply.status for reply in replies} == {200}
            assert {r.headers["x-concertmaster-model"] for r in replies} == {"big"}
            await rig.idle()

    play(main())


def test_an_engine_that_did_not_wake_is_tried_again_later() -> None:
    async def main() -> None:
        async with asleep(wakes="fails", health_interval_s=0.02) as (rig, (engine,)):
            assert (await rig.call()).status == 503
            engine.faults = Faults()
            await until(lambda: rig.replica().alive, "woken by the watch")
            assert (await rig.call(exactly(2))).status == 200

    play(main())


def test_tries_to_wake_an_engine_that_does_not_come_further_and_further_apart() -> None:
    async def main() -> None:
        async with asleep(wakes="fails", health_interval_s=0.01) as (rig, _):
            assert (await rig.call()).status == 503
            watch, name = rig.gateway.service.health, ReplicaId("p-0")
            await until(lambda: watch.pause_s(name) >= 0.08)
            assert rig.history.count(ReplicaDied(name)) <= 5
            assert float((await rig.call()).headers["retry-after-ms"]) > 1000

    play(main())


def test_calls_that_expire_while_others_are_routed_anew_are_answered_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        line = a_policy(admission=BoundedLine(max_wait_s=100.0))
        async with asleep(wakes="never", hold_s=60.0, policy=line) as (rig, _):
            gateway = rig.gateway
            calls = [asyncio.ensure_future(rig.call()) for _ in range(3)]
            await until(lambda: gateway.open_exchanges == 3)
            now_s = gateway.clock()
            once = iter([now_s])
            monkeypatch.setattr(gateway, "clock", lambda: next(once, now_s + 200.0))
            gateway.service._hear(ReplicaDied(ReplicaId("p-0")))
            replies = await asyncio.gather(*calls)
            assert {reply.status for reply in replies} == {503}
            assert gateway.metrics.by_status == {503: 3}

    play(main())


def test_nobody_is_held_for_longer_than_the_bound() -> None:
    async def main() -> None:
        async with asleep(wakes="never", hold_s=0.3) as (rig, _):
            reply, streamed = await asyncio.gather(rig.call(), rig.call({"stream": True}))
            assert (reply.status, reply.error["code"]) == (503, "waited_too_long")
            assert reply.error["message"].endswith(": m is being woken")
            assert int(reply.headers["retry-after-ms"]) >= 1000
            assert b'"code":"waited_too_long"' in streamed.body
            await rig.idle()

    play(main())


# Callers that leave, and a gateway that ends


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_held_leaves_nothing_behind(*, stream: bool) -> None:
    async def main() -> None:
        async with asleep() as (rig, (engine,)):
            wire = await rig.wire()
            wire.send(a_call(stream=stream))
            await until(lambda: rig.gateway.open_exchanges)
            await asyncio.sleep(0.1)
            await wire.close()
            await rig.idle()
            assert not rig.gateway._agents
            await until(lambda: engine.residency == "awake")
            assert engine.live_calls == 0
            assert (await rig.call(exactly(2))).status == 200

    play(main())


def test_a_gateway_that_ends_answers_the_calls_that_it_holds() -> None:
    async def main() -> None:
        async with asleep(wakes="never") as (rig, _):
            plain, streamed = await rig.wire(), await rig.wire()
            plain.send(a_call())
            streamed.send(a_call(stream=True))
            await streamed.head()
            await rig.gateway.stop(drain_s=0.0)
            status, body = await plain.answer()
            assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
            rest = await streamed.rest()
            assert b"retry: 1000\ndata: " in rest
            assert b'"code":"shutting_down"' in rest
            assert rest.endswith(b"0\r\n\r\n")
            await rig.idle()

    play(main())


# What engines answer to calls that were held


async def held_answer(script: Script) -> tuple[str, Rig]:
    """Stream a call from an engine that wakes at once, but too late for an early head."""

    class Slow(Upstream):
        def _control(self, heard: Heard) -> bytes:
            return an_answer(b"", woken[0] if "wake_up" in heard.line else "200 OK")

    woken = ["503 Service Unavailable"]
    async with Slow(script) as upstream:
        fleet = a_sleeping_fleet(lies=Readiness.SLEEPING)
        async with a_rig({"p-0": upstream.url}, fleet=fleet) as rig:
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            assert (await wire.head()).startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-st")
            woken[0] = "200 OK"
            body = b""
            while not body.endswith(b"0\r\n\r\n"):
                body += await asyncio.wait_for(wire.reader.read(65536), 5)
            await rig.idle()
            wire.send(a_message("GET", "/livez"))
            assert (await wire.answer())[0] == 200
            return body.decode(), rig


FRAME = {"choices": [{"index": 0, "delta": {"content": "a"}}]}


def answers(data: bytes) -> Script:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), 40):
            out.write(data[start : start + 40])
            await out.drain()
            await asyncio.sleep(0.001)

    return script


def frames(body: str) -> list[str]:
    """Events of a chunked stream of comments and data."""
    return re.findall(r"^data: (.*)$", body, re.MULTILINE)


def test_a_chunked_stream_follows_the_comments() -> None:
    body, _ = asyncio.run(held_answer(answers(STREAM_HEAD + events(FRAME, FRAME))))

    assert frames(body) == [json.dumps(FRAME)] * 2 + ["[DONE]"]


def test_a_stream_of_known_length_follows_the_comments() -> None:
    text = b"data: " + json.dumps(FRAME).encode() + b"\n\ndata: [DONE]\n\n"
    body, _ = asyncio.run(held_answer(answers(an_answer(text))))

    assert re.sub(r"\r\n[0-9a-f]+\r\n", "", body).count(json.dumps(FRAME)) == 1
    assert "[DONE]" in body


@pytest.mark.parametrize("chunked", [True, False])
def test_an_error_of_the_caller_becomes_an_event(*, chunked: bool) -> None:
    error = b'{"error":{"message":"too\\nlong","type":"BadRequestError","param":null,"code":400}}'
    whole = an_answer(error, "400 Bad Request", ("content-type: application/json",))
    if chunked:
        head = STREAM_HEAD.replace(b"200 OK", b"400 Bad Request")
        whole = head + a_chunk(error[:20]) + a_chunk(error[20:]) + b"0\r\n\r\n"
    body, _ = asyncio.run(held_answer(answers(whole)))

    (event,) = frames(body)
    assert json.loads(event) == json.loads(error)


def test_an_engine_that_fails_a_held_call_is_an_event_too() -> None:
    whole = an_answer(b"out of memory", "500 Internal Server Error")
    body, rig = asyncio.run(held_answer(answers(whole)))

    (event,) = frames(body)
    assert json.loads(event)["error"]["code"] == "engine_error"
    assert "out of memory" in json.loads(event)["error"]["message"]
    assert rig.gateway.metrics.by_status == {502: 1}


# Swaps


def test_a_stream_is_finished_before_its_engine_goes_to_sleep() -> None:
    async def main() -> None:
        pools = [
            a_pool(name, model=name, least_replicas=0, stopped=Readiness.SLEEPING, max_sequences=8)
            for name in ("a", "b")
        ]
        limits = ScalingLimits(gpus=1, cooldown_s=0.0)
        fleet = a_fleet(*pools, states={"b-0": Readiness.SLEEPING}, limits=limits)
        swaps = policy("least-tokens/reactive:interval_s=1,settle_s=1")
        engine = {"wake_s": 2.0}
        async with over_engines(fleet=fleet, policy=swaps, engine=engine, speedup=SPEEDUP) as (
            rig,
            (first, second),
        ):
            second.fall_asleep(lambda: None)
            long = asyncio.ensure_future(stream_of(rig, model="a", **exactly(900)))
            await until(lambda: first.live_calls)
            replies = [await rig.call({"model": "b", **exactly(2)})]
            replies += [await rig.call({"model": name, **exactly(2)}) for name in ("a", "b")]
            assert [reply.status for reply in replies] == [200] * 3
            assert (await long).count('"content"') == 901
            assert "abort" not in await long
            await rig.idle()

    play(main())
