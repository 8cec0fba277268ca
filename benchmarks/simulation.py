"""How fast the simulator is: one real hour, growth to 200,000 requests, the reference, peers.

    python benchmarks/simulation.py [--data ../shared/data/public]

Without the data folder the first part uses drawn requests of the same rate and lengths.
"""

import argparse
import heapq
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import simpy

from concertmaster.compose import build_fleet, simulate
from concertmaster.config import FleetFile, PoolSection
from concertmaster.config_files import load_fleet
from concertmaster.core.fleet import Fleet, Pool
from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.physics.batching import BatchingEngine, EngineCall, Milestone
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import Call, WorkflowPlan, Workload

ONE_MODEL = Path("examples/fleets/one-model.toml")
POLICY = "least-tokens+las"
SERVED = 200_000
"""Customers of the M/M/4 queue that event loops are compared on."""


def drawn(requests: int, rate_rps: float) -> Workload:
    """Single calls with Poisson arrivals and log-normal lengths like a chat service's."""
    rng = random.Random(0)
    now_s, plans = 0.0, []
    for i in range(requests):
        now_s += rng.expovariate(rate_rps)
        call = Call(
            stage=0,
            prompt_tokens=min(8000, 1 + int(rng.lognormvariate(6.7, 0.9))),
            output_tokens=min(1500, 1 + int(rng.lognormvariate(4.8, 0.9))),
            max_output_tokens=4096,
        )
        plans.append(WorkflowPlan(workflow_id=WorkflowId(f"w{i}"), arrival_s=now_s, calls=(call,)))
    return Workload(name="drawn", workflows=tuple(plans))


def one_hour(trace: Path) -> None:
    """Time the command on a real trace, as a process of its own."""
    spec = f"{trace}#azure2023_conv"
    if not trace.exists():
        print(f"{trace} is not there: the real trace is left out")
        return
    program = Path(sys.executable).parent / "concertmaster"
    command = [str(program), "simulate", "-f", str(ONE_MODEL), "-w", spec, "-p", POLICY]
    begun_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
    wall_s = time.perf_counter() - begun_s
    peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"concertmaster simulate, azure2023_conv, 16 replicas: {wall_s:.1f} s, {peak_mib:,.0f} MiB"
    )


