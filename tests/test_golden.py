"""Golden traces: recorded events through the core give the recorded decisions.

``python tests/test_golden.py --rewrite`` records them again; say under "Changed results" why.
"""

import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from builders import a_call, a_fleet, a_plan, a_pool, a_workload, chains
from concertmaster.core.actions import Dispatch
from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId
from concertmaster.core.policy import Policy
from concertmaster.core.scheduler import Scheduler
from concertmaster.observe.trace import VERSION, Entry, Header, TraceReader, TraceWriter
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import Workload

FOLDER = Path(__file__).parents[1] / "traces"
SUFFIX = ".trace.jsonl"


def mixed() -> Fleet:
    return a_fleet(
        a_pool("p", max_sequences=2),
        a_pool("q", model="small", slowness=0.5, max_sequences=1, priority_scheduling=True),
        name="mixed",
    )


def pair() -> Fleet:
    return a_fleet(a_pool(max_sequences=3), replicas=2, name="pair")


def asleep() -> Fleet:
    states = {"p-0": Readiness.SLEEPING, "p-1": Readiness.DISK}
    return a_fleet(a_pool(max_sequences=2), replicas=2, states=states, name="asleep")


FLEETS: dict[str, Callable[[], Fleet]] = {"mixed": mixed, "pair": pair, "asleep": asleep}


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What to record."""

    fleet: str
    policy: str
    workload: Workload
    incidents: tuple[tuple[float, Event], ...] = ()


GOLDEN: dict[str, Golden] = {
    "mixed-fleet": Golden(
        fleet="mixed", policy="least-tokens+las", workload=chains(12, gap_s=0.3, seed=1)
    ),
    "replica-death": Golden(
        fleet="pair",
        policy="power-of-two",
        workload=a_workload(
            *chains(14, gap_s=0.3, seed=2).workflows,
            a_plan("long", a_call(0, prompt_tokens=15_000), arrival_s=1.2),
        ),
        incidents=(
            (2.0, ReplicaDied(ReplicaId("p-0"))),
            (2.2, ReplicaDied(ReplicaId("p-1"))),
            (2.6, ReplicaReady(ReplicaId("p-0"))),
            (4.0, ReplicaReady(ReplicaId("p-1"))),
        ),
    ),
    "sleeping-pool": Golden(
        fleet="asleep", policy="prefix-affinity+mlfq", workload=chains(8, gap_s=0.3, seed=3)
    ),
}


def fresh(header: Header, of: Policy | None = None) -> Scheduler:
    rng = random.Random(header.seed)
    fleet = FLEETS[header.fleet]()
    return Scheduler(fleet, of or policy(header.policy), rng, record_candidates=True)


def record(name: str) -> None:
    golden = GOLDEN[name]
    header = Header(trace=VERSION, fleet=golden.fleet, policy=golden.policy, seed=1)
    with TraceWriter(FOLDER / f"{name}{SUFFIX}", header) as trace:
        Simulation(
            fresh(header),
            golden.workload,
            RecentLengths(),
            lambda pool: FastEngine(pool.curve, engine_settings(pool)),
            incidents=golden.incidents,
            observe=trace,
        ).run(policy=golden.policy, seed=header.seed)


def first_difference(scheduler: Scheduler, entries: Iterable[Entry]) -> str:
    """Where the core first decides otherwise than recorded; "" if nowhere."""
    for number, entry in enumerate(entries, start=2):
        actions = tuple(scheduler.handle(entry.now_s, entry.event))
        scheduler.validate()
        if actions != entry.actions:
            recorded = "\n".join(f"  - {action}" for action in entry.actions) or "  - nothing"
            found = "\n".join(f"  + {action}" for action in actions) or "  + nothing"
            return f"line {number}, {entry.now_s} s: {entry.event}\n{recorded}\n{found}"
    return ""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_core_still_decides_as_recorded(name: str) -> None:
    reader = TraceReader(FOLDER / f"{name}{SUFFIX}")

    difference = first_difference(fresh(reader.header), reader.entries())

    assert not difference, f"{name} diverged; if that is meant: make golden\n{difference}"
    assert reader.broken_at is None


def test_every_golden_trace_is_known_and_all_are_small() -> None:
    files = {file.name.removesuffix(SUFFIX): file for file in FOLDER.iterdir()}

    assert sorted(files) == sorted(GOLDEN)
    assert sum(file.stat().st_size for file in files.values()) < 150_000


def test_golden_traces_hold_what_they_are_named_for() -> None:
    kinds = {
        name: {
            type(one).__name__
            for entry in TraceReader(FOLDER / f"{name}{SUFFIX}").entries()
            for one in (entry.event, *entry.actions)
        }
        for name in GOLDEN
    }

    assert kinds["mixed-fleet"] >= {"RequestArrived", "TokensStreamed", "WorkflowClosed"}
    assert kinds["replica-death"] >= {"ReplicaDied", "ReplicaReady", "Fail", "Reject"}
    retries = [
        action
        for entry in TraceReader(FOLDER / f"replica-death{SUFFIX}").entries()
        for action in entry.actions
        if isinstance(action, Dispatch) and action.attempt > 1
    ]
    assert "long/0" in {retry.request_id for retry in retries}
    assert kinds["sleeping-pool"] >= {"Wake", "ReplicaReady"}


def test_a_difference_names_the_first_event_that_went_another_way() -> None:
    reader = TraceReader(FOLDER / f"mixed-fleet{SUFFIX}")
    entries = list(reader.entries())
    other = fresh(reader.header, policy("round-robin+las"))

    where, event, *rest = first_difference(other, entries).partition("\n")

    number = int(where.removeprefix("line ").partition(",")[0])
    again = fresh(reader.header, policy("round-robin+las"))
    for entry in entries[: number - 2]:
        assert tuple(again.handle(entry.now_s, entry.event)) == entry.actions
    at_fault = entries[number - 2]
    assert where == f"line {number}, {at_fault.now_s} s: {at_fault.event}"
    assert event == "\n"
    assert [line[:4] for line in rest[0].splitlines()] == ["  - ", "  + "]


if __name__ == "__main__":
    if sys.argv[1:] != ["--rewrite"]:
        sys.exit("usage: python tests/test_golden.py --rewrite")
    for golden_name in GOLDEN:
        record(golden_name)
