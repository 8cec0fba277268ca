"""How many replicas: what policies want, what is done about it, and whole runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from builders import CheckedScheduler, a_call, a_fleet, a_plan, a_policy, a_pool, a_workload
from concertmaster.core.actions import Action, Dispatch, Stop, Wake
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    ReplicaDemoted,
    ReplicaReady,
    RequestFinished,
    TimerFired,
)
from concertmaster.core.fleet import Fleet, PoolId, Readiness, ReplicaId, ScalingLimits
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.standing import Demand, FleetStanding, Standing
from concertmaster.policies.catalog import policy
from concertmaster.policies.scaling import Foreseen, Reactive, full_batch, replica_tokens_per_s
from scaling_load import a_scaled_fleet, agents, needed_replicas, scaled

P, P0, P1 = PoolId("p"), ReplicaId("p-0"), ReplicaId("p-1")


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
    assert tick(scheduler, 20.0) == [Stop(P1)]


def test_one_with_calls_ends_them_first_and_takes_no_others() -> None:
    scheduler, scaling = told(3)
    scheduler.arrive("a", 1.0)
    scaling.wanted[P] = 0

    assert tick(scheduler, 10.0) == [Stop(ReplicaId("p-2")), Stop(P1)]
    assert scheduler.replica().draining
    assert scheduler.at(11.0, RequestFinished(RequestId("a"), 1, 5)) == [Stop(P0)]


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


def test_a_pool_goes_to_zero_and_back_without_losing_a_call() -> None:
    scheduler, _ = told(0, stopped("p-0"))
    assert tick(scheduler, 10.0) == [Stop(P0)]
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


def test_gpus_are_kept_for_the_pool_that_lacks_a_replica() -> None:
    pools = [a_pool("p", least_replicas=0), a_pool("q", model="x", least_replicas=0)]
    fleet = a_fleet(*pools, states={"q-0": Readiness.DISK})
    scheduler, _ = told(1, fleet, gpus=1)
    scheduler.arrive("a", 1.0)
    scheduler.arrive("b", 2.0, models=("x",))

    assert tick(scheduler, 10.0) == []
    assert scheduler.at(11.0, RequestFinished(RequestId("a"), 1, 5)) == [Stop(P0)]
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
    with pytest.raises(InputError, match='unknown scaling "reactiv"'):
        policy("las/reactiv")


# Whole runs.


def test_a_steady_hour_needs_few_starts_and_does_not_flap() -> None:
    records, seen = scaled(a_scaled_fleet(), agents(lambda _: 2.0, 3600, 1), "las/foreseen")

    kept = len(seen.starts_s) - len(seen.stops_s)
    assert kept >= int(needed_replicas(2.0))
    assert len(seen.starts_s) <= 1.5 * kept
    assert sum(now_s > 600 for now_s in seen.starts_s) <= 2
    assert all(call.outcome == "served" for call in records.calls)


def test_a_step_is_met_within_an_interval_of_the_reactive_rule_with_fewer_starts() -> None:
    load = agents(lambda now_s: 0.3 if now_s < 300 else 2.0, 500, 2)
    runs = {
        name: scaled(a_scaled_fleet(), load, f"oracle-stjf/{name}")[1]
        for name in ("reactive", "foreseen:clear_s=15")
    }

    reactive, foreseen = (one.serving_from(8, after_s=300) for one in runs.values())
    assert foreseen <= reactive + 15
    assert len(runs["foreseen:clear_s=15"].starts_s) <= len(runs["reactive"].starts_s)


@pytest.mark.parametrize("name", ["reactive", "foreseen"])
def test_bursts_wake_a_fleet_at_zero_and_every_call_is_served(name: str) -> None:
    plans = [
        a_plan(f"w{i}", a_call(), a_call(1), arrival_s=900.0 * (i % 3) + 0.1 * i) for i in range(60)
    ]
    records, seen = scaled(a_scaled_fleet(serving=0, gpus=4), a_workload(*plans), f"las/{name}")

    assert records.gauges is not None
    assert all(call.outcome == "served" for call in records.calls)
    assert len(seen.stops_s) >= 2
    assert records.gauges.replica_starts == len(seen.starts_s)
    assert records.gauges.gpu_s <= 4 * records.duration_s
