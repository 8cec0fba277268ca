"""What a second attempt for late calls brings, and what it costs, in simulation.

python benchmarks/hedging.py [SEEDS]

Eight replicas of one model, each with room for eight calls; chains of one to six calls, all of
them streams. Nobody is told of a fault, and the same faults befall every policy:

held     one call in a hundred begins 10 s late, wherever it is; drawn anew for each attempt
freezes  each replica begins no call for 5 to 15 s, about once a minute; what decodes goes on
spells   each step of a replica takes 50 times as long for 5 to 15 s, about once a minute
"""

import heapq
import itertools
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from builders import a_fleet, a_pool, chains
from concertmaster.compose import simulate
from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.events import Event
from concertmaster.core.fleet import Pool, ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.physics.batching import BatchingEngine, EngineCall, Milestone
from concertmaster.physics.fast import FastEngine
from concertmaster.sim.engines import engine_settings
from concertmaster.sim.incidents import Incident
from concertmaster.workload.records import RunRecords

PLAIN = "least-tokens+las"
HEDGED = ("hedge", "hedge:share=1")
WORKFLOWS, REPLICAS = 500, 8
HELD_RATIO, HELD_S = 0.01, 10.0
EVERY_S, LASTS_S, FACTOR = 60.0, (5.0, 15.0), 50.0
T_95 = {5: 2.776, 8: 2.365, 10: 2.262}
"""Two-sided 95 % quantiles of Student's law, by the number of seeds."""

Span = tuple[float, float]


class Case(NamedTuple):
    """One load and one kind of fault."""

    gap_s: float
    fault: str


CASES = {
    f"{load}, {fault}": Case(gap_s, fault)
    for load, gap_s in (("a quarter full", 0.5), ("half full", 0.25), ("more than full", 0.13))
    for fault in ("no faults", "held", "freezes", "spells")
}


class Reluctant(FastEngine):
    """An engine model that holds calls back before it begins them.

    Args:
        pool: Whose replica it is.
        frozen: When it begins none.
        held_ratio: Share of calls that begin late.
        rng: Draws which.
    """

    def __init__(
        self, pool: Pool, frozen: Sequence[Span], held_ratio: float, rng: random.Random
    ) -> None:
        super().__init__(pool.curve, engine_settings(pool))
        self._frozen = frozen
        self._held_ratio = held_ratio
        self._rng = rng
        self._order = itertools.count()
        self._back: list[tuple[float, int, EngineCall]] = []

    def submit(self, now_s: float, call: EngineCall) -> None:
        """Take in a call, now or later."""
        begins_s = next((end_s for start_s, end_s in self._frozen if start_s <= now_s < end_s), 0.0)
        if self._rng.random() < self._held_ratio:
            begins_s = max(begins_s, now_s + HELD_S)
        if begins_s > now_s:
            heapq.heappush(self._back, (begins_s, next(self._order), call))
        else:
            super().submit(now_s, call)

    def cancel(self, now_s: float, request_id: RequestId) -> bool:
        """Drop a call."""
        kept = [entry for entry in self._back if entry[2].request_id != request_id]
        if len(kept) == len(self._back):
            return super().cancel(now_s, request_id)
        self._back = kept
        heapq.heapify(kept)
        return True

    def next_milestone_s(self) -> float | None:
        """Come back when a held call begins, too."""
        times_s = [super().next_milestone_s(), self._back[0][0] if self._back else None]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def advance(self, now_s: float) -> list[Milestone]:
        """Begin the calls whose time has come."""
        while self._back and self._back[0][0] <= now_s:
            super().submit(now_s, heapq.heappop(self._back)[2])
        return super().advance(now_s)


class Run(NamedTuple):
    """What came of one run.

    Attributes:
        prefilled: Prompt tokens that engines computed.
    """

    makespan_s_p50: float
    makespan_s_p99: float
    ttft_s_p99: float
    hedges: int
    dispatches: int
    prefilled: int


