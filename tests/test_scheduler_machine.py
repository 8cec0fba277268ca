"""Random histories through the core, with a model of what a driver knows beside it.

Whatever happens, in whatever order, with news of attempts long over and a clock that jumps:
every request gets exactly one outcome, promises are taken back, nobody is overtaken, no
replica idles beside a call it could serve, and the same history gives the same actions.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from builders import CheckedScheduler, a_fleet, a_forecast, a_policy, a_pool
from concertmaster.core.actions import (
    Action,
    Cancel,
    Demote,
    Dispatch,
    Fail,
    Reject,
    Resize,
    Wake,
)
from concertmaster.core.events import (
    Event,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    ReplicaJoined,
    ReplicaOnTrial,
    ReplicaReady,
    ReplicaRemoved,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import (
    Cluster,
    ClusterId,
    Fleet,
    Node,
    NodeId,
    PoolId,
    Readiness,
    Replica,
    ReplicaId,
    ScalingLimits,
)
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, RequestId, ServiceClass, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.core.standing import FleetStanding, Scaling
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.policies.scaling import Foreseen, Reactive

POLICIES = (
    "random",
    "round-robin",
    "least-tokens",
    "power-of-two",
    "prefix-affinity+edf",
    "least-requests+sjf",
    "las",
    "mlfq",
    "chimera",
    "swarmx",
    "swarmx:order=stjf,near=0.2",
    "point",
    "round-robin@arrival",
    "cascade",
    "oracle-stjf",
    "maestro",
    "fcfs/static:kv=worst-case",
)
REPLICAS = ("p-0", "p-1", "q-0", "q-1", "s-0", "s-1")
MODEL_CHOICES = ((), ("m",), ("x",), ("m", "x"), ("asleep",), ("m", "asleep"), ("nobody",))
FORECASTS = (
    NO_FORECAST,
    a_forecast(3.0),
    Forecast(
        output_tokens=Quantiles((0.1, 0.5, 0.9), (5.0, 40.0, 200.0)),
        remaining_tokens=Quantiles.exactly(900.0),
        success={ModelName("m"): 1.0},
    ),
)


def a_node(name: str) -> Node:
    return Node(node_id=NodeId(name), cluster=Cluster(cluster_id=ClusterId("c")), gpu="g", gpus=1)


def a_small_fleet() -> Fleet:
    """Tight everywhere: few sequences, little KV, and a pool that sleeps."""
    return a_fleet(
        a_pool("p", max_sequences=2, kv_blocks=64),
        a_pool("q", model="x", max_sequences=3, kv_blocks=200, slowness=3.0),
        a_pool("s", model="asleep", max_sequences=2, priority_scheduling=True),
        replicas=2,
        states={"s-0": Readiness.DISK, "s-1": Readiness.SLEEPING},
    )


@dataclass(frozen=True)
class Erratic:
    """Wants any number of replicas, another at every interval."""

    interval_s: float = 4.0
    settle_s: float = 0.0
    memory_s: float = 60.0

    def targets(self, now_s: float, view: FleetStanding) -> Mapping[PoolId, int]:
        step = int(now_s)
        return {one: (step * 7 + 3 * i) % 4 - 1 for i, one in enumerate(view.pools)}


ADOPTED = (
    "las",
    "las/hedge:share=1",
    "least-requests+sjf",
    "prefix-affinity+edf",
    "chimera",
    "swarmx",
    "cascade",
)
"""Policies that may take over from one another."""

SCALINGS: dict[str, tuple[Scaling, ScalingLimits]] = {
    "erratic": (Erratic(), ScalingLimits(cooldown_s=0.0)),
    "erratic, few GPUs": (Erratic(), ScalingLimits(gpus=4, most_changes=2, cooldown_s=9.0)),
    "reactive": (Reactive(interval_s=4.0, settle_s=8.0), ScalingLimits(gpus=4)),
    "foreseen": (Foreseen(interval_s=4.0, settle_s=8.0), ScalingLimits(gpus=4, cooldown_s=1.0)),
}


@dataclass
class Attempt:
    """What a driver knows of a call it was told to send."""

    number: int
    replica_id: ReplicaId
    tokens: int = 0


class Driver(RuleBasedStateMachine):
    """Performs what the core asks for and reports what comes of it, right or stale."""

    policy = "least-tokens"
    scaling: Scaling | None = None
    limits = ScalingLimits()

    def __init__(self) -> None:
        super().__init__()
        admission = BoundedLine(max_waiting=6, max_wait_s=200.0)
        policy = a_policy(self.policy, admission=admission, scaling=self.scaling)
        self.scheduler = CheckedScheduler(replace(self.fleet(), limits=self.limits), policy)
        self.core = self.scheduler.core
        self.now_s = 0.0
        self.arrived = 0
        self.waiting: dict[RequestId, None] = {}
        self.running: dict[RequestId, Attempt] = {}
        self.hedges: dict[RequestId, Attempt] = {}
        self.losers: dict[RequestId, ReplicaId] = {}
        self.batch: set[RequestId] = set()
        self.hedged: set[RequestId] = set()
        self.latest: dict[RequestId, int] = {}
        self.over: list[tuple[RequestId, int]] = []
        self.joined: list[ReplicaId] = []
        self.removed: dict[ReplicaId, None] = {}
        self.waking: set[ReplicaId] = set()
        self.stopping: set[ReplicaId] = set()
        self.outcomes: dict[RequestId, str] = {}
        self.workflow_of: dict[RequestId, WorkflowId] = {}

    def fleet(self) -> Fleet:
        return a_small_fleet()

    # The driver.

    def feed(self, event: Event) -> None:
        self.perform(self.scheduler.at(self.now_s, event))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatch(request_id, replica_id, attempt):
                    assert replica_id not in self.removed, "sent to a replica that was removed"
                    assert replica_id not in self.stopping, "sent to a replica that stops"
                    assert attempt == self.latest.get(request_id, 0) + 1, "a number was left out"
                    self.latest[request_id] = attempt
                    if action.hedge:
                        self.hedge(request_id, Attempt(attempt, replica_id))
                        continue
                    del self.waiting[request_id]
                    self.running[request_id] = Attempt(attempt, replica_id)
                    self.check_order(request_id, self.core.replicas[replica_id])
                case Reject(request_id, reason):
                    del self.waiting[request_id]
                    self.settle(request_id, reason)
                    hopeless = reason in ("too_long", "model_not_found")
                    never = action.retry_after_s is None
                    assert hopeless == never or (reason == "too_late" and never)
                    assert reason != "too_late" or self.is_first(request_id)
                    assert 1.0 <= (action.retry_after_s or 1.0) <= 120.0
                case Fail(request_id, reason):
                    self.settle(request_id, reason)
                case Cancel(request_id, replica_id):
                    loser = self.losers.pop(request_id, None)
                    assert replica_id == (loser or replica_id), "the wrong one was stopped"
                    assert loser or self.outcomes[request_id] == "cancelled"
                case Wake(replica_id):
                    assert replica_id not in self.waking, "woken twice"
                    assert self.core.replicas[replica_id].readiness is not Readiness.RUNNING
                    self.waking.add(replica_id)
                    self.check_wake(self.core.replicas[replica_id])
                case Demote(replica_id):
                    assert replica_id not in self.stopping, "stopped twice"
                    busy = [*self.running.values(), *self.hedges.values()]
                    assert all(one.replica_id != replica_id for one in busy)
                    self.stopping.add(replica_id)
                case Resize():
                    pass

    def hedge(self, request_id: RequestId, attempt: Attempt) -> None:
        """One more attempt of a call that nobody has heard of, where no other waits."""
        first, replica = self.running[request_id], self.core.replicas[attempt.replica_id]
        assert not first.tokens, "hedged though it has begun to answer"
        assert first.replica_id != attempt.replica_id, "hedged where it is"
        assert replica.pool.model is self.core.replicas[first.replica_id].pool.model
        assert request_id not in self.batch, "a program's call was hedged"
        assert request_id not in self.hedged, "hedged twice"
        assert not any(replica.pool.pool_id in call.pools for call in self.core.line)
        self.hedged.add(request_id)
        self.hedges[request_id] = attempt

    def decide(self, request_id: RequestId, winner: Attempt) -> None:
        """Let one of two attempts be first; the core must stop the other."""
        hedge = self.hedges.pop(request_id, None)
        if hedge is None:
            return
        loser = self.running[request_id] if winner is hedge else hedge
        self.running[request_id] = winner
        self.over.append((request_id, loser.number))
        self.losers[request_id] = loser.replica_id

    def goes_on(self, request_id: RequestId, attempt: Attempt) -> bool:
        """Whether a call has another attempt than this one, which is over."""
        hedge = self.hedges.pop(request_id, None)
        if hedge is None:
            return False
        self.over.append((request_id, attempt.number))
        if attempt is not hedge:
            self.running[request_id] = hedge
        return True

    def is_first(self, request_id: RequestId) -> bool:
        """Whether no call of the workflow has been let in that is remembered."""
        workflow = self.workflow_of[request_id]
        return workflow not in self.core.workflows._by_id

    def check_wake(self, woken: Replica) -> None:
        """It keeps to the GPUs, and none that was about to leave could serve instead."""
        gpus = self.limits.gpus
        assert gpus is None or self.busy_gpus() <= gpus, "more GPUs than there are"
        leaving = self.core._waking.leaving.values()
        assert all(replica.pool is not woken.pool for replica in leaving), "woken needlessly"

    def busy_gpus(self) -> int:
        replicas = self.core.replicas.values()
        busy = [r for r in replicas if r.alive and r.readiness is Readiness.RUNNING]
        return len(busy) + len(self.waking)

    def settle(self, request_id: RequestId, outcome: str) -> None:
        assert request_id not in self.outcomes, f"{request_id} has two outcomes"
        self.outcomes[request_id] = outcome

    def end_attempt(self, request_id: RequestId) -> Attempt:
        attempt = self.running.pop(request_id)
        self.over.append((request_id, attempt.number))
        return attempt

    def pick_attempt(self, data: st.DataObject) -> tuple[RequestId, Attempt]:
        attempts = [*self.running.items(), *self.hedges.items()]
        return attempts[data.draw(st.integers(0, len(attempts) - 1))]

    def key(self, call: Waiting) -> float:
        return self.core._dispatcher.key(call)

    def check_order(self, request_id: RequestId, replica: Replica) -> None:
        """Nobody who could have had this place and comes before it in the line still waits."""
        chosen = self.core._running.get(request_id)
        assert chosen is not None
        rivals = [call for call in self.core.line if replica.pool.pool_id in call.pools]
        assert all(chosen[0].key <= self.key(call) for call in rivals), "overtaken"

    # Calls.

    @rule(
        prompt_tokens=st.sampled_from((1, 30, 200, 500, 1000, 3000, 50_000)),
        cap=st.sampled_from((1, 20, 400)),
        models=st.sampled_from(MODEL_CHOICES),
        forecast=st.sampled_from(FORECASTS),
        workflow=st.integers(0, 3),
        prefix=st.sampled_from(((), (1,), (1, 2), (7,))),
        slack_s=st.none() | st.sampled_from((-5.0, 1.0, 900.0)),
        service_class=st.sampled_from(ServiceClass),
        streams=st.booleans(),
    )
    def arrive(
        self,
        *,
        prompt_tokens: int,
        cap: int,
        models: tuple[str, ...],
        forecast: Forecast,
        workflow: int,
        prefix: tuple[int, ...],
        slack_s: float | None,
        service_class: ServiceClass,
        streams: bool,
    ) -> None:
        name = f"r{self.arrived}"
        self.arrived += 1
        self.waiting[RequestId(name)] = None
        if service_class is ServiceClass.BATCH:
            self.batch.add(RequestId(name))
        self.workflow_of[RequestId(name)] = WorkflowId(f"w{workflow}")
        self.perform(
            self.scheduler.arrive(
                name,
                self.now_s,
                forecast,
                prompt_tokens=prompt_tokens,
                max_output_tokens=cap,
                models=models,
                workflow_id=WorkflowId(f"w{workflow}"),
                prefix_hashes=prefix,
                service_class=service_class,
                streams=streams,
                deadline_s=None if slack_s is None else self.now_s + slack_s,
            )
        )

    @precondition(lambda self: self.running)
    @rule(tokens=st.sampled_from((0, 1, 2, 30, 2000)), data=st.data())
    def stream(self, tokens: int, data: st.DataObject) -> None:
        request_id, attempt = self.pick_attempt(data)
        self.stream_one(request_id, attempt, tokens)

    def stream_one(self, request_id: RequestId, attempt: Attempt, tokens: int) -> None:
        attempt.tokens = max(attempt.tokens, tokens)
        if tokens:
            self.decide(request_id, attempt)
        self.feed(TokensStreamed(((request_id, attempt.number, tokens),)))
        assert not self.losers, "the other attempt goes on"

    @precondition(lambda self: self.running)
    @rule(tokens=st.sampled_from((0, 1, 30)), data=st.data())
    def finish(self, tokens: int, data: st.DataObject) -> None:
        self.finish_one(*self.pick_attempt(data), tokens)

    def finish_one(self, request_id: RequestId, attempt: Attempt, tokens: int) -> None:
        self.decide(request_id, attempt)
        self.end_attempt(request_id)
        self.settle(request_id, "finished")
        self.feed(RequestFinished(request_id, attempt.number, max(attempt.tokens, tokens)))
        assert not self.losers, "the other attempt goes on"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.fail_one(*self.pick_attempt(data))

    def fail_one(self, request_id: RequestId, attempt: Attempt) -> None:
        if self.goes_on(request_id, attempt):
            self.feed(RequestFailed(request_id, attempt.number, retriable=attempt.number == 1))
            assert request_id in self.running
            return
        self.end_attempt(request_id)
        retried = not attempt.tokens and self.latest[request_id] < 3
        if retried:
            self.waiting[request_id] = None
        self.feed(RequestFailed(request_id, attempt.number, retriable=not attempt.tokens))
        assert retried or self.outcomes[request_id] == "engine_error"

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Any call: waiting, running, over, or never heard of."""
        known = [RequestId(f"r{i}") for i in range(max(0, self.arrived - 8), self.arrived + 1)]
        request_id = data.draw(st.sampled_from([*known, *self.waiting]))
        self.cancel_one(request_id)

    def cancel_one(self, request_id: RequestId) -> None:
        if request_id in self.waiting:
            del self.waiting[request_id]
            self.settle(request_id, "cancelled")
        elif request_id in self.running:
            if request_id in self.hedges:
                self.goes_on(request_id, self.hedges[request_id])
            self.end_attempt(request_id)
            self.settle(request_id, "cancelled")
        self.feed(RequestCancelled(request_id))

    @precondition(lambda self: self.over)
    @rule(
        kind=st.sampled_from(("finished", "streamed", "failed for good", "failed")), data=st.data()
    )
    def bring_old_news(self, kind: str, data: st.DataObject) -> None:
        request_id, attempt = data.draw(st.sampled_from(self.over))
        if kind == "finished":
            self.feed(RequestFinished(request_id, attempt, 5))
        elif kind == "streamed":
            self.feed(TokensStreamed(((request_id, attempt, 5), (RequestId("unheard"), 1, 3))))
        else:
            self.feed(RequestFailed(request_id, attempt, retriable=kind == "failed"))

    @rule(workflow=st.integers(0, 3))
    def close_workflow(self, workflow: int) -> None:
        self.feed(WorkflowClosed(WorkflowId(f"w{workflow}")))

    # Replicas.

    def lose(self, replica_id: ReplicaId, event: Event) -> None:
        """Whatever the replica had is retried if nobody saw a token of it, and fails if not."""
        self.waking.discard(replica_id)
        self.stopping.discard(replica_id)
        attempts = [*self.running.items(), *self.hedges.items()]
        lost = [(rid, one) for rid, one in attempts if one.replica_id == replica_id]
        self.losers = {rid: replica_id for rid, _ in lost if rid in self.hedges}
        lost = [(rid, one) for rid, one in lost if not self.goes_on(rid, one)]
        last = {request_id: self.latest[request_id] == 3 for request_id, _ in lost}
        for request_id, attempt in lost:
            self.end_attempt(request_id)
            if not attempt.tokens and not last[request_id]:
                self.waiting[request_id] = None
        self.feed(event)
        assert not self.losers, "the driver goes on with an attempt that is lost"
        for request_id, attempt in lost:
            failed = self.outcomes.get(request_id) == "replica_died"
            assert failed == bool(attempt.tokens or last[request_id])

    @rule(name=st.sampled_from(REPLICAS))
    def die(self, name: str) -> None:
        self.lose(ReplicaId(name), ReplicaDied(ReplicaId(name)))

    @rule(
        name=st.sampled_from(REPLICAS),
        readiness=st.sampled_from((Readiness.SLEEPING, Readiness.HOST, Readiness.REMOTE)),
    )
    def demote(self, name: str, readiness: Readiness) -> None:
        self.lose(ReplicaId(name), ReplicaDemoted(ReplicaId(name), readiness))

    @rule(name=st.sampled_from(REPLICAS))
    def make_ready(self, name: str) -> None:
        self.waking.discard(ReplicaId(name))
        self.stopping.discard(ReplicaId(name))
        self.feed(ReplicaReady(ReplicaId(name)))

    @precondition(lambda self: self.waking)
    @rule(data=st.data())
    def wake_up(self, data: st.DataObject) -> None:
        self.make_ready(data.draw(st.sampled_from(sorted(self.waking))))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data(), stops=st.booleans())
    def hear_of_stop(self, data: st.DataObject, *, stops: bool) -> None:
        """It is stopped, or could not be and serves on."""
        replica_id = data.draw(st.sampled_from(sorted(self.stopping)))
        if stops:
            self.lose(replica_id, ReplicaDemoted(replica_id, Readiness.DISK))
        else:
            self.make_ready(replica_id)

    @rule(name=st.sampled_from(REPLICAS))
    def drain(self, name: str) -> None:
        self.feed(ReplicaDraining(ReplicaId(name)))

    @precondition(lambda self: len(self.joined) < 3)
    @rule(pool=st.sampled_from(("p", "q")))
    def join(self, pool: str) -> None:
        """One replica more takes no call before it is ready; none joins where nodes are shared."""
        if self.core.pools[PoolId(pool)].footprint is not None:
            return
        name = ReplicaId(f"{pool}-new-{len(self.joined)}")
        self.joined.append(name)
        self.feed(ReplicaJoined(name, PoolId(pool), a_node(name)))
        assert not self.core.replicas[name].in_flight

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def make_joined_ready(self, data: st.DataObject) -> None:
        self.make_ready(data.draw(st.sampled_from(self.joined)))

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """It finishes what it has; no news brings it back but that it joins again."""
        replica_id = data.draw(st.sampled_from(self.joined))
        self.feed(ReplicaRemoved(replica_id))
        self.removed[replica_id] = None

    @precondition(lambda self: self.removed)
    @rule(data=st.data())
    def join_again(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(list(self.removed)))
        replica = self.core.replicas[replica_id]
        busy = replica_id in self.waking or replica_id in self.stopping
        if not replica.in_flight and not busy:
            del self.removed[replica_id]
            self.feed(ReplicaJoined(replica_id, replica.pool.pool_id, a_node(replica_id)))

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def lose_joined(self, data: st.DataObject) -> None:
        replica_id = data.draw(st.sampled_from(self.joined))
        self.lose(replica_id, ReplicaDied(replica_id))

    @rule(name=st.sampled_from(REPLICAS))
    def try_out(self, name: str) -> None:
        self.feed(ReplicaOnTrial(ReplicaId(name)))

    # Time.

    @rule(by_s=st.sampled_from((0.05, 0.3, 5.0, 150.0, 4000.0, -0.1, -60.0)))
    def jump(self, by_s: float) -> None:
        self.now_s = max(0.0, self.now_s + by_s)
        self.feed(TimerFired())

    @precondition(lambda self: self.core.next_wakeup_s() is not None)
    @rule()
    def fire_timer(self) -> None:
        wakeup_s = self.core.next_wakeup_s()
        assert wakeup_s is not None
        self.now_s = wakeup_s
        self.feed(TimerFired())

    # What always holds.

    @invariant()
    def core_and_driver_agree_on_where_every_call_is(self) -> None:
        assert {call.request.request_id for call in self.core.line} == set(self.waiting)
        on_replicas = {
            (request_id, replica.replica_id)
            for replica in self.core.replicas.values()
            for request_id in replica.in_flight
        }
        attempts = [*self.running.items(), *self.hedges.items()]
        assert on_replicas == {(rid, one.replica_id) for rid, one in attempts}
        for request_id, one in attempts:
            replica = self.core.replicas[one.replica_id]
            assert replica.in_flight[request_id].streamed_tokens == one.tokens
            assert (replica.alive, replica.readiness) == (True, Readiness.RUNNING)

    @invariant()
    def totals_are_the_sums_of_the_calls(self) -> None:
        for replica in self.core.replicas.values():
            replica.validate(queues=self.core.policy.binds == "early")
            context = sum(
                one.request.prompt_tokens + one.expected_tokens
                for one in replica.in_flight.values()
            )
            assert replica.context_tokens == context
        open_calls = sum(one.open_calls for one in self.core.workflows._by_id.values())
        assert open_calls == len(self.running) + len(self.waiting)

    @invariant()
    def nobody_waits_beside_an_idle_replica_or_a_sleeping_one(self) -> None:
        for call in self.core.line:
            able = [r for r in self.core.replicas.values() if r.pool.pool_id in call.pools]
            leaving = [r for r in able if r.replica_id in self.core._waking.leaving]
            able = [r for r in able if r.alive and not r.draining]
            serving = [r for r in able if r.readiness is Readiness.RUNNING]
            assert all(r.in_flight for r in serving), "a replica idles beside a waiting call"
            woken = any(r.replica_id in self.waking for r in able)
            full = self.limits.gpus is not None and not any(map(self.core._waking.affords, able))
            assert serving or woken or full or not able, "a call waits and nobody is woken"
            over = self.busy_gpus() > (self.limits.gpus or math.inf)
            assert serving or woken or over or not leaving, "a call waits beside one that leaves"

    def teardown(self) -> None:
        for name in (*REPLICAS, *self.joined):
            self.make_ready(name)
        rounds = 0
        while self.running or self.waiting:
            rounds += 1
            assert rounds < 1000, "a call waits for ever"
            if self.running:
                self.finish_one(*next(iter(self.running.items())), 1)
            elif self.waking:
                self.make_ready(min(self.waking))
            elif self.stopping:
                replica_id = min(self.stopping)
                self.lose(replica_id, ReplicaDemoted(replica_id, Readiness.DISK))
            else:
                self.fire_timer()
        self.core_and_driver_agree_on_where_every_call_is()
        assert sorted(self.outcomes) == sorted(f"r{i}" for i in range(self.arrived))
        assert len(self.core.line) == 0
        for replica in self.core.replicas.values():
            ledgers = (replica.kv.reserved_blocks, replica.decode_tokens, replica.prefill_clear_s)
            assert ledgers == (0, 0, 0.0)
        self.check_replay()

    def check_replay(self) -> None:
        again = self.scheduler.fresh()
        for now_s, event, actions in self.scheduler.history:
            assert again.handle(now_s, event) == actions, f"diverged at {now_s}: {event}"


