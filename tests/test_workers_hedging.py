"""Two attempts at a call whose bytes a worker moves: one answers, and all agree on which."""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from builders import a_fleet, a_pool
from concertmaster.core.events import ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.quotas import Quota
from concertmaster.gateway.workers.frames import Drop, Engine, Send
from concertmaster.gateway.workers.wire import Wire as Line
from crew import Crew, over_upstreams
from gateway_rig import (
    CHAT,
    STREAM_HEAD,
    Heard,
    Script,
    Upstream,
    Wire,
    a_body,
    a_call,
    a_chunk,
    a_message,
    an_answer,
    cuts,
    events,
    hangs,
    play,
    until,
)
from test_gateway_hedging import an_event, answers, hedging, outcomes, say, streams
from test_gateway_keys import Safe

P0, P1 = ReplicaId("p-0"), ReplicaId("p-1")
STREAM, WHOLE = a_call(stream=True), a_call(max_tokens=1)
CLOSE = {"connection": "close"}


def breaks(*, after_s: float) -> Script:
    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        out.transport.abort()

    return script


def drips(text: str, *, after_s: float) -> Script:
    """Begin a stream, and end it half a second later."""

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        out.write(STREAM_HEAD + a_chunk(b"data: " + json.dumps(an_event(text)).encode() + b"\n\n"))
        await asyncio.sleep(0.5)
        say(out, events(an_event(f"{text} ends")))

    return script


