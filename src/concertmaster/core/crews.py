"""The crews of all pools, each looked at again only once something about it has changed."""

from collections.abc import Mapping, Sequence

from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.sketch import Sketch
from concertmaster.core.wait import Crew, crew_of, first_end
from concertmaster.core.window import Window


class Crews:
    """What does not depend on the call that asks: who serves, how fast, who ends first.

    Args:
        by_pool: Replicas of each pool, whatever their state.
        running: Calls that were handed out, with their replica.
        window: Counts what changes about each pool.
        window_s: Prefill that a replica may have been handed ahead of time; infinite if no
            prefill closes one.
    """

    def __init__(
        self,
        by_pool: Mapping[PoolId, Sequence[Replica]],
        running: Mapping[RequestId, tuple[Waiting, Replica]],
        window: Window,
        window_s: float,
    ) -> None:
        self._by_pool = by_pool
        self._running = running
        self._window = window
        self._window_s = window_s
        self._crews: dict[PoolId, tuple[int, Crew | None]] = {}
        self._firsts: dict[PoolId, tuple[int, Sketch]] = {}

    def serving(self, pool_id: PoolId) -> list[Replica]:
        """Replicas that are alive, ready and not on their way out."""
        return [
            replica
            for replica in self._by_pool[pool_id]
            if replica.readiness is Readiness.RUNNING and replica.alive and not replica.draining
        ]

    def crew(self, now_s: float, pool: Pool) -> Crew | None:
        """Return the replicas that serve as one body; ``None`` if none does."""
        changes = self._window.changes[pool.pool_id]
        kept = self._crews.get(pool.pool_id)
        if kept is None or kept[0] != changes:
            kept = self._crews[pool.pool_id] = (changes, self._crew(now_s, pool))
        return kept[1]

    def first_end(self, crew: Crew) -> Sketch:
        """Return the seconds until the first of a pool's running calls ends."""
        pool_id = crew.pool.pool_id
        changes, kept = self._window.changes[pool_id], self._firsts.get(pool_id)
        if kept is None or kept[0] != changes:
            kept = self._firsts[pool_id] = (changes, first_end(crew, self._running))
        return kept[1]

    def tokens_per_s(self, now_s: float, pool_id: PoolId) -> float:
        """Return what a pool works off; 0 if no replica of it serves."""
        replicas = self._by_pool[pool_id]
        crew = self.crew(now_s, replicas[0].pool) if replicas else None
        return crew.tokens_per_s if crew else 0.0

    def model_tokens_per_s(self, now_s: float, model: ModelName) -> float:
        """Return what all pools of a model work off."""
        pools = (replicas[0].pool for replicas in self._by_pool.values() if replicas)
        return sum(
            self.tokens_per_s(now_s, pool.pool_id) for pool in pools if pool.model.name == model
        )

    def _crew(self, now_s: float, pool: Pool) -> Crew | None:
        replicas = self.serving(pool.pool_id)
        return crew_of(pool, replicas, now_s, self._window_s) if replicas else None

    def validate(self, now_s: float) -> None:
        """Check that what is kept is what a fresh look finds."""
        for pool_id, (changes, crew) in self._crews.items():
            if changes == self._window.changes[pool_id]:
                assert crew == self._crew(now_s, self._by_pool[pool_id][0].pool), "a stale crew"
        for pool_id, (changes, sketch) in self._firsts.items():
            if changes == self._window.changes[pool_id]:
                crew = self.crew(now_s, self._by_pool[pool_id][0].pool)
                assert crew is not None, "an end without a crew"
                assert sketch == first_end(crew, self._running), "a stale first end"
