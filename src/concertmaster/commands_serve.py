"""``concertmaster serve``: the gateway, in one process or in several."""

import gc
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from concertmaster import compose, forecaster
from concertmaster.core.errors import InputError
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.admin import AdminRoutes
from concertmaster.gateway.server import controls_of, running_gateway
from concertmaster.gateway.workers.hub import Hub
from concertmaster.gateway.workers.overseer import Overseer
from concertmaster.gateway.workers.stopping import told_to_stop
from concertmaster.observe import console as show
from concertmaster.observe.logs import log_to
from concertmaster.observe.trace import Header, TraceWriter
from concertmaster.reloading import Reloader, followed
from concertmaster.serving import Served, prepared

Changes = Mapping[str, object | None]

MOST_YOUNG = 20_000
"""Objects made, less those freed, between two looks for cycles: some hundred calls."""


class SchedulerPart(msgspec.Struct, frozen=True):
    """What the process that decides is told when it is started."""

    config: str
    changes: dict[str, str | int]
    trace: str
    folder: str
    port: int


def serve(config: Path, changes: Changes, trace: Path | None) -> None:
    """Run the gateway until it is told to stop.

    Args:
        config: The fleet file.
        changes: Settings that the command line gives; ``None`` leaves the file's.
        trace: Where to write every event and decision.
    """
    port = changes.get("port") or 0
    if not isinstance(port, int) or not 0 <= port <= 65_535:
        raise InputError("port", "", f"expected 0 to 65535, found {port}")
    served = prepared(config, changes, os.environ)
    if served.settings.workers > 1:
        _oversee(config, changes, trace, served)
    else:
        _decide(config, changes, trace, served, None)


def _oversee(config: Path, changes: Changes, trace: Path | None, served: Served) -> None:
    settings = served.settings
    log_to(settings.log)

    def scheduler(folder: Path, port: int) -> Sequence[str]:
        told = {key: value for key, value in changes.items() if isinstance(value, str | int)}
        part = SchedulerPart(str(config), told, str(trace or ""), str(folder), port)
        words = msgspec.json.encode(part).decode()
        return (sys.executable, "-m", "concertmaster.commands_serve", words)

    async def run() -> int:
        overseer = Overseer(
            scheduler,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            ready=lambda port: _say(served, port),
        )
        where = f"{settings.host}:{settings.port}"
        return await compose.listening(overseer.run(), where, settings.port)

    code = compose.run_loop(run())
    if code:
        raise SystemExit(code)


def _decide(
    config: Path, changes: Changes, trace: Path | None, served: Served, hub: Hub | None
) -> None:
    """Run the gateway here; with a hub, only what decides."""
    file, settings, fleet = served.file, served.settings, served.fleet
    log_to(settings.log)
    with ExitStack() as stack:
        writer = None
        if trace is not None:
            header = Header(trace=1, fleet=fleet.name, policy=settings.policy, seed=settings.seed)
            writer = stack.enter_context(TraceWriter(trace, header))
        scheduler = Scheduler(
            fleet,
            served.policy,
            random.Random(settings.seed),
            record_candidates=writer is not None,
            weighs=True,
        )
        predictor = forecaster.serving_predictor(settings, fleet)
        admin = AdminRoutes()

        async def run() -> None:
            gateway = running_gateway(
                scheduler,
                predictor,
                served.urls,
                settings,
                speedup=file.emulator.speedup,
                observe=writer,
                commands=compose.commands(file),
                controls=controls_of(file),
                peers=served.peers,
                admin=admin,
                hub=hub,
            )
            where = f"{settings.host}:{settings.port}"
            live, bound = await compose.listening(gateway.__aenter__(), where, settings.port)
            traced = writer is not None
            reloader = Reloader(config, changes, os.environ, served, live, traced=traced)
            admin.reload = reloader.reload
            try:
                if hub is None:
                    _say(served, bound)
                async with followed(reloader):
                    await told_to_stop(at_end_of_input=hub is not None).wait()
            finally:
                await gateway.__aexit__(None, None, None)

        rest_memory()
        compose.run_loop(run())


def rest_memory() -> None:
    """Look for cycles seldom, and never among what was loaded: calls leave few behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(MOST_YOUNG)


def _say(served: Served, port: int) -> None:
    """Tell where it serves."""
    settings = served.settings
    scheme = f"http{'s' if settings.tls_cert else ''}"
    url = f"{scheme}://{settings.host}:{port}"
    page = f"{scheme}://{settings.admin}" if settings.admin else url
    workers = f"   {settings.workers} workers" if settings.workers > 1 else ""
    show.say(
        show.console(),
        f"{url}/v1   policy {settings.policy}   "
        f"{len(served.urls)} replicas in {len(served.fleet.pools)} pools{workers}   "
        f"page {page}/   {'with keys' if settings.keys else 'loopback only, no keys'}"
        "   stop with Ctrl-C",
    )


def scheduler_process(words: str) -> None:
    """Be the process that decides, for several workers."""
    part = msgspec.json.decode(words, type=SchedulerPart)
    config, trace = Path(part.config), Path(part.trace) if part.trace else None
    served = prepared(config, part.changes, os.environ)
    _decide(config, part.changes, trace, served, Hub(Path(part.folder), part.port))


if __name__ == "__main__":
    try:
        scheduler_process(sys.argv[1])
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
