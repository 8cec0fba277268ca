"""Which engines are alive, asked now and then."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.control import FleetController
from concertmaster.gateway.peers import VLLM, Peer

_log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
MOST_PAUSE = 32
"""Most intervals between two tries to wake an engine that did not."""

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
        peers: Mapping[ReplicaId, Peer],
        *,
        interval_s: float,
    ) -> None:
        self._urls = urls
        self._feed = feed
        self._is_alive = is_alive
        self._control = control
        self._peers = peers
        self.interval_s = interval_s
        self._silent_probes: Counter[ReplicaId] = Counter()
        self._pauses: dict[ReplicaId, int] = {}
        self._skipped: Counter[ReplicaId] = Counter()

    def pause_s(self, replica_id: ReplicaId) -> float:
        """Seconds of the wall's clock until a replica that is dead is looked at again, at most."""
        return self.interval_s * self._pauses.get(replica_id, 1)

    async def watch(self) -> None:
        """Probe for ever; cancel the task to stop."""
        while True:
            answering = [one for one in self._urls.items() if self._control.answers(one[0])]
            await asyncio.gather(*(self._probe(*entry) for entry in answering))
            await asyncio.sleep(self.interval_s)

    async def _probe(self, replica_id: ReplicaId, url: str) -> None:
        peer = self._peers.get(replica_id, VLLM)
        path = peer.dialect.health_path or self._control.health_path(replica_id)
        try:
            status, _ = await fetch(
                "GET", url, path, api_key=peer.api_key, timeout_s=PROBE_TIMEOUT_S
            )
            problem = "" if status == 200 else f"GET {path} answered {status}"
        except TimeoutError:
            self._silent_probes[replica_id] += 1
            if self._silent_probes[replica_id] < MAX_SILENT_PROBES:
                return
            problem = f"GET {path} got no answer {MAX_SILENT_PROBES} times"
        except OSError as error:
            problem = str(error)
        self._silent_probes[replica_id] = 0
        if replica_id not in self._urls or not self._control.answers(replica_id):
            return  # it was stopped or removed meanwhile
        if problem and self._is_alive(replica_id):
            _log.warning("replica %s at %s is not serving: %s", replica_id, url, problem)
            self._feed(ReplicaDied(replica_id))
        elif not problem and not self._is_alive(replica_id):
            await self._revive(replica_id, url)
        elif self._is_alive(replica_id):
            self._pauses.pop(replica_id, None)

    async def _revive(self, replica_id: ReplicaId, url: str) -> None:
        """Wake an engine that is there but sleeps, at longer and longer intervals if it fails."""
        if not await self._control.is_asleep(replica_id):
            _log.warning("replica %s at %s serves again", replica_id, url)
            self._feed(ReplicaReady(replica_id))
            return
        self._skipped[replica_id] += 1
        if self._skipped[replica_id] >= self._pauses.get(replica_id, 1):
            self._skipped[replica_id] = 0
            self._pauses[replica_id] = min(MOST_PAUSE, 2 * self._pauses.get(replica_id, 1))
            self._control.start(replica_id)
