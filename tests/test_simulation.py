"""Whole runs in virtual time."""

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import pytest

from builders import a_call, a_fleet, a_plan, a_pool, a_workload, chains
from concertmaster.compose import simulate
from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    Event,
    ReplicaDied,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.observe.report import build_report
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.policies.catalog import NAMES, policy
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import Gauges, RunRecords

CATALOG = (*NAMES, "round-robin+las", "power-of-two+mlfq")
P0 = ReplicaId("p-0")


def gauges_of(run: RunRecords) -> Gauges:
    assert run.gauges is not None, "a simulation sees into its fleet"
    return run.gauges


def two_models() -> Fleet:
    """Two kinds of replicas, few sequences each, so that calls have to wait."""
    return a_fleet(
        a_pool("p", max_sequences=3),
        a_pool("q", model="small", slowness=0.5, max_sequences=2, kv_blocks=300),
        replicas=2,
    )


class Log:
    """All that a run did; give it as observer."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, Event, list[Action]]] = []

    def __call__(self, now_s: float, event: Event, actions: list[Action]) -> None:
        self.entries.append((now_s, event, actions))

    def of(self, kind: type[Event]) -> list[tuple[float, Event]]:
        return [(now_s, event) for now_s, event, _ in self.entries if isinstance(event, kind)]

    def dispatches(self) -> list[Dispatch]:
        return [a for _, _, actions in self.entries for a in actions if isinstance(a, Dispatch)]


def run(
    fleet: Fleet,
    workload: Workload,
    of: str = "least-tokens",
    *,
    incidents: Iterable[tuple[float, Event]] = (),
    log: Log | None = None,
) -> RunRecords:
    simulation = Simulation(
        Scheduler(fleet, policy(of), random.Random(1)),
        workload,
        RecentLengths(),
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
        incidents=incidents,
        observe=log,
    )
    return simulation.run(policy=of, seed=1)


def makespans_s(records: RunRecords) -> dict[str, float]:
    return {
        w.workflow_id: w.finished_s - w.arrival_s
        for w in records.workflows
        if w.finished_s is not None
    }


# Every policy.


@pytest.mark.parametrize("name", CATALOG)
def test_every_workflow_of_an_overloaded_fleet_completes(name: str) -> None:
    workload = chains(40, gap_s=0.2, seed=3)

    records = simulate(two_models(), workload, name, seed=1)

    assert [w.outcome for w in records.workflows] == ["completed"] * 40
    assert len(records.calls) == workload.requests
    longest_wait_s = 0.0
    for call in records.calls:
        assert call.dispatched_s is not None
        assert call.first_token_s is not None
        assert call.finished_s is not None
        assert call.arrival_s <= call.dispatched_s < call.first_token_s <= call.finished_s
        longest_wait_s = max(longest_wait_s, call.dispatched_s - call.arrival_s)
    assert longest_wait_s > 0.5


TWICE = """
import sys
from pathlib import Path
from test_simulation import two_models
from builders import chains
from concertmaster.compose import simulate
from concertmaster.observe.trace import Header, TraceWriter

for name in ("power-of-two+las", "prefix-affinity", "random+mlfq"):
    header = Header(trace=1, fleet="two models", policy=name, seed=5)
    with TraceWriter(Path(sys.argv[1]) / name, header) as trace:
        simulate(two_models(), chains(25, gap_s=0.2, seed=3), name, seed=5, observe=trace)
