"""Engines that are processes of this machine, started and ended by the gateway."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from concertmaster.core.events import ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.engines.control import NEAR
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.control import (
    Engine,
    Errands,
    Feed,
    FleetController,
    RemoteEngines,
    Standing,
)

_log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
START_POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0
TERM_S = 10.0
"""What a process gets to end by itself before it is killed."""

RESTART_S = 1.0
"""How long after a process has ended unasked it is started again."""


class EngineProcesses:
    """Engines that are processes of this machine; those without a command are left to others.

    One that ends unasked is started again; one that does not come up is dead. One of a kind
    that can sleep is left to the others between its start and its end.

    Args:
        commands: What to run for a replica, program first.
        urls: Where each will listen.
        feed: Tells the core.
        others: Controls the rest.
        sleepers: Those that sleep while their process runs.
    """

    def __init__(
        self,
        commands: Mapping[ReplicaId, Sequence[str]],
        urls: Mapping[ReplicaId, str],
        feed: Feed,
        others: FleetController,
        *,
        sleepers: Collection[ReplicaId] = (),
    ) -> None:
        self._commands = commands
        self._urls = urls
        self._sleepers = sleepers
        self._problems: dict[ReplicaId, str] = {}
        self._feed = feed
        self._others = others
        self._errands = Errands()
        self._processes: dict[ReplicaId, asyncio.subprocess.Process] = {}
        self._watches: dict[ReplicaId, asyncio.Task[None]] = {}

    def start(self, replica_id: ReplicaId) -> None:
        """Run its command, and wait until it is healthy."""
        asleep = replica_id in self._sleepers and replica_id in self._watches
        if asleep or replica_id not in self._commands:
            self._others.start(replica_id)
        else:
            self._errands.run(replica_id, self._start(replica_id))

    def stop(self, replica_id: ReplicaId, to: Readiness) -> None:
        """End its process, unless it can sleep and shall stay near."""
        sleeps = replica_id in self._sleepers and to in NEAR
        if sleeps or replica_id not in self._commands:
            self._others.stop(replica_id, to)
        else:
            self._errands.run(replica_id, self._stop(replica_id))

    def answers(self, replica_id: ReplicaId) -> bool:
        """Only a process that has come up does."""
        if replica_id in self._commands:
            return replica_id in self._watches and replica_id in self._processes
        return self._others.answers(replica_id)

    def health_path(self, replica_id: ReplicaId) -> str:
        """Return what its kind of engine answers."""
        return self._others.health_path(replica_id)

    async def is_asleep(self, replica_id: ReplicaId) -> bool:
        """Ask those that can sleep; a process that answers is awake otherwise."""
        if replica_id in self._commands and replica_id not in self._sleepers:
            return False
        return await self._others.is_asleep(replica_id)

    def problem(self, replica_id: ReplicaId) -> str:
        """Why its process did not come up, or its engine did not wake."""
        return self._problems.get(replica_id, "") or self._others.problem(replica_id)

    async def open(self, running: Iterable[ReplicaId]) -> None:
        """Run the commands of what runs at the start; return once all are healthy or dead."""
        mine = [replica_id for replica_id in running if replica_id in self._commands]
        problems = await asyncio.gather(*(self._bring_up(one) for one in mine))
        for replica_id, problem in zip(mine, problems, strict=True):
            if problem:
                self._give_up(replica_id, problem)

    async def close(self) -> None:
        """End all processes."""
        await asyncio.gather(self._errands.cancel(), self._others.close())
        mine = {**self._processes, **self._watches}
        await asyncio.gather(*(self._end(replica_id) for replica_id in mine))

    async def _start(self, replica_id: ReplicaId) -> None:
        problem = await self._bring_up(replica_id)
        if problem:
            self._give_up(replica_id, problem)
        else:
            self._problems.pop(replica_id, None)
            self._feed(ReplicaReady(replica_id))

    def _give_up(self, replica_id: ReplicaId, problem: str) -> None:
        self._problems[replica_id] = problem
        _log.warning("replica %s did not start: %s", replica_id, problem)
        self._feed(ReplicaDied(replica_id))

    async def _bring_up(self, replica_id: ReplicaId) -> str:
        """Run the command until it is healthy; return what went wrong, if anything."""
        if replica_id in self._processes:
            return ""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._commands[replica_id],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        except OSError as error:
            return str(error)
        self._processes[replica_id] = process
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await _come_up(process, self._urls[replica_id])
        except TimeoutError:
            await self._end(replica_id)
            return f"not healthy within {START_TIMEOUT_S:.0f} s"
        if process.returncode is not None:
            del self._processes[replica_id]
            return f"its process ended with {process.returncode} before it was healthy"
        watch = asyncio.get_running_loop().create_task(self._watch(replica_id, process))
        self._watches[replica_id] = watch
        return ""

    async def _watch(self, replica_id: ReplicaId, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        del self._processes[replica_id]
        _log.warning("replica %s: its process ended with %d, starting it again", replica_id, code)
        self._feed(ReplicaDied(replica_id))
        await asyncio.sleep(RESTART_S)
        del self._watches[replica_id]
        self.start(replica_id)

    async def _stop(self, replica_id: ReplicaId) -> None:
        await self._end(replica_id)
        self._feed(ReplicaDemoted(replica_id, Readiness.DISK))

    async def _end(self, replica_id: ReplicaId) -> None:
        """Ask a process to end, and make it if it does not."""
        watch = self._watches.pop(replica_id, None)
        if watch is not None:
            watch.cancel()
        process = self._processes.get(replica_id)
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(TERM_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        del self._processes[replica_id]


async def _come_up(process: asyncio.subprocess.Process, url: str) -> None:
    """Wait until a process answers that it is healthy, or has ended."""
    while process.returncode is None and not await _is_healthy(url):  # noqa: ASYNC110  # polled over HTTP
        await asyncio.sleep(START_POLL_S)


async def _is_healthy(url: str) -> bool:
    try:
        status, _ = await fetch("GET", url, "/health", timeout_s=PROBE_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    return status == 200


def controller(
    engines: Mapping[ReplicaId, Engine],
    commands: Mapping[ReplicaId, Sequence[str]],
    feed: Feed,
    standing: Callable[[ReplicaId], Standing],
) -> FleetController:
    """Return what controls a fleet: processes where there is a command, HTTP for the rest."""
    urls = {replica_id: engine.url for replica_id, engine in engines.items()}
    sleepers = [one for one in commands if engines[one].kind == "vllm"]
    remote = RemoteEngines(engines, feed, standing)
    return EngineProcesses(commands, urls, feed, remote, sleepers=sleepers)
