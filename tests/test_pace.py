"""Pace: what completions say of a replica's curve, and what the core makes of it."""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import pytest

from builders import (
    CheckedScheduler,
    a_call,
    a_fleet,
    a_forecast,
    a_plan,
    a_pool,
    a_replica,
    a_request,
    a_waiting_call,
    a_workload,
    chains,
    placements,
)
from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.cost import RateCurve
from concertmaster.core.events import (
    Event,
    PaceObserved,
    ReplicaDemoted,
    ReplicaDied,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
)
from concertmaster.core.fleet import Fleet, Pool, Readiness, Replica, ReplicaId
from concertmaster.core.policy import Scorer
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.physics.batching import BatchingEngine
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.policies.catalog import policy
from concertmaster.policies.pickers import SHORTLIST, shortlist
from concertmaster.policies.scorers import Decode, InFlightTokens, Prefill, PrefillMiss
from concertmaster.predictors.rates import MIN_STEPS, PaceWatch
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import Workload

P0, P1 = ReplicaId("p-0"), ReplicaId("p-1")


# What the core and the policies make of it.


def busy(pace: float) -> Replica:
    """A replica with two calls, one of them past its first token."""
    scheduler = CheckedScheduler()
    scheduler.at(0.0, PaceObserved(((P0, pace),)))
    for name in ("a", "b"):
        scheduler.arrive(name, forecast=a_forecast(40), prompt_tokens=1000)
    scheduler.at(0.5, TokensStreamed(((RequestId("a"), 1, 10),)))
    return scheduler.replica()


@pytest.mark.parametrize("scorer", [Prefill(), PrefillMiss(), Decode(), InFlightTokens()])
def test_seconds_that_a_replica_adds_grow_with_its_pace(scorer: Scorer) -> None:
    call = a_waiting_call("c")
    cost_s = scorer.cost_s(0.0, call, busy(1.0))

    assert cost_s > 0
    assert scorer.cost_s(0.0, call, busy(1.5)) == pytest.approx(1.5 * cost_s)


def test_a_slow_replica_takes_longer_to_clear_its_prefill() -> None:
    assert busy(2.0).prefill_clear_s == pytest.approx(2 * busy(1.0).prefill_clear_s)


def test_service_attained_counts_at_the_pace_of_the_replica() -> None:
    attained_s = []
    for pace in (1.0, 3.0):
        scheduler = CheckedScheduler()
        scheduler.at(0.0, PaceObserved(((P0, pace),)))
        scheduler.arrive("a", workflow_id="w")
        scheduler.at(1.0, TokensStreamed(((RequestId("a"), 1, 20),)))
        attained_s.append(scheduler.core.workflows.get("w").attained_s)  # type: ignore[arg-type]

    assert attained_s[1] == pytest.approx(3 * attained_s[0])


def test_of_two_idle_replicas_the_faster_one_is_chosen() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2))
    assert scheduler.at(0.0, PaceObserved(((P0, 1.2),))) == []

    assert placements(scheduler.arrive("a")) == {"a": "p-1"}


def test_a_large_pool_is_shortened_by_tokens_at_their_pace() -> None:
    pool = a_pool()
    replicas = [a_replica(f"p-{i:02d}", pool) for i in range(2 * SHORTLIST)]
    for i, replica in enumerate(replicas):
        replica.decode_tokens = 100 if i < SHORTLIST else 150
        replica.pace = 2.0 if i < SHORTLIST else 1.0

    kept = {replica.replica_id for replica in shortlist(a_waiting_call(), replicas)}

    assert kept == {replica.replica_id for replica in replicas[SHORTLIST:]}


# What is observed.


