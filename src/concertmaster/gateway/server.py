"""Starts and stops a gateway on a port."""

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from concertmaster.config import FleetFile, GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.control import ControlKind
from concertmaster.gateway.admin import AdminCheck, AdminDesk, AdminRoutes
from concertmaster.gateway.agent import AgentConnection, Desk, Judge, Patience
from concertmaster.gateway.app import SideRoutes
from concertmaster.gateway.asgi import SideDoor
from concertmaster.gateway.clock import scaled_clock, steady
from concertmaster.gateway.driver import Gateway, Observer
from concertmaster.gateway.keyring import KeyCheck, Keyring
from concertmaster.gateway.limits import limits_of
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.reach import AdminDoor, admin_door, check_reach, open_keys, tls_of
from concertmaster.gateway.seeing import Seeing
from concertmaster.gateway.workers.hub import Hub
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
    admin: AdminRoutes | None = None,
    environ: Mapping[str, str] = os.environ,
    hub: Hub | None = None,
) -> AsyncIterator[tuple[Gateway, int]]:
    """Serve until the block ends; yields the gateway and the port it listens on.

    With a ``hub`` that port is its workers', and this process listens for them alone.

    Raises:
        OSError: The port is taken or the host is not ours.
        InputError: Strangers could reach it without keys, or its keys or TLS files are amiss.
    """
    check_reach("", settings)
    tls = tls_of("", settings)
    seeing = Seeing(scheduler, settings, speedup=speedup, also=observe)
    routes = SideRoutes(seeing.receipts)
    admin = admin or AdminRoutes()
    door = admin_door("", settings, environ)
    side_door = SideDoor(routes.app(shows_fleet=door is None))
    admins = SideDoor(routes.admin_app(admin.routes()))
    gateway = Gateway(
        scheduler,
        predictor,
        urls,
        clock=steady(scaled_clock(speedup)),
        speedup=speedup,
        side_door=side_door,
        observe=seeing.audience,
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
    routes.gateway = admin.gateway = gateway
    servers: list[asyncio.Server] = []
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(seeing.over(gateway))
            keyring = await stack.enter_async_context(keyring_of(settings.keys))
            await gateway.open()
            count = gateway.metrics.answered
            if hub is None:
                judge = None if keyring is None else KeyCheck(keyring, count)
                at = (settings.host, settings.port)
                servers.append(await listen(at, gateway, judge, tls))
            else:
                servers += await hub.open(gateway, keyring, settings, speedup=speedup)
            if door is not None:
                check = AdminCheck(door, keyring, count)
                desk = AdminDesk(gateway, admins)
                servers.append(await _listen_to_admins(door, desk, check, tls))
        except BaseException:
            for server in servers:
                server.close()
            await gateway.stop(drain_s=0.0)
            raise
        gateway.start()
        port = servers[0].sockets[0].getsockname()[1] if hub is None else hub.port
        seeing.journal.started(settings.host, port, scheduler.policy.name, len(urls))
        try:
            yield gateway, port
        finally:
            admin.ending = True
            await gateway.stop(drain_s=drain_s)  # still listening: a load balancer asks /readyz
            for server in servers:
                server.close()
            if hub is not None:
                hub.close()
            await asyncio.gather(side_door.close(), admins.close())
            for server in servers:
                await server.wait_closed()


async def listen(
    at: tuple[str, int],
    desk: Desk,
    judge: Judge | None,
    tls: ssl.SSLContext | None,
    *,
    shared: bool = False,
) -> asyncio.Server:
    """Take agents at an address; ``shared`` lets other processes listen there too."""
    return await asyncio.get_running_loop().create_server(
        lambda: AgentConnection(desk, judge), *at, backlog=_BACKLOG, ssl=tls, reuse_port=shared
    )


async def _listen_to_admins(
    door: AdminDoor, desk: AdminDesk, check: AdminCheck, tls: ssl.SSLContext | None
) -> asyncio.Server:
    try:
        return await listen((door.host, door.port), desk, check, tls)
    except OSError as error:
        problem = f"cannot listen on {door.host}:{door.port}: {error.strerror}"
        raise InputError("", "gateway.admin", problem) from None


@asynccontextmanager
async def keyring_of(keys: str) -> AsyncIterator[Keyring | None]:
    """Read the keys if there are any, and follow their file."""
    if not keys:
        yield None
        return
    keyring = Keyring(open_keys("", keys), time.monotonic)
    watching = asyncio.create_task(keyring.watch())
    try:
        yield keyring
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        keyring.close()


def controls_of(file: FleetFile) -> dict[ReplicaId, ControlKind]:
    """Return how each replica's engine is controlled."""
    return {
        ReplicaId(f"{section.name}-{number}"): section.controlled_by
        for section in file.pools
        for number in range(section.count)
    }
