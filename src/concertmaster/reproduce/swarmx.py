"""Tails: routing by distributions, how much load it carries, scaling, and drift."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from concertmaster.reproduce import swarmx_world as world
from concertmaster.reproduce.search import highest
from concertmaster.reproduce.study import Cell, Figures, Results, Summary
from concertmaster.reproduce.swarmx_arms import (
    BLIND,
    DEEP_ROUTERS,
    DRIFTERS,
    FROZEN,
    LATE,
    LATE_TWO,
    MORE_ROUTERS,
    MORE_SCALED,
    MORE_SEARCHED,
    OURS,
    ROLES,
    ROUTERS,
    SCALED,
    SEARCHED,
    SETTLED,
    TWO,
)
from concertmaster.reproduce.swarmx_drift import SCENARIOS, drift
from concertmaster.reproduce.swarmx_scaling import SHAPES, scale
from concertmaster.reproduce.swarmx_summary import (
    DRIFTING,
    DRIFTS,
    RATES,
    ROUTING,
    SCALING,
    summary,
)
from concertmaster.reproduce.swarmx_world import DEEP
from concertmaster.reproduce.window import figures, makespans_s, middle, quantiles
from concertmaster.workload.records import RunRecords

HORIZON_S, FEWEST, MOST = 350.0, 200, 1200
"""A search runs each rate for so long, but with no fewer and no more workflows."""

LIKELY = {BLIND: 0.8, LATE: 0.8, TWO: 1.1, LATE_TWO: 1.1, ROLES: 1.1, OURS: 1.1}
"""Load at which the search of an arm's rate begins: a good guess saves runs."""

FLOOD = 3.0
"""Times load 1 at which a fleet shows what it finishes flat out, with the first seed alone."""

KEPT = 0.95
"""Share of workflows that must keep the promise where throughput is compared."""

DEFAULT_WORLDS = 3
DEFAULT_SCENARIOS = 2
DEFAULT_SHAPES = 1
MORE_LOADS = (0.5, 1.2)
UNCLAIMED = ("loss", FROZEN)
"""Run through drift in the full grid alone."""


_Column = tuple[str, str, float]


@dataclass(frozen=True, slots=True)
class SwarmX:
    """The recipe against its rivals: parts taken out, reach, scaling, recovery."""

    name: str = "swarmx"
    title: str = "Latency as a distribution: tails of routing, reach, scaling and recovery"
    modules: tuple[str, ...] = (
        "search",
        "stores",
        "swarmx",
        "swarmx_arms",
        "swarmx_drift",
        "swarmx_scaling",
        "swarmx_world",
    )

    @property
    def settings(self) -> Mapping[str, object]:
        """How long runs are."""
        return {"workflows": world.WORKFLOWS, "horizon_s": HORIZON_S, "slo": world.SLO_FACTOR}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Routers in three worlds, the rest in one; the full grid has all worlds.

        Cells that begin side by side need other worlds and forecasts, so that no two processes
        make the same ones.
        """
        worlds = list(world.WORLDS)[: None if full else DEFAULT_WORLDS]
        scenarios = list(SCENARIOS)[: None if full else DEFAULT_SCENARIOS]
        loads = sorted((1.0, *MORE_LOADS * full))
        shapes = list(SHAPES)[: None if full else DEFAULT_SHAPES]
        drifters = (*DRIFTERS, SETTLED)
        drifts = [pair for pair in product(scenarios, drifters) if full or pair != UNCLAIMED]
        routers = ROUTERS + (DEEP_ROUTERS + MORE_ROUTERS) * full
        searched = SEARCHED + MORE_SEARCHED * full
        scaled = SCALED + MORE_SCALED * full
        grid = [
            *(
                (f"{ROUTING}/{name}", arm, load)
                for load, arm, name in product(loads, routers, worlds)
            ),
            *_by_turns(
                [(f"{ROUTING}/{DEEP}", arm, 1.0) for arm in DEEP_ROUTERS if not full],
                [(f"{RATES}/{DEEP}", arm, 0.0) for arm in searched],
            ),
            *((f"{SCALING}/{name}", arm, 0.0) for name, arm in product(shapes, scaled)),
            *((f"{DRIFTS}/{name}", arm, 0.0) for name, arm in drifts),
        ]
        return [
            Cell(setting=setting, arm=arm, load=load, seed=seed)
            for seed, (setting, arm, load) in product(range(seeds), grid)
        ]

    def run(self, cell: Cell) -> Figures:
        """Route, search, scale or drift, as the setting says."""
        question, _, name = cell.setting.partition("/")
        if question == ROUTING:
            return route(name, cell)
        if question == RATES:
            return reach(name, cell.arm, seed=cell.seed)
        if question == SCALING:
            return scale(DEEP, name, cell.arm, seed=cell.seed)
        return drift(DRIFTING, name, cell.arm, seed=cell.seed)

    def summarise(self, results: Results) -> Summary:
        """State the claims."""
        return summary(results)


def _by_turns(*lists: Sequence[_Column]) -> list[_Column]:
    """Return the first of each, then the second of each."""
    return [one for row in zip_longest(*lists) for one in row if one is not None]


def route(name: str, cell: Cell) -> Figures:
    """Play one arm at a load on a fleet that stays as it is."""
    rate_rps = cell.load * world.rate_of(name)
    workflows = world.WORLDS[name].workflows
    run = world.play(name, cell.arm, rate_rps=rate_rps, workflows=workflows, seed=cell.seed)
    return {
        **figures(run),
        "rate_rps": rate_rps,
        "slo_s": world.slo_s(name),
        "attained_ratio": world.attained_ratio(run, world.slo_s(name)),
        "makespans_s": quantiles(makespans_s(middle(run))),
    }


def reach(name: str, arm: str, *, seed: int) -> Figures:
    """Find how much an arm carries; of the recipe also what the fleet finishes flat out."""
    rate_rps = reach_rps(name, arm, seed=seed)
    if arm != ROLES or seed:
        return {"rate_rps": rate_rps}
    flooded = world.play(
        name, arm, rate_rps=FLOOD * world.rate_of(name), workflows=world.WORKFLOWS, seed=seed
    )
    return {"rate_rps": rate_rps, "flat_out_rps": finished_rps(flooded)}


def finished_rps(run: RunRecords) -> float:
    """Workflows a second that a run finished between a quarter and three quarters of them."""
    ends_s = sorted(one.finished_s for one in run.workflows if one.finished_s is not None)
    quarter = len(ends_s) // 4
    return 2 * quarter / (ends_s[3 * quarter] - ends_s[quarter])


def reach_rps(name: str, arm: str, *, seed: int) -> float:
    """Find the most workflows a second at which 95 % of them keep the promise."""

    def meets(rate_rps: float) -> bool:
        workflows = max(FEWEST, min(MOST, round(rate_rps * HORIZON_S)))
        return world.keeps(name, arm, KEPT, rate_rps=rate_rps, workflows=workflows, seeds=[seed])

    start = LIKELY.get(arm, 1.0) * world.rate_of(name)
    return highest(meets, start=start, step=1.1, tolerance=0.05)


STUDY = SwarmX()
