"""What engines say of themselves: models, limits, load. Said loudly where it is not as expected."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from concertmaster.core.fleet import Replica, ReplicaId
from concertmaster.engines.dialects import Reading
from concertmaster.engines.discovery import contradiction, served_models
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.peers import VLLM, Peer

_log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
_NOTHING = Reading({}, ())


class EngineWatch:
    """Looks at every engine that serves: its models once it comes up, its figures ever after.

    Our own ledger of calls in flight decides; what an engine says shows where it and the ledger
    part, as they do when somebody else calls the same engine.

    Args:
        urls: Address of every replica.
        peers: What the engines are; vLLM those left out.
        replicas: The core's.
        answers: Whether a replica should answer now.
        interval_s: Between two looks.

    Attributes:
        readings: What the latest look at each engine showed.
    """

    def __init__(
        self,
        urls: Mapping[ReplicaId, str],
        peers: Mapping[ReplicaId, Peer],
        replicas: Mapping[ReplicaId, Replica],
        answers: Callable[[ReplicaId], bool],
        *,
        interval_s: float,
    ) -> None:
        self._urls = urls
        self._peers = peers
        self._replicas = replicas
        self._answers = answers
        self.interval_s = interval_s
        self._known: set[ReplicaId] = set()
        self._told: dict[ReplicaId, str] = {}
        self.readings: dict[ReplicaId, Reading] = {}

    async def watch(self) -> None:
        """Look for ever; cancel the task to stop."""
        while True:
            await asyncio.gather(*(self._look(replica_id) for replica_id in self._urls))
            await asyncio.sleep(self.interval_s)

    async def _look(self, replica_id: ReplicaId) -> None:
        if not (self._answers(replica_id) and self._replicas[replica_id].alive):
            self._known.discard(replica_id)
            self.readings.pop(replica_id, None)
            return
        try:
            if replica_id not in self._known:
                await self._discover(replica_id)
            await self._scrape(replica_id)
        except OSError:  # TimeoutError is one: whether it lives is the health watch's matter
            self.readings.pop(replica_id, None)

    async def _discover(self, replica_id: ReplicaId) -> None:
        pool = self._replicas[replica_id].pool
        status, body = await self._get(replica_id, "/v1/models")
        self._known.add(replica_id)
        try:
            served = served_models(body) if status == 200 else {}
        except ValueError as error:
            self._tell(replica_id, str(error))
            return
        if status == 200:
            self._tell(
                replica_id, contradiction(served, pool.model.name, pool.model.context_tokens)
            )

    async def _scrape(self, replica_id: ReplicaId) -> None:
        dialect = self._peers.get(replica_id, VLLM).dialect
        if not dialect.names:
            return
        status, body = await self._get(replica_id, "/metrics")
        if status != 200:
            self.readings[replica_id] = Reading({}, tuple(dialect.names))
            self._tell(
                replica_id, f"/metrics answered {status}; load it gets from others is unseen"
            )
            return
        reading = self.readings[replica_id] = dialect.read(body)
        if reading.missing:
            self._tell(replica_id, f"/metrics has {dialect.complaint(body, reading.missing)}")

    async def _get(self, replica_id: ReplicaId, path: str) -> tuple[int, bytes]:
        key = self._peers.get(replica_id, VLLM).api_key
        url = self._urls.get(replica_id)
        if url is None:
            raise ConnectionError(f"{replica_id} was removed")
        return await fetch("GET", url, path, api_key=key, timeout_s=TIMEOUT_S)

    def _tell(self, replica_id: ReplicaId, problem: str) -> None:
        """Log a problem once, until another takes its place."""
        if problem and self._told.get(replica_id) != problem:
            self._told[replica_id] = problem
            url = self._urls.get(replica_id, "?")
            _log.warning("engine of %s at %s: %s", replica_id, url, problem)

    def families(self) -> Iterator[Metric]:
        """Yield what a scrape of the gateway says of its engines."""
        requests = GaugeMetricFamily(
            "concertmaster_engine_requests",
            "Calls that the engine says it has.",
            labels=["pool", "replica", "state"],
        )
        others = {
            name: GaugeMetricFamily(f"concertmaster_{name}", text, labels=["pool", "replica"])
            for name, text in (
                ("engine_kv_ratio", "KV that the engine says is in use, of all."),
                ("engine_foreign_requests", "Calls on the engine that are not ours."),
                ("engine_missing_metrics", "Figures that the engine should give and does not."),
            )
        }
        for replica_id, replica in self._replicas.items():
            labels = [replica.pool.pool_id, replica_id]
            values, missing = self.readings.get(replica_id, _NOTHING)
            for state in ("running", "waiting"):
                if state in values:
                    requests.add_metric([*labels, state], values[state])
            if "kv_ratio" in values:
                others["engine_kv_ratio"].add_metric(labels, values["kv_ratio"])
            if "running" in values:
                seen = values["running"] + values.get("waiting", 0.0)
                foreign = max(0.0, seen - len(replica.in_flight))
                others["engine_foreign_requests"].add_metric(labels, foreign)
            others["engine_missing_metrics"].add_metric(labels, len(missing))
        yield requests
        yield from others.values()
