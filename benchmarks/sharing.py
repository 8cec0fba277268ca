"""Who serves more models than fit, far overloaded; and what refusing lost causes brings.

python benchmarks/sharing.py [residencies | admission | kv]
"""

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from builders import (
    a_call,
    a_fleet,
    a_plan,
    a_pool,
    a_shared_fleet,
    a_sharing_pool,
    a_workload,
    chains,
)
from concertmaster.compose import simulate
from concertmaster.core.fleet import Fleet, Readiness
from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.reproduce.study import Estimate
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords

SEEDS = (1, 2, 3, 4)
MODELS = "abcde"
DUE_SEEDS = (1, 2, 3, 4, 5)
PERSON_S, PROGRAM_S = 30.0, 90.0
GATES = ("maestro:admits=no", "maestro", "maestro:doubt=1", "maestro:doubt=0")


class Case(NamedTuple):
    """One situation: load and fleet."""

    workflows: int
    gap_s: float
    zipf: float = 1.0
    nodes: int = 2
    sequences: int = 8
    host_bytes: int = 100_000_000_000


CASES = {
    "overload": Case(400, 0.12),
    "overload, all models alike": Case(400, 0.12, zipf=0.0),
    "overload, no RAM": Case(400, 0.12, host_bytes=0),
    "overload, one node": Case(300, 0.2, nodes=1),
    "overload, one call at a time": Case(150, 0.5, sequences=1),
    "overload, 32 calls at a time": Case(600, 0.06, sequences=32),
    "thrice that overload": Case(600, 0.04),
    "near what it can do": Case(400, 0.5),
    "light": Case(300, 1.0),
}


def load(case: Case, seed: int, *, due: bool = False) -> Workload:
    """Chains of one to four calls, each naming one of five models; half for people."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) ** case.zipf for i in range(len(MODELS))]
    plans, arrival_s = [], 0.0
    for i in range(case.workflows):
        arrival_s += rng.expovariate(1 / case.gap_s)
        calls = [
            a_call(
                stage,
                models=(ModelName(rng.choices(MODELS, weights)[0]),),
                prompt_tokens=300 + 200 * stage,
                output_tokens=rng.randint(20, 300),
                max_output_tokens=1024,
                role=("planner", "coder", "critic")[stage % 3],
            )
            for stage in range(rng.randint(1, 4))
        ]
        plan = a_plan(f"w{i:04d}", *calls, arrival_s=round(arrival_s, 3), app="chains")
        plans.append(_of_class(plan, due=due, person=rng.random() < 0.5))
    return a_workload(*plans)


def _of_class(plan: WorkflowPlan, *, due: bool, person: bool) -> WorkflowPlan:
    service_class = ServiceClass.INTERACTIVE if person else ServiceClass.BATCH
    deadline_s = (PERSON_S if person else PROGRAM_S) if due else None
    return replace(plan, service_class=service_class, deadline_s=deadline_s)


def fleet(case: Case) -> Fleet:
    """Nodes with room for two of the five models each."""
    pools = [a_sharing_pool(name, max_sequences=case.sequences) for name in MODELS]
    return a_shared_fleet(
        *pools,
        nodes=case.nodes,
        hbm_bytes=38_000_000_000,
        host_bytes=case.host_bytes,
        states={"a-0": Readiness.RUNNING},
    )


def p95(values: Sequence[float]) -> float:
    """Return the value that 95 % stay below."""
    return sorted(values)[int(0.95 * len(values))]


def waits(run: RunRecords) -> tuple[float, float, float, float]:
    """Mean and P95 of calls, P95 of makespans, loads."""
    calls_s = [c.finished_s - c.arrival_s for c in run.calls if c.finished_s is not None]
    whole_s = [w.finished_s - w.arrival_s for w in run.workflows if w.finished_s is not None]
    assert run.gauges is not None
    return statistics.mean(calls_s), p95(calls_s), p95(whole_s), run.gauges.replica_starts


def residencies() -> None:
    """Print how long calls take under each residency, everything else alike."""
    print("mean of seeds: call mean s, call P95 s, makespan P95 s, loads")
    for name, case in CASES.items():
        for of in ("fcfs/expected", "fcfs/qlm", "fcfs/lru-swap"):
            runs = [simulate(fleet(case), load(case, s), of, seed=s) for s in SEEDS]
            columns = zip(*map(waits, runs), strict=True)
            print(f"{name:30}{of:15}", *(f"{statistics.mean(col):7.1f}" for col in columns))


def admission() -> None:
    """Print the share of workflows in time, with and without refusals, over seeds."""
    print("workflows in time: of people, of programs, all, all less those of the first; refused")
    for name, simulated in _situations().items():
        by_policy = {of: [attainment(simulated(of, s)) for s in DUE_SEEDS] for of in GATES}
        freely = [run[2] for run in by_policy[GATES[0]]]
        for of, runs in by_policy.items():
            gains = [run[2] - other for run, other in zip(runs, freely, strict=True)]
            *shares, refused = zip(*runs, strict=True)
            columns = [*(Estimate.of(one) for one in (*shares, gains))]
            print(f"{name:26}{of:19}", *columns, f"{statistics.mean(refused):.0f}", sep="  ")


def _situations() -> dict[str, Callable[[str, int], RunRecords]]:
    def shared(of: str, seed: int, *, gap_s: float) -> RunRecords:
        case = Case(1000, gap_s)
        return simulate(fleet(case), load(case, seed, due=True), of, seed=seed)

    def alone(of: str, seed: int, *, gap_s: float) -> RunRecords:
        plans = [
            _of_class(plan, due=True, person=i % 2 == 0)
            for i, plan in enumerate(chains(700, gap_s=gap_s, seed=seed).workflows)
        ]
        own = a_fleet(a_pool(max_sequences=4), replicas=2)
        return simulate(own, a_workload(*plans), of, seed=seed)

    return {
        **{f"shared, one each {s} s": partial(shared, gap_s=s) for s in (0.28, 0.2)},
        **{f"one model, one each {s} s": partial(alone, gap_s=s) for s in (0.9, 0.6)},
    }


def attainment(run: RunRecords) -> tuple[float, float, float, float]:
    """Shares in time by class and in all, and how many were refused."""
    person = [w.met for w in run.workflows if w.service_class is ServiceClass.INTERACTIVE]
    program = [w.met for w in run.workflows if w.service_class is ServiceClass.BATCH]
    refused = sum(w.outcome == "rejected" for w in run.workflows)
    shares = [statistics.mean(met) for met in (person, program, [*person, *program])]
    return shares[0], shares[1], shares[2], float(refused)


def kv() -> None:
    """Print what each rule reserves for answers far below their caps, and what it costs."""
    print("rule: KV reserved GB s, preemptions, seconds until all were done")
    load = chains(150, gap_s=0.05, seed=30)
    for rule in ("worst-case", "paged", "forecast"):
        run = simulate(a_fleet(a_pool(kv_blocks=1600)), load, f"fcfs/static:kv={rule}", seed=1)
        assert run.gauges is not None
        reserved_gb_s, preemptions = run.gauges.kv_reserved_gb_s, run.gauges.preemptions
        print(f"{rule:12}{reserved_gb_s:7.0f}{preemptions:7.0f}{run.duration_s:7.0f}")


PARTS = {"residencies": residencies, "admission": admission, "kv": kv}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