def spans(name: str, until_s: float) -> list[Span]:
    """Draw when one replica has its fault."""
    rng, found = random.Random(name), []
    at_s = rng.expovariate(1 / EVERY_S)
    while at_s < until_s:
        lasts_s = rng.uniform(*LASTS_S)
        found.append((at_s, at_s + lasts_s))
        at_s += lasts_s + rng.expovariate(1 / EVERY_S)
    return found


def incidents(replica_id: ReplicaId, slow: Sequence[Span]) -> list[Incident]:
    """Slow a replica down for a while, several times."""
    return [
        Incident(at_s, "slows", replica_id, factor)
        for span in slow
        for at_s, factor in zip(span, (FACTOR, 1.0), strict=True)
    ]


def quantile(values: Sequence[float], level: float) -> float:
    """Return the nearest-rank quantile."""
    return sorted(values)[math.ceil(level * len(values)) - 1]


def play(case: Case, policy: str, seed: int) -> Run:
    """Play one workload, the same for every policy."""
    fleet = a_fleet(a_pool(max_sequences=8), replicas=REPLICAS)
    when = {name: spans(f"{seed} {name}", WORKFLOWS * case.gap_s) for name in fleet.replicas}
    frozen = iter(when.values()) if case.fault == "freezes" else itertools.repeat([])
    engines: list[FastEngine] = []
    sent: list[bool] = []

    def make_engine(pool: Pool) -> BatchingEngine:
        rng = random.Random(f"{seed} {len(engines)}")
        held_ratio = HELD_RATIO if case.fault == "held" else 0.0
        engines.append(Reluctant(pool, next(frozen), held_ratio, rng))
        return engines[-1]

    def observe(_: float, __: Event, actions: list[Action]) -> None:
        sent.extend(action.hedge for action in actions if isinstance(action, Dispatch))

    slow = when.items() if case.fault == "spells" else ()
    records = simulate(
        fleet,
        chains(WORKFLOWS, gap_s=case.gap_s, seed=seed),
        policy,
        seed=seed,
        make_engine=make_engine,
        incidents=[one for name, found in slow for one in incidents(name, found)],
        observe=observe,
    )
    return measured(records, engines, sent)


def measured(records: RunRecords, engines: Sequence[FastEngine], sent: Sequence[bool]) -> Run:
    """Sum up a run, all of whose calls must have been served."""
    assert all(call.outcome == "served" for call in records.calls)
    whole_s = [w.finished_s - w.arrival_s for w in records.workflows if w.finished_s is not None]
    first_s = [c.first_token_s - c.arrival_s for c in records.calls if c.first_token_s is not None]
    return Run(
        quantile(whole_s, 0.5),
        quantile(whole_s, 0.99),
        quantile(first_s, 0.99),
        sum(sent),
        len(sent),
        sum(engine.prefilled_tokens for engine in engines),
    )


def interval(values: Sequence[float]) -> str:
    """Return mean and half width of the 95 % interval."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def show(name: str, runs: Sequence[Run], plain: Sequence[Run]) -> None:
    """Print a line: times, two paired ratios, and what it cost."""
    cells = [interval([getattr(run, key) for run in runs]) for key in Run._fields[:3]]
    for key in ("makespan_s_p50", "makespan_s_p99"):
        pairs = zip(runs, plain, strict=True)
        cells.append(interval([getattr(a, key) / getattr(b, key) for a, b in pairs]))
    hedges = 100 * sum(run.hedges for run in runs) / sum(run.dispatches for run in runs)
    extra = 100 * (sum(run.prefilled for run in runs) / sum(run.prefilled for run in plain) - 1)
    print(f"  {name:18}", *(f"{cell:>16}" for cell in cells), f"{hedges:6.2f} {extra:6.2f}")


def main() -> None:
    """Print every case."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    heads = ("makespan P50 s", "P99 s", "TTFT P99 s", "P50 / plain", "P99 / plain")
    print(" " * 20, *(f"{head:>16}" for head in heads), "hedges %, more prefill %")
    for name, case in CASES.items():
        print(name)
        plain = [play(case, PLAIN, seed) for seed in seeds]
        show("plain", plain, plain)
        for tail in HEDGED:
            show(tail, [play(case, f"{PLAIN}/{tail}", seed) for seed in seeds], plain)


if __name__ == "__main__":
    main()
