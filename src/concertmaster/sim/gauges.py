"""Integrals over a simulated run: memory promised and used, GPU time, weights woken."""

from collections.abc import Iterable, Mapping

from concertmaster.core.fleet import Readiness, Replica, ReplicaId
from concertmaster.physics.batching import BatchingEngine
from concertmaster.workload.records import Gauges

GB = 1e9


class FleetGauges:
    """Samples ledgers and engines; each sample stands for the time since the one before."""

    def __init__(
        self, replicas: Iterable[Replica], engines: Mapping[ReplicaId, BatchingEngine]
    ) -> None:
        self.totals = Gauges()
        self._replicas = list(replicas)
        self._engines = engines
        self._starting: set[ReplicaId] = set()
        self._sampled_s = 0.0
        self._paid_s = 0.0

    def sample(self, now_s: float) -> None:
        """Add the time since the last sample at what is held now."""
        reserved_gb = used_gb = 0.0
        for replica in self._replicas:
            if replica.in_flight:
                pool = replica.pool
                block_gb = pool.block_tokens * pool.model.kv_bytes_per_token / GB
                reserved_gb += replica.kv.reserved_blocks * block_gb
                used_gb += self._engines[replica.replica_id].kv_used_blocks * block_gb
        span_s, totals = now_s - self._sampled_s, self.totals
        self._sampled_s = now_s
        totals.kv_reserved_gb_s += reserved_gb * span_s
        totals.kv_used_gb_s += used_gb * span_s
        totals.kv_reserved_peak_gb = max(totals.kv_reserved_peak_gb, reserved_gb)

    def skip_to(self, now_s: float) -> None:
        """Note that nothing was held since the last sample."""
        self._sampled_s = now_s

    def note_wake(self, now_s: float, replica: Replica) -> None:
        """Count a replica that is made ready; its GPUs count from here on."""
        ready_s = replica.pool.ready_s.get(replica.readiness, 0.0)
        self.pay(now_s)
        self._starting.add(replica.replica_id)
        if replica.readiness is Readiness.SLEEPING:
            self.totals.wakes += 1
        else:
            self.totals.cold_starts += 1
        self.totals.ready_wait_s += ready_s
        self.totals.replica_starts += 1

    def note_stop(self) -> None:
        """Count a replica that is stopped."""
        self.totals.replica_stops += 1

    def note_change(self, now_s: float, replica_id: ReplicaId) -> None:
        """Pay up to an event of a replica: it is ready, or gone; call it before the event."""
        self.pay(now_s)
        self._starting.discard(replica_id)

    def finish(self, now_s: float) -> None:
        """Close the integrals at the end of the run."""
        self.totals.preemptions = sum(engine.preemptions for engine in self._engines.values())
        self.pay(now_s)

    def pay(self, now_s: float) -> None:
        """Add GPU time up to now; call it before the set of busy replicas changes."""
        gpus = sum(
            replica.pool.tensor_parallel
            for replica in self._replicas
            if replica.alive
            and (replica.readiness is Readiness.RUNNING or replica.replica_id in self._starting)
        )
        self.totals.gpu_s += gpus * (now_s - self._paid_s)
        self._paid_s = now_s
