"""Which replicas have room right now.

Late binding: a call waits in the line until a replica has room, so that the choice of
replica and the order of calls use what is known at the last moment. Room is counted in KV
blocks, in sequences the engine can decode, and in prefill handed over but not yet done
(tokens, turned into seconds by the rate curve): a request count would not tell a 100-token
prompt from a 100,000-token one.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica, ReplicaId
from concertmaster.core.policy import Binding, Filter
from concertmaster.core.queue import Waiting


class Window:
    """The open replicas of every pool.

    Args:
        replicas: All there are.
        window_s: Prefill that one may have been handed ahead of time.
        filters: Which of the open ones a call may go to.
        binds: "early" leaves every replica that serves open, however much it has been handed.

    Attributes:
        changes: How often anything about the replicas of a pool has changed.
    """

    def __init__(
        self,
        replicas: Iterable[Replica],
        window_s: float,
        filters: Sequence[Filter] = (),
        binds: Binding = "late",
    ) -> None:
        self._early = binds == "early"
        self._window_s = window_s
        self._filters = filters
        self._open: dict[PoolId, dict[ReplicaId, Replica]] = {}
        self.changes: Counter[PoolId] = Counter()
        self._reopening: list[tuple[float, ReplicaId, Replica]] = []
        for replica in replicas:
            self._open.setdefault(replica.pool.pool_id, {})
            self.update(0.0, replica)

    def adopt(
        self,
        now_s: float,
        replicas: Iterable[Replica],
        window_s: float,
        filters: Sequence[Filter],
    ) -> None:
        """Go by other settings from here on."""
        self._window_s = window_s
        self._filters = filters
        for replica in replicas:
            self.update(now_s, replica)

    def open_replicas(self, pool_id: PoolId) -> Collection[Replica]:
        """Replicas of a pool that can take one more call now, if its KV fits."""
        return self._open[pool_id].values()

    def room(self, call: Waiting, pool: Pool) -> Collection[Replica]:
        """Open replicas of a pool that every filter keeps for the call."""
        room = self.open_replicas(pool.pool_id)
        for one in self._filters:
            room = one.keep(call, pool, room)
        return room

    def update(self, now_s: float, replica: Replica) -> None:
        """Look at a replica again after anything about it has changed."""
        in_pool = self._open[replica.pool.pool_id]
        self.note(replica)
        serving = replica.readiness is Readiness.RUNNING and replica.alive and not replica.draining
        if replica.most_requests is not None:
            serving = serving and len(replica.in_flight) < replica.most_requests
        if serving and self._early:
            in_pool[replica.replica_id] = replica
            return
        if serving and len(replica.in_flight) < replica.pool.max_sequences:
            reopens_s = replica.prefill_clear_s - self._window_s
            if reopens_s <= now_s:
                in_pool[replica.replica_id] = replica
                return
            heapq.heappush(self._reopening, (reopens_s, replica.replica_id, replica))
        in_pool.pop(replica.replica_id, None)

    def forget(self, replica: Replica) -> None:
        """Drop what is planned for a replica whose name another takes."""
        self._open[replica.pool.pool_id].pop(replica.replica_id, None)
        self._reopening = [entry for entry in self._reopening if entry[2] is not replica]
        heapq.heapify(self._reopening)

    def note(self, replica: Replica) -> None:
        """Take in a change that neither opens a replica nor closes it: tokens seen, its pace."""
        self.changes[replica.pool.pool_id] += 1

    def reopen(self, now_s: float) -> None:
        """Open the replicas whose prefill is done by now."""
        while self._reopening and self._reopening[0][0] <= now_s:
            self.update(now_s, heapq.heappop(self._reopening)[2])

    def next_reopen_s(self) -> float | None:
        """When the next replica may open by the passing of time alone."""
        return self._reopening[0][0] if self._reopening else None
