"""Two upstream attempts at one call: the first to begin answers, and nothing of the other shows."""

import asyncio
import json
from collections.abc import Mapping

import pytest

from builders import a_fleet, a_policy, a_pool, a_request
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.hedging import Hedging
from concertmaster.core.policy import Policy
from concertmaster.core.races import HedgeOutcome
from concertmaster.gateway import dispatching
from concertmaster.gateway.exchange import Exchange
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    Script,
    a_call,
    a_chunk,
    an_answer,
    cuts,
    events,
    hangs,
    over_upstreams,
    play,
    until,
)

SOON = Hedging(share=1.0, floor_s=0.05)


def hedging(rule: Hedging | None = SOON) -> Policy:
    """Hand calls to p-0 first, and hedge those that are not heard of within 0.1 s."""
    return a_policy("round-robin", hedge=rule)


def an_event(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def say(out: asyncio.StreamWriter, data: bytes) -> None:
    """Write unless the gateway has hung up, as it does on losers."""
    if not out.transport.is_closing():
        out.write(data)


def streams(text: str, *, after_s: float = 0.0, head_first: bool = False) -> Script:
    """Answer with a stream, late; engines send the head before they begin."""

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        if head_first:
            say(out, STREAM_HEAD)
        await asyncio.sleep(after_s)
        if not head_first:
            say(out, STREAM_HEAD)
        say(out, a_chunk(b"data: " + json.dumps(an_event(text)).encode() + b"\n\n"))
        await asyncio.sleep(0.02)
        say(out, events(an_event(f"{text} ends")))

    return script


def answers(text: str, *, after_s: float = 0.0, status: str = "200 OK") -> Script:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        say(
            out,
            an_answer(
                json.dumps({"text": text, "usage": {"completion_tokens": 2}}).encode(), status
            ),
        )

    return script


def outcomes(rig: Rig) -> dict[HedgeOutcome, int]:
    return dict(rig.gateway.scheduler.races.outcomes)


@pytest.mark.parametrize("head_first", [True, False])
def test_a_stream_that_stalls_is_answered_by_another_replica(head_first: bool) -> None:  # noqa: FBT001
    async def main() -> None:
        stalls = streams("slow", after_s=60.0, head_first=head_first)
        async with over_upstreams(stalls, streams("fast"), policy=hedging()) as (rig, (one, other)):
            reply = await rig.call({"stream": True})

            assert reply.status == 200
            assert (reply.body.count(b"fast"), reply.body.count(b"slow")) == (2, 0)
            assert reply.body.endswith(b"data: [DONE]\n\n")
            await until(lambda: one.lost == 1, "the loser is stopped")
            assert (len(one.heard), len(other.heard)) == (1, 1)
            assert await rig.metric('concertmaster_hedges_total{outcome="won"}') == 1
            assert await rig.metric('concertmaster_decisions_total{reason="hedged"}') == 1
            await rig.idle()

    play(main())


def test_a_first_attempt_that_is_only_late_stops_its_hedge() -> None:
    async def main() -> None:
        late, hung = streams("late", after_s=0.3), streams("never", after_s=60.0, head_first=True)
        async with over_upstreams(late, hung, policy=hedging()) as (rig, (_, other)):
            reply = await rig.call({"stream": True})

            assert (reply.body.count(b"late"), reply.body.count(b"never")) == (2, 0)
            await until(lambda: other.lost == 1, "the hedge is stopped")
            assert outcomes(rig) == {"lost": 1}
            await rig.idle()

    play(main())


def test_a_whole_answer_is_hedged_too() -> None:
    async def main() -> None:
        slow, fast = answers("slow", after_s=60.0), answers("fast")
        async with over_upstreams(slow, fast, policy=hedging()) as (rig, (one, _)):
            reply = await rig.call({"max_tokens": 1})

            assert (reply.status, reply.json["text"]) == (200, "fast")
            await until(lambda: one.lost == 1)
            assert outcomes(rig) == {"won": 1}
            await rig.idle()

    play(main(), seconds=60)


def test_a_whole_answer_that_two_replicas_make_is_part_of_both_batches() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, policy=hedging()) as (rig, both):
            wire = await rig.wire()
            wire.send(a_call(max_tokens=1))
            await until(lambda: all(one.heard for one in both), "both have it")
            pace = rig.gateway._pace
            assert pace is not None
            assert [meter._batch for meter in pace._meters.values()] == [1, 1]
            await wire.close()
            await rig.idle()
            assert [meter._batch for meter in pace._meters.values()] == [0, 0]

    play(main())