def answers_in_two(text: str, *, after_s: float) -> Script:
    """Send half of a whole answer, and the rest half a second later."""
    whole = an_answer(json.dumps({"text": text, "usage": {"completion_tokens": 2}}).encode())

    async def script(_: Heard, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        out.write(whole[:-20])
        await asyncio.sleep(0.5)
        say(out, whole[-20:])

    return script


async def streamed(wire: Wire) -> bytes:
    """Read an answer in chunks to its end."""
    async with asyncio.timeout(5):
        return await wire.reader.readuntil(b"\r\n0\r\n\r\n")


def deafen(crew: Crew, number: int = 0) -> Callable[[], None]:
    """Let the scheduler hear nothing of a worker until what is returned is called."""
    transport = crew.hub.lines[number]._wire._transport
    assert transport is not None
    transport.pause_reading()
    return transport.resume_reading


def deafen_worker(crew: Crew, number: int = 0) -> Callable[[], None]:
    """Let a worker hear nothing of the scheduler until what is returned is called."""
    wire = crew.carrier(number)._wire
    assert wire is not None
    assert wire._transport is not None
    wire._transport.pause_reading()
    return wire._transport.resume_reading


def hedged(crew: Crew) -> bool:
    return bool(crew.rig.gateway.scheduler.races.seconds)


def both_heard(upstreams: list[Upstream]) -> bool:
    return all(one.heard for one in upstreams)


# One answers.


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("worker", [0, 1])
def test_a_stream_that_stalls_is_answered_by_another_replica(
    worker: int,
    head_first: bool,  # noqa: FBT001
) -> None:
    async def main() -> None:
        stalls = streams("slow", after_s=60.0, head_first=head_first)
        async with over_upstreams(stalls, streams("fast"), policy=hedging()) as (crew, (one, two)):
            wire = await crew.wire(worker)
            wire.send(STREAM)
            assert b"x-concertmaster-replica: p-0\r\n" in await wire.head()
            body = await streamed(wire)

            assert (body.count(b"fast"), body.count(b"slow")) == (2, 0)
            await until(lambda: one.lost == 1, "the loser is stopped")
            assert (len(one.heard), len(two.heard)) == (1, 1)
            assert one.heard[0].body == two.heard[0].body
            assert await crew.rig.metric('concertmaster_hedges_total{outcome="won"}') == 1
            assert await crew.rig.metric('concertmaster_decisions_total{reason="hedged"}') == 1
            await crew.idle()
            wire.send(STREAM)
            await wire.head()
            await streamed(wire)
            await crew.idle()

    play(main())


def test_a_first_attempt_that_is_only_late_stops_its_hedge() -> None:
    async def main() -> None:
        late, hung = streams("late", after_s=0.3), streams("never", after_s=60.0, head_first=True)
        async with over_upstreams(late, hung, policy=hedging()) as (crew, (_, two)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            body = await streamed(wire)

            assert (body.count(b"late"), body.count(b"never")) == (2, 0)
            await until(lambda: two.lost == 1, "the hedge is stopped")
            assert outcomes(crew.rig) == {"lost": 1}
            await crew.idle()

    play(main())


@pytest.mark.parametrize(
    ("call", "pair"),
    [
        (STREAM, (drips("one", after_s=0.3), streams("two", after_s=0.3))),
        (WHOLE, (answers_in_two("one", after_s=0.4), answers("two", after_s=0.5))),
    ],
)
def test_a_loser_is_stopped_by_the_worker_before_the_scheduler_says_so(
    call: bytes, pair: tuple[Script, Script]
) -> None:
    """Both would answer in the time in which the worker hears nothing."""

    async def main() -> None:
        async with over_upstreams(*pair, policy=hedging()) as (crew, both):
            wire = await crew.wire(0)
            wire.send(call)
            await until(lambda: both_heard(both))
            hear_again = deafen_worker(crew)
            await wire.head()
            await until(lambda: both[0].lost + both[1].lost == 1, "the loser is stopped")
            await asyncio.sleep(0.6)
            hear_again()
            await crew.idle()
            wire.writer.write_eof()
            rest = await wire.rest()

            assert b"HTTP/1.1" not in rest
            assert b"one" in rest
            assert b"two" not in rest

    play(main())


def test_a_whole_answer_is_hedged_too() -> None:
    async def main() -> None:
        slow, fast = answers("slow", after_s=60.0), answers("fast")
        async with over_upstreams(slow, fast, policy=hedging()) as (crew, (one, _)):
            wire = await crew.wire(1)
            wire.send(WHOLE)
            status, body = await wire.answer()

            assert (status, json.loads(body)["text"]) == (200, "fast")
            await until(lambda: one.lost == 1)
            assert outcomes(crew.rig) == {"won": 1}
            assert crew.rig.gateway.metrics.by_status == {200: 1}
            await crew.idle()

    play(main(), seconds=60)


def test_a_receipt_shows_both_attempts_and_which_one_answered() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, streams("fast"), policy=hedging()) as (crew, _):
            wire = await crew.wire(1)
            body = json.dumps(a_body(stream=True)).encode()
            wire.send(a_message("POST", CHAT, body, {"x-request-id": "r1"}))
            await streamed(wire)
            await crew.idle()
            receipt = (await crew.rig.ask("GET", "/v1/decisions/r1")).json

            told = [(one["replica"], one["hedge"]) for one in receipt["attempts"]]
            assert told == [("p-0", False), ("p-1", True)]
            assert (receipt["outcome"]["attempt"], receipt["outcome"]["status"]) == (2, 200)

    play(main())


def test_a_held_stream_is_answered_by_its_hedge() -> None:
    """What the caller was sent while it waited is the call's, whichever attempt goes on."""

    async def main() -> None:
        async with over_upstreams(hangs, streams("fast"), policy=hedging()) as (crew, (one, _)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: one.heard)
            crew.carrier(0)._calls[1].exchange.held = True
            body = await streamed(wire)

            assert body.count(b"fast") == 2
            assert b"HTTP/1.1" not in body
            await crew.idle()

    play(main())


def test_first_attempts_that_lose_make_a_replica_rest() -> None:
    async def main() -> None:
        settings: dict[str, Any] = {"breaker_failures": 2, "breaker_pause_s": 30.0}
        upstreams = (hangs, streams("fast"))
        async with over_upstreams(*upstreams, policy=hedging(), **settings) as (crew, (one, _)):
            for number in range(6):
                wire = await crew.wire(number % 2)
                wire.send(STREAM)
                assert b"fast" in await streamed(wire)
            await until(lambda: crew.rig.replica("p-0").draining, "it rests")
            assert len(one.heard) == 2
            await crew.idle()

    play(main())


# One breaks, or both.


@pytest.mark.parametrize(
    "broken", [cuts, answers("no", status="500 Oops"), answers("no", status="404 Not Found")]
)
def test_a_hedge_that_breaks_is_not_seen(broken: Script) -> None:
    async def main() -> None:
        late = streams("late", after_s=0.4)
        async with over_upstreams(late, broken, policy=hedging()) as (crew, (one, two)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            body = await streamed(wire)

            assert body.count(b"late") == 2
            assert (len(one.heard), len(two.heard)) == (1, 1)
            assert outcomes(crew.rig) == {"broke": 1}
            assert await crew.rig.metric("concertmaster_retries_total") == 0
            await crew.idle()

    play(main())


def test_a_hedge_answers_where_the_first_attempt_breaks() -> None:
    async def main() -> None:
        pair = breaks(after_s=0.25), streams("second", after_s=0.4)
        async with over_upstreams(*pair, policy=hedging()) as (crew, (one, two)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            body = await streamed(wire)

            assert body.count(b"second") == 2
            assert (len(one.heard), len(two.heard)) == (1, 1)
            assert outcomes(crew.rig) == {"alone": 1}
            assert await crew.rig.metric("concertmaster_retries_total") == 0
            await crew.idle()

    play(main())


def test_where_both_break_the_call_is_tried_again_as_ever() -> None:
    times = 0

    async def breaks_twice(heard: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal times
        times += 1
        await (breaks(after_s=0.25) if times < 3 else streams("third"))(heard, out)

    async def main() -> None:
        async with over_upstreams(breaks_twice, breaks_twice, policy=hedging()) as (crew, _):
            wire = await crew.wire(0)
            wire.send(STREAM)

            assert (await streamed(wire)).count(b"third") == 2
            assert times == 3
            assert await crew.rig.metric("concertmaster_retries_total") == 1
            await crew.idle()

    play(main())


def test_silent_attempts_are_given_up_by_the_worker_one_by_one() -> None:
    times = 0

    async def hangs_twice(heard: Heard, out: asyncio.StreamWriter) -> None:
        nonlocal times
        times += 1
        await (hangs if times < 3 else streams("third"))(heard, out)

    async def main() -> None:
        rule: dict[str, Any] = {"policy": hedging(), "first_byte_timeout_s": 0.5}
        async with over_upstreams(hangs_twice, hangs_twice, **rule) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            body = await streamed(wire)

            assert body.count(b"third") == 2
            assert sum(one.lost for one in both) == 2
            assert outcomes(crew.rig) == {"alone": 1}
            await crew.idle()

    play(main())


@pytest.mark.parametrize("dead", [0, 1])
def test_a_replica_that_is_found_dead_leaves_the_call_to_the_other(dead: int) -> None:
    async def main() -> None:
        scripts = [streams(f"from {number}", after_s=1.2) for number in range(2)]
        async with over_upstreams(*scripts, policy=hedging()) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both_heard(both), "both have it")
            crew.rig.gateway.feed(ReplicaDied(ReplicaId(f"p-{dead}")))
            await until(lambda: both[dead].lost == 1, "its attempt is stopped")
            body = await streamed(wire)

            assert body.count(b"from %d" % (1 - dead)) == 2
            assert b"from %d" % dead not in body
            await crew.idle()

    play(main())


# Nobody waits any more.


def test_a_caller_that_leaves_stops_both_attempts() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, policy=hedging()) as (crew, both):
            wire = await crew.wire(1)
            wire.send(STREAM)
            await until(lambda: both_heard(both), "both have it")
            await wire.close()
            await until(lambda: all(one.lost == 1 for one in both), "both are stopped")
            await until(lambda: outcomes(crew.rig) == {"cancelled": 1})
            await crew.idle()

    play(main())


def test_a_call_that_takes_too_long_as_a_whole_stops_both_attempts() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, policy=hedging(), total_timeout_s=0.6) as (
            crew,
            both,
        ):
            wire = await crew.wire(0)
            wire.send(STREAM)
            status, body = await wire.answer()

            assert (status, json.loads(body)["error"]["code"]) == (504, "timed_out")
            await until(lambda: all(one.lost == 1 for one in both))
            await crew.idle()

    play(main())


def test_a_worker_that_is_gone_takes_both_attempts_out_of_the_ledgers() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=8), replicas=2)
        async with over_upstreams(hangs, hangs, policy=hedging(), fleet=fleet) as (crew, both):
            lost, kept = await crew.wire(0), await crew.wire(1)
            lost.send(STREAM)
            await until(lambda: both_heard(both), "both have it")
            kept.send(a_call(stream=True))
            replicas = crew.rig.gateway.scheduler.replicas
            await until(lambda: sum(len(one.in_flight) for one in replicas.values()) == 4)
            transport = crew.hub.lines[0]._wire._transport
            assert transport is not None
            transport.abort()
            await until(lambda: sum(len(one.in_flight) for one in replicas.values()) == 2)
            crew.rig.gateway.scheduler.validate()
            assert outcomes(crew.rig) == {"cancelled": 1}
            for wire in (lost, kept):
                await wire.close()
            await crew.idle()

    play(main())


