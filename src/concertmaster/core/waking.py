"""Which sleeping replica to wake for a call that nobody can take."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from concertmaster.core.actions import Wake
from concertmaster.core.fleet import PoolId, Readiness, Replica, ReplicaId


class Waking:
    """The replicas that were told to wake and have not been heard of since.

    Args:
        by_pool: Replicas of each pool, whatever their state.
    """

    def __init__(self, by_pool: Mapping[PoolId, Sequence[Replica]]) -> None:
        self._by_pool = by_pool
        self._waking: dict[ReplicaId, None] = {}

    def forget(self, replica_id: ReplicaId) -> None:
        """Take in that a replica is ready, or has left service."""
        self._waking.pop(replica_id, None)

    def wake(self, pools: Iterable[PoolId]) -> list[Wake]:
        """Wake the nearest replica if no other of these pools takes calls or is being woken."""
        staying = [replica for replica in self._alive(pools) if not replica.draining]
        if not staying or any(
            replica.readiness is Readiness.RUNNING or replica.replica_id in self._waking
            for replica in staying
        ):
            return []
        nearest = min(staying, key=lambda r: (r.pool.ready_s.get(r.readiness, 0.0), r.replica_id))
        self._waking[nearest.replica_id] = None
        return [Wake(nearest.replica_id)]

    def wake_all(self, lanes: Iterable[tuple[PoolId, ...]]) -> list[Wake]:
        """Wake what each lane of the line needs after a replica has left service."""
        return [action for pools in lanes for action in self.wake(pools)]

    def _alive(self, pools: Iterable[PoolId]) -> Iterator[Replica]:
        return (r for pool_id in pools for r in self._by_pool[pool_id] if r.alive)
