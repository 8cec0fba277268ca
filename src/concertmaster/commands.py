"""What each command does; ``cli`` says how it is called."""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from msgspec.structs import replace

from concertmaster import compose
from concertmaster import demo as demonstration
from concertmaster.config_files import load_engine, load_fleet
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet
from concertmaster.engines.emulator_api import serve as serve_emulator
from concertmaster.gateway.replay import Replay
from concertmaster.observe import console as show
from concertmaster.observe import plots
from concertmaster.observe.compare import compare_reports
from concertmaster.observe.report import Report, build_report
from concertmaster.observe.trace import Header, TraceWriter
from concertmaster.parallel import parallel
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.serving import check_servable
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Workload


class Ask(NamedTuple):
    """Which workload, as the options of a command say."""

    specs: list[str]
    arrivals: str | None
    rate_rps: float | None
    rate_scale: float
    limit: int | None

    def load(self, seed: int) -> Workload:
        """Read it; drawn arrivals depend on the seed."""
        if self.rate_scale <= 0:
            raise InputError("--rate-scale", "", f"expected above 0, found {self.rate_scale}")
        return load_workloads(
            self.specs,
            seed=seed,
            arrivals=None if self.arrivals is None else ArrivalSpec.parse(self.arrivals),
            rate_rps=self.rate_rps,
            rate_scale=self.rate_scale,
            limit=self.limit,
        )


def demo(
    *, policies: list[str] | None, workflows: int, keep: bool, port: int, json: Path | None
) -> None:
    """Play the sample through a live gateway under each policy, and compare."""
    _check_port(port)
    chosen = policies or list(demonstration.POLICIES)
    for name in chosen:
        check_servable(name)
    demonstration.run(chosen, workflows=workflows, keep=keep, port=port, json=json)


