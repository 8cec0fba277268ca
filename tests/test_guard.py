"""What the gateway puts up with: timeouts, retries, breakers, bulkheads, shedding."""

import asyncio
import random
from typing import Any

import pytest

from builders import READY_S, a_fleet, a_policy, a_pool
from concertmaster.core.events import ReplicaDied, ReplicaDraining, ReplicaOnTrial, RequestFailed
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.request import ServiceClass
from concertmaster.gateway.breaker import Breaker, State
from concertmaster.gateway.limits import LIMITS
from concertmaster.gateway.retries import BURST, MOST_BACKOFF_S, RetryBudget, backoff_s
from concertmaster.gateway.shedding import Shedding
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Upstream,
    a_call,
    a_chunk,
    a_rig,
    an_answer,
    events,
    hangs,
    over_upstreams,
    play,
    says_hello,
    until,
)
from test_gateway_faults import FRAME, fails

STORM = fails("500 Internal Server Error", "oops")


# Timeouts.


def test_a_stream_without_a_first_byte_is_tried_elsewhere() -> None:
    async def head_only(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        await asyncio.sleep(60)

    async def main() -> None:
        policy = a_policy("round-robin")
        limits = {"first_byte_timeout_s": 0.2}
        async with over_upstreams(head_only, says_hello, policy=policy, **limits) as (rig, both):
            for _ in range(2):
                assert (await rig.call({"stream": True})).status == 200
            await rig.idle()
            await until(lambda: both[0].lost == len(both[0].heard) >= 1)
            assert rig.replica("p-0").alive

    play(main())


def test_a_whole_answer_may_take_longer_than_a_first_byte() -> None:
    async def slow(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        out.write(an_answer(b"{}"))

    async def main() -> None:
        async with over_upstreams(slow, first_byte_timeout_s=0.1) as (rig, upstream):
            assert (await rig.call()).status == 200
            assert len(upstream.heard) == 1

    play(main())


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_falls_silent_ends_its_answer_in_an_error(*, stream: bool) -> None:
    sent = (
        STREAM_HEAD + a_chunk(FRAME) if stream else b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\na"
    )

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(sent)
        await asyncio.sleep(60)

    async def main() -> None:
        async with over_upstreams(script, chunk_timeout_s=0.2) as (rig, upstream):
            wire = await rig.wire()
            wire.send(a_call(stream=stream))
            if stream:
                text = await wire.rest()
                assert b"the engine was silent: expected more within 0.2 s" in text
                assert b"[DONE]" not in text
                assert not text.endswith(b"0\r\n\r\n")
            else:
                await wire.head()
                with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                    await wire.reader.readexactly(9)
            await until(lambda: upstream.lost == 1)
            await rig.idle()
            assert len(upstream.heard) == 1, "what was seen is not repeated"

    play(main())


def test_an_answer_that_drips_is_not_silent() -> None:
    async def drips(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        for __ in range(8):
            out.write(a_chunk(FRAME))
            await asyncio.sleep(0.05)
        out.write(events())

    async def main() -> None:
        limits = {"chunk_timeout_s": 0.2, "first_byte_timeout_s": 0.2}
        async with over_upstreams(drips, **limits) as (rig, _):
            assert (await rig.call({"stream": True})).body.endswith(b"[DONE]\n\n")

    play(main())


def test_a_caller_that_does_not_read_is_not_taken_for_a_silent_engine() -> None:
    piece = b"data: " + b"x" * 65_000 + b"\n\n"

    async def floods(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        for __ in range(200):
            out.write(a_chunk(piece))
            await out.drain()
        out.write(events())

    async def main() -> None:
        async with over_upstreams(floods, chunk_timeout_s=0.2) as (rig, _):
            wire = await rig.wire()
            wire.reader._limit = 2**16  # type: ignore[attr-defined]  # asyncio stops reading there
            wire.send(a_call(stream=True))
            await asyncio.sleep(0.8)
            text = await wire.reader.readuntil(b"\r\n\r\n")
            while not text.endswith(b"0\r\n\r\n") and (more := await wire.reader.read(2**20)):
                text = (text + more)[-100:]
            assert b"[DONE]" in text

    play(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_takes_too_long_as_a_whole_is_told_so(*, stream: bool) -> None:
    async def main() -> None:
        async with over_upstreams(hangs, total_timeout_s=0.2) as (rig, upstream):
            reply = await rig.call({"stream": stream})
            assert (reply.status, reply.error["code"]) == (504, "timed_out")
            assert "expected the whole answer within 0.2 s" in reply.error["message"]
            assert reply.headers["x-should-retry"] == "false"
            await rig.idle()
            await until(lambda: len(upstream.heard) == upstream.lost == 1)

    play(main())


# Retries.


def test_retries_are_a_share_of_calls() -> None:
    budget = RetryBudget(0.2)
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += sum(budget.take() for _ in range(2))

    assert spent == budget.spent
    assert abs(spent - (BURST + 0.2 * 1000)) <= 1


def test_without_a_ratio_nothing_is_tried_again() -> None:
    async def main() -> None:
        async with over_upstreams(STORM, retry_ratio=0.0) as (rig, upstream):
            reply = await rig.call()
            assert (reply.status, len(upstream.heard)) == (502, 1)
            assert "(not tried again: too many calls fail)" in reply.error["message"]
            assert "x-should-retry" not in reply.headers
            await rig.idle()

    play(main())


def test_what_was_tried_again_asks_sdks_not_to() -> None:
    async def main() -> None:
        async with over_upstreams(STORM) as (rig, _):
            assert (await rig.call()).headers["x-should-retry"] == "false"
            assert await rig.metric("concertmaster_retries_total") == 2

    play(main())


def test_waits_before_retries_grow_and_are_bounded() -> None:
    rng = random.Random(1)
    waits_s = [max(backoff_s(attempt, rng) for _ in range(200)) for attempt in (1, 2, 9)]

    assert waits_s[0] < 0.1 < waits_s[1] < 0.2 < waits_s[2] < MOST_BACKOFF_S


def test_a_call_that_cannot_connect_is_sent_once_to_the_next() -> None:
    async def slowly(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)  # longer than a wait before a retry
        out.write(an_answer(b"{}"))

    async def main() -> None:
        policy = a_policy("round-robin")
        async with over_upstreams(says_hello, slowly, policy=policy) as (rig, (gone, upstream)):
            await asyncio.sleep(0.1)  # the watch has found it well
            gone.hang_up()
            for _ in range(2):
                assert (await rig.call()).status == 200
            assert ReplicaDied(ReplicaId("p-0")) in rig.history
            assert len(upstream.heard) == 2
            assert not any(isinstance(event, RequestFailed) for event in rig.history)

    play(main())


def test_a_whole_answer_that_has_begun_is_not_begun_anew_when_its_replica_dies() -> None:
    async def half(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await asyncio.sleep(60)

    async def main() -> None:
        async with over_upstreams(half, says_hello, policy=a_policy("round-robin")) as (rig, both):
            wire = await rig.wire()
            wire.send(a_call())
            await wire.head()
            rig.gateway.feed(ReplicaDied(ReplicaId("p-0")))
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await wire.reader.readexactly(100)
            assert not both[1].heard
            await rig.idle()

    play(main())


# Breakers.


def a_breaker(**limits: Any) -> Breaker:  # noqa: ANN401
    return Breaker(LIMITS._replace(**limits))


def test_a_breaker_opens_after_failures_in_a_row_and_not_before() -> None:
    breaker = a_breaker(breaker_failures=3)

    assert [breaker.failed(0.0, 0.0) for _ in range(2)] == [False, False]
    breaker.served()
    assert [breaker.failed(0.0, 0.0) for _ in range(3)] == [False, False, True]
    assert breaker.state is State.OPEN


def test_a_breaker_opens_on_a_share_of_failures() -> None:
    breaker = a_breaker(breaker_failures=5, breaker_error_ratio=0.5)
    opened = []
    for _ in range(12):
        breaker.served()
        opened.append(breaker.failed(0.0, 0.0))

    assert opened.index(True) == 9


def test_a_breaker_forgets_failures_of_long_ago() -> None:
    breaker = a_breaker(breaker_failures=5, breaker_error_ratio=0.5)
    for _ in range(4):
        breaker.failed(0.0, 0.0)
    for _ in range(500):
        breaker.served()
        breaker.served()
        breaker.served()
        assert not breaker.failed(0.0, 0.0)


def test_a_breaker_that_is_off_never_opens() -> None:
    breaker = a_breaker(breaker_failures=0)

    assert not any(breaker.failed(0.0, 0.0) for _ in range(100))


def test_trials_come_later_and_later_until_one_succeeds() -> None:
    breaker, now_s, pauses_s = a_breaker(breaker_failures=1, breaker_pause_s=1.0), 0.0, []
    for _ in range(7):
        assert breaker.failed(now_s, 0.0)
        assert not breaker.try_out(breaker.due_s - 0.01)
        pauses_s.append(breaker.due_s - now_s)
        now_s = breaker.due_s
        assert breaker.try_out(now_s)

    assert pauses_s == [1, 2, 4, 8, 16, 30, 30]
    assert breaker.served()
    breaker.failed(now_s, 1.0)
    assert breaker.due_s - now_s == 1.25


def test_a_replica_that_keeps_failing_rests_and_comes_back_by_a_trial() -> None:
    async def main() -> None:
        async with over_upstreams(
            STORM, says_hello, policy=a_policy("round-robin"), breaker_pause_s=0.2
        ) as (rig, (bad, good)):
            for _ in range(12):
                assert (await rig.call()).status == 200
            assert len(bad.heard) == 5
            resting = 'concertmaster_replica_resting{pool="p",replica="p-0"}'
            assert await rig.metric(resting) == 1
            await until(lambda: ReplicaOnTrial(ReplicaId("p-0")) in rig.history)
            for _ in range(4):
                assert (await rig.call()).status == 200
            assert len(bad.heard) == 6, "one call tries it"
            bad.script = says_hello
            trials = rig.history.count(ReplicaOnTrial(ReplicaId("p-0")))
            await until(lambda: rig.history.count(ReplicaOnTrial(ReplicaId("p-0"))) > trials)
            for _ in range(6):
                assert (await rig.call()).status == 200
            assert await rig.metric(resting) == 0
            assert len(bad.heard) >= 9
            assert len(good.heard) >= 15
            await rig.idle()

    play(main())


def test_streams_on_a_replica_that_begins_to_rest_go_on() -> None:
    release = asyncio.Event()

    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        if heard.json.get("stream"):
            out.write(STREAM_HEAD + a_chunk(FRAME))
            await release.wait()
            out.write(events())
        else:
            await STORM(heard, out)

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            await wire.reader.readuntil(a_chunk(FRAME))
            await asyncio.gather(*(rig.call() for _ in range(4)))
            assert ReplicaDraining(ReplicaId("p-0")) in rig.history
            release.set()
            assert b"[DONE]" in await wire.reader.readuntil(b"0\r\n\r\n")
            await rig.idle()

    play(main())


def test_calls_hear_when_to_come_again_while_all_replicas_rest() -> None:
    async def main() -> None:
        async with over_upstreams(STORM, breaker_pause_s=20.0) as (rig, upstream):
            replies = await asyncio.gather(*(rig.call() for _ in range(6)))
            assert {reply.status for reply in replies} <= {502, 503}
            heard = len(upstream.heard)
            reply = await rig.call()
            assert (reply.status, reply.error["code"]) == (503, "engines_failing")
            assert 10_000 < int(reply.headers["retry-after-ms"]) <= 25_000
            assert len(upstream.heard) == heard
            await rig.idle()

    play(main())


def test_a_call_waits_for_a_replica_that_is_woken_while_another_rests() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool(ready_s=READY_S), replicas=2, states={"p-1": Readiness.SLEEPING})
        async with Upstream(STORM) as bad, Upstream(says_hello) as good:
            urls = {"p-0": bad.url, "p-1": good.url}
            async with a_rig(urls, fleet=fleet, breaker_pause_s=20.0) as rig:
                await asyncio.gather(*(rig.call() for _ in range(2)))
                assert (await rig.call()).status == 200
                assert not rig.gateway.metrics.refusals["engines_failing"]

    play(main())


# Bulkheads.


def test_a_slow_pool_leaves_room_for_others() -> None:
    async def main() -> None:
        slow, quick = a_pool("slow", model="slow", max_sequences=2), a_pool("quick", model="quick")
        async with Upstream(hangs) as stuck, Upstream(says_hello) as upstream:
            urls = {"slow-0": stuck.url, "quick-0": upstream.url}
            fleet = a_fleet(slow, quick)
            async with a_rig(urls, fleet=fleet, most_open=40) as rig:
                held = []
                for _ in range(60):
                    wire = await rig.wire()
                    wire.send(a_call(model="slow"))
                    held.append(wire)
                await until(lambda: rig.gateway.metrics.refusals["pool_full"])
                reply = await rig.call({"model": "slow"})
                assert (reply.status, reply.error["code"]) == (429, "pool_full")
                assert int(reply.headers["retry-after-ms"]) >= 1000
                assert rig.gateway.open_exchanges <= 22
                replies = await asyncio.gather(*(rig.call({"model": "quick"}) for _ in range(15)))
                assert [reply.status for reply in replies] == [200] * 15
                for wire in held:
                    await wire.close()
                await rig.idle()

    play(main())


def test_a_call_above_the_most_connections_waits_for_one() -> None:
    most = open_now = 0

    async def counted(_: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        out.write(an_answer(b"{}"))

    async def main() -> None:
        async with over_upstreams(counted, most_connections=3) as (rig, upstream):
            replies = await asyncio.gather(*(rig.call() for _ in range(20)))
            assert [reply.status for reply in replies] == [200] * 20
            assert most <= 3
            assert upstream.connections <= 3
            upstream.cut_connections()
            assert (await rig.call()).status == 200
            await rig.idle()

    play(main())


# Shedding.


def test_batch_is_refused_first_and_then_everybody() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, most_open=10) as (rig, _):
            wires = [await rig.wire() for _ in range(10)]
            for number, wire in enumerate(wires[:9]):
                wire.send(a_call())
                await until(lambda n=number: rig.gateway.open_exchanges == n + 1)  # type: ignore[misc]
            batch = await rig.call(x_concertmaster_class="batch")
            assert (batch.status, batch.error["code"]) == (503, "saturated")
            assert int(batch.headers["retry-after-ms"]) >= 1000
            wires[9].send(a_call())
            await until(lambda: rig.gateway.open_exchanges == 10)
            reply = await rig.call()
            assert (reply.status, reply.error["code"]) == (503, "saturated")
            for wire in wires:
                await wire.close()
            await rig.idle()
            assert rig.gateway.metrics.refusals["saturated"] == 2

    play(main())


def test_a_late_event_loop_sheds_batch_before_others_and_recovers() -> None:
    shedding = Shedding(LIMITS._replace(most_lag_s=1.0), ())
    seen = []
    for lag_s in [0.0, 0.8, 0.8, 0.8, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]:
        shedding.note(lag_s, 0.1)
        seen.append((shedding.refuses(ServiceClass.BATCH), shedding.refuses_all()))

    assert seen[0] == (False, False)
    assert (True, False) in seen[:4]
    assert seen[5] == (True, True)
    assert seen[-1] == (False, False)


def test_who_is_shed_hears_when_the_excess_will_have_ended() -> None:
    open_calls = list(range(100))
    shedding = Shedding(LIMITS._replace(most_open=100), open_calls)
    for _ in range(50):
        shedding.ended += 1
        shedding.note(0.0, 0.5)

    assert shedding.retry_after_s() == pytest.approx(21 / 2, rel=0.01)


def test_shedding_answers_in_the_words_of_the_api() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, most_open=1) as (rig, _):
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: rig.gateway.open_exchanges == 1)
            reply = await rig.ask("POST", "/v1/messages", b"{}")
            assert reply.json["type"] == "error"
            assert reply.json["error"]["type"] == "overloaded_error"
            assert int(reply.headers["retry-after"]) >= 1
            await wire.close()

    play(main())
