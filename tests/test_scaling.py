"""How many replicas: what policies want, what is done about it, and whole runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from builders import (
    CheckedScheduler,
    a_call,
    a_fleet,
    a_forecast,
    a_plan,
    a_policy,
    a_pool,
    a_workload,
)
from concertmaster.core.actions import Action, Demote, Dispatch, Wake
from concertmaster.core.demand import Demands, Flow
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    ReplicaDemoted,
    ReplicaOnTrial,
    ReplicaReady,
    RequestFinished,
    TimerFired,
    WorkflowClosed,
)
from concertmaster.core.fleet import Fleet, PoolId, Readiness, ReplicaId, ScalingLimits
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.standing import Demand, FleetStanding, Standing
from concertmaster.policies.catalog import policy
from concertmaster.policies.scaling import (
    Foreseen,
    Reactive,
    full_batch,
    needed_tokens_per_s,
    replica_tokens_per_s,
)
from concertmaster.workload.plan import WorkflowPlan
from scaling_load import a_scaled_fleet, agents, needed_replicas, scaled

P, P0, P1 = PoolId("p"), ReplicaId("p-0"), ReplicaId("p-1")
M, X = ModelName("m"), ModelName("x")


@dataclass
class Told:
    """Wants what it is told."""

    wanted: dict[PoolId, int] = field(default_factory=dict)
    interval_s: float = 10.0
    settle_s: float = 0.0
    memory_s: float = 60.0

    def targets(self, now_s: float, view: FleetStanding) -> Mapping[PoolId, int]:
        return self.wanted


def told(
    wanted: int, fleet: Fleet | None = None, settle_s: float = 0.0, **limits: object
) -> tuple[CheckedScheduler, Told]:
    """A scheduler whose clock has begun at 0."""
    scaling = Told({P: wanted}, settle_s=settle_s)
    bounds = ScalingLimits(**{"cooldown_s": 0.0, **limits})  # type: ignore[arg-type]
    fleet = replace(fleet or a_fleet(a_pool(least_replicas=0), replicas=3), limits=bounds)
    scheduler = CheckedScheduler(fleet, a_policy(scaling=scaling))
    assert scheduler.at(0.0, TimerFired()) == []
    return scheduler, scaling


def stopped(*running: str) -> Fleet:
    names = [f"p-{i}" for i in range(3)]
    states = {name: Readiness.DISK for name in names if name not in running}
    return a_fleet(a_pool(least_replicas=0), replicas=3, states=states)


def tick(scheduler: CheckedScheduler, now_s: float) -> list[Action]:
    return scheduler.at(now_s, TimerFired())


# What is done about a target.


def test_the_clock_asks_for_the_next_interval_and_only_under_a_scaling() -> None:
    scheduler, _ = told(3)

    assert scheduler.core.next_wakeup_s() == 10.0
    assert CheckedScheduler().core.next_wakeup_s() is None


def test_replicas_are_started_and_idle_ones_stopped() -> None:
    scheduler, scaling = told(2, stopped("p-0"))

    assert tick(scheduler, 10.0) == [Wake(P1)]
    scheduler.at(15.0, ReplicaReady(P1))
    scaling.wanted[P] = 1
    assert tick(scheduler, 20.0) == [Demote(P1, Readiness.DISK)]


def test_one_with_calls_ends_them_first_and_takes_no_others() -> None:
    scheduler, scaling = told(3)
    scheduler.arrive("a", 1.0)
    scaling.wanted[P] = 0

    assert tick(scheduler, 10.0) == [
        Demote(ReplicaId("p-2"), Readiness.DISK),
        Demote(P1, Readiness.DISK),
    ]
    assert scheduler.replica().draining
    assert scheduler.at(11.0, RequestFinished(RequestId("a"), 1, 5)) == [Demote(P0, Readiness.DISK)]


def test_one_that_leaves_is_taken_back_before_another_is_woken() -> None:
    scheduler, scaling = told(0, stopped("p-0"), cooldown_s=500.0)
    scheduler.arrive("a", 1.0)
    assert tick(scheduler, 10.0) == []
    scaling.wanted[P] = 1

    assert tick(scheduler, 20.0) == []
    assert not scheduler.replica().draining


def test_a_call_takes_back_the_one_that_leaves() -> None:
    scheduler, _ = told(0, stopped("p-0"))
    scheduler.arrive("a", 1.0)
    tick(scheduler, 10.0)

    (sent,) = scheduler.arrive("b", 11.0)

    assert isinstance(sent, Dispatch)
    assert sent.replica_id == P0


def test_one_that_leaves_is_not_put_on_trial() -> None:
    scheduler, scaling = told(3)
    scheduler.arrive("a", 1.0)
    scaling.wanted[P] = 0
    tick(scheduler, 10.0)

    scheduler.at(10.5, ReplicaOnTrial(P0))

    assert scheduler.replica().draining
    assert scheduler.at(11.0, RequestFinished(RequestId("a"), 1, 5)) == [Demote(P0, Readiness.DISK)]


def test_a_pool_goes_to_zero_and_back_without_losing_a_call() -> None:
    scheduler, _ = told(0, stopped("p-0"))
    assert tick(scheduler, 10.0) == [Demote(P0, Readiness.DISK)]
    assert scheduler.arrive("a", 11.0) == [Wake(P1)]  # what stops cannot be called back
    assert scheduler.at(12.0, ReplicaDemoted(P0, Readiness.DISK)) == []
    (sent,) = scheduler.at(31.0, ReplicaReady(P1))
    assert isinstance(sent, Dispatch)


def test_a_pool_keeps_its_least_and_shrinks_only_once_settled() -> None:
    fleet = a_fleet(a_pool(least_replicas=2), replicas=3)
    scheduler, _ = told(0, fleet, settle_s=25.0)

    assert [len(tick(scheduler, now_s)) for now_s in (10.0, 20.0, 30.0, 40.0)] == [0, 0, 0, 1]


def test_few_change_at_a_time_and_none_back_so_soon() -> None:
    scheduler, scaling = told(0, most_changes=1, cooldown_s=15.0)

    assert len(tick(scheduler, 10.0)) == 1
    assert len(tick(scheduler, 20.0)) == 1
    scheduler.at(21.0, ReplicaDemoted(P1, Readiness.DISK))
    scheduler.at(21.0, ReplicaDemoted(ReplicaId("p-2"), Readiness.DISK))
    scaling.wanted[P] = 3
    assert tick(scheduler, 30.0) == []
    assert len(tick(scheduler, 40.0)) == 1


def test_one_that_has_just_come_up_stays_for_the_cooldown() -> None:
    scheduler, scaling = told(2, stopped("p-0"), cooldown_s=15.0)
    assert tick(scheduler, 10.0) == [Wake(P1)]
    scheduler.at(12.0, ReplicaReady(P1))
    scaling.wanted[P] = 1

    assert tick(scheduler, 20.0) == []
    assert tick(scheduler, 30.0) == [Demote(P1, Readiness.DISK)]


def test_gpus_are_kept_for_the_pool_that_lacks_a_replica() -> None:
    pools = [a_pool("p", least_replicas=0), a_pool("q", model="x", least_replicas=0)]
    fleet = a_fleet(*pools, states={"q-0": Readiness.DISK})
    scheduler, _ = told(1, fleet, gpus=1)
    scheduler.arrive("a", 1.0)
    scheduler.arrive("b", 2.0, models=("x",))

    assert tick(scheduler, 10.0) == []
    assert scheduler.at(11.0, RequestFinished(RequestId("a"), 1, 5)) == [Demote(P0, Readiness.DISK)]
    scheduler.arrive("c", 12.0, models=("m",))
    assert scheduler.at(13.0, ReplicaDemoted(P0, Readiness.DISK)) == [Wake(ReplicaId("q-0"))]


# What policies want.


def standing(**changes: object) -> Standing:
    facts: dict[str, object] = {"serving": 2, "starting": 0, "most": 40, "calls": 0.0}
    return Standing(**{"pool": a_pool(), **facts, **changes})  # type: ignore[arg-type]


def wants(scaling: Reactive | Foreseen, *own: Standing, demand: Demand | None = None) -> list[int]:
    view = FleetStanding(
        pools={one.pool.pool_id: one for one in own},
        demands={} if demand is None else {ModelName("m"): demand},
        gpus=None,
    )
    targets = scaling.targets(0.0, view)
    return [targets[one.pool.pool_id] for one in own]


@pytest.mark.parametrize(
    ("calls", "wanted"), [(0, 0), (20, 2), (21.9, 2), (22.1, 3), (18.1, 2), (9, 1), (500, 6)]
)
def test_reactive_rounds_up_tolerates_and_grows_by_four(calls: float, wanted: int) -> None:
    assert wants(Reactive(target=10), standing(calls=calls)) == [wanted]


def test_foreseen_fits_the_tail_and_fills_the_cheapest_pool_first() -> None:
    quick, slow = a_pool(), a_pool("q", slowness=3.0)
    each = replica_tokens_per_s(quick, Demand(context_tokens=500.0))
    demand = Demand(
        tokens_per_s=1.9 * each, announcements_per_s=1.0, variance=1.0, context_tokens=500.0
    )

    pools = (standing(pool=slow), standing(pool=quick))
    assert wants(Foreseen(), *pools, demand=demand)[1] == 2
    wide = replace(demand, variance=40 * each**2)
    assert wants(Foreseen(), *pools, demand=wide)[1] > 2
    assert wants(Foreseen(), standing(most=1), demand=demand) == [1]


def test_foreseen_gives_up_the_last_replica_only_when_nothing_is_likely() -> None:
    pool = a_pool(least_replicas=0)
    quiet = Demand(announcements_per_s=1e-4)

    assert wants(Foreseen(), standing(pool=pool), demand=quiet) == [0]
    owing = replace(quiet, owed_tokens=50, owed_workflows=1)
    assert wants(Foreseen(), standing(pool=pool), demand=owing) == [1]


def test_a_full_batch_keeps_within_steps_sequences_and_memory() -> None:
    pool = a_pool()

    batch = full_batch(pool, 1000.0)
    step_s = pool.curve.step_s(batch, 1000 * batch)
    assert step_s <= 1.5 * pool.curve.step_s(1, 1000) < pool.curve.step_s(batch + 1, 1000 * batch)
    assert full_batch(a_pool(max_sequences=3), 1000.0) == 3
    assert full_batch(a_pool(kv_blocks=125), 1000.0) == 2


def test_a_scaling_is_named_after_a_slash() -> None:
    assert policy("chimera:tau=0.3/foreseen:level=0.95").scaling == Foreseen(level=0.95)
    assert policy("las/static").scaling is policy("las").scaling is None
    with pytest.raises(InputError, match='unknown scaling, residency or hedging "reactiv"'):
        policy("las/reactiv")


def test_foreseen_starts_none_for_a_shortage_within_its_tolerance() -> None:
    each = replica_tokens_per_s(a_pool(), Demand())
    demand = Demand(tokens_per_s=2.1 * each, announcements_per_s=1.0)

    assert wants(Foreseen(tolerance=0.1), standing(), demand=demand) == [2]
    assert wants(Foreseen(tolerance=0.0), standing(), demand=demand) == [3]


def test_a_margin_that_chance_leaves_over_clears_what_piled_up() -> None:
    stream = Demand(tokens_per_s=100.0, variance=1e5)
    level = {"present_tokens_per_s": 100.0, "ready_s": 20.0, "clear_s": 100.0, "level": 0.9}

    margin = needed_tokens_per_s(stream, 10.0, **level) - 100.0
    behind = replace(stream, owed_tokens=10_000, owed_workflows=1000)
    far_behind = replace(behind, owed_tokens=40_000)
    assert margin > 30.0
    assert needed_tokens_per_s(behind, 10.0, **level) == pytest.approx(100.0 + 99.0, abs=2)
    assert needed_tokens_per_s(far_behind, 10.0, **level) > 400.0
    few = replace(stream, owed_tokens=1500, owed_workflows=1000)
    assert needed_tokens_per_s(few, 10.0, **level) == pytest.approx(100.0 + margin, rel=0.01)


# What is asked for.


def asked(demands: Demands) -> Demand:
    return demands.demand(M, owed_tokens=0, owed_workflows=0)


def test_rates_are_right_from_the_first_interval_and_fade() -> None:
    demands = Demands(memory_s=100.0)
    demands.fade(0.0)
    for turn in range(1, 30):
        demands.flow(M).announce(150)
        demands.fade(15.0 * turn)
        assert asked(demands).tokens_per_s == pytest.approx(10.0)

    demands.fade(15.0 * 29 + 100.0)
    assert 1.0 < asked(demands).tokens_per_s < 5.0


def test_what_is_more_than_chance_explains_counts_alone() -> None:
    calm, risen = Demands(memory_s=100.0), Demands(memory_s=100.0)
    for demands, burst in ((calm, 2), (risen, 60)):
        demands.fade(0.0)
        for turn in range(1, 30):
            for _ in range(1 if turn < 29 else burst):
                demands.flow(M).announce(150)
            demands.fade(15.0 * turn)

    assert 10.0 < asked(calm).tokens_per_s < 12.0
    assert asked(risen).tokens_per_s == pytest.approx(600.0)


def test_an_answer_that_outgrows_its_forecast_varies_as_one_of_that_length() -> None:
    at_once, bit_by_bit = Flow(), Flow()
    at_once.announce(300)
    bit_by_bit.announce(100)
    for before_tokens in (100, 150, 200, 250):
        bit_by_bit.exceed(50, before_tokens)

    assert bit_by_bit == at_once


def test_what_a_closed_workflow_did_not_use_is_taken_back() -> None:
    scheduler, _ = told(1)
    scheduler.arrive("w/0", 1.0, a_forecast(40.0), workflow_id=WorkflowId("w"))
    scheduler.at(2.0, RequestFinished(RequestId("w/0"), 1, 10))
    scheduler.at(2.0, WorkflowClosed(WorkflowId("w")))
    tick(scheduler, 10.0)

    assert scheduler.core._scaler is not None
    assert scheduler.core._scaler.view().demand(M).tokens_per_s == pytest.approx(1.0)


# Whole runs.


def test_a_steady_hour_takes_few_more_starts_than_it_needs_and_does_not_flap() -> None:
    least = math.ceil(needed_replicas(2.0)) - 1  # one serves at the start
    starts = []
    for seed in (1, 2):
        records, seen = scaled(a_scaled_fleet(), agents(lambda _: 2.0, 3600, seed), "las/foreseen")
        starts.append(len(seen.starts_s))
        assert starts[-1] - len(seen.stops_s) >= least
        assert sum(now_s > 600 for now_s in seen.starts_s) <= 2
        assert all(call.outcome == "served" for call in records.calls)

    assert sum(starts) <= 1.5 * least * len(starts)


def test_a_step_is_met_before_the_reactive_rule_meets_it_with_fewer_starts() -> None:
    load = agents(lambda now_s: 0.3 if now_s < 300 else 2.0, 500, 2)
    reactive, foreseen = (
        scaled(a_scaled_fleet(), load, f"oracle-stjf/{name}")[1]
        for name in ("reactive", "foreseen")
    )

    assert foreseen.serving_from(8, after_s=300) < reactive.serving_from(8, after_s=300)
    assert len(foreseen.starts_s) < len(reactive.starts_s)


def a_planned_chain(name: str, arrival_s: float) -> WorkflowPlan:
    """A plan of 2,000 tokens on one model, then four queries of 300 on another."""
    planner = a_call(output_tokens=2000, max_output_tokens=4096, role="planner", models=(M,))
    queries = [a_call(i, output_tokens=300, role="query", models=(X,)) for i in range(1, 5)]
    return a_plan(name, planner, *queries, arrival_s=arrival_s)


def test_a_model_is_made_ready_while_another_still_plans_for_it() -> None:
    """Five chains teach who follows whom; half an hour later both pools are at zero."""
    pools = [a_pool("p", least_replicas=0), a_pool("q", model="x", least_replicas=0)]
    states = dict.fromkeys(("p-0", "q-0"), Readiness.DISK)
    plans = [a_planned_chain(f"w{i}", 40.0 * i) for i in range(5)]
    late_s = 2000.0
    load = a_workload(*plans, *(a_planned_chain(f"z{i}", late_s + i) for i in range(3)))
    for name, ahead in (("foreseen", True), ("reactive", False)):
        records, seen = scaled(a_fleet(*pools, states=states), load, f"las/{name}")

        asked_s = min(
            c.arrival_s for c in records.calls if c.role == "query" and c.arrival_s > late_s
        )
        planned_s = min(c.arrival_s for c in records.calls if c.arrival_s >= late_s)
        woken_s = [at_s for at_s, one in seen.woken if one == "q-0" and at_s > late_s]
        assert len(seen.stops_s) >= 2
        assert (planned_s < woken_s[0] < asked_s) == ahead
        assert all(call.outcome == "served" for call in records.calls)


@pytest.mark.parametrize("name", ["reactive", "foreseen"])
def test_bursts_wake_a_fleet_at_zero_and_every_call_is_served(name: str) -> None:
    plans = [
        a_plan(f"w{i}", a_call(), a_call(1), arrival_s=1200.0 * (i % 3) + 0.1 * i)
        for i in range(60)
    ]
    records, seen = scaled(a_scaled_fleet(serving=0, gpus=4), a_workload(*plans), f"las/{name}")

    assert records.gauges is not None
    assert all(call.outcome == "served" for call in records.calls)
    assert len(seen.stops_s) >= 2
    assert records.gauges.replica_starts == len(seen.starts_s)
    assert records.gauges.gpu_s <= 4 * records.duration_s
