"""The main job on any machine: agents, a live gateway, emulated engines, and what policies do.

Engines and gateway run in processes of their own, as they would in a fleet; this process
plays the agents.
"""

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from concertmaster import compose, local
from concertmaster.config import FleetFile
from concertmaster.config_files import load_fleet
from concertmaster.gateway.replay import Replay
from concertmaster.observe import console as show
from concertmaster.observe.compare import compare_reports
from concertmaster.observe.report import build_report
from concertmaster.workload.load import load_workloads
from concertmaster.workload.records import RunRecords

POLICIES = ("round-robin", "least-tokens+las")
"""What people run today, and what this does without any forecast of the workflow."""

BOUND = "oracle-stjf"
"""Knows every length beforehand: simulated only, to show how much there is to gain."""

SEED = 0
RATE_SCALE = 4.0
"""The sample arrives four times as fast as recorded: enough that calls must wait."""


def run(
    policies: Sequence[str], *, workflows: int, keep: bool, port: int, json: Path | None
) -> None:
    """Play the sample under each policy, live and simulated, and print the comparison.

    Raises:
        InputError: A child could not start.
    """
    out = show.console()
    file = fleet_file()
    fleet = compose.build_fleet(file, name="local")
    workload = load_workloads(["sample"], seed=SEED, limit=workflows, rate_scale=RATE_SCALE)
    out.print(
        f"{len(workload)} agent workflows, {workload.requests:,} calls   "
        f"{len(fleet.replicas)} emulated engines, {len(fleet.pools)} models, "
        f"{file.emulator.speedup:g} x real time"
    )
    reports = {}
    with ExitStack() as stack:
        urls = stack.enter_context(local.engines(file))
        bar = stack.enter_context(show.progress_bar(len(workload)))
        for name in policies:
            bar.begin(f"live, {name}")
            with local.gateway(file, urls, name) as url:
                player = Replay(
                    url=url, workload=workload, speedup=file.emulator.speedup, progress=bar.update
                )
                reports[f"{name}, live"] = _live(player, name)
            simulated = compose.simulate(
                fleet, workload, name, seed=SEED, models=file.gateway.models
            )
            reports[f"{name}, simulated"] = [build_report(simulated)]
    bound = compose.simulate(fleet, workload, BOUND, seed=SEED)
    reports[f"{BOUND}, simulated"] = [build_report(bound)]
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
    with local.engines(file) as urls, local.gateway(file, urls, policy, port=port) as url:
        show.console().print(
            f"\nthe gateway stays up at {url}/v1 (page {url}/); try\n"
            f"  curl {url}/v1/chat/completions -H 'content-type: application/json' "
            '-d \'{"model": "auto", "messages": [{"role": "user", "content": "hello"}]}\'\n'
            "stop with Ctrl-C",
            soft_wrap=True,
        )
        signal.pause()


def fleet_file() -> FleetFile:
    """Read the demo's fleet, which ships in the package."""
    with as_file(files("concertmaster").joinpath("demo.toml")) as path:
        return load_fleet(path)