"""


def test_a_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    runs = [
        subprocess.Popen(  # noqa: S603  # our own script
            [sys.executable, "-c", TWICE, str(folder)],
            env={
                **os.environ,
                "PYTHONHASHSEED": folder.name,
                "PYTHONPATH": str(Path(__file__).parent),
            },
        )
        for folder in folders
    ]
    assert [one.wait(60) for one in runs] == [0, 0]

    traces = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert traces[0] == traces[1]
    assert len(traces[0]) == 3
    assert all(len(trace) > 10_000 for trace in traces[0].values())


def test_another_seed_gives_another_run() -> None:
    workload = chains(25, gap_s=0.2, seed=3)

    first, again, other = (
        makespans_s(simulate(two_models(), workload, "power-of-two", seed=seed))
        for seed in (1, 1, 2)
    )

    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["least-tokens", "round-robin+las"])
def test_both_engine_models_give_the_same_makespans(name: str) -> None:
    workload = chains(30, gap_s=0.3, seed=4)

    fast = simulate(two_models(), workload, name, seed=1)
    exact = simulate(
        two_models(),
        workload,
        name,
        seed=1,
        make_engine=lambda pool: ReferenceEngine(pool.curve, engine_settings(pool)),
    )

    assert makespans_s(fast) == pytest.approx(makespans_s(exact), rel=0.005)
    assert len(makespans_s(fast)) == 30


def test_on_an_overloaded_fleet_the_shortest_remaining_oracle_beats_first_come() -> None:
    workload = chains(80, gap_s=0.15, seed=5, most_calls=8)
    fleet = a_fleet(a_pool(max_sequences=2), replicas=2)

    means_s = {
        name: fmean(makespans_s(simulate(fleet, workload, name, seed=1)).values())
        for name in ("oracle-stjf", "las", "fcfs")
    }

    assert means_s["oracle-stjf"] < 0.8 * means_s["fcfs"]
    assert means_s["oracle-stjf"] < means_s["las"]


def test_the_model_oracle_solves_what_can_be_solved() -> None:
    workload = chains(30, gap_s=2.0, seed=6)

    oracle = build_report(simulate(two_models(), workload, "oracle-model", seed=1))
    blind = build_report(simulate(two_models(), workload, "least-tokens", seed=1))

    assert oracle["success_ratio"] == 1.0
    assert blind["success_ratio"] < 1.0


# Agents.


def test_a_call_goes_to_a_model_that_it_names() -> None:
    calls = [a_call(i, models=(ModelName(name),)) for i, name in enumerate(("m", "small") * 20)]
    records = run(two_models(), a_workload(a_plan("w", *calls)))

    assert [one.model for one in records.calls] == ["m", "small"] * 20


def test_a_model_that_the_fleet_lacks_is_said_in_one_line() -> None:
    workload = a_workload(a_plan("w", a_call(0, models=(ModelName("huge"),))))

    with pytest.raises(InputError) as caught:
        simulate(two_models(), workload, "random", seed=0)

    assert str(caught.value) == (
        "test: models: expected a model of the fleet test (m, small), found huge "
        "(add a pool of that model, or give one that served_name)"
    )


def test_a_call_is_made_when_its_last_parent_is_answered_and_the_tool_is_done() -> None:
    plan = a_plan(
        "w1",
        a_call(0, tool_s=0.5),
        a_call(1, output_tokens=200, parents=(0,), tool_s=1.0),
        a_call(2, parents=(0,)),
        a_call(3, parents=(1, 2), tool_s=2.0),
        arrival_s=10.0,
    )

    calls = run(a_fleet(), a_workload(plan)).calls

    start_s = {str(call.request_id): call.arrival_s for call in calls}
    end_s = {str(call.request_id): call.finished_s or 0.0 for call in calls}
    assert start_s["w1/0"] == 10.5
    assert start_s["w1/1"] == pytest.approx(end_s["w1/0"] + 1.0)
    assert start_s["w1/2"] == end_s["w1/0"]
    assert start_s["w1/3"] == pytest.approx(end_s["w1/1"] + 2.0)


def test_a_lone_call_takes_what_the_rate_curve_says() -> None:
    pool = a_pool()
    plan = a_plan("w1", a_call(0, prompt_tokens=1000, output_tokens=21))

    (call,) = run(a_fleet(pool), a_workload(plan)).calls

    prefill_s = pool.curve.prefill_s(1000)
    assert call.first_token_s == pytest.approx(prefill_s)
    assert call.finished_s == pytest.approx(prefill_s + 20 * 0.0101, rel=0.01)
    assert (call.model, call.replica_id, call.output_tokens) == ("m", "p-0", 21)


def test_the_core_is_told_of_first_tokens_of_progress_and_of_ends() -> None:
    log = Log()
    plan = a_plan("w1", a_call(0, output_tokens=400, max_output_tokens=512))

    run(a_fleet(), a_workload(plan), log=log)

    told = [
        tokens
        for _, event in log.of(TokensStreamed)
        if isinstance(event, TokensStreamed)
        for _, _, tokens in event.progress
    ]
    assert told[0] == 1
    assert len(told) == 5  # the first, then one a second
    assert told == sorted(told)
    assert log.of(RequestFinished)[0][1] == RequestFinished(RequestId("w1/0"), 1, 400)
    assert log.entries[-1][1] == WorkflowClosed(WorkflowId("w1"))


def test_an_answer_ends_at_the_cap_and_at_the_end_of_the_context() -> None:
    capped = a_plan("capped", a_call(0, output_tokens=900, max_output_tokens=30))
    full = a_plan("full", a_call(0, prompt_tokens=300, output_tokens=900, max_output_tokens=900))

    calls = run(a_fleet(a_pool(kv_blocks=20)), a_workload(capped, full)).calls

    assert {call.workflow_id: call.output_tokens for call in calls} == {"capped": 30, "full": 20}


def test_a_workflow_ends_where_a_call_is_refused_and_the_others_go_on() -> None:
    broken = a_plan("broken", a_call(0), a_call(1, prompt_tokens=90_000), a_call(2))
    whole = a_plan("whole", a_call(0), a_call(1))

    records = run(a_fleet(), a_workload(broken, whole))

    assert {w.workflow_id: w.outcome for w in records.workflows} == {
        "broken": "rejected",
        "whole": "completed",
    }
    refused = [call for call in records.calls if call.outcome != "served"]
    assert [(call.request_id, call.outcome, call.reason) for call in refused] == [
        ("broken/1", "rejected", "too_long")
    ]


def test_progress_counts_the_workflows_that_are_over() -> None:
    counts: list[int] = []
    simulate(a_fleet(), chains(5, gap_s=1.0, seed=1), "fcfs", seed=1, progress=counts.append)

    assert counts == [1, 2, 3, 4, 5]


def test_forecasts_travel_with_arrivals_once_enough_was_learned() -> None:
    log = Log()
    run(two_models(), chains(20, gap_s=1.0, seed=2), log=log)

    sources = [
        event.forecast.source
        for _, event in log.of(RequestArrived)
        if isinstance(event, RequestArrived)
    ]
    assert sources[0] == "none"
    assert sources[-1] in ("role", "app")


# Incidents.


def test_a_death_loses_only_workflows_whose_caller_had_seen_a_token() -> None:
    workload = chains(40, gap_s=0.2, seed=7)
    log = Log()

    records = run(
        two_models(),
        workload,
        incidents=[(3.0, ReplicaDied(P0)), (20.0, ReplicaReady(P0))],
        log=log,
    )

    lost = [call for call in records.calls if call.outcome != "served"]
    assert [(call.outcome, call.reason) for call in lost] == [("failed", "replica_died")] * len(
        lost
    )
    assert all(call.first_token_s is not None and call.first_token_s <= 3.0 for call in lost)
    outcomes = [w.outcome for w in records.workflows]
    assert outcomes.count("completed") == 40 - len(lost)
    used_s = [now_s for now_s, _, actions in log.entries for a in actions if sent_to(a, P0)]
    assert not [now_s for now_s in used_s if 3.0 <= now_s < 20.0]
    assert max(used_s) >= 20.0


def sent_to(action: Action, replica: ReplicaId) -> bool:
    return isinstance(action, Dispatch) and action.replica_id == replica


def test_a_call_in_prefill_is_started_again_on_another_replica() -> None:
    log = Log()
    plan = a_plan("w1", a_call(0, prompt_tokens=20_000))

    records = run(
        a_fleet(replicas=2), a_workload(plan), incidents=[(1.0, ReplicaDied(P0))], log=log
    )

    (call,) = records.calls
    assert [(d.replica_id, d.attempt) for d in log.dispatches()] == [("p-0", 1), ("p-1", 2)]
    assert (call.outcome, call.replica_id, call.dispatched_s) == ("served", "p-1", 0.0)
    assert call.first_token_s == pytest.approx(1.0 + 2.0, abs=0.15)


def test_with_all_replicas_dead_calls_wait_for_the_recovery() -> None:
    plan = a_plan("w1", a_call(0, prompt_tokens=20_000))
    late = a_plan("late", a_call(0), arrival_s=5.0)

    records = run(
        a_fleet(),
        a_workload(plan, late),
        incidents=[(1.0, ReplicaDied(P0)), (60.0, ReplicaReady(P0))],
    )

    by_id = {call.workflow_id: call for call in records.calls}
    assert by_id[WorkflowId("late")].reason == "no_replica"
    assert by_id[WorkflowId("w1")].first_token_s == pytest.approx(62.0, abs=0.15)


def test_news_that_was_under_way_when_its_replica_died_is_not_taken_for_the_retry() -> None:
    plan = a_plan("w1", a_call(0, output_tokens=1))

    (call,) = run(
        a_fleet(replicas=2, network_s=2.0), a_workload(plan), incidents=[(1.5, ReplicaDied(P0))]
    ).calls

    assert call.replica_id == "p-1"
    assert call.finished_s == pytest.approx(1.5 + 2.0, abs=0.1)


def test_a_call_to_another_cluster_takes_a_round_trip_longer() -> None:
    plan = a_plan("w1", a_call(0))

    near, far = (
        run(a_fleet(network_s=network_s), a_workload(plan)).calls[0] for network_s in (0.0, 0.5)
    )

    assert far.finished_s == pytest.approx(near.finished_s + 0.5)  # type: ignore[operator]


def test_a_sleeping_pool_is_woken_once_and_its_calls_served_when_it_is_ready() -> None:
    states = {"p-0": Readiness.DISK, "p-1": Readiness.SLEEPING}
    workload = a_workload(*(a_plan(f"w{i}", a_call(0), arrival_s=0.1 * i) for i in range(3)))

    records = run(a_fleet(replicas=2, states=states), workload)

    assert {call.replica_id for call in records.calls} == {"p-1"}
    assert {call.dispatched_s for call in records.calls} == {2.0}
    gauges = gauges_of(records)
    assert (gauges.wakes, gauges.cold_starts, gauges.ready_wait_s) == (1, 0, 2.0)


def test_the_timer_opens_a_replica_whose_prefill_is_done() -> None:
    log = Log()
    plans = [a_plan(f"w{i}", a_call(0, prompt_tokens=9000, output_tokens=300)) for i in range(3)]

    run(a_fleet(), a_workload(*plans), log=log)

    waited_s = [dispatch.waited_s for dispatch in log.dispatches()]
    assert waited_s == pytest.approx([0.0, 0.7, 1.6], abs=0.1)
    assert len(log.of(TimerFired)) == 2


# Gauges.


def a_long_call(name: str, arrival_s: float = 0.0) -> WorkflowPlan:
    call = a_call(0, prompt_tokens=1600, output_tokens=2000, max_output_tokens=2048)
    return a_plan(name, call, arrival_s=arrival_s)


def test_memory_is_integrated_over_time() -> None:
    records = run(a_fleet(), a_workload(a_long_call("w1")))

    gauges, gb = gauges_of(records), 131_072 / 1e9
    assert gauges.kv_used_gb_s == pytest.approx(2600 * gb * records.duration_s, rel=0.1)
    assert gauges.kv_reserved_gb_s == pytest.approx(2620 * gb * records.duration_s, rel=0.1)
    assert gauges.kv_reserved_peak_gb == pytest.approx(3600 * gb, rel=0.05)
    assert gauges.gpu_s == records.duration_s
    assert gauges.preemptions == 0


def test_idle_time_between_calls_holds_no_memory() -> None:
    pair = a_workload(a_long_call("w1"), a_long_call("w2", 500.0))
    once = gauges_of(run(a_fleet(), a_workload(a_long_call("w1"))))
    twice = gauges_of(run(a_fleet(), pair))

    assert once.kv_used_gb_s > 0
    assert twice.kv_used_gb_s == pytest.approx(2 * once.kv_used_gb_s, rel=0.05)


def test_a_run_ends_with_its_last_event_not_with_a_timer_that_nobody_needs() -> None:
    log = Log()

    records = run(two_models(), chains(40, gap_s=0.2, seed=3), log=log)

    ends_s = [w.finished_s for w in records.workflows if w.finished_s is not None]
    assert records.duration_s == log.entries[-1][0] == max(ends_s)


def test_a_call_in_a_fleet_that_never_recovers_is_refused_when_its_time_is_over() -> None:
    plan = a_plan("w1", a_call(0, prompt_tokens=20_000))

    records = run(a_fleet(), a_workload(plan), incidents=[(1.0, ReplicaDied(P0))])

    assert records.calls[0].reason == "waited_too_long"
    assert records.duration_s == 3600.0
