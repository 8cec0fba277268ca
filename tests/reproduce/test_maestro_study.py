"""The study of memory: its arms, its budgets, what it reads off a run, its claims."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.policies.catalog import policy
from concertmaster.reproduce import maestro_world as world
from concertmaster.reproduce.data import data_folder
from concertmaster.reproduce.maestro import LARGER, STUDY
from concertmaster.reproduce.maestro_arms import (
    ALONE,
    ALONE_FCFS,
    ARMS,
    EDF,
    EDF_EXPECTED,
    FCFS,
    MORE_RIVALS,
    NO_FETCH,
    ORACLE,
    OURS,
    PAGED,
    RIVALS,
    TRAINED,
    WITHOUT,
    WORST,
)
from concertmaster.reproduce.maestro_measures import (
    LOST_S,
    absent_ratio,
    completed_rps,
    covered_s,
    makespan_s,
    merge,
)
from concertmaster.reproduce.maestro_summary import summary
from concertmaster.reproduce.maestro_world import CONTENTION, WORLDS
from concertmaster.reproduce.results import Cell, Results
from concertmaster.workload.nine_apps import SPEEDS
from concertmaster.workload.records import CallRecord, WorkflowRecord

needs_data = pytest.mark.skipif(
    not (data_folder() / world.STAGES).is_file(), reason="needs the recorded workflows"
)
spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda one: (one[0], one[0] + one[1]))
)


def a_call(arrival_s: float, dispatched_s: float | None, model: str = "m") -> CallRecord:
    return CallRecord(
        request_id=RequestId(f"{arrival_s} {model}"),
        workflow_id=WorkflowId("w"),
        role="",
        service_class=ServiceClass.BATCH,
        arrival_s=arrival_s,
        prompt_tokens=9,
        deadline_s=None,
        model=model,
        dispatched_s=dispatched_s,
    )


def a_workflow(name: str, arrival_s: float, finished_s: float | None) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id=WorkflowId(name),
        app="",
        service_class=ServiceClass.BATCH,
        arrival_s=arrival_s,
        deadline_s=None,
        finished_s=finished_s,
    )


# Arms and cells.


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_policy_for_shared_nodes(arm: str) -> None:
    assert policy(ARMS[arm].policy).residency is not None


def test_every_arm_is_run_and_every_arm_that_is_run_is_known() -> None:
    assert {cell.arm for cell in STUDY.cells(seeds=1, full=True)} == {*ARMS}
    assert {*RIVALS, *MORE_RIVALS, *WITHOUT, ALONE, ALONE_FCFS} == {*ARMS}


def test_the_full_grid_only_adds_cells() -> None:
    some, every = (STUDY.cells(seeds=2, full=full) for full in (False, True))

    assert {*some} < {*every}
    assert len(some) == len({*some})
    assert {cell.setting for cell in every} == {*WORLDS}
    assert {cell.load for cell in every} == {*CONTENTION.values()}


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_has_the_gpus_and_distances_that_its_name_says(name: str) -> None:
    fleet = world.fleet_of(name)
    gpus = sum(node.gpus for node in fleet.nodes)
    said = 8 * int(name[0]) if "clusters" in name else int(name.partition(" ")[0])

    assert gpus == said
    assert len(fleet.clusters) == len({*WORLDS[name].network_ms})
    assert sorted(round(1e3 * one.cluster.network_s) for one in fleet.nodes) == sorted(
        6 * WORLDS[name].network_ms
    )


@pytest.mark.parametrize("name", [world.EIGHT, *LARGER])
def test_every_model_that_is_asked_for_has_a_replica_on_each_of_its_nodes(name: str) -> None:
    fleet = world.fleet_of(name)
    machines = len(WORLDS[name].network_ms)

    assert {*fleet.models} == {*SPEEDS}
    assert len(fleet.replicas) == machines * (8 * 4 + 3 * 2)


@needs_data
def test_what_is_measured_and_what_is_learnt_from_are_other_tasks() -> None:
    measured, learnt = (
        {plan.task for plan in world.plans(200, 0, part=part, caps="guessed")}
        for part in ("test", "train")
    )

    assert measured
    assert not measured & learnt


# What it reads off a run.


def test_a_wait_counts_as_absent_while_no_replica_of_the_model_serves() -> None:
    calls = [a_call(0.0, 10.0), a_call(5.0, 5.0), a_call(0.0, 10.0, "other"), a_call(1.0, None)]

    assert absent_ratio(calls, {"m": [(4.0, 6.0), (5.0, 20.0)]}) == pytest.approx(14 / 20)
    assert absent_ratio([], {}) == 0.0


@given(spans, st.integers(0, 50), st.integers(0, 50))
def test_merged_spans_cover_what_they_covered(
    found: list[tuple[float, float]], begin: int, length: int
) -> None:
    merged = merge(found)
    seconds = range(begin, begin + length)
    inside = sum(any(first <= at < last for first, last in found) for at in seconds)

    assert all(one[1] < other[0] for one, other in pairwise(merged))
    assert covered_s(begin, begin + length, merged) == inside


def test_what_was_lost_counts_as_an_hour() -> None:
    assert makespan_s(a_workflow("w", 5.0, 9.0)) == 4.0
    assert makespan_s(a_workflow("w", 5.0, None)) == LOST_S


def test_throughput_counts_until_the_last_workflow_is_done() -> None:
    done = [a_workflow("a", 0.0, 10.0), a_workflow("b", 5.0, 40.0), a_workflow("c", 6.0, None)]

    assert completed_rps(done) == 2 / 40
    assert completed_rps(done[2:]) == 0.0


# The summary.


def figures_of(cell: Cell) -> dict[str, float | list[float]]:
    """Make up figures in which every claim is met, by arm."""
    met = {OURS: 0.95, ORACLE: 0.97, EDF: 0.6, EDF_EXPECTED: 0.65}.get(cell.arm, 0.5)
    share = {OURS: 0.1, NO_FETCH: 0.2}.get(cell.arm, 1.0)
    return {
        "workflows.met_ratio": met,
        "interactive.met_ratio": met - (0.01 if "clusters" in cell.setting else 0.0),
        "batch.met_ratio": met,
        "by_class.interactive.queue_wait_s.mean": share * (1 + cell.seed / 10),
        "by_class.batch.queue_wait_s.mean": 3.0,
        "by_class.interactive.kv_reserved_gb_s": 40.0,
        "by_class.batch.kv_reserved_gb_s": 60.0,
        "interactive.p95_s": 10.0,
        "batch.p95_s": 100.0,
        "all.p95_s": 90.0 if cell.arm == OURS else 100.0,
        "completed_rps": 1.0,
        "kv.reserved_gb_s": 400.0 if cell.arm == WORST else 100.0,
        "kv.used_gb_s": 80.0,
        "kv.preemptions": 5.0 if cell.arm == PAGED else 0.0,
        "fleet.replica_stops": 9.0 if cell.arm == OURS else 90.0,
        "weights.wakes": 12.0,
        "weights.cold_starts": 3.0,
        "absent_ratio": 0.5,
        "served_models": 6.0 if cell.arm == ALONE else 11.0,
        "memory_at_s": [0.0, 1.0],
        "memory_reserved_gb": [0.0, 9.0],
        "memory_used_gb": [0.0, 8.0],
        "served_replica": [0.0, 5.0],
        "served_from_s": [0.0, 3.0],
        "served_to_s": [2.0, 9.0],
    }


def results(*, full: bool = False, seeds: int = 3) -> Results:
    return Results({cell: figures_of(cell) for cell in STUDY.cells(seeds=seeds, full=full)})


@pytest.mark.parametrize("full", [False, True])
def test_claims_say_what_the_figures_say(*, full: bool) -> None:
    found = {claim.id: claim for claim in summary(results(full=full)).claims}

    assert [claim.id for claim in found.values() if not claim.met] == []
    assert found["kv-reserved"].measured == pytest.approx(0.25)
    assert found["kv-preemptions"].measured == -5.0
    assert found["slo-edf"].measured == pytest.approx(0.35)
    assert found["slo-edf-best"].measured == pytest.approx(0.3)
    assert EDF_EXPECTED in found["slo-edf-best"].statement
    assert found["slo-oracle"].measured == pytest.approx(-0.02)
    assert found["wait-interactive"].measured == pytest.approx(0.1)
    assert found["models-served"].measured == 5.0
    assert found["put-away"].measured == pytest.approx(0.1)
    assert found["prefetch"].measured == pytest.approx(0.5)
    assert found["clusters-medium"].measured == pytest.approx(-0.01)
    assert ("clusters-three-high" in found) is full


def test_a_claim_is_missed_where_figures_say_so() -> None:
    made = {cell: {**facts, "kv.reserved_gb_s": 200.0} for cell, facts in results().figures.items()}
    found = {claim.id: claim for claim in summary(Results(made)).claims}

    assert not found["kv-reserved"].met
    assert found["kv-reserved"].measured == 1.0


def test_a_single_seed_has_no_interval_and_still_a_summary() -> None:
    assert summary(results(seeds=1)).claims[0].ci95 is None


def test_tables_show_every_arm_where_it_ran_and_plots_are_drawn() -> None:
    found = summary(results())
    table = next(one for one in found.tables if one.title == "Memory, 8 GPUs, high contention")

    assert {row[0] for row in table.rows} == {*RIVALS, TRAINED, *WITHOUT}
    assert FCFS in [row[0] for row in table.rows]
    assert found.plots is not None
    assert {*found.plots} == {
        "maestro-attainment",
        "maestro-memory",
        "maestro-weights-ours",
        "maestro-weights-lru-swap",
    }
