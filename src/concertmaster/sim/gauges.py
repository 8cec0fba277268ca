"""Integrals over a simulated run: memory promised and used, GPU time, weights woken."""

from collections.abc import Iterable, Mapping

from concertmaster.core.fleet import InFlight, Readiness, Replica, ReplicaId
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
        self._serving_s = {
            one.replica_id: 0.0 for one in self._replicas if one.readiness is Readiness.RUNNING
        }
        self._starting: set[ReplicaId] = set()
        self._sampled_s = 0.0
        self._paid_s = 0.0

    def sample(self, now_s: float) -> None:
        """Add the time since the last sample at what is held now."""
        reserved_gb = used_gb = 0.0
        span_s, totals = now_s - self._sampled_s, self.totals
        for replica in self._replicas:
            if replica.in_flight:
                pool = replica.pool
                block_gb = pool.block_tokens * pool.model.kv_bytes_per_token / GB
                replica_gb = replica.kv.reserved_blocks * block_gb
                reserved_gb += replica_gb
                used_gb += self._engines[replica.replica_id].kv_used_blocks * block_gb
                self._share_out(replica, replica_gb * span_s)
        self._sampled_s = now_s
        totals.kv_reserved_gb_s += reserved_gb * span_s
        totals.kv_used_gb_s += used_gb * span_s
        totals.kv_reserved_peak_gb = max(totals.kv_reserved_peak_gb, reserved_gb)
        totals.kv_samples.append((now_s, reserved_gb, used_gb))

    def _share_out(self, replica: Replica, gb_s: float) -> None:
        """Divide what is promised on a replica between classes, by the tokens of their calls."""
        calls = replica.in_flight.values()
        tokens = [_tokens(call) for call in calls]
        whole, by = sum(tokens), self.totals.kv_reserved_gb_s_by
        for call, share in zip(calls, tokens, strict=True):
            one = call.request.service_class
            by[one] = by.get(one, 0.0) + gb_s * share / whole

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
        if replica_id in self._starting:
            self._starting.discard(replica_id)
            self._serving_s[replica_id] = now_s
        else:
            self._end_service(now_s, replica_id)

    def _end_service(self, now_s: float, replica_id: ReplicaId) -> None:
        begun_s = self._serving_s.pop(replica_id, None)
        if begun_s is not None:
            self.totals.served_spans.append((replica_id, begun_s, now_s))

    def finish(self, now_s: float) -> None:
        """Close the integrals at the end of the run."""
        for replica_id in list(self._serving_s):
            self._end_service(now_s, replica_id)
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


def _tokens(call: InFlight) -> int:
    """Tokens that a call was promised, or holds by now if these are more."""
    prompt_tokens = call.request.prompt_tokens
    promised_tokens = call.promised_tokens or prompt_tokens + call.expected_tokens
    held_tokens = prompt_tokens + call.streamed_tokens
    return max(held_tokens, promised_tokens)
