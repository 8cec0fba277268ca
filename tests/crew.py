"""Workers and the scheduler that they share, all in one event loop; each has its own sockets."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders import a_fleet, a_pool
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.emulator_api import serve as serve_emulator
from concertmaster.gateway.workers.carrier import Carrier
from concertmaster.gateway.workers.hub import Hub
from concertmaster.gateway.workers.overseer import reserved
from concertmaster.gateway.workers.worker import Worker
from concertmaster.sim.engines import engine_settings
from gateway_rig import PATIENCE_S, Rig, Script, Upstream, Wire, a_rig, says_hello, until


@dataclass
class Crew:
    """A scheduler, and its workers on one port."""

    rig: Rig
    hub: Hub
    workers: list[Worker]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def carrier(self, number: int) -> Carrier:
        carrier = self.workers[number].carrier
        assert carrier is not None
        return carrier

    @property
    def connections(self) -> int:
        return sum(len(self.carrier(one).agents) for one in range(len(self.workers)))

    async def wire(self, number: int) -> Wire:
        """Connect until it is this worker that has accepted."""
        for _ in range(100):
            known, before = set(self.carrier(number).agents), self.connections
            wire = await self.rig.wire()
            while self.connections == before:  # noqa: ASYNC110  # a turn or two
                await asyncio.sleep(0)
            if set(self.carrier(number).agents) - known:
                return wire
        raise AssertionError(f"worker {number} never accepted")

    def lose_scheduler(self) -> None:
        """Cut the lines, as if the scheduler's process had been killed."""
        for line in list(self.hub.lines.values()):
            assert line._wire._transport is not None
            line._wire._transport.abort()

    async def idle(self) -> None:
        """Wait until nothing is open anywhere, and check that the ledgers agree."""
        await self.rig.idle()
        await until(lambda: not any(line._calls for line in self.hub.lines.values()), "lines")
        carriers = [self.carrier(number) for number in range(len(self.workers))]
        await until(lambda: not any(one.open_calls for one in carriers), "carriers")
        for carrier in carriers:
            assert (len(carrier._asking), len(carrier._orphans)) == (0, 0)


@asynccontextmanager
async def a_crew(
    urls: dict[str, str],
    *,
    workers: int = 2,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[Crew]:
    async with AsyncExitStack() as stack:
        held = stack.enter_context(reserved("127.0.0.1", 0))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = Hub(folder, held.getsockname()[1])
        rig = await stack.enter_async_context(a_rig(urls, hub=hub, **settings))
        crew = Crew(rig, hub, [Worker(folder, number) for number in range(workers)])
        stopped, tasks = asyncio.Event(), []
        for worker in crew.workers:
            tasks.append(asyncio.create_task(worker.keep_in_touch()))
            assert await worker.has_rules(stopped)
            ready = asyncio.Event()
            crew.tasks.append(asyncio.create_task(worker.serve(stopped, ready.set)))
            await ready.wait()
        try:
            yield crew
        finally:
            for wire in rig.wires:
                await wire.close()
            stopped.set()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*crew.tasks)
            for task in tasks:
                task.cancel()


@asynccontextmanager
async def over_upstreams(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[Crew, Any]]:  # noqa: ANN401
    async with AsyncExitStack() as stack:
        upstreams = [
            await stack.enter_async_context(Upstream(script)) for script in scripts or (says_hello,)
        ]
        urls = {f"p-{i}": one.url for i, one in enumerate(upstreams)}
        crew = await stack.enter_async_context(a_crew(urls, **settings))
        yield crew, upstreams[0] if len(upstreams) == 1 else upstreams


@asynccontextmanager
async def over_engines(replicas: int = 2, *, speedup: float = 20.0) -> AsyncIterator[Crew]:
    fleet = a_fleet(a_pool(max_sequences=4), replicas=replicas)
    async with AsyncExitStack() as stack:
        urls: dict[str, str] = {}
        for replica_id, (pool, _, _) in fleet.replicas.items():
            emulator = Emulator(
                model_name=pool.model.name,
                curve=pool.curve,
                settings=engine_settings(pool),
                speedup=speedup,
            )
            server = await serve_emulator(emulator, "127.0.0.1", 0)
            await stack.enter_async_context(server)
            urls[replica_id] = f"http://127.0.0.1:{server.port}"
        yield await stack.enter_async_context(a_crew(urls, fleet=fleet, speedup=speedup))
