"""Hedging in virtual time: whole workloads, traces that replay, and what they tell of a race."""

import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from builders import a_call, a_fleet, a_plan, a_policy, a_pool, a_workload, chains
from concertmaster.core.actions import Action, Cancel, Dispatch
from concertmaster.core.events import Event
from concertmaster.core.fleet import Fleet, Pool
from concertmaster.core.hedging import Hedging
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.observe.console import explain
from concertmaster.observe.trace import VERSION, Header, TraceReader, TraceWriter
from concertmaster.physics.batching import EngineCall, Milestone
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.driver import Observer, Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import RunRecords

LATE_S = 10.0
RULE = Hedging(share=1.0)


class Late(ReferenceEngine):
    """Begins each call late."""

    def __init__(self, pool: Pool, late_s: float) -> None:
        super().__init__(pool.curve, engine_settings(pool))
        self._late_s = late_s
        self._held: list[tuple[float, EngineCall]] = []

    def submit(self, now_s: float, call: EngineCall) -> None:
        self._held.append((now_s + self._late_s, call))

    def cancel(self, now_s: float, request_id: RequestId) -> bool:
        held = [entry for entry in self._held if entry[1].request_id != request_id]
        found = len(held) < len(self._held)
        self._held = held
        return super().cancel(now_s, request_id) or found

    def clear(self) -> None:
        self._held.clear()
        super().clear()

    def next_milestone_s(self) -> float | None:
        times_s = [super().next_milestone_s(), self._held[0][0] if self._held else None]
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    def advance(self, now_s: float) -> list[Milestone]:
        while self._held and self._held[0][0] <= now_s:
            super().submit(now_s, self._held.pop(0)[1])
        return super().advance(now_s)


def play(
    fleet: Fleet, workload: Workload, rule: Hedging | None, observe: Observer | None = None
) -> tuple[RunRecords, Scheduler]:
    """Play over replicas of which the first begins everything late."""
    policy = a_policy("round-robin", hedge=rule)
    scheduler = Scheduler(fleet, policy, random.Random(1), record_candidates=True)
    lateness_s = iter((LATE_S, *[0.0] * (len(fleet.replicas) - 1)))

    def check(now_s: float, event: Event, actions: list[Action]) -> None:
        scheduler.validate()
        if observe is not None:
            observe(now_s, event, actions)

    simulation = Simulation(
        scheduler,
        workload,
        RecentLengths(),
        lambda pool: Late(pool, next(lateness_s)),
        observe=check,
    )
    return simulation.run(policy=policy.name, seed=1), scheduler


def one_call() -> Workload:
    return a_workload(a_plan("w", a_call(0)))


@pytest.mark.parametrize("network_s", [0.0, 0.2])
def test_a_call_that_does_not_begin_is_answered_elsewhere(network_s: float) -> None:
    fleet = a_fleet(replicas=2, network_s=network_s)

    plain, _ = play(fleet, one_call(), None)
    hedged, scheduler = play(fleet, one_call(), RULE)

    (late,), (call,) = plain.calls, hedged.calls
    assert (late.replica_id, call.replica_id) == ("p-0", "p-1")
    assert late.first_token_s is not None
    assert call.first_token_s is not None
    assert late.first_token_s > LATE_S
    assert 1.0 < call.first_token_s < 2.5
    assert call.output_tokens == late.output_tokens == 40
    assert scheduler.races.outcomes == {"won": 1}


@pytest.mark.parametrize("network_s", [0.0, 0.2])
def test_every_call_of_a_workload_is_served_once(network_s: float) -> None:
    fleet = a_fleet(a_pool(max_sequences=8), replicas=3, network_s=network_s)
    workload = chains(40, gap_s=1.0, seed=3)

    plain, _ = play(fleet, workload, None)
    hedged, scheduler = play(fleet, workload, RULE)

    assert all(call.outcome == "served" for call in hedged.calls)
    assert len(hedged.calls) == len(plain.calls)
    assert sum(call.output_tokens for call in hedged.calls) == sum(
        call.output_tokens for call in plain.calls
    )
    assert scheduler.races.outcomes["won"] > 5
    assert hedged.duration_s < plain.duration_s
    for replica in scheduler.replicas.values():
        assert not replica.in_flight
        assert replica.kv.reserved_blocks == 0


def test_where_nothing_is_late_the_decisions_are_those_without_a_rule() -> None:
    def decisions(rule: Hedging | None) -> list[Action]:
        seen: list[Action] = []
        fleet = a_fleet(replicas=2)
        scheduler = Scheduler(fleet, a_policy(hedge=rule), random.Random(1))
        Simulation(
            scheduler,
            chains(20, gap_s=0.5, seed=2),
            RecentLengths(),
            lambda pool: FastEngine(pool.curve, engine_settings(pool)),
            observe=lambda _, __, actions: seen.extend(actions),
        ).run(policy="", seed=1)
        return seen

    assert decisions(RULE) == decisions(None)


def test_a_trace_of_a_race_replays_and_explains_it(tmp_path: Path) -> None:
    path, fleet = tmp_path / "race.jsonl", a_fleet(replicas=2)
    header = Header(trace=VERSION, fleet="test", policy="round-robin", seed=1)
    with TraceWriter(path, header) as trace:
        play(fleet, one_call(), RULE, trace)

    again = Scheduler(
        fleet, a_policy("round-robin", hedge=RULE), random.Random(1), record_candidates=True
    )
    actions: list[Action] = []
    for entry in TraceReader(path).entries():
        assert tuple(again.handle(entry.now_s, entry.event)) == entry.actions
        actions += entry.actions
    assert [type(action) for action in actions] == [Dispatch, Dispatch, Cancel]

    out = io.StringIO()
    explain(Console(file=out, width=200), TraceReader(path), "w/0")
    assert "hedged 1.000 s on p-1   attempt 2, beside the one before" in out.getvalue()
    assert "on p-0: another began to answer first" in out.getvalue()
