# ruff: noqa: INP001  # a script beside the decisions it gives numbers to, not a package
"""The numbers that stand in the decisions beside this file.

    python docs/adr/measure.py [NUMBER ...]

Each part is named by the number of its decision. Run it in the root of the repository;
all parts together take about ten seconds.
"""

import dataclasses
import random
import sys
import tempfile
import timeit
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from concertmaster.compose import build_fleet
from concertmaster.config_files import load_fleet
from concertmaster.core.actions import Action
from concertmaster.core.errors import InputError
from concertmaster.core.facts import fact
from concertmaster.core.fleet import Fleet, PoolId
from concertmaster.core.forecast import Quantiles
from concertmaster.core.policy import Policy
from concertmaster.core.queue import longest_overtaking_s
from concertmaster.core.request import WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.observe.report import build_report, summary
from concertmaster.observe.trace import VERSION, Header, TraceWriter
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.catalog import policy
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.driver import Observer, Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Call, WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords

FLEETS = Path("examples/fleets")
BUILDS = 200_000
RATE_RPS = 0.8


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


def a_fleet(name: str) -> Fleet:
    """Load an example fleet."""
    return build_fleet(load_fleet(FLEETS / f"{name}.toml"), name=name)


def sample(rate_rps: float, seed: int = 0) -> Workload:
    """Return the sample at a rate of workflows a second."""
    return load_workloads(
        ["sample"], seed=seed, arrivals=ArrivalSpec(kind="poisson"), rate_rps=rate_rps
    )


def play(
    fleet: Fleet,
    workload: Workload,
    of: Policy,
    *,
    kind: type[Scheduler] = Scheduler,
    observe: Observer | None = None,
) -> RunRecords:
    """Run a workload through a policy that need not be in the catalog."""
    scheduler = kind(fleet, of, random.Random(0), record_candidates=observe is not None)
    simulation = Simulation(
        scheduler,
        workload,
        RecentLengths(),
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
        observe=observe,
    )
    return simulation.run(policy=of.name, seed=0)


def waits_s(run: RunRecords) -> list[float]:
    """Seconds from arrival to dispatch."""
    return [c.dispatched_s - c.arrival_s for c in run.calls if c.dispatched_s is not None]


def row(name: str, run: RunRecords) -> str:
    """Makespans, first tokens and the longest wait of a run."""
    report = build_report(run)
    makespan_s, ttft_s = report["makespan_s"], report["ttft_s"]
    return (
        f"  {name:<34} makespan mean {makespan_s['mean']:6.1f} s  P95 {makespan_s['p95']:6.1f} s"
        f"  TTFT P50 {ttft_s['p50']:6.2f} s  longest wait {max(waits_s(run)):6.1f} s"
    )


# The parts


def time_types() -> None:
    """Time a comparison and an addition in three types."""
    for name, now, gap in (
        ("float seconds", 1234.5, 0.25),
        ("int nanoseconds", 1_234_500_000_000, 250_000_000),
        ("Decimal seconds", Decimal("1234.5"), Decimal("0.25")),
    ):
        total_s = timeit.timeit(
            "a + b < c", globals={"a": now, "b": gap, "c": now}, number=1_000_000
        )
        say(f"  {name:<20} {1000 * total_s:5.0f} ns")


def forecast_laws() -> None:
    """Compare the sum of tails with the tail of the sum."""
    levels = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    law = Quantiles(levels, (20.0, 40.0, 90.0, 180.0, 400.0, 900.0, 1300.0, 2600.0))
    total = law
    for count in range(2, 9):
        total = total.compose(law)
        if count in (2, 4, 8):
            naive = count * law.at(0.95)
            say(
                f"  {count} calls: P95 of the sum {total.at(0.95):7,.0f} tokens, "
                f"sum of the P95s {naive:7,.0f} (x {naive / total.at(0.95):.2f})"
            )