@pytest.mark.parametrize("policy", POLICIES)
def test_any_history_keeps_every_promise(policy: str) -> None:
    class DriverOfPolicy(Driver):
        pass

    DriverOfPolicy.policy = policy
    run_state_machine_as_test(
        DriverOfPolicy, settings=settings(max_examples=40, stateful_step_count=60)
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_any_history_keeps_every_promise_while_replicas_come_and_go(name: str) -> None:
    class ScalingDriver(Driver):
        scaling, limits = SCALINGS[name]

    run_state_machine_as_test(
        ScalingDriver, settings=settings(max_examples=60, stateful_step_count=60)
    )


@pytest.mark.parametrize(
    "name",
    [
        "least-tokens/hedge:share=1,floor_s=0.1",
        "swarmx/hedge:share=0.5,level=0.9,floor_s=1",
        "las/static:kv=forecast/hedge:share=1",
    ],
)
def test_any_history_keeps_every_promise_while_late_calls_are_hedged(name: str) -> None:
    class HedgingDriver(Driver):
        policy = name

        def fleet(self) -> Fleet:
            return a_fleet(
                a_pool("p", max_sequences=4, kv_blocks=256),
                a_pool("q", model="x", max_sequences=8, slowness=3.0),
                a_pool("s", model="asleep", max_sequences=2),
                replicas=2,
                states={"s-0": Readiness.DISK, "s-1": Readiness.SLEEPING},
            )

        @rule(model=st.sampled_from("mx"), streams=st.booleans(), by_s=st.sampled_from((3.0, 60.0)))
        def be_late(self, *, model: str, streams: bool, by_s: float) -> None:
            self.arrive(
                prompt_tokens=30,
                cap=20,
                models=(model,),
                forecast=a_forecast(3.0),
                workflow=1,
                prefix=(),
                slack_s=None,
                service_class=ServiceClass.INTERACTIVE,
                streams=streams,
            )
            self.jump(by_s)

        @precondition(lambda self: self.hedges)
        @rule(data=st.data(), kind=st.sampled_from(("stream", "finish", "fail", "die", "cancel")))
        def decide_one(self, kind: str, data: st.DataObject) -> None:
            """Races are few among all calls, so their ends are sought."""
            request_id = data.draw(st.sampled_from(list(self.hedges)))
            attempts = (self.running[request_id], self.hedges[request_id])
            attempt = attempts[data.draw(st.integers(0, 1))]
            if kind == "die":
                self.lose(attempt.replica_id, ReplicaDied(attempt.replica_id))
            elif kind == "cancel":
                self.cancel_one(request_id)
            else:
                news = {
                    "stream": lambda: self.stream_one(request_id, attempt, 1),
                    "finish": lambda: self.finish_one(request_id, attempt, 3),
                    "fail": lambda: self.fail_one(request_id, attempt),
                }
                news[kind]()

    run_state_machine_as_test(
        HedgingDriver, settings=settings(max_examples=80, stateful_step_count=60)
    )


def test_any_history_keeps_every_promise_while_policies_take_over() -> None:
    class AdoptingDriver(Driver):
        policy = ADOPTED[0]

        @rule(name=st.sampled_from(ADOPTED))
        def adopt(self, name: str) -> None:
            admission = self.core.policy.admission
            self.core.adopt(replace(policy_named(name), admission=admission))
            self.feed(TimerFired())

        def check_replay(self) -> None:
            """A history does not hold who decided when."""

    run_state_machine_as_test(
        AdoptingDriver, settings=settings(max_examples=80, stateful_step_count=60)
    )


def test_a_policy_with_other_bones_is_refused() -> None:
    scheduler = Scheduler(a_small_fleet(), policy_named("las"), random.Random(0))
    for name in ("round-robin@arrival", "las/reactive", "fcfs/static:kv=worst-case"):
        with pytest.raises(AssertionError, match="needs a scheduler of its own"):
            scheduler.adopt(policy_named(name))


def test_calls_that_wait_take_their_places_by_the_policy_that_takes_over() -> None:
    fleet = a_fleet(a_pool("p", max_sequences=1), replicas=1)
    scheduler = CheckedScheduler(fleet, a_policy("fcfs"))
    scheduler.arrive("runs", 0.0)
    scheduler.arrive("late", 1.0, deadline_s=5000.0)
    scheduler.arrive("urgent", 2.0, deadline_s=3.0)

    scheduler.core.adopt(policy_named("edf"))
    actions = scheduler.at(2.5, RequestFinished(RequestId("runs"), 1, 3))

    assert [one.request_id for one in actions if isinstance(one, Dispatch)] == ["urgent"]


def test_a_removed_replica_gets_no_call_though_it_is_reported_ready() -> None:
    fleet = a_fleet(a_pool("p"), replicas=1)
    scheduler = CheckedScheduler(fleet, a_policy("fcfs"))
    scheduler.at(0.0, ReplicaRemoved(ReplicaId("p-0")))
    scheduler.at(0.1, ReplicaReady(ReplicaId("p-0")))

    assert not any(isinstance(one, Dispatch) for one in scheduler.arrive("a", 1.0))


def test_a_policy_that_takes_over_brings_its_own_window() -> None:
    core = Scheduler(a_small_fleet(), policy_named("las"), random.Random(0))

    core.adopt(replace(policy_named("las"), window_s=5.0))

    assert core._window._window_s == core._outlook._crews._window_s == 5.0
