"""A replica's pace: a factor on its rate curve, from pairs of expected and actual seconds."""

import math
from collections import deque
from collections.abc import Iterable, Mapping

from concertmaster.core.fleet import PoolId, ReplicaId

MIN_PACE, MAX_PACE = 0.25, 20.0
"""Bounds of a pace: what lies beyond says that the curve is of another machine."""

_OWN_PRIOR = 2.0
_POOL_PRIOR = 6.0
"""Observations that the pool's pace, and 1.0, count for."""


class _Recent:
    """The latest observations of one replica, as logarithms of actual over expected."""

    __slots__ = ("_count", "_half_life_s", "_last_s", "_seen", "_stale", "centre")

    def __init__(self, window: int, half_life_s: float) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)
        self._half_life_s = half_life_s
        self._stale = False
        self._count = self._last_s = 0.0
        self.centre = 0.0

    def add(self, now_s: float, log_ratio: float) -> None:
        self._seen.append((now_s, log_ratio))
        self._last_s = now_s
        self._stale = True

    def count(self, now_s: float) -> float:
        """Observations that still count: one of a half-life ago counts for half."""
        return self._count * self._left(now_s - self._last_s)

    def refresh(self) -> None:
        """Bring centre and count up to date; the centre moves with what is observed alone."""
        if self._stale:
            weights = [self._left(self._last_s - at_s) for at_s, _ in self._seen]
            self._count = math.fsum(weights)
            self.centre = _median(
                (log_ratio, weight)
                for (_, log_ratio), weight in zip(self._seen, weights, strict=True)
            )
            self._stale = False

    def _left(self, after_s: float) -> float:
        return float(0.5 ** (after_s / self._half_life_s))


class PaceTracker:
    """The pace of every replica: 1.0 as its curve says, 1.3 takes 30 % longer.

    The median of the latest observations in log space, each worth half as much after a
    half-life: a fifth of them may be anything. Few observations are drawn towards the pace
    of the pool (the median of its replicas), and few of the whole pool towards 1.0.

    Args:
        pools: Pool of every replica.
        window: Observations to remember of each replica.
        half_life_s: After which an observation counts for half.
    """

    def __init__(
        self, pools: Mapping[ReplicaId, PoolId], *, window: int = 32, half_life_s: float = 180.0
    ) -> None:
        self._pools = dict(pools)
        self._window = window
        self._half_life_s = half_life_s
        self._recent: dict[PoolId, dict[ReplicaId, _Recent]] = {}
        self._pool_log: dict[PoolId, tuple[float, float]] = {}

    def add(self, replica_id: ReplicaId, pool_id: PoolId) -> None:
        """Follow one replica more."""
        self._pools[replica_id] = pool_id

    def observe(
        self, now_s: float, replica_id: ReplicaId, expected_s: float, actual_s: float
    ) -> None:
        """Take in how long something took, and how long it should have taken.

        Args:
            now_s: When it ended; never earlier than the observation before.
            replica_id: One of those that were named at the start.
            expected_s: By the rate curve; above 0.
            actual_s: On the clock; above 0.
        """
        pool_id = self._pools[replica_id]
        in_pool = self._recent.setdefault(pool_id, {})
        recent = in_pool.get(replica_id)
        if recent is None:
            recent = in_pool[replica_id] = _Recent(self._window, self._half_life_s)
        recent.add(now_s, math.log(actual_s / expected_s))
        self._pool_log.pop(pool_id, None)

    def pace(self, now_s: float, replica_id: ReplicaId) -> float:
        """Return the factor on the curve's seconds, from ``MIN_PACE`` to ``MAX_PACE``."""
        pool_id = self._pools[replica_id]
        log_pace = self._log_of_pool(now_s, pool_id)
        recent = self._recent.get(pool_id, {}).get(replica_id)
        if recent is not None:
            recent.refresh()
            count = recent.count(now_s)
            log_pace += (recent.centre - log_pace) * count / (count + _OWN_PRIOR)
        return min(max(math.exp(log_pace), MIN_PACE), MAX_PACE)

    def forget(self, replica_id: ReplicaId) -> None:
        """Drop what was observed of a replica: what comes back may be another machine."""
        pool_id = self._pools[replica_id]
        if self._recent.get(pool_id, {}).pop(replica_id, None) is not None:
            self._pool_log.pop(pool_id, None)

    def _log_of_pool(self, now_s: float, pool_id: PoolId) -> float:
        """Logarithm of the pace of a pool; computed once an instant."""
        known = self._pool_log.get(pool_id)
        if known is not None and known[0] == now_s:
            return known[1]
        counted = []
        for recent in self._recent.get(pool_id, {}).values():
            recent.refresh()
            counted.append((recent.centre, recent.count(now_s)))
        count = math.fsum(weight for _, weight in counted)
        log_pace = _median(counted) * count / (count + _POOL_PRIOR) if counted else 0.0
        self._pool_log[pool_id] = (now_s, log_pace)
        return log_pace


def _median(weighted: Iterable[tuple[float, float]]) -> float:
    """Return the value with half of the weight on either side, at least one value given."""
    ranked = sorted(weighted)
    half = math.fsum(weight for _, weight in ranked) / 2
    below = 0.0
    for value, weight in ranked:
        below += weight
        if below >= half:
            return value
    return ranked[-1][0]
