"""Calls that two replicas work on: when a second one is asked, and what came of it.

A race begins when a call is late, a budget allows it, and a replica that nobody waits for
would be done first; it ends with the first token of either attempt, and the other is
cancelled. Which ledgers the attempts are in is for the dispatcher to keep.
"""

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica
from concertmaster.core.hedging import Budget, Hedging, Tails
from concertmaster.core.outlook import Outlook
from concertmaster.core.queue import Waiting
from concertmaster.core.request import RequestId, ServiceClass
from concertmaster.core.service import Service, service_on
from concertmaster.core.sketch import Measure, left_over

HedgeOutcome: TypeAlias = Literal["won", "lost", "broke", "alone", "cancelled"]
"""What came of a hedge: it began to answer first, or second; it broke while the first attempt
went on; the first broke and it went on alone; the caller left both."""

MOST_FULL = 0.5
"""Share of sequences and of KV above which a replica takes no hedge: others would feel it."""

AGAIN_RATIO, LEAST_AGAIN_S = 0.25, 0.05
"""A late call that could not be hedged is looked at again after so much more of its time."""


@dataclass(slots=True, kw_only=True)
class Watched:
    """A call that has been sent and not been heard of.

    Attributes:
        sent_s: When it was sent.
        base_s: By when something should be heard: of a stream, the prefill and what is before
            it; of a whole answer, the answer too, at the level of the rule.
        factor: How many times that is late.
        service: What its replica took it to need.
        due_s: When it is late, or is to be looked at again.
        is_short: Whether it has been late while the budget had nothing left.
    """

    call: Waiting
    replica: Replica
    sent_s: float
    base_s: float
    factor: float
    service: Service
    due_s: float
    is_short: bool = False


