"""Which engines are alive, asked now and then; and waking those that sleep."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.openai_http import fetch

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
WAKE_TIMEOUT_S = 600.0


class HealthWatch:
    """Probes ``/health`` of every engine and tells the core what changed.

    A dead connection is noticed at once by the call that meets it; the watch is what brings
    a replica back, and what finds one that died while idle.
    """

    def __init__(
        self,
        urls: Mapping[ReplicaId, str],
        feed: Callable[[Event], None],
        is_alive: Callable[[ReplicaId], bool],
        *,
        interval_s: float,
    ) -> None:
        self._urls = urls
        self._feed = feed
        self._is_alive = is_alive
        self._interval_s = interval_s
        self._waking: dict[asyncio.Task[None], None] = {}

    async def watch(self) -> None:
        """Probe for ever; cancel the task to stop."""
        while True:
            await asyncio.gather(*(self._probe(*entry) for entry in self._urls.items()))
            await asyncio.sleep(self._interval_s)

    async def _probe(self, replica_id: ReplicaId, url: str) -> None:
        try:
            status, _ = await fetch("GET", url, "/health", timeout_s=PROBE_TIMEOUT_S)
            problem = "" if status == 200 else f"GET /health answered {status}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        if problem and self._is_alive(replica_id):
            _log.warning("replica %s at %s is not serving: %s", replica_id, url, problem)
            self._feed(ReplicaDied(replica_id))
        elif not problem and not self._is_alive(replica_id):
            _log.warning("replica %s at %s serves again", replica_id, url)
            self._feed(ReplicaReady(replica_id))

    def wake(self, replica_id: ReplicaId) -> None:
        """Ask a sleeping engine to wake; the core is told when it is ready, or that it is not."""
        task = asyncio.get_running_loop().create_task(self._wake(replica_id))
        self._waking[task] = None
        task.add_done_callback(lambda done: self._waking.pop(done, None))

    async def _wake(self, replica_id: ReplicaId) -> None:
        url = self._urls[replica_id]
        try:
            status, _ = await fetch("POST", url, "/wake_up", timeout_s=WAKE_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            _log.warning("replica %s at %s did not wake: %s", replica_id, url, error)
            status = 503
        ready = status == 200
        self._feed(ReplicaReady(replica_id) if ready else ReplicaDied(replica_id))
