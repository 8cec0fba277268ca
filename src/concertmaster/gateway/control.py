"""Bringing replicas into service and taking them out: the core's ``Wake`` and ``Demote``.

Engines that run all the time are put to sleep and woken over HTTP; those that have a command
are processes of this machine, started and ended with it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol

from concertmaster.core.events import Event, ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.engines.openai_http import fetch

_log = logging.getLogger(__name__)

SLEEP_TIMEOUT_S = 60.0
WAKE_TIMEOUT_S = 600.0
WAKE_RETRY_S = 0.5

START_TIMEOUT_S = 600.0
START_POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0
TERM_S = 10.0
"""What a process gets to end by itself before it is killed."""

RESTART_S = 1.0
"""How long after a process has ended unasked it is started again."""

Feed = Callable[[Event], None]


class FleetController(Protocol):
    """Starts and stops replicas; neither call waits."""

    def start(self, replica_id: ReplicaId) -> None:
        """Bring it into service; the core is told ``ReplicaReady`` or ``ReplicaDied``."""

    def stop(self, replica_id: ReplicaId) -> None:
        """Take an idle one out; the core is told ``ReplicaDemoted``, or ``ReplicaReady`` if not."""

    def answers(self, replica_id: ReplicaId) -> bool:
        """Whether it should answer when its health is asked."""

    async def open(self, running: Iterable[ReplicaId]) -> None:
        """Bring into service what runs at the start."""

    async def close(self) -> None:
        """Drop what is under way, and end what was started."""


class _Errands:
    """At most one errand a replica at a time; a later one waits for the one before."""

    def __init__(self) -> None:
        self._tasks: dict[ReplicaId, asyncio.Task[None]] = {}

    def run(self, replica_id: ReplicaId, errand: Coroutine[Any, Any, None]) -> None:
        before = self._tasks.get(replica_id)
        task = asyncio.get_running_loop().create_task(_after(before, errand))
        self._tasks[replica_id] = task
        task.add_done_callback(lambda _: self._forget(replica_id, task))

    def _forget(self, replica_id: ReplicaId, task: asyncio.Task[None]) -> None:
        if self._tasks.get(replica_id) is task:
            del self._tasks[replica_id]

    async def cancel(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _after(before: asyncio.Task[None] | None, errand: Coroutine[Any, Any, None]) -> None:
    try:
        if before is not None:
            await asyncio.wait((before,))
        await errand
    finally:
        errand.close()


class SleepingEngines:
    """Engines that somebody else runs: they sleep and wake over HTTP, as vLLM does.

    Args:
        urls: Address of every replica.
        feed: Tells the core.
        is_alive: Whether the core takes a replica to be alive.
    """

    def __init__(
        self, urls: Mapping[ReplicaId, str], feed: Feed, is_alive: Callable[[ReplicaId], bool]
    ) -> None:
        self._urls = urls
        self._feed = feed
        self._is_alive = is_alive
        self._errands = _Errands()
        self._waking: set[ReplicaId] = set()
        self._sleepless: set[ReplicaId] = set()

    def start(self, replica_id: ReplicaId) -> None:
        """Ask a sleeping engine to wake, unless it has been asked."""
        if replica_id not in self._waking:
            self._waking.add(replica_id)
            self._errands.run(replica_id, self._wake(replica_id))

    def stop(self, replica_id: ReplicaId) -> None:
        """Put an idle engine to sleep; one that refuses serves on."""
        self._errands.run(replica_id, self._sleep(replica_id))

    def answers(self, replica_id: ReplicaId) -> bool:
        """Asleep or not, it answers."""
        return replica_id in self._urls

    async def open(self, running: Iterable[ReplicaId]) -> None:
        """Nothing to do: somebody else started them."""

    async def close(self) -> None:
        """Drop what is under way; engines stay as they are."""
        await self._errands.cancel()

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
        finally:
            self._waking.discard(replica_id)
        if problem:
            _log.warning("replica %s at %s did not wake: %s", replica_id, url, problem)
        self._feed(ReplicaDied(replica_id) if problem else ReplicaReady(replica_id))

    async def _sleep(self, replica_id: ReplicaId) -> None:
        url = self._urls[replica_id]
        try:
            status, _ = await fetch("POST", url, "/sleep?level=1", timeout_s=SLEEP_TIMEOUT_S)
            problem = "" if status == 200 else f"POST /sleep answered {status}"
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        if problem and replica_id not in self._sleepless:
            self._sleepless.add(replica_id)
            _log.warning("replica %s at %s cannot be stopped: %s", replica_id, url, problem)
        if not problem:
            self._feed(ReplicaDemoted(replica_id, Readiness.SLEEPING))
        elif self._is_alive(replica_id):
            self._feed(ReplicaReady(replica_id))


class EngineProcesses:
    """Engines that are processes of this machine; those without a command are left to others.

    One that ends unasked is started again; one that does not come up is dead.

    Args:
        commands: What to run for a replica, program first.
        urls: Where each will listen.
        feed: Tells the core.
        others: Controls the rest.
    """

    def __init__(
        self,
        commands: Mapping[ReplicaId, Sequence[str]],
        urls: Mapping[ReplicaId, str],
        feed: Feed,
        others: FleetController,
    ) -> None:
        self._commands = commands
        self._urls = urls
        self._feed = feed
        self._others = others
        self._errands = _Errands()
        self._processes: dict[ReplicaId, asyncio.subprocess.Process] = {}
        self._watches: dict[ReplicaId, asyncio.Task[None]] = {}

    def start(self, replica_id: ReplicaId) -> None:
        """Run its command, and wait until it is healthy."""
        if replica_id in self._commands:
            self._errands.run(replica_id, self._start(replica_id))
        else:
            self._others.start(replica_id)

    def stop(self, replica_id: ReplicaId) -> None:
        """End its process."""
        if replica_id in self._commands:
            self._errands.run(replica_id, self._stop(replica_id))
        else:
            self._others.stop(replica_id)

    def answers(self, replica_id: ReplicaId) -> bool:
        """Only a process that has come up does."""
        if replica_id in self._commands:
            return replica_id in self._watches and replica_id in self._processes
        return self._others.answers(replica_id)

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
            self._feed(ReplicaReady(replica_id))

    def _give_up(self, replica_id: ReplicaId, problem: str) -> None:
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