def test_without_a_rule_a_late_call_stays_where_it_is() -> None:
    async def main() -> None:
        late = streams("late", after_s=0.4)
        async with over_upstreams(late, hangs, policy=hedging(None)) as (rig, (_, other)):
            assert b"late" in (await rig.call({"stream": True})).body
            assert not other.heard

    play(main())


@pytest.mark.parametrize(
    "broken", [cuts, answers("no", status="500 Oops"), answers("no", status="404 Not Found")]
)
def test_a_hedge_that_breaks_is_not_seen(broken: Script) -> None:
    async def main() -> None:
        late = streams("late", after_s=0.4)
        async with over_upstreams(late, broken, policy=hedging()) as (rig, (one, other)):
            reply = await rig.call({"stream": True})

            assert (reply.status, reply.body.count(b"late")) == (200, 2)
            assert (len(one.heard), len(other.heard)) == (1, 1)
            assert outcomes(rig) == {"broke": 1}
            assert await rig.metric("concertmaster_retries_total") == 0
            await rig.idle()

    play(main())


def test_a_hedge_answers_where_the_first_attempt_breaks() -> None:
    async def breaks_late(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.25)
        out.transport.abort()

    async def main() -> None:
        slowly = streams("second", after_s=0.4)
        async with over_upstreams(breaks_late, slowly, policy=hedging()) as (rig, (one, other)):
            reply = await rig.call({"stream": True})

            assert (reply.status, reply.body.count(b"second")) == (200, 2)
            assert (len(one.heard), len(other.heard)) == (1, 1)
            assert outcomes(rig) == {"alone": 1}
            assert await rig.metric("concertmaster_retries_total") == 0
            await rig.idle()

    play(main())


def test_where_both_break_the_call_is_tried_again_as_ever() -> None:
    times = 0

    async def breaks(_: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal times
        times += 1
        if times < 3:
            await asyncio.sleep(0.25)
            out.transport.abort()
        else:
            await streams("third")(_, out)

    async def main() -> None:
        async with over_upstreams(breaks, breaks, policy=hedging()) as (rig, _):
            reply = await rig.call({"stream": True})

            assert (reply.status, reply.body.count(b"third")) == (200, 2)
            assert times == 3
            assert await rig.metric("concertmaster_retries_total") == 1
            await rig.idle()

    play(main())


def test_a_caller_that_leaves_stops_both_attempts() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, policy=hedging()) as (rig, upstreams):
            wire = await rig.wire()
            wire.send(a_call(stream=True))
            await until(lambda: all(one.heard for one in upstreams), "both have it")
            await wire.close()
            await until(lambda: all(one.lost == 1 for one in upstreams), "both are stopped")
            assert outcomes(rig) == {"cancelled": 1}
            await rig.idle()

    play(main())


def test_a_call_that_takes_too_long_as_a_whole_stops_both_attempts() -> None:
    async def main() -> None:
        rule = hedging()
        async with over_upstreams(hangs, hangs, policy=rule, total_timeout_s=0.6) as (rig, both):
            reply = await rig.call({"stream": True})

            assert (reply.status, reply.error["code"]) == (504, "timed_out")
            await until(lambda: all(one.lost == 1 for one in both))
            await rig.idle()

    play(main())


def test_a_silent_hedge_is_given_up_as_any_attempt() -> None:
    async def main() -> None:
        late = streams("late", after_s=1.0)
        rule = {"policy": hedging(), "first_byte_timeout_s": 0.5}
        async with over_upstreams(late, hangs, **rule) as (rig, (_, other)):
            task = asyncio.create_task(rig.call({"stream": True}))
            await until(lambda: other.heard)
            await until(lambda: other.lost == 1, "silent for too long")
            await task
            await rig.idle()

    play(main())


@pytest.mark.parametrize("dead", [0, 1])
def test_a_replica_that_is_found_dead_leaves_the_call_to_the_other(dead: int) -> None:
    async def main() -> None:
        scripts = [streams(f"from {number}", after_s=1.2) for number in range(2)]
        rule = {"policy": hedging(), "health_interval_s": 0.1}
        async with over_upstreams(*scripts, **rule) as (rig, both):
            task = asyncio.create_task(rig.call({"stream": True}))
            await until(lambda: all(one.heard for one in both), "both have it")
            both[dead].healthy = False
            await until(lambda: not rig.replica(f"p-{dead}").alive, "found dead")
            reply = await task

            assert reply.body.count(b"from %d" % (1 - dead)) == 2
            assert b"from %d" % dead not in reply.body
            await rig.idle()

    play(main())


