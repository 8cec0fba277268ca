"""Which engines are alive, asked now and then."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.control import FleetController

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
MAX_SILENT_PROBES = 3
"""Probes without an answer that make an engine dead: a busy one may miss some."""


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
        control: FleetController,
        *,
        interval_s: float,
    ) -> None:
        self._urls = urls
        self._feed = feed
        self._is_alive = is_alive
        self._control = control
        self._interval_s = interval_s
        self._silent_probes: Counter[ReplicaId] = Counter()

    async def watch(self) -> None:
        """Probe for ever; cancel the task to stop."""
        while True:
            answering = [one for one in self._urls.items() if self._control.answers(one[0])]
            await asyncio.gather(*(self._probe(*entry) for entry in answering))
            await asyncio.sleep(self._interval_s)

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
        if not self._control.answers(replica_id):
            return  # it was stopped meanwhile
        if problem and self._is_alive(replica_id):
            _log.warning("replica %s at %s is not serving: %s", replica_id, url, problem)
            self._feed(ReplicaDied(replica_id))
        elif not problem and not self._is_alive(replica_id):
            if await _is_asleep(url):
                self._control.start(replica_id)
            else:
                _log.warning("replica %s at %s serves again", replica_id, url)
                self._feed(ReplicaReady(replica_id))


async def _is_asleep(url: str) -> bool:
    """Ask vLLM's way; an engine that does not know the question is awake."""
    try:
        status, body = await fetch("GET", url, "/is_sleeping", timeout_s=PROBE_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    return status == 200 and b"true" in body
