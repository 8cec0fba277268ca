"""Changes of a fleet file while it is served: what can be taken up is, the rest is named.

A file that is wrong changes nothing: what was read last stays good.
"""

import asyncio
import dataclasses
import logging
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from concertmaster.config import FleetFile, GatewaySection, PoolSection
from concertmaster.core.errors import InputError
from concertmaster.core.events import TimerFired
from concertmaster.core.fleet import NodeId, PoolId, ReplicaId
from concertmaster.gateway.admin import Outcome
from concertmaster.gateway.control import Engine
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.roster import Roster
from concertmaster.serving import Served, prepared

_log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often the file is looked at; it is read once it has not changed from one look to the next."""

LIVE = frozenset({"policy", "window_s", "max_body_mb", "health_interval_s", "hold_s"})
"""Settings of ``[gateway]`` that a gateway takes up while it serves."""

_MEMBERS = frozenset({"endpoints", "replicas", "least_replicas"})


class Reloader:
    """Follows a fleet file.

    Args:
        path: The file.
        changes: Settings that the command line gives, which a file cannot change.
        environ: What the file's references are looked up in.
        served: What is served by now.
        gateway: Serves it.
        traced: Whether a trace is written, which names one policy for the whole of it.
    """

    def __init__(
        self,
        path: Path,
        changes: Mapping[str, object | None],
        environ: Mapping[str, str],
        served: Served,
        gateway: Gateway,
        *,
        traced: bool = False,
    ) -> None:
        self._path = path
        self._changes = changes
        self._environ = environ
        self._served = served
        self._gateway = gateway
        self._traced = traced
        self._roster = Roster(gateway, dict(served.urls))

    def reload(self) -> Outcome:
        """Read the file and take up what can be; log a line for each key."""
        try:
            fresh = prepared(self._path, self._changes, self._environ)
        except InputError as error:
            _log.error("not taken up, what was read before stays: %s", error)
            self._gateway.metrics.reloads["refused"] += 1
            return Outcome(problem=str(error))
        changed = (*self._take_up_settings(fresh), *self._take_up_pools(fresh))
        kept = tuple(_restarts(self._served, fresh, traced=self._traced))
        for text in changed:
            _log.info("taken up: %s", text)
        for text in kept:
            _log.warning("needs a restart: %s", text)
        self._gateway.metrics.reloads["partly" if kept else "taken_up"] += 1
        return Outcome(changed, kept)

    async def watch(self) -> None:
        """Reload whenever the file has changed, for ever."""
        seen = before = self._stamp()
        while True:
            await asyncio.sleep(LOOK_S)
            now = self._stamp()
            if now == before and now not in (seen, None):
                seen = now
                self.reload()
            before = now

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    # Settings

    def _take_up_settings(self, fresh: Served) -> Iterator[str]:
        old, new = self._served.settings, fresh.settings
        keys = [key for key in _differing(old, new) if key in LIVE]
        if {"policy", "window_s"} & {*keys}:
            if _takes_over(self._served, fresh, traced=self._traced):
                self._gateway.scheduler.adopt(fresh.policy)
                self._gateway.feed(TimerFired())
                self._served = self._served._replace(policy=fresh.policy)
            else:
                keys = [key for key in keys if key not in {"policy", "window_s"}]
        told = {key: getattr(new, key) for key in keys}
        settings = replace(old, **told)
        self._served = self._served._replace(settings=settings)
        self._gateway.max_body_bytes = int(settings.max_body_mb * 1_000_000)
        self._gateway.service.adopt(
            health_interval_s=settings.health_interval_s, hold_s=settings.hold_s
        )
        for key, value in told.items():
            yield f"gateway.{key} = {value}"

    # Replicas

    def _take_up_pools(self, fresh: Served) -> Iterator[str]:
        known = {pool.name: pool for pool in self._served.file.pools}
        pools = {pool.name: pool for pool in fresh.file.pools}
        for name, section in pools.items():
            if name in known and _is_open(self._served.file, known[name], section):
                yield from self._take_up_members(fresh, section)
                known[name] = replace(
                    known[name], **{key: getattr(section, key) for key in _MEMBERS}
                )
        file = replace(self._served.file, pools=list(known.values()))
        self._served = self._served._replace(file=file)

    def _take_up_members(self, fresh: Served, section: PoolSection) -> Iterator[str]:
        """Let addresses that are new join, and remove those that are gone."""
        pool_id = PoolId(section.name)
        left = self._roster.serving(pool_id)
        joining = []
        for number, url in enumerate(section.endpoints):
            same = next((one for one, known in left.items() if known == url), None)
            if same is None:
                joining.append((ReplicaId(f"{section.name}-{number}"), url))
            else:
                del left[same]
        for planned, url in joining:
            replica_id = self._join(fresh, section, planned, url)
            yield f"{replica_id} at {url} joins"
        for replica_id, url in left.items():
            self._roster.remove(replica_id)
            yield f"{replica_id} at {url} is removed"

    def _join(self, fresh: Served, section: PoolSection, planned: ReplicaId, url: str) -> ReplicaId:
        pool, node, _ = fresh.fleet.replicas[planned]
        if not fresh.file.nodes:
            node = dataclasses.replace(node, node_id=NodeId(url))
        engine = Engine(url, pool.model.name, section.controlled_by)
        return self._roster.join(pool.pool_id, node, engine, fresh.peers[planned])


@asynccontextmanager
async def followed(reloader: Reloader) -> AsyncIterator[None]:
    """Reload when the file changes and at SIGHUP, until the block ends."""
    loop = asyncio.get_running_loop()
    watching = loop.create_task(reloader.watch())
    loop.add_signal_handler(signal.SIGHUP, reloader.reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def _is_open(file: FleetFile, old: PoolSection, new: PoolSection) -> bool:
    """Whether replicas of a pool may come and go: its engines run elsewhere, on nodes of theirs.

    How many there are is part of what the limits of a fleet were checked against.
    """
    alike = not set(_differing(old, new)) - _MEMBERS
    apart = not (new.command or new.nodes) and new.runs
    return alike and apart and file.scaling.gpus is None and old.least == new.least


def _takes_over(old: Served, new: Served, *, traced: bool) -> bool:
    return not traced and old.policy.bones == new.policy.bones


def _restarts(old: Served, new: Served, *, traced: bool) -> Iterator[str]:
    """Yield what differs from the file and stays as it is until a restart."""
    for key in _differing(old.settings, new.settings):
        why = ""
        if key in {"policy", "window_s"}:
            why = ", as a trace is written" if traced else ", as it scales or binds otherwise"
        yield f"gateway.{key}: {getattr(old.settings, key)!r} stays{why}"
    for key in ("name", "clusters", "nodes", "emulator", "scaling"):
        if getattr(old.file, key) != getattr(new.file, key):
            yield key
    known = {pool.name: pool for pool in old.file.pools}
    pools = {pool.name: pool for pool in new.file.pools}
    yield from (f"pools.{name}: it is new" for name in pools if name not in known)
    yield from (f"pools.{name}: it is gone" for name in known if name not in pools)
    for name in filter(known.__contains__, pools):
        for key in _differing(known[name], pools[name]):
            yield f"pools.{name}.{key}"


def _differing(old: msgspec.Struct, new: GatewaySection | PoolSection) -> list[str]:
    keys = old.__struct_fields__
    return [key for key in keys if getattr(old, key) != getattr(new, key)]