def test_a_call_that_moves_with_a_dead_replica_takes_nothing_from_the_budget() -> None:
    async def main() -> None:
        async with over_upstreams(answers("gone"), answers("here"), policy=hedging()) as (
            rig,
            both,
        ):
            for _ in both:
                await rig.call({"max_tokens": 1})
            both[0].hang_up()
            reply = await rig.call({"max_tokens": 1})
            assert len(both[1].heard) == 2

            assert reply.json["text"] == "here"
            assert await rig.metric("concertmaster_retries_total") == 0
            await rig.idle()

    play(main())


class Deaf:
    """A caller to whom nothing may be said."""

    def write(self, data: bytes) -> None:
        raise AssertionError(data)

    def finished(self, *, keep_alive: bool) -> None:
        raise AssertionError

    def abort(self) -> None:
        raise AssertionError


def test_a_lost_first_attempt_that_still_connects_is_not_sent() -> None:
    """Links send what they have kept only while it is the attempt that its call is at."""
    call = Exchange(a_request(), Deaf(), b"", b"", model_named="", streams=True)
    call.attempt, call.replica_id = 1, "p-0"
    hedge = call.beside()
    hedge.attempt, hedge.replica_id = 2, "p-1"

    dispatching.stop(call, ReplicaId("p-0"))

    assert (call.attempt, call.replica_id) == (2, "p-1")
    assert call.hedge is hedge
    assert not hedge.over


def test_first_attempts_that_lose_make_a_replica_rest() -> None:
    async def main() -> None:
        settings = {"policy": hedging(), "breaker_failures": 2, "breaker_pause_s": 30.0}
        async with over_upstreams(hangs, streams("fast"), **settings) as (rig, (one, _)):
            for _ in range(6):
                assert b"fast" in (await rig.call({"stream": True})).body
            await until(lambda: rig.replica("p-0").draining, "it rests")
            assert len(one.heard) == 2
            await rig.idle()

    play(main())


def test_a_receipt_shows_the_hedge_and_which_attempt_answered() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, streams("fast"), policy=hedging()) as (rig, _):
            await rig.call({"stream": True}, x_request_id="r1")
            receipt = (await rig.ask("GET", "/v1/decisions/r1")).json

            first, second = receipt["attempts"]
            assert (first["replica"], first["hedge"]) == ("p-0", False)
            assert (second["replica"], second["hedge"], second["attempt"]) == ("p-1", True, 2)
            assert receipt["outcome"]["attempt"] == 2
            assert receipt["outcome"]["status"] == 200

    play(main())


@pytest.mark.parametrize("stream", [True, False])
def test_many_calls_over_engines_that_stall_are_each_answered_once(stream: bool) -> None:  # noqa: FBT001
    """Each call names itself, and every fourth attempt stalls."""
    seen = 0

    async def stalls_now_and_then(heard: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += 1
        after_s = 60.0 if seen % 4 == 0 else 0.01 * (seen % 5)
        said = heard.json["messages"][0]["content"]
        answer = streams(said) if stream else answers(said)
        await asyncio.sleep(after_s)
        await answer(heard, out)

    async def one(rig: Rig, number: int) -> None:
        said = f"number-{number}-"
        fields: Mapping[str, object] = {
            "messages": [{"role": "user", "content": said}],
            "stream": stream,
            "max_tokens": 1,
        }
        reply = await rig.call(fields)
        assert reply.status == 200
        assert reply.body.count(b"number-") == reply.body.count(said.encode()) == 1 + stream

    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=64), replicas=3)
        script = stalls_now_and_then
        settings = {"fleet": fleet, "policy": hedging(), "total_timeout_s": 4.0}
        async with over_upstreams(script, script, script, **settings) as (rig, _):
            for start in range(0, 60, 3):
                numbers = range(start, start + 3)
                replies = await asyncio.gather(
                    *(one(rig, number) for number in numbers), return_exceptions=True
                )
                # a hedge may stall as well: its call is refused, with a reason and as a whole
                problems = [str(each) for each in replies if each is not None]
                assert all("504" in problem for problem in problems), problems
            await rig.idle()
            assert rig.gateway.scheduler.races.outcomes["won"] > 3

    play(main(), seconds=90)