class Bench:
    """A core of two replicas and a watch on its events."""

    def __init__(self, fleet: Fleet | None = None) -> None:
        self.core = Scheduler(fleet or a_fleet(replicas=2), policy("round-robin"), random.Random(0))
        self.watch = PaceWatch(self.core)

    def feed(self, now_s: float, event: Event) -> list[Action]:
        self.watch.note(now_s, event)
        return self.core.handle(now_s, event)

    def call(
        self, name: str, now_s: float, *, pace: float, tokens: int = 101, gone: bool = False
    ) -> None:
        """One call alone, ten milliseconds a token at pace 1.0."""
        (dispatch,) = self.feed(now_s, RequestArrived(a_request(name, arrival_s=now_s)))
        assert isinstance(dispatch, Dispatch)
        self.feed(now_s + 0.1, TokensStreamed(((RequestId(name), 1, 1),)))
        step_s = self.core.replicas[P0].pool.curve.step_s(1, 100 + tokens // 2)
        end_s = now_s + 0.1 + pace * step_s * (tokens - 1)
        end = RequestFailed(RequestId(name), 1, retriable=False) if gone else None
        self.feed(end_s, end or RequestFinished(RequestId(name), 1, tokens))

    def told(self, now_s: float) -> Mapping[str, float]:
        event = self.watch.due(now_s)
        if event is None:
            return {}
        self.feed(now_s, event)
        return dict(event.paces)


def one_replica() -> Bench:
    return Bench(a_fleet())


def test_a_call_alone_on_a_slow_replica_shows_its_pace() -> None:
    bench = one_replica()
    for i in range(30):
        bench.call(f"r{i}", 4.0 * i, pace=1.3)

    assert bench.told(120.0) == {P0: pytest.approx(1.3, rel=0.04)}


def test_a_pace_near_the_curve_is_not_told() -> None:
    bench = one_replica()
    for i in range(30):
        bench.call(f"r{i}", 4.0 * i, pace=1.04)

    assert bench.told(120.0) == {}


def test_a_pace_is_told_again_only_once_it_has_moved_and_back_on_the_curve_is_told_as_one() -> None:
    bench = one_replica()
    for i in range(40):
        bench.call(f"r{i}", 4.0 * i, pace=1.3)
    assert bench.told(160.0) != {}
    for i in range(40, 44):
        bench.call(f"r{i}", 4.0 * i, pace=1.31)
    assert bench.told(176.0) == {}
    for i in range(44, 90):
        bench.call(f"r{i}", 4.0 * i, pace=1.0)

    assert bench.told(360.0) == {P0: 1.0}
    assert bench.told(361.0) == {}


def test_silence_brings_a_pace_back() -> None:
    bench = one_replica()
    for i in range(30):
        bench.call(f"r{i}", 4.0 * i, pace=1.5)
    assert bench.told(120.0) != {}

    assert bench.told(3720.0) == {P0: 1.0}


def test_short_answers_and_broken_calls_say_nothing() -> None:
    bench = one_replica()
    for i in range(30):
        bench.call(f"r{i}", 4.0 * i, pace=3.0, tokens=MIN_STEPS)
        bench.call(f"s{i}", 4.0 * i + 2.0, pace=3.0, tokens=50, gone=True)

    assert bench.told(120.0) == {}


@pytest.mark.parametrize("end", [ReplicaDied(P0), ReplicaDemoted(P0, Readiness.HOST)])
def test_a_replica_that_left_service_begins_anew(end: Event) -> None:
    bench = one_replica()
    for i in range(30):
        bench.call(f"r{i}", 4.0 * i, pace=2.0)
    assert bench.told(120.0) != {}
    bench.feed(120.0, RequestArrived(a_request("lost", arrival_s=120.0)))
    bench.feed(120.1, TokensStreamed(((RequestId("lost"), 1, 1),)))

    bench.feed(121.0, end)

    assert bench.told(121.0) == {P0: 1.0}
    assert not bench.watch._calls


def test_a_call_that_ended_this_instant_is_observed_the_next_time() -> None:
    """Another call's prefill may have been part of its last step."""
    bench = one_replica()
    step_s = bench.core.replicas[P0].pool.curve.step_s(1, 100 + 101 // 2)
    bench.call("r", 0.0, pace=3.0)

    assert bench.told(0.1 + 3.0 * step_s * 100) == {}
    assert bench.told(5.0) != {}


def test_nothing_is_kept_of_calls_that_are_over() -> None:
    bench = one_replica()
    bench.call("served", 0.0, pace=1.0)
    bench.call("broke", 5.0, pace=1.0, gone=True)
    bench.feed(10.0, RequestArrived(a_request("left", arrival_s=10.0)))
    bench.feed(10.1, TokensStreamed(((RequestId("left"), 1, 1),)))
    bench.feed(10.2, RequestCancelled(RequestId("left")))

    assert not bench.watch._calls
    assert bench.watch._meters[P0]._batch == 0
    assert bench.watch._meters[P0]._kv_tokens == 0


def test_news_of_an_attempt_that_is_over_ends_nothing() -> None:
    bench = one_replica()
    bench.feed(0.0, RequestArrived(a_request("a")))
    bench.feed(0.1, TokensStreamed(((RequestId("a"), 1, 1),)))
    bench.feed(0.5, RequestFinished(RequestId("a"), 2, 40))

    assert list(bench.watch._calls) == ["a"]


def test_calls_that_are_not_heard_of_slow_another_down_and_say_nothing_themselves() -> None:
    """Three calls share steps of which the curve knows that all of them are in it."""
    told = []
    for is_known in (True, False):
        bench = Bench(a_fleet(a_pool(curve=a_call_a_step())))
        for i in range(30):
            now_s = 10.0 * i
            names = [f"{name}{i}" for name in ("loud", "quiet", "silent")]
            for name in names:
                bench.feed(now_s, RequestArrived(a_request(name, arrival_s=now_s)))
            for name in names[1:] if is_known else ():
                bench.watch.unheard(now_s, RequestId(name), 1)
            bench.feed(now_s + 0.1, TokensStreamed(((RequestId(names[0]), 1, 1),)))
            for name, tokens in zip(names, (101, 20, 20), strict=True):
                bench.feed(now_s + 3.1, RequestFinished(RequestId(name), 1, tokens))
        told.append(bench.told(300.0))

    assert told == [{}, {P0: pytest.approx(3.0, rel=0.1)}]


class QuietRace(Bench):
    """A whole answer on both replicas, and a stream beside each attempt."""

    def __init__(self) -> None:
        super().__init__(a_fleet(a_pool(curve=a_call_a_step()), replicas=2))
        self.core.adopt(policy("round-robin/hedge:share=1"))
        for name in ("quiet", "loud-1", "loud-0"):
            self.feed(0.0, RequestArrived(a_request(name, streams=name != "quiet")))
        self.watch.unheard(0.0, QUIET, 1)
        for name in ("loud-1", "loud-0"):
            self.feed(0.1, TokensStreamed(((RequestId(name), 1, 1),)))
        (hedge,) = (one for one in self.feed(60.0, TimerFired()) if isinstance(one, Dispatch))
        assert (hedge.request_id, hedge.replica_id) == (QUIET, P1)
        self.watch.unheard(60.0, QUIET, 2)

    @property
    def batches(self) -> list[int]:
        return [self.watch._meters[one]._batch for one in (P0, P1)]


QUIET = RequestId("quiet")


def test_a_whole_answer_on_two_replicas_is_part_of_both_batches() -> None:
    race = QuietRace()

    assert race.batches == [2, 2]


@pytest.mark.parametrize(
    ("event", "batches"),
    [
        (TokensStreamed(((QUIET, 2, 1),)), [1, 2]),
        (TokensStreamed(((QUIET, 1, 1),)), [2, 1]),
        (RequestFinished(QUIET, 2, 50), [1, 1]),
        (RequestFinished(QUIET, 1, 50), [1, 1]),
        (RequestFailed(QUIET, 2, retriable=True), [2, 1]),
        (RequestFailed(QUIET, 1, retriable=True), [1, 2]),
        (RequestCancelled(QUIET), [1, 1]),
        (ReplicaDied(P1), [2, 0]),
        (ReplicaDied(P0), [0, 2]),
    ],
)
def test_an_attempt_leaves_its_batch_when_it_ends_and_no_sooner(
    event: Event, batches: list[int]
) -> None:
    race = QuietRace()
    race.feed(61.0, event)

    assert race.batches == batches
    watched = [one.meter for unheard in race.watch._unheard.values() for one in unheard]
    assert all(meter in race.watch._meters.values() for meter in watched)
    race.feed(62.0, RequestCancelled(QUIET))
    for name in ("loud-0", "loud-1"):
        race.feed(62.0, RequestCancelled(RequestId(name)))
    assert race.batches == [0, 0]
    assert not race.watch._unheard
    assert not race.watch._calls


def a_call_a_step() -> RateCurve:
    """A curve on which two calls decode half as fast as one, and prefill is free."""
    return RateCurve(fixed_s=0.0, linear_tokens=(1, 2), linear_s=(1e-9, 2e-9), sequence_s=0.01)


# In whole runs.


@dataclass
class Run:
    """What a run showed.

    Attributes:
        dispatches: By replica.
        paces: What the core had been told after a minute.
        last_paces: What it knew at the end.
        ratios: Actual over expected seconds of every observation.
    """

    dispatches: Counter[str]
    paces: dict[str, float]
    last_paces: list[float]
    ratios: list[float]


def played(
    workload: Workload,
    fleet: Fleet,
    *,
    slowdowns: Mapping[ReplicaId, float] | None = None,
    follow_pace: bool = True,
    engine: type[FastEngine] | type[ReferenceEngine] = FastEngine,
) -> Run:
    dispatches: Counter[str] = Counter()
    paces: dict[str, float] = dict.fromkeys(fleet.replicas, 1.0)
    seen: dict[tuple[ReplicaId, float, float], None] = {}
    core = Scheduler(fleet, policy("least-tokens"), random.Random(1))
    names = iter(fleet.replicas)

    def observe(now_s: float, event: Event, actions: list[Action]) -> None:
        dispatches.update(a.replica_id for a in actions if isinstance(a, Dispatch))
        if isinstance(event, PaceObserved) and now_s <= 60.0:
            paces.update(event.paces)
        if simulation._pace is not None:
            for in_pool in simulation._pace._tracker._recent.values():
                for replica_id, recent in in_pool.items():
                    seen.update(((replica_id, *one), None) for one in recent._seen)

    def make_engine(pool: Pool) -> BatchingEngine:
        made: BatchingEngine = engine(pool.curve, engine_settings(pool))
        made.slowdown = (slowdowns or {}).get(next(names), 1.0)
        return made

    simulation = Simulation(
        core, workload, RecentLengths(), make_engine, observe=observe, follow_pace=follow_pace
    )
    simulation.run(policy="least-tokens", seed=1)
    observe(math.inf, TimerFired(), [])
    last_paces = [replica.pace for replica in core.replicas.values()]
    return Run(dispatches, paces, last_paces, [math.exp(log_ratio) for _, _, log_ratio in seen])


def three() -> Fleet:
    return a_fleet(a_pool(max_sequences=32), replicas=3)


def test_a_slow_replica_is_known_within_a_minute_and_gets_less_work() -> None:
    workload = chains(400, gap_s=0.2, seed=1)
    slow = {P0: 1.3}

    followed = played(workload, three(), slowdowns=slow)
    blind = played(workload, three(), slowdowns=slow, follow_pace=False)

    assert followed.paces == {
        P0: pytest.approx(1.3, rel=0.08),
        P1: pytest.approx(1.0, rel=0.05),
        "p-2": pytest.approx(1.0, rel=0.05),
    }
    assert blind.last_paces == [1.0, 1.0, 1.0]
    share, blind_share = (run.dispatches[P0] / run.dispatches.total() for run in (followed, blind))
    assert share < 0.9 * blind_share


@pytest.mark.parametrize("engine", [FastEngine, ReferenceEngine])
@pytest.mark.parametrize("gap_s", [1.0, 0.2, 0.1])
def test_an_honest_fleet_is_found_to_be_so_at_any_load(
    engine: type[FastEngine] | type[ReferenceEngine], gap_s: float
) -> None:
    """From a call at a time to a line that grows; the mean of observations shows a bias."""
    workload = chains(int(30 / gap_s), gap_s=gap_s, seed=2, most_tokens=200)

    run = played(workload, three(), engine=engine)

    assert len(run.ratios) > 40
    assert fmean(run.ratios) == pytest.approx(1.0, abs=0.02)


def waves(each: int, *, gap_s: float, prompts: range, outputs: range) -> Workload:
    """Forty times several calls at once, of random lengths."""
    rng = random.Random(1)
    return a_workload(
        *(
            a_plan(
                f"w{wave:02d}-{i}",
                a_call(
                    prompt_tokens=rng.choice(prompts),
                    output_tokens=rng.choice(outputs),
                    max_output_tokens=4096,
                ),
                arrival_s=gap_s * wave,
            )
            for wave in range(40)
            for i in range(each)
        )
    )


def steep(kv_token_s: float) -> Fleet:
    """One replica whose steps grow with prefill from the 257th token on, and with the cache."""
    curve = RateCurve(
        fixed_s=0.002,
        linear_tokens=(1, 256, 2048),
        linear_s=(0.008, 0.009, 0.08),
        kv_token_s=kv_token_s,
        prefill_pair_s=1e-8,
    )
    return a_fleet(a_pool(curve=curve, max_sequences=64))


@pytest.mark.parametrize(
    ("workload", "kv_token_s"),
    [
        (waves(6, gap_s=0.5, prompts=range(100, 300), outputs=range(9, 200)), 1e-7),
        (waves(3, gap_s=3.0, prompts=range(100, 300), outputs=range(9, 900)), 2e-6),
    ],
    ids=["prefills that share steps", "caches that grow"],
)
def test_every_single_observation_is_right(workload: Workload, kv_token_s: float) -> None:
    run = played(workload, steep(kv_token_s))

    assert len(run.ratios) > 0.9 * workload.requests
    assert min(run.ratios) > 0.99
    assert max(run.ratios) < 1.004


def test_prefills_of_several_steps_are_counted_in_full() -> None:
    workload = waves(2, gap_s=0.7, prompts=range(2500, 7000), outputs=range(9, 300))

    run = played(workload, steep(1e-7))

    assert fmean(run.ratios) == pytest.approx(1.0, abs=0.03)


def test_an_honest_fleet_keeps_its_curves() -> None:
    workload = chains(400, gap_s=0.15, seed=3)

    followed = played(workload, three())
    blind = played(workload, three(), follow_pace=False)

    assert followed.last_paces == [1.0, 1.0, 1.0]
    assert followed.dispatches == blind.dispatches
