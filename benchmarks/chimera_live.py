"""Is what choosing models by forecast does real? The same workflows simulated and live.

    python benchmarks/chimera_live.py [--data FOLDER] [--workflows 300] [--speedup 4]

Questions that training held back arrive at a share of what a fleet of one small and one big
model can do, under a policy that does not choose and one that does. Both drivers begin with
the same forecasts: those that ship, after a rehearsal on other questions; and they learn from
every answer and grade. Live, engines are emulated and a gateway stands before them, in
processes of their own; agents send every prompt with its text, and grade their workflows.

One call that goes elsewhere sends others elsewhere too, so a simulation is repeated with
arrivals moved by some milliseconds: what differs between those is luck, live too.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from concertmaster import compose, local
from concertmaster.config import EmulatorSection, FleetFile, GatewaySection, PoolSection
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.replay import Replay
from concertmaster.learning.datasets import key_of
from concertmaster.observe.console import progress_bar
from concertmaster.observe.report import summary
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.predictors.store import DEFAULT as SHIPPED
from concertmaster.predictors.store import pack_laws, read_store, restore, write_store
from concertmaster.reproduce.capacity import capacity_rps
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.window import makespans_s
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords
from concertmaster.workload.split import held_out

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "public"
TEMPLATES = ("solver", "planner-solver", "planner-solver-verifier-solver")
SMALL, BIG = "llama-3.1-8b-instruct", "llama-3.1-70b-instruct"
POLICIES = ("vllm", "chimera")
SEED = 0
REHEARSED = 600
"""Workflows that are rehearsed on."""
REPEATS = 6
JITTER_S = 0.05
"""How far arrivals are moved in repeats of a simulation, at most."""
MOST_OFF = 0.2
"""How far the live gain may be from the simulated one, as a share of it."""
LUCK = 2.0
"""Or by how many standard deviations of the simulated gain, whichever is more."""
MOST_SUCCESS_OFF = 0.03
FORECAST_BUDGET_MS = 1000.0
"""Two cores are shared by all four processes: a forecast that is held up is waited for."""


class Figures(NamedTuple):
    """What is held side by side.

    Attributes:
        token_s: Mean over workflows of makespan by output tokens.
        big_ratio: Share of calls that the big model answered.
    """

    token_s: float
    makespan_s_mean: float
    makespan_s_p95: float
    success_ratio: float
    big_ratio: float


def fleet_file(models: str, speedup: float) -> FleetFile:
    """Return the fleet: one small model on one GPU, one big one on four.

    Args:
        models: Folder of the store that forecasts.
        speedup: Of the emulated engines.
    """
    return FleetFile(
        name="two models",
        pools=[
            PoolSection(name="small", model=SMALL, gpu="a6000", replicas=1, max_sequences=64),
            PoolSection(
                name="big",
                model=BIG,
                gpu="a100-80g",
                replicas=1,
                tensor_parallel=4,
                max_sequences=64,
            ),
        ],
        gateway=GatewaySection(
            models=models, forecast_budget_ms=FORECAST_BUDGET_MS, health_interval_s=60.0
        ),
        emulator=EmulatorSection(speedup=speedup),
    )


def read(data: Path) -> list[WorkflowPlan]:
    """Read every question in every template; no tool plays a part in them."""
    sources = [load_source(f"{data}#mmlu_pro:{template}", seed=SEED) for template in TEMPLATES]
    return [_without_tools(plan) for source in sources for plan in source.plans]


def _without_tools(plan: WorkflowPlan) -> WorkflowPlan:
    """Say of each call what a gateway sees: that no tool was asked for nor has answered."""
    calls = tuple(replace(call, after_tool=False, tool_call=False) for call in plan.calls)
    return replace(plan, calls=calls)


def rehearse(fleet: Fleet, workload: Workload, folder: Path) -> None:
    """Write a store that has seen a workload served, besides what the shipped one has seen."""
    store = read_store(SHIPPED)
    predictor = restore(store, models=[pool.model.name for pool in fleet.pools])
    Simulation(
        Scheduler(fleet, policy_named(POLICIES[0]), random.Random(SEED)),
        workload,
        predictor,
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
    ).run(policy=POLICIES[0], seed=SEED)
    assert predictor.judge is not None
    learnt = {
        "laws": pack_laws(predictor.evidence),
        "calibration": predictor.calibration.arrays(),
        "success": predictor.judge.head.arrays(),
    }
    write_store(folder, store.manifest, {**store.parts, **learnt}, store.seen)


def figures(run: RunRecords) -> Figures:
    """Sum a run up.

    Raises:
        InputError: A workflow was not completed.
    """
    ends_s = {one.workflow_id: one.finished_s for one in run.workflows}
    arrivals_s = {one.workflow_id: one.arrival_s for one in run.workflows}
    tokens = dict.fromkeys(ends_s, 0)
    for call in run.calls:
        tokens[call.workflow_id] += call.output_tokens
    token_s = []
    for name, end_s in ends_s.items():
        if end_s is None:
            raise InputError(run.policy, name, "this workflow was not completed")
        token_s.append((end_s - arrivals_s[name]) / tokens[name])
    makespan_s = summary(makespans_s(run))
    assert makespan_s["mean"] is not None
    assert makespan_s["p95"] is not None
    return Figures(
        token_s=fmean(token_s),
        makespan_s_mean=makespan_s["mean"],
        makespan_s_p95=makespan_s["p95"],
        success_ratio=fmean(one.success or 0.0 for one in run.workflows),
        big_ratio=sum(call.model == BIG for call in run.calls) / len(run.calls),
    )


def simulated(fleet: Fleet, workload: Workload, policy: str, models: str) -> Iterator[Figures]:
    """Play it in virtual time, again and again with arrivals moved a little."""
    for repeat in range(REPEATS):
        rng = random.Random(f"{SEED} {repeat}")
        plans = [
            replace(plan, arrival_s=plan.arrival_s + rng.uniform(0.0, JITTER_S * bool(repeat)))
            for plan in workload
        ]
        plans.sort(key=lambda plan: (plan.arrival_s, plan.workflow_id))
        moved = replace(workload, workflows=tuple(plans))
        yield figures(compose.simulate(fleet, moved, policy, seed=SEED, models=models))


def live(
    file: FleetFile, workload: Workload, policy: str, progress: Callable[[int], None]
) -> Figures:
    """Play it through a gateway before emulated engines."""
    speedup = file.emulator.speedup
    with local.engines(file) as urls, local.gateway(file, urls, policy, seed=SEED) as url:
        player = Replay(
            url=url, workload=workload, speedup=speedup, bare_prompts=True, progress=progress
        )
        return figures(compose.run_loop(player.run(policy=policy, seed=SEED)))


def gains(plain: Sequence[Figures], chosen: Sequence[Figures]) -> list[float]:
    """Share of the seconds a token that choosing saves, run by run."""
    return [1 - b.token_s / a.token_s for a, b in zip(plain, chosen, strict=True)]


ROWS = (
    ("E2E, s a token", "token_s", 4),
    ("makespan mean, s", "makespan_s_mean", 2),
    ("makespan P95, s", "makespan_s_p95", 2),
    ("success", "success_ratio", 3),
    ("calls on 70B", "big_ratio", 3),
)


def table(there: Mapping[str, Sequence[Figures]], here: Mapping[str, Figures]) -> str:
    """Lay figures out: simulated ones as mean and standard deviation of the repeats."""
    heads = [head for policy in POLICIES for head in (f"{policy} simulated", f"{policy} live")]
    lines = [f"{'':<18}" + "".join(f"{head:>20}" for head in heads)]
    for title, name, digits in ROWS:
        cells = []
        for policy in POLICIES:
            values = [getattr(one, name) for one in there[policy]]
            cells.append(f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}")
            cells.append(f"{getattr(here[policy], name):.{digits}f}")
        lines.append(f"{title:<18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    """Run all; exit code 1 if what is live differs by more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the public data")
    parser.add_argument("--workflows", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.9, help="of the fleet's capacity")
    parser.add_argument("--speedup", type=float, default=4.0)
    asked = parser.parse_args()
    plans = read(asked.data)
    fresh = [plan for plan in plans if held_out(key_of(plan))]
    known = [plan for plan in plans if not held_out(key_of(plan))]
    there: dict[str, list[Figures]] = {}
    here: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = f"{folder}/store"
        file = fleet_file(models, asked.speedup)
        fleet = compose.build_fleet(file, name="local")
        rate_rps = asked.share * capacity_rps(fleet, fresh, seed=SEED)
        workload = draw(fresh, workflows=asked.workflows, rate_rps=rate_rps, seed=SEED)
        rehearse(
            fleet, draw(known, workflows=REHEARSED, rate_rps=rate_rps, seed=SEED), Path(models)
        )
        print(
            f"{len(workload)} workflows, {workload.requests} calls, {rate_rps:.2f} workflows/s = "
            f"{asked.share:g} of capacity, {asked.speedup:g} x real time\n",
            flush=True,
        )
        with progress_bar(len(workload)) as bar:
            for policy in POLICIES:
                bar.begin(f"live, {policy}")
                here[policy] = live(file, workload, policy, bar.update)
                there[policy] = list(simulated(fleet, workload, policy, models))
    print(table(there, here))
    there_gains = gains(*(there[policy] for policy in POLICIES))
    (here_gain,) = gains(*([here[policy]] for policy in POLICIES))
    gain, luck = fmean(there_gains), stdev(there_gains)
    success_off = max(
        abs(here[policy].success_ratio - fmean(one.success_ratio for one in there[policy]))
        for policy in POLICIES
    )
    print(
        f"\nE2E a token, chimera below vllm: simulated {gain:+.1%} ± {luck:.1%}, "
        f"live {here_gain:+.1%}; they differ by {100 * (here_gain - gain):+.1f} points, "
        f"success by at most {100 * success_off:.1f}"
    )
    off = abs(here_gain - gain)
    return int(off > max(MOST_OFF * abs(gain), LUCK * luck) or success_off > MOST_SUCCESS_OFF)


if __name__ == "__main__":
    sys.exit(main())
