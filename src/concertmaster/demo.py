"""The main job on any machine: agents, a live gateway, emulated engines, and what policies do.

Engines and gateway run in processes of their own, as they would in a fleet; this process
plays the agents. Children end when their pipe to this process closes, however it ends.
"""

import asyncio
import multiprocessing
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from concertmaster import compose
from concertmaster.config import FleetFile, load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.emulator_api import serve as serve_emulator
from concertmaster.gateway.replay import Replay
from concertmaster.gateway.server import running_gateway
from concertmaster.observe import console as show
from concertmaster.observe.compare import compare_reports
from concertmaster.observe.report import build_report
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.predictors.recent import RecentLengths
from concertmaster.workload.load import load_workloads
from concertmaster.workload.records import RunRecords

POLICIES = ("round-robin", "least-tokens+las")
"""What people run today, and what this does without any forecast of the workflow."""

SEED = 0
START_TIMEOUT_S = 60.0

Urls = dict[ReplicaId, str]


def run(
    policies: Sequence[str], *, workflows: int, keep: bool, port: int, json: Path | None
) -> None:
    """Play the sample under each policy, live and simulated, and print the comparison.

    Raises:
        InputError: A child could not start.
    """
    out = show.console()
    file = _fleet_file()
    fleet = compose.build_fleet(file, name="local")
    workload = load_workloads(["sample"], seed=SEED, limit=workflows)
    out.print(
        f"{len(workload)} agent workflows, {workload.requests:,} calls   "
        f"{len(fleet.replicas)} emulated engines, {len(fleet.pools)} models, "
        f"{file.emulator.speedup:g} x real time"
    )
    reports = {}
    with ExitStack() as stack:
        urls = stack.enter_context(_child(_run_engines, file))
        bar = stack.enter_context(show.progress_bar(len(workload)))
        for name in policies:
            bar.begin(f"live, {name}")
            with _child(_run_gateway, file, urls, name, 0) as url:
                player = Replay(
                    url=url, workload=workload, speedup=file.emulator.speedup, progress=bar.update
                )
                reports[f"{name}, live"] = _live(player, name)
            simulated = compose.simulate(fleet, workload, name, seed=SEED)
            reports[f"{name}, simulated"] = [build_report(simulated)]
    comparison = compare_reports(reports)
    show.show_comparison(out, "sample workload", comparison, 1)
    if json is not None:
        show.write_json(comparison, json)
        out.print(f"report            {json}")
    if keep:
        _keep_up(file, policies[-1], port)


def _live(player: Replay, policy: str) -> list[dict[str, Any]]:
    run: RunRecords = compose.run_loop(player.run(policy=policy, seed=SEED))
    return [build_report(run)]


def _keep_up(file: FleetFile, policy: str, port: int) -> None:
    with _child(_run_engines, file) as urls, _child(_run_gateway, file, urls, policy, port) as url:
        show.console().print(
            f"\nthe gateway stays up at {url}/v1 (page {url}/); try\n"
            f"  curl {url}/v1/chat/completions -H 'content-type: application/json' "
            '-d \'{"model": "auto", "messages": [{"role": "user", "content": "hello"}]}\'\n'
            "stop with Ctrl-C",
            soft_wrap=True,
        )
        signal.pause()


def _fleet_file() -> FleetFile:
    with as_file(files("concertmaster").joinpath("demo.toml")) as path:
        return load_fleet(path)


# Children


@contextmanager
def _child(target: Any, *facts: Any) -> Iterator[Any]:  # noqa: ANN401  # what it says is its own
    """Run a function in a process; yields what it says once it is up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *facts), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise InputError("demo", "", f"a child was not up within {START_TIMEOUT_S:.0f} s")
        try:
            said = ours.recv()
        except EOFError:
            raise InputError("demo", "", "a child ended before it was up") from None
        if isinstance(said, InputError):
            raise said
        yield said
    finally:
        ours.close()
        process.join(START_TIMEOUT_S)


def _run_engines(pipe: Connection, file: FleetFile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fleet = compose.build_fleet(file, name="local")
    compose.run_loop(_serve_engines(pipe, fleet, file.emulator.speedup))


async def _serve_engines(pipe: Connection, fleet: Fleet, speedup: float) -> None:
    servers, urls = [], {}
    for replica_id, (pool, _, _) in fleet.replicas.items():
        emulator = compose.emulator_of(pool, speedup=speedup)
        server = await serve_emulator(emulator, "127.0.0.1", 0)
        servers.append(server)
        urls[replica_id] = f"http://127.0.0.1:{server.port}"
    pipe.send(urls)
    await _parent_gone(pipe)
    for server in servers:
        server.close()


def _run_gateway(pipe: Connection, file: FleetFile, urls: Urls, policy: str, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    compose.run_loop(_serve_gateway(pipe, file, urls, policy, port))


async def _serve_gateway(
    pipe: Connection, file: FleetFile, urls: Urls, policy: str, port: int
) -> None:
    fleet = compose.build_fleet(file, name="local")
    scheduler = Scheduler(fleet, policy_named(policy), random.Random(SEED))
    settings = replace(file.gateway, port=port)
    gateway = running_gateway(
        scheduler, RecentLengths(), urls, settings, speedup=file.emulator.speedup, drain_s=1.0
    )
    try:
        _, bound = await compose.listening(gateway.__aenter__(), f"127.0.0.1:{port}", port)
    except InputError as error:
        pipe.send(error)
        return
    try:
        pipe.send(f"http://127.0.0.1:{bound}")
        await _parent_gone(pipe)
    finally:
        await gateway.__aexit__(None, None, None)


async def _parent_gone(pipe: Connection) -> None:
    """Wait until the other end of the pipe closes."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), gone.set)
    await gone.wait()
    loop.remove_reader(pipe.fileno())
