"""Everything that keeps one bad engine, or too many callers, from hurting the other calls."""

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Protocol

from concertmaster.core.assembly import MAX_ATTEMPTS
from concertmaster.core.events import Event, RequestCancelled, RequestFailed
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.breaker import Breakers, State
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.limits import Limits
from concertmaster.gateway.openai_api import Reason
from concertmaster.gateway.retries import RetryBudget, backoff_s
from concertmaster.gateway.shedding import Bulkheads, Shedding
from concertmaster.gateway.timeouts import Timeouts

LOOK_S = 0.1
BROKEN_WAIT_S = 0.8
"""How long a call waits for the trial of an engine where all that could take it keep failing.

Less than the second after which a held stream begins, so that it still gets its status.
"""


class Refuse(Protocol):
    """Answers a call with an error."""

    def __call__(
        self, exchange: Exchange, reason: Reason, retry_after_s: float | None = None
    ) -> None:
        """Answer it, or cut it if its answer has begun."""


class Guard:
    """Timeouts, retries, breakers, bulkheads and shedding of one gateway.

    Args:
        scheduler: The core.
        exchanges: Calls without an outcome.
        limits: What is put up with.
        feed: Tells the core.
        refuse: Answers a call with an error.
        clock: The core's.
        speedup: How much faster that clock runs than the wall's.
        rng: Draws waits before retries and trials.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        exchanges: Mapping[RequestId, Exchange],
        limits: Limits,
        *,
        feed: Callable[[Event], None],
        refuse: Refuse,
        clock: Callable[[], float],
        speedup: float,
        rng: random.Random,
    ) -> None:
        self._scheduler = scheduler
        self._exchanges = exchanges
        self._feed = feed
        self._refuse = refuse
        self._clock = clock
        self._speedup = speedup
        self._rng = rng
        self._budget = RetryBudget(limits.retry_ratio)
        self._timeouts = Timeouts(
            limits, speedup=speedup, silent=_silent, too_long=self._end_too_long
        )
        self._bulkheads = Bulkheads(scheduler, limits)
        self.shedding = Shedding(limits, exchanges)
        self.breakers = Breakers(
            scheduler.replicas,
            limits,
            feed,
            clock=lambda: clock() / speedup,
            rng=rng,
        )

    # What it has done

    @property
    def retries(self) -> int:
        """Attempts after the first, of calls that failed."""
        return self._budget.spent

    def rests(self, replica_id: ReplicaId) -> bool:
        """Whether a replica is let be because it kept failing, or on trial."""
        return self.breakers.state(replica_id) is not State.CLOSED

    # Callers

    def refuses(self, exchange: Exchange) -> bool:
        """Refuse a call that has just come in if it is one too many."""
        request, quota, open_calls = exchange.request, exchange.quota, len(self._exchanges)
        drain_s = self._scheduler.line.drain_s
        if self.shedding.refuses(request.service_class):
            self._refuse(exchange, "saturated", self.shedding.retry_after_s())
        elif quota is not None and self._bulkheads.refuses_tenant(quota, open_calls):
            self._refuse(exchange, "tenant_full", drain_s(self._clock()))
        elif self._bulkheads.refuses(request, open_calls):
            self._refuse(exchange, "pool_full", drain_s(self._clock()))
        else:
            return False
        return True

    # Engines

    def sent(self, attempt: int) -> None:
        """Count a dispatch."""
        if attempt == 1:
            self._budget.earn()

    def served(self, replica_id: ReplicaId) -> None:
        """Count a complete answer."""
        self.breakers.served(replica_id)

    def failed(self, exchange: Exchange, attempt: int) -> None:
        """Let the core try again elsewhere if nothing was seen and the budget allows it.

        Where another attempt goes on beside it, that is the retry, and was paid for.
        """
        retriable = not exchange.started
        if exchange.request.request_id in self._scheduler.races.seconds:
            retriable = True
        elif retriable and attempt < MAX_ATTEMPTS:
            if self._budget.take():
                wait_s = backoff_s(attempt, self._rng)
                loop = asyncio.get_running_loop()
                loop.call_later(wait_s, self._tell_failure, exchange, attempt)
                return
            retriable = False
            exchange.error_text += " (not tried again: too many calls fail)"
        self._feed(RequestFailed(exchange.request.request_id, attempt, retriable=retriable))

    def _tell_failure(self, exchange: Exchange, attempt: int) -> None:
        if not exchange.over:
            self._feed(RequestFailed(exchange.request.request_id, attempt, retriable=True))

    # Now and then

    async def watch(self) -> None:
        """Look at everything now and then, for ever."""
        loop = asyncio.get_running_loop()
        swept_s = looked_s = loop.time()
        period_s = min(LOOK_S, self._timeouts.period_s)
        while True:
            await asyncio.sleep(period_s)
            wall_s = loop.time()
            self.shedding.note(max(0.0, wall_s - looked_s - period_s), wall_s - looked_s)
            looked_s = wall_s
            self.breakers.look()
            self._release_stranded()
            if wall_s - swept_s >= self._timeouts.period_s:
                swept_s = wall_s
                self._timeouts.sweep(wall_s, self._clock(), self._exchanges.values())

    def _release_stranded(self) -> None:
        """Refuse those who wait where every replica that could take them keeps failing."""
        if not (self.breakers.restless and len(self._scheduler.line)):
            return
        replicas, now_s = list(self._scheduler.replicas.values()), self._clock()
        for pools, lane in list(self._scheduler.line.lanes.items()):
            able = [replica for replica in replicas if replica.pool.pool_id in pools]
            trial_in_s = self.breakers.trial_in_s(able)
            if trial_in_s is None:
                continue
            for call in list(lane):
                exchange = self._exchanges[call.request.request_id]
                if now_s - exchange.arrived_s >= BROKEN_WAIT_S * self._speedup:
                    self.turn_away(exchange, "engines_failing", max(1.0, trial_in_s))

    def _end_too_long(self, exchange: Exchange, problem: str) -> None:
        if exchange.started and exchange.engine is not None:
            exchange.engine.give_up(problem)
            return
        if exchange.engine is not None:
            self.breakers.failed(ReplicaId(exchange.replica_id))
        exchange.error_text = problem
        self.turn_away(exchange, "timed_out")

    def turn_away(
        self, exchange: Exchange, reason: Reason, retry_after_s: float | None = None
    ) -> None:
        """End a call that the core still has, with an error."""
        if not exchange.over:
            self._refuse(exchange, reason, retry_after_s)
            self._feed(RequestCancelled(exchange.request.request_id))


def _silent(exchange: Exchange, problem: str) -> None:
    if exchange.engine is not None:
        exchange.engine.give_up(problem)