def trace_size() -> None:
    """Weigh a trace and time its writing."""
    workload = sample(2.0)
    fleet, of = a_fleet("three-sizes"), policy("least-tokens+las")
    bare_s = min(play(fleet, workload, of).wall_s for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.trace.jsonl"
        header = Header(trace=VERSION, fleet=fleet.name, policy=of.name, seed=0)
        with TraceWriter(path, header) as writer:
            traced_s = play(fleet, workload, of, observe=writer).wall_s
        lines, size = path.read_bytes().count(b"\n"), path.stat().st_size
    say(f"  {lines:,} lines, {size / lines:,.0f} bytes a line, {size / 1e6:.1f} MB")
    say(f"  simulation {bare_s:.2f} s, with the trace {traced_s:.2f} s")


def denominators() -> None:
    """Count refused work both ways."""
    fleet, workload = a_fleet("contended"), sample(2.0)
    for most_s in (3600.0, 20.0, 10.0, 5.0):
        of = dataclasses.replace(policy("edf"), admission=BoundedLine(max_wait_s=most_s))
        calls = play(fleet, workload, of).calls
        served = [call for call in calls if call.outcome == "served"]
        met = sum(call.met for call in calls)
        say(
            f"  refuse after {most_s:6.0f} s: {met:,} met; of {len(calls):,} asked "
            f"{100 * met / len(calls):.1f} %, of {len(served):,} served "
            f"{100 * met / len(served):.1f} %"
        )


def binding() -> None:
    """Bind calls late and early, and count room in two ways."""
    las = policy("least-tokens+las")
    early = dataclasses.replace(las, window_s=1e9, filters=())
    for caching in (True, False):
        say(f"  prefix caching {'on' if caching else 'off'}")
        fleet = with_pools(a_fleet("contended"), prefix_caching=caching)
        say(row("window of 0.25 s, KV blocks", play(fleet, sample(2.0), las)))
        say(row("bound on arrival", play(fleet, sample(2.0), early)))
        for most in (8, 16, 32):
            counted = with_pools(fleet, max_sequences=most)
            say(row(f"{most} calls a replica", play(counted, sample(2.0), early)))


def with_pools(fleet: Fleet, **changes: object) -> Fleet:
    """Change a setting of every pool."""
    pools = {pool.pool_id: dataclasses.replace(pool, **changes) for pool in fleet.pools}  # type: ignore[arg-type]
    return dataclasses.replace(
        fleet,
        pools=tuple(pools.values()),
        replicas={
            name: (pools[pool.pool_id], node, state)
            for name, (pool, node, state) in fleet.replicas.items()
        },
    )


def aging() -> None:
    """Try four agings."""
    fleet, workload = a_fleet("contended"), sample(2.0)
    las = policy("las")
    for one in (0.01, 0.1, 0.3, 1.0):
        of = dataclasses.replace(las, aging=one)
        say(
            row(f"aging {one}, bound {longest_overtaking_s(one):,.0f} s", play(fleet, workload, of))
        )


def facts() -> None:
    """Build facts of 13 fields."""
    names = [f"field_{i}" for i in range(13)]
    frozen = dataclasses.make_dataclass("Frozen", names, frozen=True, slots=True)
    plain: type = fact(frozen=True, slots=True)(
        type("Plain", (), {"__annotations__": dict.fromkeys(names, int)})
    )
    values = list(range(13))
    for name, kind in (("frozen dataclass", frozen), ("fact", plain)):
        seconds = min(timeit.repeat(lambda k=kind: k(*values), number=BUILDS, repeat=3))  # type: ignore[misc]
        say(f"  {name:<20} {1e6 * seconds / BUILDS:.2f} µs")


class OpenDoor(Scheduler):
    """A call that finds no room holds nothing back: those behind it go on."""

    def _dispatch(self, now_s: float, actions: list[Action]) -> None:
        nothing: dict[PoolId, None] = {}
        for call in sorted(self.line, key=lambda one: (one.key, one.serial)):
            replicas = self._room_for(call, nothing)
            if replicas:
                self.line.remove(call.request.request_id)
                actions.append(self._place(now_s, call, replicas))


def large_calls() -> None:
    """Put a few large calls among small ones, with and without holding room back for them."""
    fleet = a_fleet("contended")
    for kind, name in ((Scheduler, "closes its pools"), (OpenDoor, "lets others pass")):
        run = play(fleet, small_and_large(), policy("fcfs"), kind=kind)
        large = [c for c in run.calls if c.prompt_tokens > 10_000]
        small = [c for c in run.calls if c.prompt_tokens < 10_000]
        parts = []
        for what, calls in (("large", large), ("small", small)):
            wait_s = summary([c.dispatched_s - c.arrival_s for c in calls if c.dispatched_s])
            parts.append(f"{what} mean {wait_s['mean']:5.1f} s, P99 {wait_s['p99']:5.1f} s")
        say(f"  {name:<18} wait of {'; of '.join(parts)}")


def small_and_large() -> Workload:
    """Mix calls that keep two replicas at their KV limit with a few that fill one."""
    rng = random.Random(0)
    plans, now_s = [], 0.0
    for i in range(3000):
        now_s += rng.expovariate(RATE_RPS)
        large = i % 300 == 150
        call = Call(
            stage=0,
            prompt_tokens=28_000 if large else rng.randint(1000, 3000),
            output_tokens=rng.randint(50, 450),
            max_output_tokens=512,
            role="large" if large else "small",
        )
        plans.append(
            WorkflowPlan(workflow_id=WorkflowId(f"w{i:04d}"), arrival_s=now_s, calls=(call,))
        )
    return Workload(name="small and large", workflows=tuple(plans))


PARTS: dict[str, Callable[[], None]] = {
    "0002": time_types,
    "0003": forecast_laws,
    "0005": trace_size,
    "0006": denominators,
    "0009": binding,
    "0010": aging,
    "0011": facts,
    "0013": large_calls,
}


def main(numbers: list[str]) -> None:
    """Run the parts asked for, else all."""
    for number in numbers or PARTS:
        if number not in PARTS:
            raise InputError(number, "", f"expected one of {', '.join(PARTS)}")
        say(f"{number}  {PARTS[number].__doc__}")
        PARTS[number]()


if __name__ == "__main__":
    main(sys.argv[1:])
