"""The study of tails: its arms, its load, its incidents, its claims."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_fleet, a_pool
from concertmaster.core.actions import Demote, Wake
from concertmaster.core.events import TimerFired
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.request import ServiceClass, WorkflowId
from concertmaster.policies.catalog import NAMES, policy
from concertmaster.reproduce import swarmx_drift as drifts
from concertmaster.reproduce import swarmx_scaling as scaled
from concertmaster.reproduce import swarmx_world as world
from concertmaster.reproduce.results import Cell, Results
from concertmaster.reproduce.search import MOST_STEPS, highest
from concertmaster.reproduce.swarmx import DEFAULT_WORLDS, STUDY, finished_rps
from concertmaster.reproduce.swarmx_arms import (
    ARMS,
    BLIND,
    DEEP_ROUTERS,
    DRIFTERS,
    FORESEEN,
    FROZEN,
    LATE,
    LATE_TWO,
    MEANS,
    MEANS_OF,
    MORE_ROUTERS,
    MORE_SCALED,
    MORE_SEARCHED,
    OURS,
    ROLES,
    ROUTERS,
    SCALED,
    SEARCHED,
    SETTLED,
    STATIC,
    TWO,
    WITHOUT,
)
from concertmaster.reproduce.swarmx_scaling_summary import CLAIMED, frontier_s
from concertmaster.reproduce.swarmx_summary import DRIFTING, summary
from concertmaster.reproduce.swarmx_world import DEEP
from concertmaster.sim.incidents import loss
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.coding import SESSIONS
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.records import Gauges, RunRecords, WorkflowRecord

with_sessions = pytest.mark.skipif(
    not Path(SESSIONS).exists(), reason="the coding sessions are absent"
)
needs_recipe = pytest.mark.skipif("swarmx" not in NAMES, reason="needs the recipe swarmx")


def a_record(name: int, arrival_s: float, makespan_s: float | None) -> WorkflowRecord:
    return WorkflowRecord(
        workflow_id=WorkflowId(f"{name:04d}"),
        app="",
        service_class=ServiceClass.INTERACTIVE,
        arrival_s=arrival_s,
        deadline_s=None,
        finished_s=None if makespan_s is None else arrival_s + makespan_s,
        outcome="failed" if makespan_s is None else "completed",
    )


def a_run(*workflows: WorkflowRecord) -> RunRecords:
    return RunRecords(
        policy="p",
        seed=0,
        calls=[],
        workflows=list(workflows),
        gauges=Gauges(),
        decision_s=[],
        duration_s=1.0,
        wall_s=1.0,
    )


# Arms and cells.


@needs_recipe
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_policy(arm: str) -> None:
    assert policy(ARMS[arm].policy).name


def test_every_arm_that_is_run_or_claimed_is_known() -> None:
    run = {
        *ROUTERS,
        *DEEP_ROUTERS,
        *MORE_ROUTERS,
        *SEARCHED,
        *MORE_SEARCHED,
        *DRIFTERS,
        SETTLED,
        *WITHOUT,
        *SCALED,
        *MORE_SCALED,
    }

    assert run == {*ARMS}
    assert {BLIND, LATE, MEANS} <= {*ROUTERS}
    assert {*MEANS_OF.items()} <= {*product(ROUTERS + DEEP_ROUTERS, repeat=2)}
    assert {BLIND, LATE, TWO, LATE_TWO, ROLES} == {*SEARCHED}
    assert {ROLES, FROZEN} == {*DRIFTERS}


def test_the_full_grid_only_adds_cells() -> None:
    some, every = (STUDY.cells(seeds=2, full=full) for full in (False, True))

    assert {*some} < {*every}
    assert len(some) == len({*some})
    assert {cell.seed for cell in some} == {0, 1}


def test_worlds_of_claims_are_in_the_default_grid() -> None:
    assert DEEP in list(world.WORLDS)[:DEFAULT_WORLDS]
    assert DRIFTING in world.WORLDS


@pytest.mark.parametrize("name", world.WORLDS)
def test_a_world_is_named_after_its_fleet_and_size(name: str) -> None:
    place = world.WORLDS[name]
    gpus = sum(pool.tensor_parallel for pool, _, _ in world.fleet_of(name).replicas.values())
    _, kinds, count = name.split("/")

    assert gpus == int(count)
    assert place.fleet.endswith(kinds.replace("+", "-"))
    assert files("concertmaster.reproduce").joinpath("fleets", f"{place.fleet}.toml").is_file()


def names_of(plans: Sequence[WorkflowPlan]) -> set[str]:
    return {plan.workflow_id for plan in plans}


def test_templates_training_and_warm_up_are_other_workflows() -> None:
    measured = names_of(world.plans(world.WORLDS[DEEP].workload, 50, world.TEMPLATE_SEED))
    trained_on = names_of(world.learnt(DEEP, 50, world.TRAINING_SEED))
    warm_up = names_of(world.learnt(DEEP, 50, world.WARM_UP_SEED))

    assert not measured & trained_on
    assert not measured & warm_up
    assert not trained_on & warm_up


@with_sessions
@pytest.mark.parametrize("name", [name for name in world.WORLDS if name.startswith("coding")])
def test_no_recorded_session_is_both_measured_and_learnt_from(name: str) -> None:
    measured = names_of(world.templates_of(name))
    learnt = names_of(world.learnt(name, world.TRAINED_ON, world.TRAINING_SEED))

    assert len(measured) > 50
    assert not measured & (learnt | names_of(world.learnt(name, world.WARM_UP, world.WARM_UP_SEED)))


# The load.


@given(st.floats(0.01, 100.0), st.floats(0.3, 3.0))
def test_the_search_finds_the_highest_rate(limit: float, off: float) -> None:
    found = highest(lambda rate: rate <= limit, start=limit * off, tolerance=0.02)

    assert limit / 1.021 <= found <= limit


def test_flat_out_is_the_pace_of_the_middle_half_of_the_ends() -> None:
    ends = [a_record(i, 0.0, end_s) for i, end_s in enumerate((1, 10, 12, 14, 16, 18, 20, 99))]

    assert finished_rps(a_run(*ends, a_record(9, 0.0, None))) == pytest.approx(4 / (20 - 12))


def test_a_search_gives_up_where_every_rate_or_none_will_do() -> None:
    assert highest(lambda _: True, start=1.0, step=2.0) == 2.0**MOST_STEPS
    assert highest(lambda _: False, start=1.0, step=2.0) == 0.5**MOST_STEPS


def test_a_larger_fleet_gets_the_load_of_the_one_it_is_sized_as(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "kept", lambda *_: 0.5)
    for measured in (world.rate_of, world.slo_s):
        measured.cache_clear()

    assert world.rate_of(DRIFTING) == 3 * world.rate_of(DEEP) == 1.5
    assert world.slo_s(DRIFTING) == world.slo_s(DEEP) == 0.5
    for measured in (world.rate_of, world.slo_s):
        measured.cache_clear()


def test_attainment_counts_what_was_lost_and_leaves_out_the_ends() -> None:
    middle = [a_record(1 + i, 1.0 + i, 10.0) for i in range(6)]
    late, lost = a_record(7, 7.0, 11.0), a_record(8, 8.0, None)
    run = a_run(a_record(0, 0.0, 99.0), *middle, late, lost, a_record(9, 9.0, 99.0))

    assert world.attained_ratio(run, 10.0) == 6 / 8


# Drift.


def test_what_is_throttled_leaves_as_much_as_what_is_lost() -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q"), replicas=100)
    slowed = drifts.SCENARIOS["throttle"].strike(fleet, 5.0)
    dead = drifts.SCENARIOS["loss"].strike(fleet, 5.0)

    assert {one.kind for one in slowed} == {"slows"}
    left = 200 - len(slowed) * (1 - 1 / drifts.SLOWER)
    assert left == pytest.approx(200 - len(dead), abs=2)
    assert dead == loss(fleet, drifts.LOST_RATIO, at_s=5.0)


def test_one_slow_replica_of_each_pool_is_one() -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q"), replicas=3)
    slowed = drifts.SCENARIOS["slow"].strike(fleet, 5.0)

    assert [(one.replica_id, one.factor) for one in slowed] == [("p-0", 4.0), ("q-0", 4.0)]


def recovered_s(p90s_s: Mapping[float, float]) -> float:
    """Recovery where windows have a P90 of 10 s but for those named."""
    times_s = [i * drifts.STEP_S for i in range(60)]
    return drifts.recovery_s(times_s, [p90s_s.get(at_s, 10.0) for at_s in times_s], 10.0)


def test_recovery_is_the_first_window_that_is_near_and_stays_near() -> None:
    at_s = drifts.STRICKEN_S

    assert recovered_s({}) == 0.0
    assert recovered_s({at_s: 12.0}) == 0.0
    assert recovered_s({at_s: 12.1}) == drifts.STEP_S
    assert recovered_s({at_s: 99.0, at_s + 50.0: 99.0}) == 60.0
    assert recovered_s({at_s - 10.0: 99.0}) == 0.0


def test_what_does_not_recover_counts_to_the_end() -> None:
    times_s = [i * drifts.STEP_S for i in range(60)]

    assert drifts.recovery_s(times_s, [99.0] * 60, 10.0) == times_s[-1] - drifts.STRICKEN_S


def test_p90_is_of_those_that_completed() -> None:
    done = [a_record(i, 0.0, float(i)) for i in range(1, 11)]

    assert drifts.p90_s([*done, a_record(11, 0.0, None)]) == 10.0
    assert drifts.p90_s([]) == 0.0


def test_windows_hold_the_workflows_that_arrive_in_them() -> None:
    times_s, p90s_s = drifts.timeline([a_record(1, 100.0, 7.0)])
    seen = [at_s for at_s, p90 in zip(times_s, p90s_s, strict=True) if p90]

    assert seen == [50.0, 60.0, 70.0, 80.0, 90.0, 100.0]


@pytest.mark.parametrize(("arm", "at_s"), [(FROZEN, drifts.STRICKEN_S), (SETTLED, 0.0)])
def test_the_settled_arm_is_struck_before_the_first_arrival(
    arm: str, at_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[tuple[str, float]] = []

    def play(_: str, __: str, arm: str, *, at_s: float, seed: int) -> RunRecords:
        played.append((arm, at_s))
        return a_run(*(a_record(i, 10.0 * i, 10.0) for i in range(90 + seed)))

    monkeypatch.setattr(drifts, "_play", play)
    found = drifts.drift(DEEP, "loss", arm, seed=0)

    assert played == [(arm, at_s)]
    assert found["p90_after_s"] == 10.0


def test_a_changed_mix_asks_for_longer_work_at_the_same_instants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "rate_of", lambda _: 0.3)
    mix = drifts.SCENARIOS["mix"]
    changed, same = (drifts.asked(DEEP, mix, at_s=at_s, seed=1) for at_s in (300.0, 1e9))

    def output_tokens(*, late: bool) -> list[int]:
        return [
            sum(call.output_tokens for call in plan.calls)
            for plan in changed
            if (plan.arrival_s >= 300.0) == late
        ]

    assert [plan.arrival_s for plan in changed] == [plan.arrival_s for plan in same]
    assert [plan for plan in changed if plan.arrival_s < 300.0] == [
        plan for plan in same if plan.arrival_s < 300.0
    ]
    assert min(output_tokens(late=True)) > min(output_tokens(late=False))
    assert sum(output_tokens(late=True)) / len(output_tokens(late=True)) > 1.3 * sum(
        output_tokens(late=False)
    ) / len(output_tokens(late=False))


# Scaling.


def test_a_fleet_that_scales_starts_as_its_world_and_may_double() -> None:
    fleet, serving = scaled.elastic_fleet(DEEP), world.fleet_of(DEEP)
    running = {name for name, (_, _, state) in fleet.replicas.items() if state is Readiness.RUNNING}

    assert running == {*serving.replicas}
    assert scaled.gpus(fleet) == fleet.limits.gpus == 2 * scaled.gpus(serving)


def test_gpus_count_from_when_a_replica_is_woken_until_it_is_stopped() -> None:
    fleet = scaled.elastic_fleet(DEEP)
    count = scaled.GpuCount(fleet)
    count(10.0, TimerFired(), [Wake(ReplicaId("big-5")), Wake(ReplicaId("small-slow-15"))])
    count(20.0, TimerFired(), [Demote(ReplicaId("big-5"), Readiness.DISK)])

    assert count.at([0.0, 9.0, 10.0, 19.0, 20.0]) == [16.0, 16.0, 19.0, 19.0, 17.0]


def test_the_default_grid_scales_where_claims_are_made() -> None:
    cells = STUDY.cells(seeds=1, full=False)

    assert {cell.arm for cell in cells if cell.setting == CLAIMED} == {*SCALED}


@pytest.mark.parametrize("shape", scaled.SHAPES)
def test_every_shape_is_an_arrival_process(shape: str) -> None:
    assert ArrivalSpec.parse(scaled.SHAPES[shape].arrivals).rhythm is not None


def test_scaling_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "rate_of", lambda _: 2.0)
    monkeypatch.setattr(world, "slo_s", lambda _: 300.0)
    monkeypatch.setitem(scaled.SHAPES, "bursts", scaled.Shape("burst:2:60:60", 1.0, 400))
    static, elastic = (
        scaled.scale(DEEP, "bursts", arm, seed=0) for arm in (STATIC[0], "round-robin/reactive")
    )

    assert {*static["timeline_gpus"]} == {16.0}  # type: ignore[misc]
    assert static["fleet.replica_starts"] == 0.0
    assert elastic["fleet.replica_starts"] > 0.0  # type: ignore[operator]
    assert 16.0 < max(elastic["timeline_gpus"]) <= 32.0  # type: ignore[arg-type]
    assert len(elastic["timeline_s"]) == len(elastic["timeline_p90_s"])  # type: ignore[arg-type]


# The summary.


def figures_of(cell: Cell) -> dict[str, float | list[float]]:
    """Make up figures: ours take a tenth of what the blind arm takes, the rest half of it."""
    question = cell.setting.partition("/")[0]
    if question == "rate":
        rates = {BLIND: 1.0, LATE: 1.1, TWO: 1.5, LATE_TWO: 1.4}
        return {"rate_rps": rates.get(cell.arm, 2.4) + 0.01 * cell.seed, "flat_out_rps": 3.0}
    if question == "drift":
        starts_s = [drifts.STEP_S * at for at in range(80)]
        near_s = drifts.STRICKEN_S + (480.0 if cell.arm == FROZEN else 20.0 + 10.0 * cell.seed)
        return {
            "p90_after_s": 50.0,
            "lost_ratio": 0.0,
            "timeline_s": starts_s,
            "timeline_p90_s": [99.0 if at_s < near_s else 55.0 for at_s in starts_s],
        }
    share = {OURS: 0.1, ROLES: 0.1, FORESEEN: 0.1, BLIND: 1.0}.get(cell.arm, 0.5)
    spread = {f"makespan_s.{level}": 100 * share + cell.seed for level in ("p50", "p90")}
    tails = {f"makespan_s.{level}": 200 * share + cell.seed for level in ("p95", "p99")}
    return {
        **spread,
        **tails,
        "fleet.gpu_s": 18.0 if cell.arm.endswith("target=12") else 9.0,
        "fleet.replica_starts": 3.0,
        "timeline_s": [0.0, 60.0],
        "timeline_p90_s": [50.0, 60.0],
        "timeline_gpus": [16.0, 20.0],
        "rate_rps": 0.5,
        "slo_s": 200.0,
        "attained_ratio": 0.9,
        "makespans_s": [1.0, 2.0],
    }


def results(*, full: bool = False, seeds: int = 3) -> Results:
    return Results({cell: figures_of(cell) for cell in STUDY.cells(seeds=seeds, full=full)})


@pytest.mark.parametrize("full", [False, True])
def test_claims_say_what_the_figures_say(*, full: bool) -> None:
    found = {claim.id: claim for claim in summary(results(full=full)).claims}

    assert all(claim.met for claim in found.values())
    assert found["router-round-robin-published"].measured == pytest.approx(0.1, abs=0.01)
    assert found["router-round-robin-best"].measured == pytest.approx(0.2, abs=0.02)
    assert found["router-murakkab"].measured == pytest.approx(0.2, abs=0.02)
    assert found["rate-round-robin-published"].measured == pytest.approx(2.4, abs=0.02)
    assert found["rate-power-of-two-best"].statement.endswith(TWO)
    assert found["rate-round-robin-best"].measured == pytest.approx(2.4 / 1.1, abs=0.02)
    assert found["end-to-end-static-published"].measured == pytest.approx(0.2, abs=0.02)
    assert found["end-to-end-reactive-best"].measured == pytest.approx(0.2, abs=0.02)
    assert found["drift-throttle"].measured == 30.0
    worlds = len(world.WORLDS) if full else DEFAULT_WORLDS
    assert found["distribution-over-mean"].measured == worlds


def test_equal_gpu_time_is_read_off_between_the_arms_of_a_rival() -> None:
    made = dict(results().figures)
    for cell, others in results().figures.items():
        if cell.setting == CLAIMED and cell.arm == FORESEEN:
            made[cell] = {**others, "fleet.gpu_s": 13.5, "makespan_s.p95": 50.0}
        elif cell.setting == CLAIMED:
            p95_s = 60.0 if cell.arm.endswith("target=12") else 140.0
            made[cell] = {**others, "makespan_s.p95": p95_s}
    found = {claim.id: claim for claim in summary(Results(made)).claims}

    assert found["end-to-end-reactive-published"].measured == pytest.approx(50 / 100)
    assert found["end-to-end-static-published"].measured == pytest.approx(50 / 140)
    assert "swarmx/foreseen 13.5" in found["end-to-end-static-published"].note


@given(st.lists(st.tuples(st.floats(1.0, 99.0), st.floats(1.0, 99.0)), min_size=1), st.data())
def test_a_rivals_frontier_goes_through_its_arms_and_stays_among_them(
    steps: list[tuple[float, float]], data: st.DataObject
) -> None:
    gpu_s = data.draw(st.floats(0.0, 200.0))
    p95s = [p95_s for _, p95_s in steps]

    assert min(p95s) - 1e-9 <= frontier_s(steps, gpu_s) <= max(p95s) + 1e-9


def test_a_single_seed_has_no_interval_and_still_a_summary() -> None:
    assert summary(results(seeds=1)).claims[0].ci95 is None


def test_a_gain_within_the_interval_does_not_count() -> None:
    made = dict(results().figures)
    for cell, seed in product(list(made), range(3)):
        if cell.arm in MEANS_OF and cell.seed == seed and "makespan_s.p99" in made[cell]:
            made[cell] = {**made[cell], "makespan_s.p99": 100.0 + 80.0 * (seed - 1)}
    found = {claim.id: claim for claim in summary(Results(made)).claims}

    assert found["distribution-over-mean"].measured == 0.0


def test_tables_and_plots_show_every_arm() -> None:
    found = summary(results())
    routers = next(table for table in found.tables if table.title.endswith(DEEP))

    assert {row[0] for row in routers.rows} == {*ROUTERS, *DEEP_ROUTERS}
    assert found.plots is not None
    assert {*found.plots} == {"swarmx-makespans", "swarmx-drift", "swarmx-scaling-bursts"}
