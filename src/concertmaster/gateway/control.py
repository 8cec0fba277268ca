"""Bringing replicas into service and taking them out: the core's ``Wake`` and ``Demote``."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from concertmaster.core.events import Event, ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.engines.control import CONTROLS, ControlError, ControlKind, EngineControl

_log = logging.getLogger(__name__)

SLEEP_TIMEOUT_S = 60.0
LEAST_PATIENCE_S = 60.0
PATIENCE = 10.0
"""How many times what it should take a wake may take before it is given up."""

STAY_S = 5.0
"""How long it takes to say that an engine that sleeps cannot be moved further away."""

Feed = Callable[[Event], None]


class Standing(NamedTuple):
    """How a replica stands with the core.

    Attributes:
        readiness: Where its weights lie.
        ready_s: Seconds, of the wall's clock, until it could serve.
    """

    alive: bool
    readiness: Readiness
    ready_s: float


class Engine(NamedTuple):
    """A replica's engine, and how to control it."""

    url: str
    model: str
    kind: ControlKind = "vllm"

    @property
    def control(self) -> EngineControl:
        """The calls that its kind understands."""
        return CONTROLS[self.kind]


class FleetController(Protocol):
    """Starts and stops replicas; neither call waits."""

    def start(self, replica_id: ReplicaId) -> None:
        """Bring it into service; the core is told ``ReplicaReady`` or ``ReplicaDied``."""

    def stop(self, replica_id: ReplicaId, to: Readiness) -> None:
        """Move an idle one's weights there, or as near as its engine can.

        The core is told ``ReplicaDemoted``, or ``ReplicaReady`` if it serves on.
        """

    def answers(self, replica_id: ReplicaId) -> bool:
        """Whether it should answer when its health is asked."""

    def health_path(self, replica_id: ReplicaId) -> str:
        """Return what to ask for its health."""

    async def is_asleep(self, replica_id: ReplicaId) -> bool:
        """Whether it is there but would have to be woken to serve."""

    def problem(self, replica_id: ReplicaId) -> str:
        """Why it did not come up the last time; empty if it did."""

    async def open(self, running: Iterable[ReplicaId]) -> None:
        """Bring into service what runs at the start."""

    async def close(self) -> None:
        """Drop what is under way, and end what was started."""


class Errands:
    """At most one errand a replica at a time; a later one waits for the one before."""

    def __init__(self) -> None:
        self._tasks: dict[ReplicaId, asyncio.Task[None]] = {}

    def run(self, replica_id: ReplicaId, errand: Coroutine[Any, Any, None]) -> None:
        """Begin an errand, or line it up."""
        before = self._tasks.get(replica_id)
        task = asyncio.get_running_loop().create_task(_after(before, errand))
        self._tasks[replica_id] = task
        task.add_done_callback(lambda _: self._forget(replica_id, task))

    def _forget(self, replica_id: ReplicaId, task: asyncio.Task[None]) -> None:
        if self._tasks.get(replica_id) is task:
            del self._tasks[replica_id]

    async def cancel(self) -> None:
        """Drop all of them."""
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


class RemoteEngines:
    """Engines that somebody else runs: they load and unload over HTTP.

    Args:
        engines: Every replica's, and how to control it.
        feed: Tells the core.
        standing: How a replica stands with the core.
    """

    def __init__(
        self,
        engines: Mapping[ReplicaId, Engine],
        feed: Feed,
        standing: Callable[[ReplicaId], Standing],
    ) -> None:
        self._engines = engines
        self._feed = feed
        self._standing = standing
        self._errands = Errands()
        self._waking: set[ReplicaId] = set()
        self._stayed: set[ReplicaId] = set()
        self._problems: dict[ReplicaId, str] = {}

    def start(self, replica_id: ReplicaId) -> None:
        """Ask an engine to load its model, unless it has been asked."""
        if replica_id not in self._waking:
            self._waking.add(replica_id)
            self._errands.run(replica_id, self._wake(replica_id))

    def stop(self, replica_id: ReplicaId, to: Readiness) -> None:
        """Have an idle engine free its GPU; one that refuses stays as it is."""
        self._errands.run(replica_id, self._sleep(replica_id, to))

    def answers(self, replica_id: ReplicaId) -> bool:
        """Take it to answer, loaded or not."""
        return replica_id in self._engines

    def health_path(self, replica_id: ReplicaId) -> str:
        """Return what its kind of engine answers."""
        return self._engines[replica_id].control.health_path

    async def is_asleep(self, replica_id: ReplicaId) -> bool:
        """Ask it; one that cannot be asked is taken to be awake."""
        engine = self._engines[replica_id]
        try:
            return not await engine.control.resident(engine.url, engine.model)
        except OSError:
            return False

    def problem(self, replica_id: ReplicaId) -> str:
        """Return what its engine said, or did not say in time."""
        return self._problems.get(replica_id, "")

    async def open(self, running: Iterable[ReplicaId]) -> None:
        """Nothing to do: somebody else started them."""

    async def close(self) -> None:
        """Drop what is under way; engines stay as they are."""
        await self._errands.cancel()

    async def _wake(self, replica_id: ReplicaId) -> None:
        engine, (_, readiness, ready_s) = self._engines[replica_id], self._standing(replica_id)
        patience_s = max(LEAST_PATIENCE_S, PATIENCE * ready_s)
        try:
            problem = await _problem_of(
                engine.control.load(engine.url, engine.model, readiness), patience_s
            )
        finally:
            self._waking.discard(replica_id)
        if not problem:
            self._problems.pop(replica_id, None)
            self._feed(ReplicaReady(replica_id))
            return
        if problem != self._problems.get(replica_id):
            _log.warning("replica %s at %s did not wake: %s", replica_id, engine.url, problem)
        self._problems[replica_id] = problem
        self._feed(ReplicaDied(replica_id))

    async def _sleep(self, replica_id: ReplicaId, to: Readiness) -> None:
        engine, (_, readiness, _) = self._engines[replica_id], self._standing(replica_id)
        found = to

        async def unload() -> None:
            nonlocal found
            if readiness is not Readiness.RUNNING and engine.kind == "vllm":
                raise ControlError("a vLLM that sleeps goes no further away unless it is woken")
            found = await engine.control.unload(engine.url, engine.model, to)

        problem = await _problem_of(unload(), SLEEP_TIMEOUT_S)
        if not problem:
            self._feed(ReplicaDemoted(replica_id, found))
            return
        if replica_id not in self._stayed:
            self._stayed.add(replica_id)
            _log.warning("replica %s at %s cannot be stopped: %s", replica_id, engine.url, problem)
        if readiness is not Readiness.RUNNING:
            await asyncio.sleep(STAY_S)
            self._feed(ReplicaDemoted(replica_id, readiness))
        elif self._standing(replica_id).alive:
            self._feed(ReplicaReady(replica_id))


async def _problem_of(errand: Coroutine[Any, Any, None], limit_s: float) -> str:
    """Await an errand; return what went wrong, if anything."""
    try:
        async with asyncio.timeout(limit_s):
            await errand
    except TimeoutError:
        return f"not done within {limit_s:.0f} s"
    except OSError as error:
        return str(error) or type(error).__name__
    return ""
