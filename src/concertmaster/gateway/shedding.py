"""Who is refused while the gateway itself cannot keep up: batch first, then everybody."""

from collections.abc import Collection, Mapping

from concertmaster.core.fleet import Pool, PoolId, Replica
from concertmaster.core.request import Request, ServiceClass
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.limits import Limits
from concertmaster.gateway.quotas import Quota

BATCH_RATIO = 0.8
"""Share of the open calls, and half of it of the lag, from which batch is refused."""

_SMOOTHING = 0.3
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 120.0


class Shedding:
    """Watches open calls and the lateness of the event loop.

    Args:
        limits: How much of either is too much.
        exchanges: Calls without an outcome.
    """

    def __init__(self, limits: Limits, exchanges: Collection[object]) -> None:
        self._limits = limits
        self._exchanges = exchanges
        self._lag_s = 0.0
        self._ended_per_s = 0.0
        self.ended = 0
        self._counted = 0

    def note(self, lag_s: float, period_s: float) -> None:
        """Take in how late the event loop was, and how long ago the last look is."""
        self._lag_s += _SMOOTHING * (lag_s - self._lag_s)
        rate = (self.ended - self._counted) / period_s
        self._counted = self.ended
        self._ended_per_s += _SMOOTHING * (rate - self._ended_per_s)

    def refuses_all(self) -> bool:
        """Whether nobody can be taken."""
        limits = self._limits
        return len(self._exchanges) >= limits.most_open or self._lag_s >= limits.most_lag_s

    def refuses(self, service_class: ServiceClass) -> bool:
        """Whether a call that has come in, and is counted, is one too many."""
        if service_class is not ServiceClass.BATCH:
            return False
        limits = self._limits
        full = len(self._exchanges) > BATCH_RATIO * limits.most_open
        return full or self._lag_s >= limits.most_lag_s * BATCH_RATIO / 2

    def retry_after_s(self) -> float:
        """Seconds until there should be room, at the rate at which calls end; 1 to 120."""
        excess = len(self._exchanges) + 1 - BATCH_RATIO * self._limits.most_open
        drain_s = excess / self._ended_per_s if self._ended_per_s > 0 else _LEAST_RETRY_S
        return min(max(_LEAST_RETRY_S, drain_s, 4 * self._lag_s), _MOST_RETRY_S)


class Bulkheads:
    """Keeps calls that wait for one pool, and those of one tenant, from taking all room.

    A call is refused if as many wait for each of its pools as there is room left in all: one
    slow pool then leaves half of the room to others, two leave a third, and so on
    (dynamic thresholds, Choudhury and Hahne 1998). So is one whose tenant has more calls open
    than that: a tenant that floods leaves half of the room to the others.

    Args:
        scheduler: Its line and its replicas.
        limits: Most open calls.
    """

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self._scheduler = scheduler
        self._most_open = limits.most_open
        self._by_pool: Mapping[PoolId, list[Replica]] = {one: [] for one in scheduler.pools}
        for replica in scheduler.replicas.values():
            self._by_pool[replica.pool.pool_id].append(replica)

    def refuses(self, request: Request, open_calls: int) -> bool:
        """Whether every pool of a call has its share of room taken."""
        room = self._most_open - open_calls
        if open_calls < self._most_open // 4 or len(self._by_pool) < 2:
            return False
        pools = [one for one in self._scheduler.pools.values() if _may_go(request, one)]
        return bool(pools) and all(self._waiting(pool) >= room for pool in pools)

    def refuses_tenant(self, quota: Quota, open_calls: int) -> bool:
        """Whether a tenant has more calls open than there is room left for those of others."""
        busy = open_calls >= self._most_open // 4
        return busy and quota.shared and quota.in_flight > self._most_open - open_calls

    def _waiting(self, pool: Pool) -> int:
        """Count the calls that wait for a pool, in the line or ahead of time at its engines."""
        lanes = self._scheduler.line.lanes.items()
        in_line = sum(len(lane) for pools, lane in lanes if pool.pool_id in pools)
        replicas = self._by_pool[pool.pool_id]
        return in_line + sum(max(0, len(r.in_flight) - pool.max_sequences) for r in replicas)


def _may_go(request: Request, pool: Pool) -> bool:
    return not request.models or pool.model.name in request.models