class Timed:
    """An engine model whose time is taken, call by call."""

    spent_s = 0.0

    def __init__(self, engine: BatchingEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        """Pass on what is not timed."""
        return getattr(self._engine, name)

    def submit(self, now_s: float, call: EngineCall) -> None:
        """Time it."""
        begun_s = time.perf_counter()
        self._engine.submit(now_s, call)
        Timed.spent_s += time.perf_counter() - begun_s

    def advance(self, now_s: float) -> list[Milestone]:
        """Time it."""
        begun_s = time.perf_counter()
        milestones = self._engine.advance(now_s)
        Timed.spent_s += time.perf_counter() - begun_s
        return milestones

    def next_milestone_s(self) -> float | None:
        """Time it."""
        begun_s = time.perf_counter()
        due_s = self._engine.next_milestone_s()
        Timed.spent_s += time.perf_counter() - begun_s
        return due_s

    def progress(self, now_s: float) -> list[tuple[RequestId, int]]:
        """Time it."""
        begun_s = time.perf_counter()
        progress = self._engine.progress(now_s)
        Timed.spent_s += time.perf_counter() - begun_s
        return progress


class Timing(NamedTuple):
    """Wall seconds of a simulation, those inside engine models, and makespans by arrival."""

    wall_s: float
    engine_s: float
    makespans_s: list[float]


def timed(fleet: Fleet, workload: Workload, kind: type[FastEngine | ReferenceEngine]) -> Timing:
    """Simulate with the time of the engine models taken."""
    Timed.spent_s = 0.0

    def make(pool: Pool) -> BatchingEngine:
        return cast("BatchingEngine", Timed(kind(pool.curve, engine_settings(pool))))

    run = simulate(fleet, workload, POLICY, seed=0, make_engine=make)
    makespans_s = [(w.finished_s or math.nan) - w.arrival_s for w in run.workflows]
    return Timing(run.wall_s, Timed.spent_s, makespans_s)


def against_reference(trace: Path) -> None:
    """Simulate the same workloads with both engine models in one run."""
    fleet = build_fleet(load_fleet(ONE_MODEL), name="one-model")
    print("\nreference against fast engine model, in whole simulations; seconds")
    print(f"{'':<24}{'whole simulation':>26}{'engine models alone':>26}{'largest':>12}")
    heads = ("reference", "fast", "ratio") * 2
    print(
        f"{'load':<24}"
        + "".join(f"{head:>{10 - 2 * (i % 3 > 0)}}" for i, head in enumerate(heads))
        + f"{'difference':>12}"
    )
    for scale in (1.0, 10.0, 40.0):
        if trace.exists():
            workload = load_workloads([f"{trace}#azure2023_conv"], seed=0, rate_scale=scale)
            label = f"azure2023_conv x {scale:g}"
        else:
            workload, label = drawn(16_495, 5.9 * scale), f"drawn x {scale:g}"
        fast, slow = timed(fleet, workload, FastEngine), timed(fleet, workload, ReferenceEngine)
        pairs = zip(fast.makespans_s, slow.makespans_s, strict=True)
        worst = max(abs(a / b - 1) for a, b in pairs)
        print(
            f"{label:<24}{slow.wall_s:>10.1f}{fast.wall_s:>8.1f}{slow.wall_s / fast.wall_s:>8.1f}"
            f"{slow.engine_s:>10.1f}{fast.engine_s:>8.2f}{slow.engine_s / fast.engine_s:>8.1f}"
            f"{worst:>12.0e}"
        )


def growth() -> None:
    """Simulate up to 200,000 requests on 128 replicas; report the exponent of growth."""
    section = PoolSection(name="pool", model="llama-3.1-8b-instruct", gpu="a100-80g", replicas=128)
    fleet = build_fleet(FleetFile(pools=[section]), name="128")
    print("\n128 replicas, 60 requests/s")
    points = []
    for requests in (25_000, 50_000, 100_000, 200_000):
        wall_s = simulate(fleet, drawn(requests, 60.0), POLICY, seed=0).wall_s
        points.append((math.log(requests), math.log(wall_s)))
        print(f"{requests:>9,} requests {wall_s:>7.1f} s {1e6 * wall_s / requests:>6.0f} µs each")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope /= sum((x - mean_x) ** 2 for x, _ in points)
    print(f"wall time ~ requests^{slope:.2f}")


def event_loops() -> None:
    """Compare events per second with a bare heap loop and SimPy."""
    fleet = build_fleet(load_fleet(ONE_MODEL), name="one-model")
    events = 0

    def count(*_: object) -> None:
        nonlocal events
        events += 1

    workload = drawn(16_000, 60.0)
    run = simulate(fleet, workload, POLICY, seed=0, observe=count)
    print("\nevents per second")
    print(f"{'core events with decisions, ours':<36}{events / run.wall_s:>12,.0f}")
    print(f"{'bare heap loop, M/M/4':<36}{heap_loop():>12,.0f}")
    print(f"{'SimPy, M/M/4':<36}{simpy_loop():>12,.0f}")


def heap_loop() -> float:
    """Arrivals and departures of an M/M/4 queue from a heap; events per second."""
    rng = random.Random(0)
    agenda = [(rng.expovariate(3.5), 0)]
    waiting = busy = events = arrived = 0
    begun_s = time.perf_counter()
    while agenda:
        now_s, kind = heapq.heappop(agenda)
        events += 1
        if kind == 0:
            arrived += 1
            if arrived < SERVED:
                heapq.heappush(agenda, (now_s + rng.expovariate(3.5), 0))
            if busy < 4:
                busy += 1
                heapq.heappush(agenda, (now_s + rng.expovariate(1.0), 1))
            else:
                waiting += 1
        elif waiting:
            waiting -= 1
            heapq.heappush(agenda, (now_s + rng.expovariate(1.0), 1))
        else:
            busy -= 1
    return events / (time.perf_counter() - begun_s)


def simpy_loop() -> float:
    """Run the same queue as SimPy processes; events per second."""
    rng = random.Random(0)
    env = simpy.Environment()
    servers = simpy.Resource(env, capacity=4)

    def customer() -> "simpy.events.ProcessGenerator":
        with servers.request() as place:
            yield place
            yield env.timeout(rng.expovariate(1.0))

    def source() -> "simpy.events.ProcessGenerator":
        for _ in range(SERVED // 4):
            yield env.timeout(rng.expovariate(3.5))
            env.process(customer())

    env.process(source())
    begun_s = time.perf_counter()
    env.run()
    return 2 * (SERVED // 4) / (time.perf_counter() - begun_s)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/public"))
    parser.add_argument("--only", choices=("hour", "loops", "growth", "reference"))
    options = parser.parse_args()
    trace = options.data / "requests.parquet"
    parts: dict[str, Callable[[], None]] = {
        "hour": lambda: one_hour(trace),
        "loops": event_loops,
        "growth": growth,
        "reference": lambda: against_reference(trace),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
