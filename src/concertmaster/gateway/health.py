"""Which engines are alive, asked now and then; putting them to sleep, and waking them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from concertmaster.core.events import Event, ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.engines.openai_http import fetch

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
MAX_SILENT_PROBES = 3
"""Probes without an answer that make an engine dead: a busy one may miss some."""

SLEEP_TIMEOUT_S = 60.0
WAKE_TIMEOUT_S = 600.0
WAKE_RETRY_S = 0.5


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
        self._waking: dict[ReplicaId, asyncio.Task[None]] = {}
        self._stopping: dict[ReplicaId, asyncio.Task[None]] = {}
        self._sleepless: set[ReplicaId] = set()
        self._silent_probes: Counter[ReplicaId] = Counter()

    async def watch(self) -> None:
        """Probe for ever; cancel the task to stop, wakes and stops under way too."""
        try:
            while True:
                await asyncio.gather(*(self._probe(*entry) for entry in self._urls.items()))
                await asyncio.sleep(self._interval_s)
        finally:
            for task in (*self._waking.values(), *self._stopping.values()):
                task.cancel()

    async def _probe(self, replica_id: ReplicaId, url: str) -> None:
        try:
            status, _ = await fetch("GET", url, "/health", timeout_s=PROBE_TIMEOUT_S)
            problem = "" if status == 200 else f"GET /health answered {status}"
        except TimeoutError:
            self._silent_probes[replica_id] += 1
            if self._silent_probes[replica_id] < MAX_SILENT_PROBES:
                return
            problem = f"GET /health got no answer {MAX_SILENT_PROBES} times"
        except OSError as error:
            problem = str(error)
        self._silent_probes[replica_id] = 0
        if problem and self._is_alive(replica_id):
            _log.warning("replica %s at %s is not serving: %s", replica_id, url, problem)
            self._feed(ReplicaDied(replica_id))
        elif not problem and not self._is_alive(replica_id):
            if await _is_asleep(url):
                self.wake(replica_id)
            else:
                _log.warning("replica %s at %s serves again", replica_id, url)
                self._feed(ReplicaReady(replica_id))

    def wake(self, replica_id: ReplicaId) -> None:
        """Ask a sleeping engine to wake; the core is told when it is ready, or that it is not."""
        if replica_id not in self._waking:
            task = asyncio.get_running_loop().create_task(self._wake(replica_id))
            self._waking[replica_id] = task
            task.add_done_callback(lambda _: self._waking.pop(replica_id))

    async def _wake(self, replica_id: ReplicaId) -> None:
        url = self._urls[replica_id]
        try:
            async with asyncio.timeout(WAKE_TIMEOUT_S):
                status = 503  # also what an engine says that is still falling asleep
                while status == 503:
                    status, _ = await fetch("POST", url, "/wake_up", timeout_s=WAKE_TIMEOUT_S)
                    await asyncio.sleep(WAKE_RETRY_S * (status == 503))
            problem = "" if status == 200 else f"POST /wake_up answered {status}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            _log.warning("replica %s at %s did not wake: %s", replica_id, url, problem)
        self._feed(ReplicaDied(replica_id) if problem else ReplicaReady(replica_id))

    def stop(self, replica_id: ReplicaId) -> None:
        """Put an idle engine to sleep; the core is told that it sleeps, or that it serves on."""
        task = asyncio.get_running_loop().create_task(self._stop(replica_id))
        self._stopping[replica_id] = task
        task.add_done_callback(lambda _: self._stopping.pop(replica_id))

    async def _stop(self, replica_id: ReplicaId) -> None:
        url = self._urls[replica_id]
        try:
            status, _ = await fetch("POST", url, "/sleep?level=1", timeout_s=SLEEP_TIMEOUT_S)
            problem = "" if status == 200 else f"POST /sleep answered {status}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        if problem and replica_id not in self._sleepless:
            self._sleepless.add(replica_id)
            _log.warning("replica %s at %s cannot be stopped: %s", replica_id, url, problem)
        if problem and self._is_alive(replica_id):
            self._feed(ReplicaReady(replica_id))
        elif not problem:
            self._feed(ReplicaDemoted(replica_id, Readiness.SLEEPING))


async def _is_asleep(url: str) -> bool:
    """Ask vLLM's way; an engine that does not know the question is awake."""
    try:
        status, body = await fetch("GET", url, "/is_sleeping", timeout_s=PROBE_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    return status == 200 and b"true" in body
