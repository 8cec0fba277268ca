"""The scheduling core: events in, actions out.

Nothing here waits, sleeps, sends, logs or asks for the time. A driver tells the core what
happened and when, performs the actions it gets back, and reports what comes of them.

The life of a call: it arrives with its forecast, is admitted or refused, stands in a lane
(the pools it may go to) under one key, is dispatched once a replica has room, streams, and
gets exactly one outcome: finished, failed, rejected or cancelled.
"""

import random
from collections.abc import Iterable
from typing import assert_never

from concertmaster.core.actions import Action, Cancel, Fail, Reject
from concertmaster.core.assembly import MAX_ATTEMPTS, Assembly, filters_of
from concertmaster.core.events import (
    Event,
    FailReason,
    PaceObserved,
    RejectReason,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    ReplicaJoined,
    ReplicaOnTrial,
    ReplicaReady,
    ReplicaRemoved,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import Fleet, Pool, Replica, ReplicaId
from concertmaster.core.forecast import Forecast
from concertmaster.core.policy import Policy, Refusal
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, Request, RequestId


class Scheduler:
    """Admission, order and placement for a whole fleet.

    Args:
        fleet: What there is.
        policy: How to decide.
        rng: Source of all randomness; the same seed and events give the same actions.
        record_candidates: Keep the costs of every candidate with a dispatch, for traces.
        weighs: Keep what was weighed at a dispatch until ``weighing`` is asked, for receipts.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        rng: random.Random,
        *,
        record_candidates: bool = False,
        weighs: bool = False,
    ) -> None:
        parts = Assembly(fleet, policy, rng, record_candidates=record_candidates, weighs=weighs)
        self.policy = policy
        self.weighing = parts.weighing
        self.replicas, self.pools, self._by_pool = parts.replicas, parts.pools, parts.by_pool
        self.line, self.workflows = parts.line, parts.workflows
        self.races, self._running = parts.races, parts.running
        self._promises, self._window, self._outlook = parts.promises, parts.window, parts.outlook
        self._routing, self._waking, self._wants = parts.routing, parts.waking, parts.wants
        self._residents, self._scaler = parts.residents, parts.scaler
        self._dispatcher = parts.dispatcher
        self._serial = 0
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
            self._dispatcher.dispatch(now_s, actions)
        if self.races.are_on:
            self._dispatcher.hedge(now_s, actions)
        if self._residents is not None:
            actions += self._residents.act(now_s)
        if self._waking.leaving:
            actions += self._waking.let_go()
        return actions

    def next_wakeup_s(self) -> float | None:
        """When to send ``TimerFired`` if nothing else happens first; ``None`` for never."""
        times_s = [None if self._scaler is None else self._scaler.due_s]
        if self.races.are_on:
            times_s.append(self.races.next_due_s())
        if self._residents is not None:
            times_s.append(self._residents.due_s)
        if len(self.line):
            review_s = self._routing.next_review_s(self._now_s, self.line)
            times_s += [self.line.next_expiry_s(), review_s, self._window.next_reopen_s()]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def in_flight(self, request_id: RequestId, attempt: int | None = None) -> ReplicaId | None:
        """Return the replica that an attempt of a call is on; ``None`` if it is over.

        Args:
            request_id: The call.
            attempt: By default the first of those that are under way.
        """
        found = self._running.get(request_id)
        if attempt is not None:
            found = self._dispatcher.attempt_of(request_id, attempt)
        return None if found is None else found[1].replica_id

    def adopt(self, policy: Policy) -> None:
        """Decide by another policy from here on; calls that wait take their places by it.

        What calls were promised and routed to stays. The next event dispatches by it.

        Args:
            policy: One that ``Policy.bones`` are alike of; what they say is built in.
        """
        assert policy.bones == self.policy.bones, f"{policy.name} needs a scheduler of its own"
        looked_again = self.policy.reroute_s is not None
        self.policy = policy
        self._outlook.adopt(policy)
        self._routing.adopt(policy)
        self._dispatcher.adopt(policy)
        if self.weighing is not None:
            self.weighing.adopt(policy.scorers)
        self.races.adopt(policy.hedge)
        filters = filters_of(policy, self._promises)
        self._window.adopt(self._now_s, self.replicas.values(), policy.window_s, filters)
        waiting = list(self.line)
        for call in waiting:
            self.line.leave(call)
        for call in waiting:
            call.key = self._dispatcher.key(call)
            self.line.enter(call)
            if not looked_again:
                self._routing.plan_review(self._now_s, call, self.line)

    # Events

    def _take_in(  # noqa: C901, PLR0911, PLR0912  # one case an event reads best in one place
        self, now_s: float, event: Event
    ) -> list[Action]:
        match event:
            case RequestArrived(request, forecast):
                return self._arrive(now_s, request, forecast)
            case TokensStreamed(progress):
                return self._stream(now_s, progress)
            case RequestFinished(request_id, attempt, output_tokens):
                return self._finish(now_s, request_id, attempt, output_tokens)
            case RequestCancelled(request_id):
                return self._cancel(now_s, request_id)
            case RequestFailed(request_id, attempt, retriable):
                call = self._dispatcher.release(now_s, request_id, attempt, settle=False)
                return self._retry(now_s, call, "engine_error", retriable=retriable) if call else []
            case ReplicaDied(replica_id):
                replica = self.replicas[replica_id]
                actions = self._waking.died(now_s, replica)
                return [*actions, *self._retry_lost(now_s, replica)]
            case ReplicaReady(replica_id):
                actions = self._waking.came_up(now_s, self.replicas[replica_id])
                return [*actions, *self._waking.wake_all(now_s, self.line.lanes)]
            case ReplicaDemoted(replica_id, readiness):
                replica = self.replicas[replica_id]
                actions = self._waking.went(now_s, replica, readiness)
                return [*actions, *self._retry_lost(now_s, replica)]
            case ReplicaDraining(replica_id):
                self._waking.disown(now_s, self.replicas[replica_id])
                return [*self._waking.wake_all(now_s, self.line.lanes)]
            case ReplicaJoined(replica_id, pool_id, node):
                self._join(now_s, Replica(replica_id, self.pools[pool_id], node))
                return []
            case ReplicaRemoved(replica_id):
                self._waking.remove(now_s, self.replicas[replica_id])
                return [*self._waking.wake_all(now_s, self.line.lanes)]
            case ReplicaOnTrial(replica_id):
                self._waking.try_out(now_s, self.replicas[replica_id])
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

    def _stream(self, now_s: float, progress: Iterable[tuple[RequestId, int, int]]) -> list[Action]:
        actions: list[Action] = []
        for request_id, attempt, tokens in progress:
            if tokens and self.races.are_on:
                actions += self._dispatcher.decide_race(now_s, request_id, attempt)
            self._dispatcher.stream(request_id, attempt, tokens)
        return actions

    def _finish(
        self, now_s: float, request_id: RequestId, attempt: int, output_tokens: int
    ) -> list[Action]:
        actions: list[Action] = []
        if self.races.are_on:
            actions += self._dispatcher.decide_race(now_s, request_id, attempt)
        self._dispatcher.stream(request_id, attempt, output_tokens)
        call = self._dispatcher.release(now_s, request_id, attempt, finished=True)
        if call is not None:
            self.line.note_finish(now_s)
            if call.is_last:
                self.workflows.rest(call.workflow)
        return actions

    def _join(self, now_s: float, replica: Replica) -> None:
        assert replica.pool.footprint is None, f"{replica.pool.pool_id} shares nodes"
        siblings = self._by_pool[replica.pool.pool_id]
        known = self.replicas.get(replica.replica_id)
        if known is not None:
            assert known.removed, f"{known.replica_id} is there already"
            assert not known.in_flight, f"{known.replica_id} is not done yet"
            siblings.remove(known)
            self._window.forget(known)
        replica.alive = False
        self.replicas[replica.replica_id] = replica
        siblings.append(replica)
        self._window.update(now_s, replica)

    def _arrive(self, now_s: float, request: Request, forecast: Forecast) -> list[Action]:
        request_id = request.request_id
        assert request_id not in self.line, f"{request_id} waits already"
        assert request_id not in self._running, f"{request_id} runs already"
        able = self._routing.able(request)
        if isinstance(able, str):
            return [self._reject(now_s, request, able)]
        refusal = self.policy.admission.refuses(request, len(self.line))
        if refusal is not None:
            return [self._reject(now_s, request, refusal)]
        call = self._called(now_s, request, forecast)
        verdict = self._judge(call, able)
        if isinstance(verdict, Refusal):
            return [Reject(request_id, verdict.reason, verdict.retry_after_s)]
        call.workflow = self.workflows.arrive(now_s, request)
        call.workflow.kept_to = verdict
        self._routing.assign(call, able)
        if self._residents is not None:
            self._wants.note_arrival(now_s, call, self.pools[call.pools[0]])
        replicas = () if len(self.line) else self._dispatcher.room_for(call, {})
        if replicas:
            return self._dispatcher.place(now_s, call, replicas)
        self._wait(call)
        return [*self._waking.wake(now_s, call.pools)]

    def _called(self, now_s: float, request: Request, forecast: Forecast) -> Waiting:
        """Return a call that has not arrived yet."""
        self._serial += 1
        return Waiting(
            request=request,
            forecast=forecast,
            workflow=self.workflows.known(now_s, request),
            pools=(),
            serial=self._serial,
            attempt=1,
            expires_s=self.policy.admission.expires_s(request),
            kv_level=self.policy.kv_level,
            by_mean=self.policy.by_mean,
        )

    def _judge(self, call: Waiting, able: list[Pool]) -> ModelName | Refusal:
        """Say what model a workflow is kept to, if any; its first call may be refused."""
        gate, workflow = self.policy.gate, call.workflow
        if gate is None or workflow.calls:
            return workflow.kept_to
        return gate.judge(call, able, self._outlook)

    def _cancel(self, now_s: float, request_id: RequestId) -> list[Action]:
        if request_id in self.line:
            workflow = self.line.remove(request_id).workflow
            self.workflows.settle(workflow.workflow_id, answered=False)
            return []
        running = self._running.get(request_id)
        if running is None:
            return []
        actions = self._dispatcher.call_off(now_s, request_id)
        self._dispatcher.release(now_s, request_id, running[0].attempt, settle=False)
        self.workflows.settle(running[0].workflow.workflow_id, answered=False)
        return [*actions, Cancel(request_id, running[1].replica_id)]

    def _retry_lost(self, now_s: float, replica: Replica) -> list[Action]:
        """Send calls that a replica took along back to the line, or fail them; wake others.

        Those that go on elsewhere are only stopped here.
        """
        actions: list[Action] = []
        for request_id in list(replica.in_flight):
            seen_tokens = replica.in_flight[request_id].streamed_tokens
            call, first = self._running[request_id]
            attempt = call.attempt if first is replica else call.hedge
            if self._dispatcher.release(now_s, request_id, attempt, settle=False) is None:
                actions.append(Cancel(request_id, replica.replica_id))
            else:
                actions += self._retry(now_s, call, "replica_died", retriable=seen_tokens == 0)
        return [*actions, *self._waking.wake_all(now_s, self.line.lanes)]

    # Outcomes

    def _retry(
        self, now_s: float, call: Waiting, reason: FailReason, *, retriable: bool
    ) -> list[Action]:
        if retriable and call.latest_attempt < MAX_ATTEMPTS:
            call.attempt = call.latest_attempt + 1
            self._wait(call)
            return [*self._waking.wake(now_s, call.pools)]
        self.workflows.settle(call.workflow.workflow_id, answered=False)
        return [Fail(call.request.request_id, reason)]

    def _reject(self, now_s: float, request: Request, reason: RejectReason) -> Reject:
        hopeless = reason in ("too_long", "model_not_found")
        return Reject(request.request_id, reason, None if hopeless else self.line.drain_s(now_s))

    def _wait(self, call: Waiting) -> None:
        call.key = self._dispatcher.key(call)
        self.line.push(call)
        self._routing.plan_review(self._now_s, call, self.line)

    def validate(self) -> None:
        """Check every invariant; slow, for tests."""
        self.line.validate()
        self.workflows.validate()
        self._outlook.validate()
        for replica in self.replicas.values():
            replica.validate(queues=self.policy.binds == "early")
        if self._residents is not None:
            self._residents.validate()
        self.races.validate()
        on_replicas = sorted(rid for r in self.replicas.values() for rid in r.in_flight)
        attempts = sorted([*self._running, *self.races.seconds])
        assert on_replicas == attempts, "the running calls are not those on replicas"
        for request_id, (call, second) in self.races.seconds.items():
            assert self._running[request_id][0] is call, "two attempts of two calls"
            assert self._running[request_id][1] is not second, "both attempts are on one replica"
        assert not any(rid in self.line for rid in self._running), "a call both waits and runs"
        assert all(self.workflows.get(call.workflow.workflow_id).open_calls for call in self.line)
