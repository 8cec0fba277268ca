"""Whose turn it is among tenants: fair queuing by the engine seconds that each was handed.

Each pool is shared by itself. A tenant's account there is the predicted engine seconds of its
calls that had to wait, over its weight; what came of a call puts it right at its end. Who
begins to wait is lifted to the lowest account of those who wait already, so that nobody saves
up by being idle, and nobody pays for what nobody else wanted (start-time fair queuing, Goyal et
al. 1996; virtual token counters, Sheng et al., OSDI 2024, section 4).
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.request import Request

QUANTUM_S = 1.0
"""Engine seconds by which accounts may differ while keys alone decide who goes next."""

_SPARE_ACCOUNTS = 1000


class PoolShare:
    """The accounts of one pool, in engine seconds over weights."""

    def __init__(self) -> None:
        self._used_s: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._floor_s = 0.0
        self._stale = False

    @property
    def floor_s(self) -> float:
        """Lowest account of those who wait; the last one if nobody does."""
        if self._stale and self._waiting:
            self._floor_s = min(self._used_s[tenant] for tenant in self._waiting)
            self._stale = False
        return self._floor_s

    def enter(self, tenant: str) -> None:
        """Note that a call waits."""
        waiting = self._waiting.get(tenant, 0)
        if not waiting:
            floor_s = self.floor_s
            self._used_s[tenant] = max(self._used_s.get(tenant, 0.0), floor_s)
            self._stale = True
            self._forget(floor_s)
        self._waiting[tenant] = waiting + 1

    def leave(self, tenant: str) -> None:
        """Note that a call waits no longer."""
        waiting = self._waiting[tenant] - 1
        if waiting:
            self._waiting[tenant] = waiting
            return
        self._floor_s = self.floor_s
        del self._waiting[tenant]
        self._stale = True

    def charge(self, tenant: str, seconds: float) -> None:
        """Put seconds on an account; below 0 takes them off again."""
        self._used_s[tenant] = self._used_s.get(tenant, self._floor_s) + seconds
        self._stale = True

    def turn(self, tenant: str) -> int:
        """Return whole quanta that a tenant who waits is ahead of who has had least."""
        if len(self._waiting) < 2:
            return 0
        return int((self._used_s[tenant] - self.floor_s) // QUANTUM_S)

    def validate(self, waiting: dict[str, int]) -> None:
        """Check counts against the calls."""
        assert self._waiting == waiting, "a pool lost count of who waits for it"

    def _forget(self, floor_s: float) -> None:
        """Drop accounts that their tenants would be lifted from."""
        if len(self._used_s) > 2 * len(self._waiting) + _SPARE_ACCOUNTS:
            waiting = self._waiting
            self._used_s = {
                tenant: used_s
                for tenant, used_s in self._used_s.items()
                if tenant in waiting or used_s >= floor_s
            }


class FairShare:
    """Accounts of all tenants. Calls without a tenant are on nobody's."""

    def __init__(self) -> None:
        self._pools: dict[PoolId, PoolShare] = {}

    def enter(self, pools: Sequence[PoolId], tenant: str) -> None:
        """Note that a call waits for these pools."""
        if tenant:
            for pool_id in pools:
                self._share(pool_id).enter(tenant)

    def leave(self, pools: Sequence[PoolId], tenant: str) -> None:
        """Note that it waits for them no longer."""
        if tenant:
            for pool_id in pools:
                self._pools[pool_id].leave(tenant)

    def turn(self, pools: Sequence[PoolId], tenant: str) -> int:
        """Return the rank of a tenant who waits for these pools; the smallest goes first."""
        if not tenant:
            return 0
        return min(self._pools[pool_id].turn(tenant) for pool_id in pools)

    def charge(self, pool: Pool, request: Request, seconds: float) -> None:
        """Put engine seconds on the account of a call's tenant; below 0 takes them off."""
        if request.tenant:
            share = self._share(pool.pool_id)
            share.charge(request.tenant, seconds / request.tenant_weight)

    def validate(self, waiting: Iterable[tuple[Sequence[PoolId], str]]) -> None:
        """Check counts against calls that wait: their pools and tenants."""
        counts: dict[PoolId, Counter[str]] = {pool_id: Counter() for pool_id in self._pools}
        for pools, tenant in waiting:
            for pool_id in pools if tenant else ():
                counts[pool_id][tenant] += 1
        for pool_id, share in self._pools.items():
            share.validate(dict(counts[pool_id]))

    def _share(self, pool_id: PoolId) -> PoolShare:
        share = self._pools.get(pool_id)
        if share is None:
            share = self._pools[pool_id] = PoolShare()
        return share


def engine_s(pool: Pool, prefill_tokens: int, output_tokens: float) -> float:
    """Return what a call takes of an engine that is full: its part of each step.

    Args:
        pool: Where.
        prefill_tokens: Prompt tokens to compute.
        output_tokens: Tokens to generate, each with one of ``max_sequences`` parts of a step.
    """
    batch = pool.max_sequences
    step_s = pool.curve.step_s(batch, 0)
    return prefill_tokens * pool.prefill_token_s + output_tokens * step_s / batch
