"""What order alone is worth: the sample on two crowded replicas, one ordering an arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from concertmaster import compose
from concertmaster.core.fleet import Fleet
from concertmaster.observe.plot_kinds import CdfPlot, Line, LinePlot, Plot
from concertmaster.reproduce.capacity import capacity_rps
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.reproduce.ledger import FOLDER
from concertmaster.reproduce.study import (
    Cell,
    Claim,
    Estimate,
    Figures,
    Results,
    Summary,
    Table,
)
from concertmaster.reproduce.window import figures, makespans_s, middle, quantiles
from concertmaster.workload.load import load_workloads
from concertmaster.workload.plan import WorkflowPlan

FLEET, WORKLOAD = "contended", "sample"
SETTING = f"{FLEET}/{WORKLOAD}"
ARMS = ("fcfs", "sjf", "las", "mlfq", "oracle-stjf")
LOADS = (0.5, 0.8, 1.0, 1.2)
MORE_LOADS = (0.3, 0.9, 1.1, 1.4)
PEAK = 1.2
"""A fifth more than the fleet can finish, as in a rush: calls wait, and order matters."""

WORKFLOWS = 800
MEAN, P95 = "makespan_s.mean", "makespan_s.p95"


@cache
def _fleet() -> Fleet:
    return study_fleet(FLEET)


@cache
def _templates() -> tuple[WorkflowPlan, ...]:
    return load_workloads([WORKLOAD], seed=0).workflows


@cache
def _capacity_rps() -> float:
    return capacity_rps(_fleet(), _templates(), keep_in=FOLDER)


@dataclass(frozen=True, slots=True)
class Orders:
    """Five orderings, the same placement."""

    name: str = "orders"
    title: str = "What order alone is worth"
    modules: tuple[str, ...] = ("orders",)

    @property
    def settings(self) -> Mapping[str, object]:
        """How many workflows a run has."""
        return {"workflows": WORKFLOWS}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Every ordering at every load; the full grid has eight loads."""
        loads = sorted(LOADS + MORE_LOADS * full)
        return [
            Cell(setting=SETTING, arm=arm, load=load, seed=seed)
            for seed, load, arm in product(range(seeds), loads, ARMS)
        ]

    def run(self, cell: Cell) -> Figures:
        """Draw workflows at this load and play them under this ordering."""
        rate_rps = cell.load * _capacity_rps()
        workload = draw(_templates(), workflows=WORKFLOWS, rate_rps=rate_rps, seed=cell.seed)
        run = compose.simulate(_fleet(), workload, cell.arm, seed=cell.seed)
        spread_s = quantiles(makespans_s(middle(run)))
        return {**figures(run), "capacity_rps": _capacity_rps(), "makespans_s": spread_s}

    def summarise(self, results: Results) -> Summary:
        """Compare each ordering with first come, first served."""
        capacity = results.values("capacity_rps", setting=SETTING, arm="fcfs", load=1.0)[0]
        return Summary(
            claims=_claims(results),
            tables=(
                _table("Mean makespan, seconds", MEAN, results),
                _table("P95 makespan, seconds", P95, results),
            ),
            plots=_plots(results),
            notes=(
                f"load 1 is the capacity, {capacity:.3g} workflows/s; a rush is load {PEAK:g}",
                f"{WORKFLOWS} workflows a run; figures leave out the first and last tenth to come",
            ),
        )


def _claims(results: Results) -> tuple[Claim, ...]:
    def over_fcfs(figure: str, arm: str, load: float) -> list[float]:
        return results.ratios(figure, arm, "fcfs", settings=[SETTING], loads=[load])

    return (
        Claim.over_seeds(
            "las-mean",
            "mean makespan in a rush, las / fcfs",
            over_fcfs(MEAN, "las", PEAK),
            "at most",
            0.9,
        ),
        Claim.over_seeds(
            "las-tail",
            "P95 makespan in a rush, las / fcfs",
            over_fcfs(P95, "las", PEAK),
            "at most",
            1.2,
            note="a long workflow waits behind every newcomer; sjf and the oracle do not pay this",
        ),
        Claim.over_seeds(
            "oracle-mean",
            "mean makespan in a rush, oracle-stjf / fcfs",
            over_fcfs(MEAN, "oracle-stjf", PEAK),
            "at most",
            0.8,
        ),
        Claim.over_seeds(
            "las-idle",
            "mean makespan at half load, las / fcfs",
            over_fcfs(MEAN, "las", 0.5),
            "at most",
            1.01,
        ),
    )


def _table(title: str, figure: str, results: Results) -> Table:
    return Table(
        title=title,
        columns=("ordering", *(f"load {load:g}" for load in results.loads)),
        rows=tuple(
            (
                arm,
                *(
                    Estimate.of(results.values(figure, setting=SETTING, arm=arm, load=load))
                    for load in results.loads
                ),
            )
            for arm in results.arms
        ),
    )


def _plots(results: Results) -> Mapping[str, Plot]:
    over_load = LinePlot(
        title="Mean makespan by load",
        x_label="load, share of capacity",
        y_label="mean makespan, seconds",
        panels={SETTING: [_line(results, arm) for arm in results.arms]},
    )
    spread = CdfPlot(
        title="Makespans",
        x_label="makespan, seconds",
        panels={
            f"load {load:g}": {arm: _all_makespans_s(results, arm, load) for arm in results.arms}
            for load in results.loads
        },
    )
    return {"orders-load": over_load, "orders-makespans": spread}


def _line(results: Results, arm: str) -> Line:
    points = [
        Estimate.of(results.values(MEAN, setting=SETTING, arm=arm, load=load))
        for load in results.loads
    ]
    means, halves = [one.mean for one in points], [one.half for one in points]
    return Line(label=arm, x=results.loads, y=means, half=halves)


def _all_makespans_s(results: Results, arm: str, load: float) -> list[float]:
    found = results.series("makespans_s", setting=SETTING, arm=arm, load=load)
    return [makespan_s for one in found for makespan_s in one]


STUDY = Orders()