# Without a scheduler.


def test_a_race_goes_on_without_a_scheduler_and_one_answers() -> None:
    async def main() -> None:
        slow, second = streams("slow", after_s=60.0), streams("second", after_s=0.5)
        async with over_upstreams(slow, second, policy=hedging()) as (crew, (one, two)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: two.heard, "both have it")
            crew.lose_scheduler()
            body = await streamed(wire)

            assert (body.count(b"second"), body.count(b"slow")) == (2, 0)
            await until(lambda: one.lost == 1, "the loser is stopped")
            await crew.idle()

    play(main())


@pytest.mark.parametrize("lost_first", [True, False])
def test_one_attempt_that_breaks_does_not_end_a_race_without_a_scheduler(
    lost_first: bool,  # noqa: FBT001
) -> None:
    async def main() -> None:
        pair = breaks(after_s=0.4), streams("second", after_s=0.6)
        async with over_upstreams(*pair, policy=hedging()) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both_heard(both), "both have it")
            if not lost_first:
                await until(lambda: outcomes(crew.rig) == {"alone": 1})
            crew.lose_scheduler()
            assert (await streamed(wire)).count(b"second") == 2
            await crew.idle()

    play(main())


def test_an_answer_that_won_its_race_goes_on_without_a_scheduler() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, drips("won", after_s=0.0), policy=hedging()) as (crew, _):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await wire.head()
            await until(lambda: outcomes(crew.rig) == {"won": 1})
            await asyncio.sleep(0.1)  # the word to drop the other is there
            crew.lose_scheduler()
            assert (await streamed(wire)).count(b"won") == 2
            await crew.idle()

    play(main())


