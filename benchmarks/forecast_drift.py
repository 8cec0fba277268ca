"""Whether forecasts stay true while a fleet and its users change: a simulated week.

    python benchmarks/forecast_drift.py --plot drift.png

Recorded workflows arrive in bursts at two pools. After a third of the week other apps take
over that the predictor has never seen; after two thirds the engines of one pool take 30 %
longer than their curve says. Every seed is played with adaptation on, and once for each
change with what was learnt before it kept as it is. Measured is how often answers stay
within the P95 that was stated of their tokens and of their seconds from dispatch to end.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.forecast_drift_figures import (
    ARMS,
    HEAD,
    LEVEL,
    SLOWED,
    Label,
    Plan,
    Played,
    draw,
    figures,
    show,
)

from concertmaster.compose import build_fleet
from concertmaster.config import FleetFile, PoolSection
from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.errors import InputError
from concertmaster.core.events import Event, RequestArrived, RequestFinished
from concertmaster.core.fleet import Fleet, Pool, PoolId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.learning.datasets import key_of, refuse_overlap
from concertmaster.learning.drift import DriftWatch
from concertmaster.observe.plots import check_plot_path
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy
from concertmaster.predictors.evidence import Evidence
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.service import ServiceTimes, Work, work_of
from concertmaster.predictors.store import DEFAULT, load_predictor, read_store
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.split import held_out

WEEK_S = 604_800.0
DATA = Path("../shared/data/public/workflow_stages.parquet")
BEFORE = ("intercode_sql", "intercode_bash")
"""Apps of the first third; all others of the file follow."""

MODEL = "llama-3.1-8b-instruct"
SLOWER = 1.3
BURST, GAP_S = 8, 3.0
"""Workflows that come together, and mean seconds between them."""


# The week


def week_of(plans: Sequence[WorkflowPlan], plan: Plan, seed: int) -> Workload:
    """Draw workflows for each third and let them arrive in bursts.

    Raises:
        InputError: There are no workflows for one of the mixes.
    """
    rng = random.Random(f"{seed} week")
    first_s, _ = plan.changes_s
    parts = []
    for before, calls, span in (
        (True, plan.calls, (0.0, first_s)),
        (False, 2 * plan.calls, (first_s, plan.week_s)),
    ):
        mix = [one for one in plans if (one.app in BEFORE) == before]
        if not mix:
            which = " and ".join(BEFORE) if before else f"apps other than {' and '.join(BEFORE)}"
            raise InputError("--data", "", f"expected workflows of {which}, found none")
        parts += _arriving(_drawn(mix, calls, rng), span, rng)
    ranked = sorted(parts, key=lambda one: (one.arrival_s, one.workflow_id))
    return Workload(name="week", workflows=tuple(ranked))


def _drawn(mix: Sequence[WorkflowPlan], calls: int, rng: random.Random) -> list[WorkflowPlan]:
    """Draw workflows without replacement until they have as many calls, or all."""
    chosen: list[WorkflowPlan] = []
    for one in rng.sample(mix, len(mix)):
        if calls <= 0:
            break
        chosen.append(one)
        calls -= len(one.calls)
    return chosen


def _arriving(
    chosen: Sequence[WorkflowPlan], span: tuple[float, float], rng: random.Random
) -> list[WorkflowPlan]:
    timed = []
    for start in range(0, len(chosen), BURST):
        now_s = rng.uniform(*span)
        for one in chosen[start : start + BURST]:
            name = WorkflowId(f"{one.app} {one.workflow_id}")
            timed.append(replace(one, workflow_id=name, arrival_s=now_s))
            now_s += rng.expovariate(1 / GAP_S)
    return timed


def two_pools() -> Fleet:
    """Two replicas each of one 8B model on two kinds of GPU."""
    sections = [
        PoolSection(name=name, model=MODEL, gpu=gpu, replicas=2)
        for name, gpu in (("a100", "a100-80g"), (SLOWED, "l40s"))
    ]
    return build_fleet(FleetFile(pools=sections), name="two-pools")


# One run


class Switch:
    """Passes on to a predictor that learns; once stopped, to one that keeps what that learnt."""

    def __init__(self, models: str) -> None:
        self._current, self._kept = (predictor_of(models, adapt=adapt) for adapt in (True, False))
        self._kept.evidence = self._current.evidence
        self._kept.calibration = self._current.calibration

    def stop(self) -> None:
        """Learn no more; histories of workflows go on."""
        self._current = self._kept

    def __getattr__(self, name: str) -> object:
        """Pass on."""
        return getattr(self._current, name)


def predictor_of(models: str, *, adapt: bool) -> LearnedPredictor:
    """Return laws that begin empty, or what a store holds."""
    names = (ModelName(MODEL),)
    if models == "none":
        return LearnedPredictor(Evidence(), None, models=names, adapt=adapt)
    return load_predictor(folder_of(models), models=names, adapt=adapt)


def folder_of(models: str) -> Path:
    """Return where a store lies."""
    return DEFAULT if models == "default" else Path(models)


class Sent(NamedTuple):
    """A call under way, and what was stated of its seconds."""

    dispatched_s: float
    pool: PoolId
    work: Work
    stated: Quantiles


class Observer:
    """Looks over the driver's shoulder: states seconds at dispatch, takes labels at the end."""

    def __init__(self, scheduler: Scheduler, plan: Plan, played: Played) -> None:
        self._scheduler, self._plan, self._played = scheduler, plan, played
        self.predictor = Switch(plan.models)
        self._asked: dict[RequestId, tuple[Request, Forecast]] = {}
        self._sent: dict[RequestId, Sent] = {}
        self._service = ServiceTimes()
        self._watches = {"tokens": DriftWatch(), "seconds": DriftWatch(step=0.0)}
        self._labels, self._third = 0, 0
        self.engines: list[FastEngine] = []

    def make_engine(self, pool: Pool) -> FastEngine:
        """Build an engine, and remember it if it will be slowed."""
        engine = FastEngine(pool.curve, engine_settings(pool))
        if pool.pool_id == SLOWED:
            self.engines.append(engine)
        return engine

    def __call__(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Take in an event of the core."""
        self._pass_changes(now_s)
        if isinstance(event, RequestArrived):
            self._asked[event.request.request_id] = event.request, event.forecast
        elif isinstance(event, RequestFinished):
            self._label(now_s, event.request_id, event.output_tokens)
        for action in actions:
            if isinstance(action, Dispatch):
                self._state(now_s, action)

    def _pass_changes(self, now_s: float) -> None:
        third = sum(now_s >= change_s for change_s in self._plan.changes_s)
        if third == self._third:
            return
        self._third, self._labels = third, 0
        if third == ARMS[self._played.arm]:
            self._service.adapt = False
            self.predictor.stop()
        for watch in self._watches.values():
            watch.reset()
        for engine in self.engines if third == 2 else ():
            engine.slowdown = SLOWER

    def _state(self, now_s: float, action: Dispatch) -> None:
        request, forecast = self._asked[action.request_id]
        replica = self._scheduler.replicas[action.replica_id]
        stated = self._service.predict(request, forecast, replica)
        sent = Sent(now_s, replica.pool.pool_id, work_of(request, replica), stated)
        self._sent[action.request_id] = sent

    def _label(self, now_s: float, request_id: RequestId, output_tokens: int) -> None:
        request, forecast = self._asked.pop(request_id)
        sent = self._sent.pop(request_id)
        tokens = forecast.output_law(ModelName(MODEL))
        assert tokens is not None, "the predictor always answers"
        actual_s = now_s - sent.dispatched_s
        self._played.labels.append(
            Label(
                now_s,
                request.arrival_s,
                sent.pool,
                output_tokens <= tokens.at(LEVEL),
                actual_s <= sent.stated.at(LEVEL),
            )
        )
        self._labels += 1
        self._watch("tokens", ("tokens",), tokens, output_tokens, now_s)
        self._watch("seconds", (sent.pool,), sent.stated, actual_s, now_s)
        self._service.learn(
            now_s,
            request,
            sent.pool,
            work=sent.work,
            stated=sent.stated,
            output_tokens=output_tokens,
            actual_s=actual_s,
        )

    def _watch(
        self, name: str, group: tuple[str, ...], law: Quantiles, actual: float, now_s: float
    ) -> None:
        alarm = self._watches[name].add(group, law, actual, now_s)
        if alarm is not None:
            self._played.alarms.setdefault(f"{name} {self._third}", self._labels)


def play(plans: Sequence[WorkflowPlan], plan: Plan, seed: int, arm: str) -> Played:
    """Play one week; paces of replicas are followed where adaptation stays on."""
    played = Played(seed, arm)
    scheduler = Scheduler(two_pools(), policy("round-robin"), random.Random(seed))
    observer = Observer(scheduler, plan, played)
    Simulation(
        scheduler,
        week_of(plans, plan, seed),
        cast("Predictor", observer.predictor),
        observer.make_engine,
        observe=observer,
        follow_pace=arm == "on",
    ).run(policy="round-robin", seed=seed)
    return played


# The command


def main() -> None:
    """Play, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--models", default="none", help='a store, "default", or "none"')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3500, help="of each third, about")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two seeds of 1,200 calls a third")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.calls = 2, 1200
    if options.data == DATA and not DATA.exists():
        print(f"{DATA} is not there: nothing is measured")
        return
    try:
        _measure(options)
    except InputError as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace) -> None:
    for name in ("seeds", "calls", "jobs"):
        if getattr(options, name) < 1:
            found = f"expected an integer >= 1, got {getattr(options, name)}"
            raise InputError(f"--{name}", "", found)
    if options.plot is not None:
        check_plot_path(options.plot)
    _PLANS[:] = fresh_plans(options.data, options.models)
    plan = Plan(options.calls, WEEK_S, options.models)
    week_of(_PLANS, plan, 0)
    jobs = [(plan, seed, arm) for seed in range(options.seeds) for arm in ARMS]
    fork = multiprocessing.get_context("fork")  # plans are shared, not copied
    with ProcessPoolExecutor(options.jobs, mp_context=fork) as pool:
        played = pool.map(_play, jobs)
        runs = list(track(played, "weeks", len(jobs), console=Console(stderr=True)))
    rows = list(figures(runs, plan))
    print(f"{options.seeds} seeds, {statistics.fmean(len(r.labels) for r in runs):,.0f} calls each")
    print(HEAD)
    for row in sorted((r for r in rows if r["third"]), key=lambda r: r["third"]):
        print(show(row))
    if options.json:
        options.json.write_text(json.dumps(rows))
    if options.plot is not None:
        draw(runs, plan, options.plot)


_PLANS: list[WorkflowPlan] = []


def _play(job: tuple[Plan, int, str]) -> Played:
    plan, seed, arm = job
    return play(_PLANS, plan, seed, arm)


def fresh_plans(data: Path, models: str) -> list[WorkflowPlan]:
    """Read recorded workflows; if a store is measured, those that it was not trained on.

    Raises:
        InputError: They cannot be read, or the store has seen one of them.
    """
    plans = list(load_source(str(data), seed=0).plans)
    if models == "none":
        return plans
    fresh = [one for one in plans if held_out(key_of(one))]
    seen = read_store(folder_of(models)).seen
    refuse_overlap(seen, fresh, [], where=models, remedy="train it on the other rows")
    return fresh


if __name__ == "__main__":
    main()