async def until_stopped() -> None:
    """Wait for SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


def _check_port(port: int) -> None:
    if not 0 <= port <= 65_535:
        raise InputError("port", "", f"expected 0 to 65535, found {port}")


def engine(*, config: Path, host: str | None, port: int | None) -> None:
    """Run one emulated engine until it is told to stop."""
    file = load_engine(config)
    changes = {"host": host, "port": port}
    file = replace(file, **{k: v for k, v in changes.items() if v is not None})
    _check_port(file.port)
    emulator = compose.build_emulator(file)

    async def run() -> None:
        where = f"{file.host}:{file.port}"
        starting = serve_emulator(emulator, file.host, file.port)
        server = await compose.listening(starting, where, file.port)
        show.say(
            show.console(),
            f"http://{file.host}:{server.port}/v1   {file.model} on {file.gpu}, emulated, "
            f"{file.speedup:g} x real time   stop with Ctrl-C",
        )
        await until_stopped()
        server.close()

    compose.run_loop(run())


def simulate(
    *,
    fleet: Path,
    ask: Ask,
    policy: str,
    models: str,
    seed: int,
    json: Path | None,
    trace: Path | None,
    reference: bool,
) -> None:
    """Run one policy in virtual time and print the report."""
    policy_named(policy)
    built = compose.build_fleet(load_fleet(fleet), name=fleet.stem)
    workload = ask.load(seed)
    with ExitStack() as stack:
        observe = None
        if trace is not None:
            header = Header(trace=1, fleet=built.name, policy=policy, seed=seed)
            observe = stack.enter_context(TraceWriter(trace, header))
        bar = stack.enter_context(show.progress_bar(len(workload)))
        bar.begin("simulating")
        run = compose.simulate(
            built,
            workload,
            policy,
            seed=seed,
            models=models,
            observe=observe,
            progress=_every(50, bar.update),
            make_engine=(lambda p: ReferenceEngine(p.curve, engine_settings(p)))
            if reference
            else None,
        )
    report = build_report(run)
    out = show.console()
    show.show_report(out, f"{built.name}: {workload.name}", run, report)
    _show_notes(workload)
    if trace is not None:
        show.say(out, f"trace             {trace}")
        show.say(out, f"\nnext: concertmaster explain {trace} {run.calls[0].request_id}")
    if json is not None:
        show.write_json(report, json)


def compare(
    *,
    fleet: Path,
    ask: Ask,
    policies: list[str],
    models: str,
    seeds: int,
    json: Path | None,
    plot: Path | None,
    jobs: int | None,
) -> None:
    """Run several policies over several seeds and print them side by side."""
    for name in policies:
        policy_named(name)
    if len(set(policies)) < len(policies):
        raise InputError("--policy", "", "a policy is named twice", "name each once")
    if jobs is not None and jobs < 1:
        raise InputError("--jobs", "", f"expected at least 1, found {jobs}")
    if seeds < 1:
        raise InputError("--seeds", "", f"expected at least 1, found {seeds}")
    if plot is not None:
        plots.check_plot_path(plot)
    built = compose.build_fleet(load_fleet(fleet), name=fleet.stem)
    _show_notes(ask.load(0))
    if seeds > 1 and ask.arrivals in {None, "trace"}:
        _note(
            "recorded arrivals are the same under every seed: add --arrivals poisson to vary them"
        )
    run = partial(_run_one, built, ask, models)
    results = _run_all(run, policies, seeds, jobs or os.cpu_count() or 1)
    reports = {name: [report for report, _ in results[name]] for name in policies}
    comparison = compare_reports(reports)
    title = f"{built.name}: {' + '.join(ask.specs)}"
    show.show_comparison(show.console(), title, comparison, seeds)
    if json is not None:
        show.write_json(comparison, json)
    if plot is not None:
        makespans = {name: [s for _, one in results[name] for s in one] for name in policies}
        plots.plot_makespans(makespans, plot, title=title)
        show.say(show.console(), f"plot              {plot}")


Result = tuple[Report, list[float]]


def _run_all(
    run: Callable[[str, int], Result], policies: Sequence[str], seeds: int, jobs: int
) -> dict[str, list[Result]]:
    found: dict[tuple[str, int], Result] = {}
    tasks = [(name, seed) for seed in range(seeds) for name in policies]
    with show.progress_bar(len(tasks)) as bar:
        bar.begin("simulating")
        if jobs == 1 or len(tasks) == 1:
            for name, seed in tasks:
                found[name, seed] = run(name, seed)
                bar.update(len(found))
        else:
            with parallel(min(jobs, len(tasks))) as pool:
                futures = {pool.submit(run, *task): task for task in tasks}
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    bar.update(len(found))
    return {name: [found[name, seed] for seed in range(seeds)] for name in policies}


def _run_one(fleet: Fleet, ask: Ask, models: str, policy: str, seed: int) -> Result:
    run = compose.simulate(fleet, ask.load(seed), policy, seed=seed, models=models)
    makespans_s = [w.finished_s - w.arrival_s for w in run.workflows if w.finished_s is not None]
    return build_report(run), makespans_s


def replay(*, url: str, ask: Ask, seed: int, speedup: float, json: Path | None) -> None:
    """Play a workload against a live gateway and print the report."""
    if not _is_address(url):
        raise InputError("--url", url, "expected http://HOST:PORT")
    if speedup <= 0:
        raise InputError("--speedup", "", f"expected above 0, found {speedup}")
    workload = ask.load(seed)
    with show.progress_bar(len(workload)) as bar:
        bar.begin("replaying")
        one = Replay(url=url, workload=workload, speedup=speedup, progress=bar.update)
        run = compose.run_loop(one.run(policy="live", seed=seed))
    report = build_report(run)
    show.show_report(show.console(), f"{url}: {workload.name}", run, report)
    _show_notes(workload)
    if json is not None:
        show.write_json(report, json)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is no number, or too large
        return False
    return named and parts.scheme == "http" and parts.path in {"", "/"}


def _show_notes(workload: Workload) -> None:
    for note in workload.notes:
        _note(note)


def _note(text: str) -> None:
    show.say(show.console(stderr=True), f"note: {text}")


def _every(step: int, tell: Callable[[int], None]) -> Callable[[int], None]:
    """Pass on every so many counts only: a bar need not be told more often."""

    def told(count: int) -> None:
        if count % step == 0:
            tell(count)

    return told
