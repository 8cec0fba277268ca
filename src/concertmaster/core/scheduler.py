"""The scheduling core: events in, actions out.

Nothing here waits, sleeps, sends, logs or asks for the time. A driver tells the core what
happened and when, performs the actions it gets back, and reports what comes of them.

The life of a call: it arrives with its forecast, is admitted or refused, stands in a lane
(the pools it may go to) under one key, is dispatched once a replica has room, streams, and
gets exactly one outcome: finished, failed, rejected or cancelled.
"""

import random
from collections.abc import Mapping, Sequence
from typing import assert_never

from concertmaster.core.actions import Action, Cancel, Dispatch, Fail, Reject
from concertmaster.core.events import (
    Event,
    FailReason,
    PaceObserved,
    RejectReason,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    ReplicaReady,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import (
    Fleet,
    InFlight,
    Pool,
    PoolId,
    Readiness,
    Replica,
    ReplicaId,
)
from concertmaster.core.forecast import Forecast
from concertmaster.core.outlook import Outlook, key_of
from concertmaster.core.policy import Filter, Policy
from concertmaster.core.promise import Promises
from concertmaster.core.queue import Lane, Waiting, WaitingLine
from concertmaster.core.request import Request, RequestId
from concertmaster.core.residency import Residents
from concertmaster.core.routing import Routing
from concertmaster.core.scaling import Scaler
from concertmaster.core.service import service_on
from concertmaster.core.sketch import affine
from concertmaster.core.waking import Waking
from concertmaster.core.wants import Wants
from concertmaster.core.window import Window
from concertmaster.core.workflow import Workflows

MAX_ATTEMPTS = 3
"""Dispatches of one call before it fails; a retry happens only if its caller saw nothing."""


class Scheduler:
    """Admission, order and placement for a whole fleet.

    Args:
        fleet: What there is.
        policy: How to decide.
        rng: Source of all randomness; the same seed and events give the same actions.
        record_candidates: Keep the costs of every candidate with a dispatch, for traces.
    """

    def __init__(
        self, fleet: Fleet, policy: Policy, rng: random.Random, *, record_candidates: bool = False
    ) -> None:
        self.policy = policy
        self.replicas: dict[ReplicaId, Replica] = {r.replica_id: r for r in fleet.build()}
        self.pools: dict[PoolId, Pool] = {pool.pool_id: pool for pool in fleet.pools}
        replicas = self.replicas.values()
        self._by_pool = {one: [r for r in replicas if r.pool.pool_id == one] for one in self.pools}
        self.line = WaitingLine()
        self.workflows = Workflows()
        self._rng = rng
        self._record_candidates = record_candidates
        filters: tuple[Filter, ...] = policy.filters
        self._promises: Promises | None = None
        if policy.kv is not None and policy.binds == "late":
            self._promises = Promises(policy.kv, self._by_pool, self.workflows)
            filters = (*filters, self._promises)
        self._window = Window(replicas, policy.window_s, filters, policy.binds)
        self._running: dict[RequestId, tuple[Waiting, Replica]] = {}
        self._outlook = Outlook(
            policy,
            by_pool=self._by_pool,
            line=self.line,
            running=self._running,
            workflows=self.workflows,
            window=self._window,
        )
        self._routing = Routing(
            policy,
            pools=self.pools,
            by_pool=self._by_pool,
            workflows=self.workflows,
            outlook=self._outlook,
            rng=rng,
        )
        self._waking = Waking(self._by_pool, self._window)
        self._wants = Wants(self._by_pool, self.line, self.workflows)
        self._residents: Residents | None = None
        if policy.residency is not None and any(node.shared for node in fleet.nodes):
            assert self._promises is not None, "who shares nodes promises KV by a rule"
            self._residents = Residents(
                policy.residency,
                by_pool=self._by_pool,
                waking=self._waking,
                line=self.line,
                promises=self._promises,
                wants=self._wants,
            )
        self._scaler: Scaler | None = None
        if policy.scaling is not None:
            self._scaler = Scaler(
                policy.scaling,
                fleet.limits,
                by_pool=self._by_pool,
                waking=self._waking,
                line=self.line,
                running=self._running,
                workflows=self.workflows,
            )
        self._serial = self._dispatches = 0
        self._now_s = 0.0

    def handle(self, now_s: float, event: Event) -> list[Action]:
        """Take in one event and return what to do about it, in order.

        A clock that went backwards is taken to have stood still.
        """
        now_s = self._now_s = max(now_s, self._now_s)
        self._outlook.now_s = now_s
        self._window.reopen(now_s)
        actions = self._take_in(now_s, event)
        if self._scaler is not None:
            actions += self._scaler.act(now_s)
        if len(self.line):
            for call in self.line.pop_expired(now_s):
                actions.append(self._reject(now_s, call.request, "waited_too_long"))
                self.workflows.settle(call.workflow.workflow_id, answered=False)
            if not isinstance(event, RequestArrived):
                for call in self._routing.review(now_s, self.line):
                    actions += self._waking.wake(now_s, call.pools)
            self._dispatch(now_s, actions)
        if self._residents is not None:
            actions += self._residents.act(now_s)
        if self._waking.leaving:
            actions += self._waking.stops()
        return actions

    def next_wakeup_s(self) -> float | None:
        """When to send ``TimerFired`` if nothing else happens first; ``None`` for never."""
        times_s = [None if self._scaler is None else self._scaler.due_s]
        if self._residents is not None:
            times_s.append(self._residents.due_s)
        if len(self.line):
            review_s = self._routing.next_review_s(self._now_s, self.line)
            times_s += [self.line.next_expiry_s(), review_s, self._window.next_reopen_s()]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def in_flight(self, request_id: RequestId) -> ReplicaId | None:
        """Return the replica that a call is on, if it is on one."""
        running = self._running.get(request_id)
        return None if running is None else running[1].replica_id

    # Events

    def _take_in(  # noqa: C901, PLR0911, PLR0912  # one case an event reads best in one place
        self, now_s: float, event: Event
    ) -> list[Action]:
        match event:
            case RequestArrived(request, forecast):
                return self._arrive(now_s, request, forecast)
            case TokensStreamed(progress):
                for request_id, attempt, tokens in progress:
                    self._stream(request_id, attempt, tokens)
                return []
            case RequestFinished(request_id, attempt, output_tokens):
                self._stream(request_id, attempt, output_tokens)
                call = self._release(now_s, request_id, attempt, finished=True)
                if call is not None:
                    self.line.note_finish(now_s)
                    if call.is_last:
                        self.workflows.rest(call.workflow)
                return []
            case RequestCancelled(request_id):
                return self._cancel(now_s, request_id)
            case RequestFailed(request_id, attempt, retriable):
                call = self._release(now_s, request_id, attempt, settle=False)
                return self._retry(now_s, call, "engine_error", retriable=retriable) if call else []
            case ReplicaDied(replica_id):
                replica = self.replicas[replica_id]
                replica.alive = False
                return self._demote(now_s, replica, replica.readiness)
            case ReplicaReady(replica_id):
                return self._revive(now_s, self.replicas[replica_id])
            case ReplicaDemoted(replica_id, readiness):
                return self._demote(now_s, self.replicas[replica_id], readiness)
            case ReplicaDraining(replica_id):
                self._waking.disown(now_s, self.replicas[replica_id])
                return [*self._waking.wake_all(now_s, self.line.lanes)]
            case PaceObserved(paces):
                for replica_id, pace in paces:
                    self.replicas[replica_id].pace = pace
                    self._window.note(self.replicas[replica_id])
                return []
            case WorkflowClosed(workflow_id):
                self.workflows.close(workflow_id)
                return []
            case TimerFired():
                return []
            case _:
                assert_never(event)

    def _arrive(self, now_s: float, request: Request, forecast: Forecast) -> list[Action]:
        request_id = request.request_id
        assert request_id not in self.line, f"{request_id} waits already"
        assert request_id not in self._running, f"{request_id} runs already"
        policy = self.policy
        able = self._routing.able(request)
        if isinstance(able, str):
            return [self._reject(now_s, request, able)]
        refusal = policy.admission.refuses(request, len(self.line))
        if refusal is not None:
            return [self._reject(now_s, request, refusal)]
        self._serial += 1
        call = Waiting(
            request=request,
            forecast=forecast,
            workflow=self.workflows.arrive(now_s, request),
            pools=(),
            serial=self._serial,
            attempt=1,
            expires_s=policy.admission.expires_s(request),
            kv_level=policy.kv_level,
            by_mean=policy.by_mean,
        )
        self._routing.assign(call, able)
        if self._residents is not None:
            self._wants.note_arrival(now_s, call, self.pools[call.pools[0]])
        replicas = () if len(self.line) else self._room_for(call, {})
        if replicas:
            return self._place(now_s, call, replicas)
        self._wait(call)
        return [*self._waking.wake(now_s, call.pools)]

    def _stream(self, request_id: RequestId, attempt: int, tokens: int) -> None:
        running = self._running.get(request_id)
        if running is None or running[0].attempt != attempt or not tokens:
            return
        call, replica = running
        workflow, pool, pace = call.workflow, replica.pool, replica.pace
        prefill_tokens = replica.in_flight[request_id].prefill_tokens
        workflow.attained_s += prefill_tokens * pool.prefill_token_s * pace
        fresh_tokens = replica.stream(request_id, tokens)
        self._window.note(replica)
        if self._residents is not None:
            self._residents.note_growth(replica)
        self.workflows.stream(workflow, fresh_tokens, pool.model.name)
        workflow.attained_s += fresh_tokens * pool.decode_token_s * pace

    def _cancel(self, now_s: float, request_id: RequestId) -> list[Action]:
        if request_id in self.line:
            workflow = self.line.remove(request_id).workflow
            self.workflows.settle(workflow.workflow_id, answered=False)
            return []
        running = self._running.get(request_id)
        if running is None:
            return []
        self._release(now_s, request_id, running[0].attempt, settle=False)
        self.workflows.settle(running[0].workflow.workflow_id, answered=False)
        return [Cancel(request_id, running[1].replica_id)]

    def _revive(self, now_s: float, replica: Replica) -> list[Action]:
        replica.alive, replica.draining = True, False
        replica.readiness = Readiness.RUNNING
        self._waking.forget(replica)
        actions = [] if self._residents is None else self._residents.settle(now_s, replica)
        self._window.update(now_s, replica)
        return [*actions, *self._waking.wake_all(now_s, self.line.lanes)]

    def _demote(self, now_s: float, replica: Replica, readiness: Readiness) -> list[Action]:
        """Take a replica out of service; calls it still had go back to the line or fail."""
        replica.readiness = readiness
        replica.prefixes.clear()
        self._waking.forget(replica)
        self._window.update(now_s, replica)
        actions: list[Action] = []
        for request_id in list(replica.in_flight):
            seen_tokens = replica.in_flight[request_id].streamed_tokens
            call = self._running[request_id][0]
            self._release(now_s, request_id, call.attempt, settle=False)
            actions += self._retry(now_s, call, "replica_died", retriable=seen_tokens == 0)
        if self._residents is not None:
            actions += self._residents.settle(now_s, replica)
        return [*actions, *self._waking.wake_all(now_s, self.line.lanes)]

    # Outcomes

    def _release(
        self,
        now_s: float,
        request_id: RequestId,
        attempt: int,
        *,
        settle: bool = True,
        finished: bool = False,
    ) -> Waiting | None:
        """Strike an attempt from the ledgers; ``None`` if it is over already."""
        running = self._running.get(request_id)
        if running is None or running[0].attempt != attempt:
            return None
        call, replica = self._running.pop(request_id)
        released = replica.release(request_id)
        if finished and self._promises is not None:
            self._promises.learn(replica.pool, released)
        call.workflow.ends.pop(request_id, None)
        self._window.update(now_s, replica)
        if settle:
            self.workflows.settle(call.workflow.workflow_id)
        return call

    def _retry(
        self, now_s: float, call: Waiting, reason: FailReason, *, retriable: bool
    ) -> list[Action]:
        if retriable and call.attempt < MAX_ATTEMPTS:
            call.attempt += 1
            self._wait(call)
            return [*self._waking.wake(now_s, call.pools)]
        self.workflows.settle(call.workflow.workflow_id, answered=False)
        return [Fail(call.request.request_id, reason)]

    def _reject(self, now_s: float, request: Request, reason: RejectReason) -> Reject:
        hopeless = reason in ("too_long", "model_not_found")
        return Reject(request.request_id, reason, None if hopeless else self.line.drain_s(now_s))

    # Waiting and dispatch

    def _wait(self, call: Waiting) -> None:
        call.key = self._key(call)
        self.line.push(call)
        self._routing.plan_review(self._now_s, call, self.line)

    def _key(self, call: Waiting) -> float:
        return key_of(self.policy, call, self.pools[call.pools[0]])

    def _dispatch(self, now_s: float, actions: list[Action]) -> None:
        """Hand out calls, best key first, until nobody fits.

        A head that finds no room closes its pools to calls behind it: what frees up is kept
        for it, so that small calls cannot starve a large one.
        """
        refresh = self._key if self.policy.ordering.drifts else None
        blocked: dict[PoolId, None] = {}
        lanes = [lane for lane in self.line.lanes.values() if self._may_move(lane, blocked)]
        while lanes:
            heads = [
                (head.key, head.serial, lane, head)
                for lane in lanes
                if (head := lane.head(refresh))
            ]
            _, _, lane, call = min(heads)
            replicas = self._room_for(call, blocked)
            if replicas:
                self.line.remove(call.request.request_id)
                actions += self._place(now_s, call, replicas)
            else:
                blocked.update(dict.fromkeys(lane.pools))
            lanes = [lane for lane in lanes if len(lane) and self._may_move(lane, blocked)]

    def _may_move(self, lane: Lane, blocked: dict[PoolId, None]) -> bool:
        return any(
            pool_id not in blocked and self._window.open_replicas(pool_id) for pool_id in lane.pools
        )

    def _room_for(self, call: Waiting, blocked: dict[PoolId, None]) -> list[Replica]:
        """Return the open replicas that every filter keeps."""
        found: list[Replica] = []
        for pool_id in call.pools:
            if pool_id not in blocked:
                found += self._window.room(call, self.pools[pool_id])
        return found

    def _place(self, now_s: float, call: Waiting, replicas: Sequence[Replica]) -> list[Action]:
        """Choose among the replicas that have room, and write the call into its ledgers."""
        policy, request = self.policy, call.request
        chosen, chosen_cost_s = replicas[0], None
        if len(replicas) > 1:
            scorers = policy.scorers

            def cost_s(replica: Replica) -> float:
                return sum(scorer.cost_s(now_s, call, replica) for scorer in scorers)

            chosen = policy.picker.pick(call, replicas, cost_s, self._rng)
            chosen_cost_s = cost_s(chosen) if scorers else None
        costs_s: Mapping[ReplicaId, Mapping[str, float]] = {}
        if self._record_candidates:
            costs_s = {r.replica_id: policy.costs_s(now_s, call, r) for r in replicas}
        self._enter(now_s, call, chosen)
        dispatch = Dispatch(
            request.request_id,
            chosen.replica_id,
            call.attempt,
            int(1000 * self._key(call)) if chosen.pool.priority_scheduling else 0,
            now_s - request.arrival_s,
            len(replicas),
            chosen_cost_s,
            costs_s,
        )
        if self._residents is None:
            return [dispatch]
        return [*self._residents.grants(now_s, chosen), dispatch]

    def _enter(self, now_s: float, call: Waiting, replica: Replica) -> None:
        """Write a dispatched call into the ledgers."""
        request, model = call.request, replica.pool.model.name
        if call.workflow.model != model:
            self._routing.commit(call, model)
        if self.policy.siblings:
            law = service_on(now_s, call, replica).law(call.output_sketch(model))
            call.workflow.ends[request.request_id] = affine(law, 1.0, now_s)
        expected_tokens = call.expected_tokens(model)
        hit_tokens = replica.prefixes.hit_tokens(replica.pool.cacheable(request))
        in_flight = InFlight(
            request=request,
            prefill_tokens=max(1, request.prompt_tokens - hit_tokens),
            decode_tokens=expected_tokens,
            expected_tokens=expected_tokens,
        )
        if self._scaler is not None:
            self._scaler.note_dispatch(model, in_flight)
        self._promise(now_s, call, replica, in_flight)
        self._dispatches += 1
        replica.last_dispatch = self._dispatches
        replica.last_used_s = now_s
        call.workflow.waited_s += now_s - request.arrival_s
        self._running[request.request_id] = (call, replica)
        self._window.update(now_s, replica)

    def _promise(self, now_s: float, call: Waiting, replica: Replica, in_flight: InFlight) -> None:
        pool, promises = replica.pool, self._promises
        if promises is None:
            replica.admit(now_s, in_flight, min(call.kv_tokens(pool.model.name), pool.kv_tokens))
            return
        in_flight.promised_tokens = promises.tokens(call, pool)
        replica.admit(now_s, in_flight, in_flight.promised_tokens)
        promises.enter(call, replica)

    def validate(self) -> None:
        """Check every invariant; slow, for tests."""
        self.line.validate()
        self.workflows.validate()
        self._outlook.validate()
        for replica in self.replicas.values():
            replica.validate(queues=self.policy.binds == "early")
        if self._residents is not None:
            self._residents.validate()
        on_replicas = sorted(rid for r in self.replicas.values() for rid in r.in_flight)
        assert on_replicas == sorted(self._running), "the running calls are not those on replicas"
        assert not any(rid in self.line for rid in self._running), "a call both waits and runs"
        assert all(self.workflows.get(call.workflow.workflow_id).open_calls for call in self.line)
