"""Starts and stops a gateway on a port."""

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from concertmaster.config import FleetFile, GatewaySection
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.control import ControlKind
from concertmaster.gateway.agent import AgentConnection, Judge, Patience
from concertmaster.gateway.app import SideRoutes
from concertmaster.gateway.asgi import SideDoor
from concertmaster.gateway.driver import Gateway, Observer
from concertmaster.gateway.keyring import KeyCheck, Keyring
from concertmaster.gateway.limits import limits_of
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.reach import check_reach, open_keys, tls_of
from concertmaster.predictors.interface import Predictor

_BACKLOG = 1024


@asynccontextmanager
async def running_gateway(
    scheduler: Scheduler,
    predictor: Predictor,
    urls: Mapping[ReplicaId, str],
    settings: GatewaySection,
    *,
    speedup: float = 1.0,
    observe: Observer | None = None,
    drain_s: float = 30.0,
    commands: Mapping[ReplicaId, Sequence[str]] | None = None,
    controls: Mapping[ReplicaId, ControlKind] | None = None,
    peers: Mapping[ReplicaId, Peer] | None = None,
) -> AsyncIterator[tuple[Gateway, int]]:
    """Serve until the block ends; yields the gateway and the port it listens on.

    Raises:
        OSError: The port is taken or the host is not ours.
        InputError: Strangers could reach it without keys, or its keys or TLS files are amiss.
    """
    check_reach("", settings)
    tls = tls_of("", settings)
    routes = SideRoutes()
    side_door = SideDoor(routes.app())
    gateway = Gateway(
        scheduler,
        predictor,
        urls,
        clock=scaled_clock(speedup),
        speedup=speedup,
        side_door=side_door,
        observe=observe,
        max_body_bytes=int(settings.max_body_mb * 1_000_000),
        limits=limits_of(settings),
        rng=random.Random(settings.seed),
        health_interval_s=settings.health_interval_s,
        commands=commands or {},
        controls=controls or {},
        peers=peers or {},
        hold_s=settings.hold_s,
        patience=Patience(settings.head_timeout_s, settings.body_timeout_s),
    )
    routes.gateway = gateway
    async with AsyncExitStack() as stack:
        try:
            judge = await stack.enter_async_context(_guarded(gateway, settings.keys))
            await gateway.open()
            server = await _listen(gateway, judge, settings, tls)
        except BaseException:
            await gateway.stop(drain_s=0.0)
            raise
        gateway.start()
        try:
            yield gateway, server.sockets[0].getsockname()[1]
        finally:
            await gateway.stop(drain_s=drain_s)  # still listening: a load balancer asks /readyz
            server.close()
            await side_door.close()
            await server.wait_closed()


async def _listen(
    gateway: Gateway, judge: Judge | None, settings: GatewaySection, tls: ssl.SSLContext | None
) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(
        lambda: AgentConnection(gateway, judge),
        settings.host,
        settings.port,
        backlog=_BACKLOG,
        ssl=tls,
    )


@asynccontextmanager
async def _guarded(gateway: Gateway, keys: str) -> AsyncIterator[Judge | None]:
    """Judge who comes in if there are keys, and follow their file."""
    if not keys:
        yield None
        return
    keyring = Keyring(open_keys("", keys), time.monotonic)
    watching = asyncio.create_task(keyring.watch())
    try:
        yield KeyCheck(keyring, gateway.metrics.answered)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        keyring.close()


def scaled_clock(speedup: float) -> Callable[[], float]:
    """Return a clock that runs ``speedup`` times as fast as the wall's."""
    started_s = time.monotonic()
    if speedup == 1.0:
        return lambda: time.monotonic() - started_s
    return lambda: (time.monotonic() - started_s) * speedup


def controls_of(file: FleetFile) -> dict[ReplicaId, ControlKind]:
    """Return how each replica's engine is controlled."""
    return {
        ReplicaId(f"{section.name}-{number}"): section.controlled_by
        for section in file.pools
        for number in range(section.count)
    }