def test_a_race_that_nobody_wins_without_a_scheduler_is_refused_once() -> None:
    async def main() -> None:
        pair = breaks(after_s=0.3), breaks(after_s=0.5)
        async with over_upstreams(*pair, policy=hedging(), may_log=True) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both_heard(both), "both have it")
            crew.lose_scheduler()
            status, body = await wire.answer()

            assert (status, json.loads(body)["error"]["code"]) == (502, "engine_error")
            await crew.idle()

    play(main())


# Quotas.


@pytest.fixture(name="charged")
def _charged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Output tokens that tenants were charged, a call each."""
    charged: list[int] = []
    ends = Quota.end

    def end(self: Quota, tokens: int, lasted_s: float) -> None:
        charged.append(tokens)
        ends(self, tokens, lasted_s)

    monkeypatch.setattr(Quota, "end", end)
    return charged


def test_a_tenant_is_charged_for_one_answer(tmp_path: Path, charged: list[int]) -> None:
    safe = Safe(tmp_path / "keys.sqlite")
    key = {"authorization": f"Bearer {safe.key(in_flight=1, tokens_per_min=100_000)}"}
    message = a_message("POST", CHAT, json.dumps(a_body(max_tokens=1)).encode(), key)

    async def main() -> None:
        pair = answers("slow", after_s=60.0), answers("fast", after_s=0.1)
        settings: dict[str, Any] = {"keys": str(safe.path), "policy": hedging()}
        async with over_upstreams(*pair, **settings) as (crew, both):
            wire = await crew.wire(0)
            for _ in range(2):
                wire.send(message)
                assert (await wire.answer())[0] == 200
            wire.send(message)
            await until(lambda: len(both[0].heard) + len(both[1].heard) >= 5, "a race is on")
            await wire.close()
            await crew.idle()
            assert outcomes(crew.rig)["won"] >= 1
            assert charged == [2, 2, 0]

    play(main())


def test_an_answer_that_was_given_up_as_it_arrived_is_charged(
    tmp_path: Path, charged: list[int]
) -> None:
    safe = Safe(tmp_path / "keys.sqlite")
    key = {"authorization": f"Bearer {safe.key(in_flight=1)}"}
    message = a_message("POST", CHAT, json.dumps(a_body(max_tokens=1)).encode(), key)

    async def main() -> None:
        settings: dict[str, Any] = {"keys": str(safe.path), "policy": hedging(None)}
        async with over_upstreams(answers("whole", after_s=0.1), **settings) as (crew, upstream):
            wire = await crew.wire(0)
            wire.send(message)
            await until(lambda: upstream.heard)
            hear_again = deafen(crew)
            assert (await wire.answer())[0] == 200
            crew.rig.gateway.feed(ReplicaDied(P0))
            hear_again()
            await crew.idle()
            assert charged == [2]
            crew.rig.gateway.feed(ReplicaReady(P0))
            wire.send(message)
            assert (await wire.answer())[0] == 200

    play(main())


# Words that cross on their way.


def test_a_hedge_that_was_decided_after_the_answer_began_is_not_sent() -> None:
    async def main() -> None:
        late = drips("late", after_s=0.05)
        async with over_upstreams(late, hangs, policy=hedging()) as (crew, (one, two)):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: one.heard)
            hear_again = deafen(crew)
            await until(lambda: hedged(crew), "it is late as far as the scheduler knows")
            body = await streamed(wire)
            hear_again()

            assert body.count(b"late") == 2
            await crew.idle()
            assert outcomes(crew.rig) == {"lost": 1}
            assert not two.heard

    play(main())


def test_a_hedge_that_was_decided_after_the_first_attempt_broke_is_the_only_one() -> None:
    async def main() -> None:
        pair = breaks(after_s=0.05), breaks(after_s=0.05)
        async with over_upstreams(*pair, policy=hedging(), may_log=True) as (crew, (one, two)):
            wire, carrier = await crew.wire(0), crew.carrier(0)
            wire.send(STREAM)
            await until(lambda: one.heard)
            hear_again = deafen(crew)
            await until(lambda: two.heard, "it is sent beside what has broken")
            assert not carrier._asking
            await until(lambda: carrier._asking, "nothing goes on")
            one.script = two.script = streams("third")
            hear_again()
            assert (await streamed(wire)).count(b"third") == 2
            assert outcomes(crew.rig) == {"alone": 1}
            await crew.idle()

    play(main())


@pytest.mark.parametrize("winner", [0, 1])
@pytest.mark.parametrize("call", [STREAM, WHOLE])
def test_an_answer_that_began_where_its_replica_was_given_up_is_the_last_of_its_call(
    winner: int, call: bytes
) -> None:
    """The worker lets an attempt answer while the scheduler takes its replica for dead."""

    async def main() -> None:
        begins = (
            streams("winner", after_s=0.5) if call is STREAM else answers("winner", after_s=0.5)
        )
        scripts: list[Script] = [hangs, hangs]
        scripts[winner] = begins
        async with over_upstreams(*scripts, policy=hedging()) as (crew, both):
            wire = await crew.wire(0)
            wire.send(call)
            await until(lambda: both_heard(both), "both have it", seconds=15)
            hear_again = deafen(crew)
            deaf_too = deafen_worker(crew)
            crew.rig.gateway.feed(ReplicaDied(ReplicaId(f"p-{winner}")))
            await until(lambda: both[1 - winner].lost == 1, "the worker has decided")
            hear_again()
            deaf_too()
            await until(lambda: not crew.rig.gateway.open_exchanges, "the call is over")

            assert sum(len(one.heard) for one in both) == 2
            assert crew.rig.gateway.metrics.by_status == {502: 1}
            rest = await wire.rest() if call is STREAM else (await wire.answer())[1]
            assert rest.count(b"HTTP/1.1") <= 1
            assert rest.count(b"winner") <= 2
            await crew.idle()

    play(main(), seconds=60)


def test_an_attempt_after_an_answer_has_begun_is_not_made() -> None:
    """A replica is taken for dead, and its call sent elsewhere, as its answer begins."""

    async def main() -> None:
        begins = drips("first", after_s=0.1)
        async with over_upstreams(begins, streams("second"), policy=hedging(None)) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both[0].heard)
            hear_again = deafen(crew)
            await wire.head()
            crew.rig.gateway.feed(ReplicaDied(P0))
            await until(lambda: crew.rig.replica("p-1").in_flight, "it goes elsewhere")
            await asyncio.sleep(0.1)
            hear_again()
            rest = await wire.rest()

            assert b"second" not in rest
            assert not both[1].heard
            assert crew.rig.gateway.metrics.by_status == {502: 1}
            await crew.idle()

    play(main())


def test_a_call_that_waits_again_and_was_answered_meanwhile_leaves_the_line() -> None:
    async def main() -> None:
        begins = streams("first", after_s=0.1)
        async with over_upstreams(begins, policy=hedging(None)) as (crew, upstream):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: upstream.heard)
            hear_again = deafen(crew)
            await wire.head()
            crew.rig.gateway.feed(ReplicaDied(P0))
            hear_again()
            await until(lambda: not crew.rig.gateway.open_exchanges)
            assert crew.rig.gateway.metrics.by_status == {502: 1}
            crew.rig.gateway.feed(ReplicaReady(P0))

            assert len(upstream.heard) == 1
            await crew.idle()

    play(main())


def test_a_replica_that_is_taken_for_dead_does_not_answer_what_is_sent_elsewhere() -> None:
    async def main() -> None:
        late, other = streams("late", after_s=0.5), streams("other")
        async with over_upstreams(late, other, policy=hedging(None)) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both[0].heard)
            crew.rig.gateway.feed(ReplicaDied(P1))
            crew.rig.gateway.feed(ReplicaDied(P0))
            await until(lambda: both[0].lost == 1, "the worker has dropped it")
            crew.rig.gateway.feed(ReplicaReady(P1))
            assert (await streamed(wire)).count(b"other") == 2
            await crew.idle()

    play(main())


def test_a_race_of_which_both_replicas_are_taken_for_dead_is_run_anew() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, hangs, policy=hedging()) as (crew, both):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: both_heard(both))
            for dead in (P0, P1):
                crew.rig.gateway.feed(ReplicaDied(dead))
            await until(lambda: all(one.lost == 1 for one in both), "both are stopped")
            both[1].script = drips("third", after_s=0.0)
            crew.rig.gateway.feed(ReplicaReady(P1))
            await wire.head()
            (call,) = crew.rig.gateway._exchanges.values()
            assert (call.attempt, call.hedge) == (3, None)
            assert (await streamed(wire)).count(b"third") == 2
            await crew.idle()

    play(main())


def test_a_call_whose_only_attempt_was_dropped_is_refused_if_the_scheduler_goes_too() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, policy=hedging(None), may_log=True) as (crew, upstream):
            wire = await crew.wire(0)
            wire.send(STREAM)
            await until(lambda: upstream.heard)
            crew.rig.gateway.feed(ReplicaDied(P0))
            await until(lambda: upstream.lost == 1, "it waits for another replica")
            crew.lose_scheduler()

            assert (await wire.answer())[0] == 503
            await until(lambda: not crew.carrier(0).open_calls)

    play(main())


def test_an_attempt_that_was_dropped_while_it_connects_is_not_made() -> None:
    async def main() -> None:
        async with over_upstreams(policy=hedging(None)) as (crew, upstream):
            wire, carrier = await crew.wire(0), crew.carrier(0)
            hear_again = deafen_worker(crew)
            wire.send(STREAM)
            await until(lambda: carrier.open_calls)
            for frame in (
                Engine("p-0", upstream.url, "vllm", ""),
                Send(1, 1, False, "p-0", "m", 0, "cm-1", b"", b""),  # noqa: FBT003
                Drop(1, 1),
            ):
                carrier.hear(None, frame)  # type: ignore[arg-type]
            await asyncio.sleep(0.1)
            assert not upstream.heard
            hear_again()
            assert (await wire.answer())[0] == 200
            await crew.idle()

    play(main())


# All of it.


def slow_lines(monkeypatch: pytest.MonkeyPatch, most_s: float, rng: random.Random) -> None:
    """Let batches of frames take their time, each wire's in order."""
    take, due_s = Line._take, dict[int, float]()

    def late(self: Line[Any], body: bytes) -> None:
        loop = asyncio.get_running_loop()
        least_s = due_s.get(id(self), 0.0) + 1e-6  # of equal instants any may come first
        due_s[id(self)] = max(least_s, loop.time() + rng.uniform(0, most_s))
        loop.call_at(due_s[id(self)], take, self, body)

    monkeypatch.setattr(Line, "_take", late)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_many_calls_whose_words_cross_are_each_answered_once(
    seed: int,
    stream: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attempts stall, break or answer, replicas are taken for dead, words are up to 60 ms late."""
    rng = random.Random(seed)
    slow_lines(monkeypatch, 0.06, rng)

    async def fares(heard: Heard, out: asyncio.StreamWriter) -> None:
        said = heard.json["messages"][0]["content"]
        fate = rng.random()
        if fate < 0.15:
            await breaks(after_s=rng.uniform(0, 0.2))(heard, out)
            return
        await asyncio.sleep(60.0 if fate < 0.3 else rng.uniform(0, 0.3))
        await (streams(said) if stream else answers(said))(heard, out)

    async def one(crew: Crew, number: int) -> int:
        said = f"number-{number}-"
        fields: Mapping[str, object] = {
            "messages": [{"role": "user", "content": said}],
            "stream": stream,
            "max_tokens": 1,
        }
        wire = await crew.rig.wire()
        wire.send(a_message("POST", CHAT, json.dumps(a_body(**fields)).encode(), CLOSE))
        data = await wire.rest()
        assert data.count(b"HTTP/1.1 ") == 1, data
        whole = data.count(said.encode()) == 1 + stream and b" 200 OK" in data
        assert data.count(b"number-") == data.count(said.encode())
        assert whole or b"error" in data or b"[DONE]" not in data
        return whole

    async def flaps(crew: Crew) -> None:
        while True:
            victim = ReplicaId(f"p-{rng.randrange(3)}")
            await asyncio.sleep(rng.uniform(0.05, 0.2))
            crew.rig.gateway.feed(ReplicaDied(victim))
            await asyncio.sleep(0.02)
            crew.rig.gateway.feed(ReplicaReady(victim))

    async def main() -> None:
        fleet = a_fleet(a_pool(max_sequences=64), replicas=3)
        settings: dict[str, Any] = {
            "fleet": fleet,
            "policy": hedging(),
            "total_timeout_s": 3.0,
            "breaker_failures": 1000,
        }
        async with over_upstreams(fares, fares, fares, **settings) as (crew, _):
            flapping = asyncio.create_task(flaps(crew))
            whole = 0
            for start in range(0, 96, 12):
                whole += sum(
                    await asyncio.gather(*(one(crew, start + number) for number in range(12)))
                )
            flapping.cancel()
            await crew.idle()
            assert whole > 48
            assert sum(outcomes(crew.rig).values()) > 10

    play(main(), seconds=120)
