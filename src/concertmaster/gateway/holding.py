"""Calls whose model does not run: held while it is woken, and refused if it will not be.

The core wakes a replica for a call that finds none. Here the callers of streams are told so
with comments, which keep their connection; nobody waits for ever; and who is refused hears
when it is worth trying again.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica, ReplicaId
from concertmaster.core.request import Request, RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import stream
from concertmaster.gateway.exchange import Exchange

LOOK_S = 0.5
FIRST_S = 1.0
"""Wait before the first comment: what fails sooner is answered with a status of its own."""

EVERY_S = 5.0
"""Between two comments; proxies drop connections that are silent for 15 s or more."""


class Prospect(NamedTuple):
    """What a caller who is refused is told.

    Attributes:
        retry_after_s: Seconds until its model should run; ``None`` if it does.
        why: What stands in the way, as an ending of the message.
    """

    retry_after_s: float | None = None
    why: str = ""


class Holding:
    """Tells those who wait what they wait for. All its seconds are the wall's.

    Args:
        scheduler: Its line holds the calls.
        problem: Why a replica did not come up the last time.
        pause_s: Seconds until a dead replica is looked at again.
        speedup: How much faster the core's clock runs.
        hold_s: Longest time for which a call is held.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        problem: Callable[[ReplicaId], str],
        pause_s: Callable[[ReplicaId], float],
        *,
        speedup: float,
        hold_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._problem = problem
        self._pause_s = pause_s
        self._speedup = speedup
        self.hold_s = hold_s
        self._due_s: dict[ReplicaId, float] = {}
        self._told: dict[RequestId, None] = {}
        self._by_pool: dict[PoolId, list[Replica]] = {}
        self.recount()

    def recount(self) -> None:
        """Take in which replicas there are."""
        self._by_pool = {pool_id: [] for pool_id in self._scheduler.pools}
        for replica in self._scheduler.replicas.values():
            self._by_pool[replica.pool.pool_id].append(replica)

    def woken(self, now_s: float, replica_id: ReplicaId) -> None:
        """Note when a replica that is told to wake should be ready."""
        replica = self._scheduler.replicas[replica_id]
        self._due_s[replica_id] = now_s + replica.pool.ready_s.get(replica.readiness, 0.0)

    def settled(self, replica_id: ReplicaId) -> None:
        """Note that a replica is on its way no longer."""
        self._due_s.pop(replica_id, None)

    def look(self, now_s: float, exchanges: Mapping[RequestId, Exchange]) -> list[Exchange]:
        """Comment on waits that are due for it; return the calls that were held for too long."""
        overdue = []
        for pools, lane in self._scheduler.line.lanes.items():
            if any(map(_serves, self._replicas(pools))):
                continue
            state = self._state(now_s, pools)
            for call in lane:
                exchange = exchanges[call.request.request_id]
                waited_s = (now_s - exchange.arrived_s) / self._speedup
                if waited_s >= self.hold_s:
                    overdue.append(exchange)
                elif exchange.held or (exchange.may_hold and waited_s >= FIRST_S):
                    self._comment(now_s, exchange, state)
        self._comment_on_room(now_s, exchanges)
        return overdue

    def _comment(self, now_s: float, exchange: Exchange, state: str) -> None:
        if exchange.held and now_s - exchange.spoken_s < EVERY_S * self._speedup:
            return
        exchange.spoken_s = now_s
        self._told[exchange.request.request_id] = None
        if not exchange.held:
            exchange.held = True
            exchange.caller.write(stream.head(exchange.response_headers))
        exchange.caller.write(stream.chunk(stream.comment(state)))

    def _comment_on_room(self, now_s: float, exchanges: Mapping[RequestId, Exchange]) -> None:
        """Go on with those whose model runs by now, and who wait for room on it."""
        line = self._scheduler.line
        for request_id in [one for one in self._told if one not in line]:
            del self._told[request_id]
        for request_id in self._told:
            self._comment(now_s, exchanges[request_id], "waiting for room")

    def _state(self, now_s: float, pools: tuple[PoolId, ...]) -> str:
        model = self._scheduler.pools[pools[0]].model.name
        rising_s = self._rising_s(now_s, self._replicas(pools))
        if rising_s is None:
            return f"waiting to wake {model}"
        return f"waking {model}, about {math.ceil(rising_s)} s"

    def stranded(self) -> list[RequestId]:
        """Return the calls that wait for pools of which no replica is alive."""
        lanes = self._scheduler.line.lanes.items()
        return [
            call.request.request_id
            for pools, lane in lanes
            if not any(replica.alive for replica in self._replicas(pools))
            for call in lane
        ]

    def prospect(self, now_s: float, request: Request) -> Prospect:
        """Say when a model that a call may go to should run, and why none does."""
        pools = [pool for pool in self._scheduler.pools.values() if _may_go(request, pool)]
        replicas = self._replicas(pool.pool_id for pool in pools)
        if not replicas or any(map(_serves, replicas)):
            return Prospect()
        nearest = min(replicas, key=lambda one: (self._away_s(now_s, one), one.replica_id))
        name, retry_after_s = nearest.pool.model.name, max(1.0, self._away_s(now_s, nearest))
        if nearest.replica_id in self._due_s:
            return Prospect(retry_after_s, f": {name} is being woken")
        problem = self._problem(nearest.replica_id)
        if not nearest.alive and problem:
            return Prospect(retry_after_s, f": {name} did not wake: {problem}")
        return Prospect(retry_after_s)

    def _away_s(self, now_s: float, replica: Replica) -> float:
        """Seconds until a replica could serve if it were woken as soon as can be."""
        if replica.replica_id in self._due_s:
            return max(0.0, self._due_s[replica.replica_id] - now_s) / self._speedup
        ready_s = replica.pool.ready_s.get(replica.readiness, 0.0) / self._speedup
        return ready_s if replica.alive else ready_s + self._pause_s(replica.replica_id)

    def _rising_s(self, now_s: float, replicas: Iterable[Replica]) -> float | None:
        """Seconds until the first of those that are being woken should be ready, at least one."""
        rising = [self._away_s(now_s, one) for one in replicas if one.replica_id in self._due_s]
        return max(1.0, min(rising)) if rising else None

    def _replicas(self, pools: Iterable[PoolId]) -> list[Replica]:
        return [replica for pool_id in pools for replica in self._by_pool[pool_id]]


def _serves(replica: Replica) -> bool:
    return replica.alive and replica.readiness is Readiness.RUNNING and not replica.draining


def _may_go(request: Request, pool: Pool) -> bool:
    return not request.models or pool.model.name in request.models
