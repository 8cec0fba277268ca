"""Workloads of studies, the middle of their runs, and the capacity that loads are shares of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_call, a_fleet, a_plan, a_pool, chains
from concertmaster import compose
from concertmaster.core.fleet import Fleet
from concertmaster.core.request import WorkflowId
from concertmaster.reproduce import capacity as measured
from concertmaster.reproduce.capacity import capacity_rps
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.window import figures, middle, quantiles
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.records import RunRecords

TEMPLATES = tuple(chains(20, gap_s=1.0, seed=3))


def a_crowded_fleet(replicas: int = 2) -> Fleet:
    return a_fleet(a_pool(max_sequences=2), replicas=replicas)


# Drawing.


@given(st.integers(0, 99), st.floats(0.01, 100.0))
def test_a_seed_fixes_the_work_and_a_rate_only_stretches_it(seed: int, rate_rps: float) -> None:
    slow = draw(TEMPLATES, workflows=30, rate_rps=1.0, seed=seed)
    fast = draw(TEMPLATES, workflows=30, rate_rps=rate_rps, seed=seed)

    assert [plan.calls for plan in slow] == [plan.calls for plan in fast]
    assert [plan.arrival_s / rate_rps for plan in slow] == pytest.approx(
        [plan.arrival_s for plan in fast]
    )


def test_ids_are_fresh_and_arrivals_in_order() -> None:
    drawn = draw(TEMPLATES, workflows=200, rate_rps=5.0, seed=1)

    assert len({plan.workflow_id for plan in drawn}) == 200
    assert drawn.rate_rps == pytest.approx(5.0, rel=0.3)
    keys = [(plan.arrival_s, plan.workflow_id) for plan in drawn]
    assert keys == sorted(keys)
    assert draw(TEMPLATES, workflows=200, rate_rps=5.0, seed=2) != drawn


def test_without_a_rate_all_come_at_once() -> None:
    assert {plan.arrival_s for plan in draw(TEMPLATES, workflows=9, rate_rps=None, seed=0)} == {0.0}


def test_a_template_that_is_drawn_again_shares_only_what_others_share() -> None:
    one = a_plan("one", a_call(0, prefix_hashes=(1, 2)), a_call(1, prefix_hashes=(1, 2, 3)))
    other = a_plan("other", a_call(0, prefix_hashes=(1, 9)))

    drawn = draw([one, other], workflows=40, rate_rps=1.0, seed=0)
    ones = [plan for plan in drawn if plan.workflow_id.endswith("~one")]

    assert ones[0].calls[0].prefix_hashes == (1, 2)
    assert len({plan.calls[0].prefix_hashes[1] for plan in ones}) == len(ones) > 5
    for plan in ones:
        assert plan.calls[1].prefix_hashes[:2] == plan.calls[0].prefix_hashes
        assert plan.calls[0].prefix_hashes[0] == 1


# The middle of a run.


@pytest.fixture(scope="module")
def run() -> RunRecords:
    workload = draw(TEMPLATES, workflows=40, rate_rps=1.0, seed=0)
    return compose.simulate(a_crowded_fleet(), workload, "fcfs", seed=0)


def test_the_first_and_last_tenth_to_arrive_are_left_out(run: RunRecords) -> None:
    kept = middle(run)

    ranked = sorted(run.workflows, key=lambda one: one.arrival_s)
    assert kept.workflows == ranked[4:36]
    assert {call.workflow_id for call in kept.calls} == {one.workflow_id for one in ranked[4:36]}
    assert kept.duration_s == ranked[35].arrival_s - ranked[4].arrival_s
    assert len(middle(run, cool_down_ratio=0.0).workflows) == 36


def test_figures_are_numbers_by_their_path(run: RunRecords) -> None:
    found = figures(run)

    assert found["workflows.total"] == 32
    assert found["makespan_s.mean"] > 0
    assert found["workflows.completed_ratio"] == found["workflows.met_ratio"] == 1.0
    assert not {"seed", "wall_s", "policy"} & set(found)
    assert all(isinstance(value, float) for value in found.values())


def test_a_workflow_that_failed_counts_as_missed(run: RunRecords) -> None:
    kept = middle(run)
    lost = kept.workflows[0]
    finished_s, lost.finished_s, lost.outcome = lost.finished_s, None, "rejected"
    try:
        found = figures(run)
    finally:
        lost.finished_s, lost.outcome = finished_s, "completed"

    assert found["workflows.completed_ratio"] == found["workflows.met_ratio"] == 31 / 32


def test_few_values_are_their_own_quantiles() -> None:
    assert quantiles([2.0, 1.0]) == [1.0, 2.0]
    assert quantiles([float(i) for i in range(1000)], count=4) == [124.0, 374.0, 624.0, 874.0]


# Capacity.


@pytest.fixture(autouse=True)
def small_crowds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FEWEST", 80)


def test_twice_the_fleet_has_twice_the_capacity() -> None:
    one = capacity_rps(a_crowded_fleet(1), TEMPLATES)
    two = capacity_rps(a_crowded_fleet(2), TEMPLATES)

    assert two == pytest.approx(2 * one, rel=0.03)


def test_a_fleet_keeps_up_below_its_capacity_and_falls_behind_above() -> None:
    fleet = a_crowded_fleet()
    rate_rps = capacity_rps(fleet, TEMPLATES)

    def mean_s(load: float) -> float:
        workload = draw(TEMPLATES, workflows=200, rate_rps=load * rate_rps, seed=5)
        return figures(compose.simulate(fleet, workload, "fcfs", seed=0))["makespan_s.mean"]

    assert mean_s(0.8) < 3 * mean_s(0.1)
    assert mean_s(1.6) > 5 * mean_s(0.1)


def test_capacity_does_not_depend_on_the_order() -> None:
    """The rate of whole workflows would: first come, first served ends them in a bunch."""
    found = [capacity_rps(a_crowded_fleet(), TEMPLATES, policy=name) for name in ("fcfs", "las")]

    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_crowds_grow_until_the_fleet_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "FEWEST", 5)
    large = a_crowded_fleet(16)

    grown = capacity_rps(large, TEMPLATES)
    monkeypatch.setattr(measured, "MOST", 5)

    assert grown > 1.5 * capacity_rps(large, TEMPLATES)


def test_capacity_is_kept_and_looked_up_by_all_that_it_depends_on(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: list[int] = []
    real = compose.simulate

    def counted(*args: object, **named: object) -> RunRecords:
        count.append(1)
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(compose, "simulate", counted)
    monkeypatch.setattr(measured, "FEWEST", 20)
    monkeypatch.setattr(measured, "MOST", 20)
    fleet = a_crowded_fleet()
    shorter: tuple[WorkflowPlan, ...] = TEMPLATES[:10]

    first = capacity_rps(fleet, TEMPLATES, keep_in=tmp_path)  # type: ignore[arg-type]
    runs = len(count)
    assert capacity_rps(fleet, TEMPLATES, keep_in=tmp_path) == first  # type: ignore[arg-type]
    assert len(count) == runs
    for other in (
        {"templates": shorter},
        {"fleet": a_crowded_fleet(3)},
        {"policy": "las"},
        {"seed": 1},
    ):
        runs = len(count)
        capacity_rps(**{"fleet": fleet, "templates": TEMPLATES, "keep_in": tmp_path, **other})  # type: ignore[arg-type]
        assert len(count) > runs, other


def test_ids_of_templates_stay_readable() -> None:
    assert draw([a_plan("w")], workflows=1, rate_rps=1.0, seed=0).workflows[0].workflow_id == (
        WorkflowId("00000~w")
    )