class Races:
    """Watches calls until they are heard of, and finds those that are worth a second attempt.

    Args:
        rule: When; ``None`` for never.
        pools: All there are.
        outlook: Says who has room that nobody waits for.
        attempts: Most attempts of a call, all told.

    Attributes:
        seconds: Calls on two replicas, with the second; kept by the dispatcher.
        outcomes: What came of hedges so far.
        short: Late calls that met an empty budget, each once.
        are_on: Whether there is a rule, or ever was one.
    """

    def __init__(
        self,
        rule: Hedging | None,
        *,
        pools: Mapping[PoolId, Pool],
        outlook: Outlook,
        attempts: int,
    ) -> None:
        self._pools = pools
        self._outlook = outlook
        self._attempts = attempts
        self._watched: dict[RequestId, Watched] = {}
        self._agenda: list[tuple[float, int, Watched]] = []
        self._planned = 0
        self.seconds: dict[RequestId, tuple[Waiting, Replica]] = {}
        self.outcomes: Counter[HedgeOutcome] = Counter()
        self.short = 0
        self.rule: Hedging | None = None
        self.are_on = False
        self.adopt(rule)

    def adopt(self, rule: Hedging | None) -> None:
        """Go by another rule from here on; races that are on go on."""
        if rule == self.rule:
            return
        self.rule = rule
        self._watched.clear()
        self._agenda.clear()
        if rule is not None:
            self.are_on = True
            self._measure = Measure.quantile(rule.level)
            self._budget = Budget(rule.share)
            self._tails = Tails(rule.level)

    # What happens to calls

    def sent(self, now_s: float, call: Waiting, replica: Replica) -> None:
        """Watch a call that is about to be entered into the ledgers of a replica."""
        if self.rule is None:
            return
        self._budget.earn()
        if not self._may_race(call):
            return
        pool, service = replica.pool, service_on(now_s, call, replica)
        expected_s = service.first_s
        if not call.request.streams:
            expected_s += service.token_s * self._tokens(call, pool)
        base_s = max(self.rule.floor_s, expected_s)
        factor = self._tails.of(pool.pool_id, streams=call.request.streams).factor
        self._watch(
            Watched(
                call=call,
                replica=replica,
                sent_s=now_s,
                base_s=base_s,
                factor=factor,
                service=service,
                due_s=now_s + factor * base_s,
            )
        )

    def _may_race(self, call: Waiting) -> bool:
        """Programs wait; a call is hedged once, and has an attempt left for it."""
        is_batch = call.request.service_class is ServiceClass.BATCH
        return not (is_batch or call.hedge or call.attempt >= self._attempts)

    def _tokens(self, call: Waiting, pool: Pool) -> float:
        return call.measured_tokens(pool.model.name, self._measure)

    def heard(self, now_s: float, request_id: RequestId) -> None:
        """Take in that the first attempt of a call has begun to answer."""
        watched = self._watched.pop(request_id, None)
        if watched is not None:
            self._note(watched, (now_s - watched.sent_s) / watched.base_s)

    def overtaken(self, now_s: float, request_id: RequestId) -> None:
        """Take in that the second attempt was first: how late the other was stays unknown.

        It was late by more than was put up with, and no more is made of it: to count the time
        until the second answered would make what is late grow with every hedge.
        """
        watched = self._watched.pop(request_id, None)
        if watched is not None:
            ratio = (now_s - watched.sent_s) / watched.base_s
            self._note(watched, min(ratio, watched.factor))

    def _note(self, watched: Watched, ratio: float) -> None:
        call, pool = watched.call, watched.replica.pool
        self._tails.of(pool.pool_id, streams=call.request.streams).note(ratio)

    def forget(self, request_id: RequestId) -> None:
        """Take in that nothing more is to be heard of a first attempt."""
        self._watched.pop(request_id, None)

    def end(self, request_id: RequestId, outcome: HedgeOutcome) -> tuple[Waiting, Replica]:
        """Take a call out of its race, and return it with the replica that was second."""
        self.outcomes[outcome] += 1
        return self.seconds.pop(request_id)

    # Who is late

    def _watch(self, watched: Watched) -> None:
        self._watched[watched.call.request.request_id] = watched
        self._planned += 1
        heapq.heappush(self._agenda, (watched.due_s, self._planned, watched))
        if len(self._agenda) > 64 and len(self._agenda) > 2 * len(self._watched):
            self._agenda = [entry for entry in self._agenda if self._stands(entry)]
            heapq.heapify(self._agenda)

    def _stands(self, entry: tuple[float, int, Watched]) -> bool:
        due_s, _, watched = entry
        known = self._watched.get(watched.call.request.request_id)
        return known is watched and watched.due_s == due_s and not watched.call.hedge

    def next_due_s(self) -> float | None:
        """When the next call may be late, if any is watched."""
        agenda = self._agenda
        while agenda and not self._stands(agenda[0]):
            heapq.heappop(agenda)
        return agenda[0][0] if agenda else None

    def next_late(self, now_s: float) -> tuple[Waiting, Replica, int] | None:
        """Return a call that is late, where else it shall go, and among how many; pay for it.

        Those for which there is no such place now are looked at again later.
        """
        while (due_s := self.next_due_s()) is not None and due_s <= now_s:
            watched = heapq.heappop(self._agenda)[2]
            better = self._better(now_s, watched)
            if better is not None and self._budget.take():
                replica, candidates = better
                return watched.call, replica, candidates
            elapsed_s = now_s - watched.sent_s
            watched.due_s = now_s + max(LEAST_AGAIN_S, AGAIN_RATIO * elapsed_s)
            self._watch(watched)
        return None

    def _better(self, now_s: float, watched: Watched) -> tuple[Replica, int] | None:
        """Return the replica that would end a late call first, if before the first attempt."""
        if self._budget.is_empty:
            if not watched.is_short:
                watched.is_short = True
                self.short += 1
            return None
        call, model = watched.call, watched.replica.pool.model.name
        ends_s = [
            (self._end_s(now_s, call, replica), replica.replica_id, replica)
            for pool in map(self._pools.__getitem__, call.pools)
            if pool.model.name == model
            for replica in self._outlook.room(call, pool)
            if replica is not watched.replica and _is_spare(replica)
        ]
        if not ends_s:
            return None
        end_s, _, replica = min(ends_s)
        return (replica, len(ends_s)) if end_s < self._rest_s(now_s, watched) else None

    def _end_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds until a call would end on another replica, at the level of the rule."""
        service, pool = service_on(now_s, call, replica), replica.pool
        factor = self._tails.of(pool.pool_id, streams=True).factor
        return factor * service.first_s + service.token_s * self._tokens(call, pool)

    def _rest_s(self, now_s: float, watched: Watched) -> float:
        """Seconds until it ends where it is, at the same level, given that nothing was heard.

        The first token of a stream is as long away as it has been waited for: what is late has
        most likely met a fault, and faults that have lasted go on (a Pareto tail of index 2).
        A whole answer may be nothing but long, so it is what is left of its length.
        """
        call, pool, service = watched.call, watched.replica.pool, watched.service
        elapsed_s = now_s - watched.sent_s
        if call.request.streams:
            return elapsed_s + service.token_s * self._tokens(call, pool)
        done = max(0.0, elapsed_s - service.first_s) / service.token_s
        return service.token_s * self._left(call, pool, done)

    def _left(self, call: Waiting, pool: Pool, done: float) -> float:
        """Tokens left of an answer of which so many should be there, at the level."""
        assert self.rule is not None
        below, tokens = 0.0, 0.0
        for tokens, mass in left_over(call.output_sketch(pool.model.name), done):  # noqa: B007
            below += mass
            if below >= self.rule.level:
                break
        return tokens

    def validate(self) -> None:
        """Check that calls on two replicas are what they seem."""
        for request_id, (call, replica) in self.seconds.items():
            assert call.attempt < call.hedge <= self._attempts, "a hedge is the later attempt"
            assert request_id in replica.in_flight, "a hedge that no ledger knows"
            assert not replica.in_flight[request_id].streamed_tokens, "a race is over"
        single = [watched for watched in self._watched.values() if not watched.call.hedge]
        planned = [entry for entry in self._agenda if self._stands(entry)]
        assert len(planned) == len(single), "a watched call is not planned for once"


def _is_spare(replica: Replica) -> bool:
    """Whether a replica serves, is not on trial, and has plenty of room."""
    kv, pool = replica.kv, replica.pool
    serves = replica.readiness is Readiness.RUNNING and replica.most_requests is None
    few = len(replica.in_flight) < MOST_FULL * pool.max_sequences
    return serves and few and kv.reserved_blocks <= MOST_FULL * kv.capacity_blocks
