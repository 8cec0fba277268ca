"""A fleet on this machine: emulated engines and a gateway, in processes of their own.

Children end when their pipe to the parent closes, however the parent ends.
"""

import asyncio
import logging
import multiprocessing
import random
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from concertmaster import compose, forecaster
from concertmaster.config import FleetFile
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.emulator_api import serve as serve_emulator
from concertmaster.gateway.server import controls_of, running_gateway
from concertmaster.observe.trace import Header, TraceWriter
from concertmaster.policies.catalog import policy as policy_named

START_TIMEOUT_S = 60.0
DRAIN_S = 1.0

Urls = dict[ReplicaId, str]


def engines(file: FleetFile) -> AbstractContextManager[Urls]:
    """Run an emulated engine for every replica; yields their addresses."""
    return _child(_run_engines, file)


def gateway(
    file: FleetFile,
    urls: Urls,
    policy: str,
    *,
    port: int = 0,
    seed: int = 0,
    trace: Path | None = None,
) -> AbstractContextManager[str]:
    """Run a gateway in front of engines; yields its address.

    Args:
        file: The fleet.
        urls: Addresses of its replicas.
        policy: Name in the catalog.
        port: 0 takes a free one.
        seed: Fixes all randomness.
        trace: Where to write every event and decision.
    """
    return _child(_run_gateway, _Job(file, urls, policy, port, seed, trace))


class _Job(NamedTuple):
    file: FleetFile
    urls: Urls
    policy: str
    port: int
    seed: int
    trace: Path | None


@contextmanager
def _child(target: Any, *facts: Any) -> Iterator[Any]:  # noqa: ANN401  # what it says is its own
    """Run a function in a process; yields what it says once it is up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *facts), daemon=True)
    _start_deaf(process)
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise InputError(
                "local fleet", "", f"a child was not up within {START_TIMEOUT_S:.0f} s"
            )
        try:
            said = ours.recv()
        except EOFError:
            raise InputError("local fleet", "", "a child ended before it was up") from None
        if isinstance(said, InputError):
            raise said
        yield said
    finally:
        ours.close()
        process.join(START_TIMEOUT_S)


def _start_deaf(process: BaseProcess) -> None:
    """Start a process that never sees Ctrl-C; one that comes meanwhile is this one's, after it."""
    resource_tracker.ensure_running()  # its first start would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_engines(pipe: Connection, file: FleetFile) -> None:
    fleet = compose.build_fleet(file, name="local", served=True)
    compose.run_loop(_serve_engines(pipe, fleet, file.emulator.speedup))


async def _serve_engines(pipe: Connection, fleet: Fleet, speedup: float) -> None:
    servers, urls = [], {}
    for replica_id, (pool, _, state) in fleet.replicas.items():
        emulator = compose.emulator_of(pool, speedup=speedup, lies=state)
        server = await serve_emulator(emulator, "127.0.0.1", 0)
        servers.append(server)
        urls[replica_id] = f"http://127.0.0.1:{server.port}"
    _tell(pipe, urls)
    await _parent_gone(pipe)
    for server in servers:
        server.close()


def _run_gateway(pipe: Connection, job: _Job) -> None:
    logging.getLogger("concertmaster").addHandler(logging.NullHandler())  # the demo has its table
    compose.run_loop(_serve_gateway(pipe, job))


async def _serve_gateway(pipe: Connection, job: _Job) -> None:
    file, port = job.file, job.port
    fleet = compose.build_fleet(file, name="local", served=True)
    with ExitStack() as stack:
        observe = None
        if job.trace is not None:
            header = Header(trace=1, fleet=fleet.name, policy=job.policy, seed=job.seed)
            observe = stack.enter_context(TraceWriter(job.trace, header))
        serving = running_gateway(
            Scheduler(fleet, policy_named(job.policy), random.Random(job.seed), weighs=True),
            forecaster.serving_predictor(
                file.gateway, fleet, trains=False
            ),  # a daemon has no children
            job.urls,
            replace(file.gateway, port=port),
            speedup=file.emulator.speedup,
            observe=observe,
            drain_s=DRAIN_S,
            controls=controls_of(file),
        )
        try:
            _, bound = await compose.listening(serving.__aenter__(), f"127.0.0.1:{port}", port)
        except InputError as error:
            _tell(pipe, error)
            return
        try:
            _tell(pipe, f"http://127.0.0.1:{bound}")
            await _parent_gone(pipe)
        finally:
            await serving.__aexit__(None, None, None)


def _tell(pipe: Connection, what: object) -> None:
    with suppress(OSError):  # the parent was interrupted: its end is closed, which ends us
        pipe.send(what)


async def _parent_gone(pipe: Connection) -> None:
    """Wait until the other end of the pipe closes."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), gone.set)
    await gone.wait()
    loop.remove_reader(pipe.fileno())
