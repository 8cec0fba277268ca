"""What befalls a simulated fleet: who dies, who turns slow, and who is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_call, a_fleet, a_plan, a_pool, a_workload, chains
from concertmaster.compose import simulate
from concertmaster.core.actions import Action
from concertmaster.core.events import Event, PaceObserved, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.sim.incidents import Incident, loss, replicas_of, slowing
from concertmaster.workload.records import RunRecords

P0 = ReplicaId("p-0")


def run(*incidents: Incident, output_tokens: int = 101, follow_pace: bool = True) -> RunRecords:
    workload = a_workload(a_plan("w", a_call(0, output_tokens=output_tokens)))
    return simulate(
        a_fleet(), workload, "fcfs", seed=0, incidents=incidents, follow_pace=follow_pace
    )


def lasted_s(records: RunRecords) -> float:
    (call,) = records.calls
    assert call.finished_s is not None
    return call.finished_s - call.arrival_s


@given(
    share=st.floats(0.0, 1.0),
    replicas=st.integers(1, 12),
)
def test_a_loss_takes_its_share_of_every_pool_and_leaves_one(share: float, replicas: int) -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q"), replicas=replicas)
    dead = loss(fleet, share, at_s=3.0)

    for name in "pq":
        lost = sum(one.replica_id.startswith(name) for one in dead)
        assert lost <= replicas - 1
        assert abs(lost - min(replicas - 1, share * replicas)) <= 0.51
    assert {(one.at_s, one.kind) for one in dead} <= {(3.0, "dies")}
    assert P0 not in {one.replica_id for one in dead}


def test_replicas_of_a_pool_come_in_order() -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q"), replicas=2)

    assert replicas_of(fleet, "q") == ["q-0", "q-1"]


def test_the_core_is_told_of_deaths_and_recoveries_only() -> None:
    told = [Incident(0.0, kind, P0).event for kind in ("dies", "recovers", "slows")]

    assert told == [ReplicaDied(P0), ReplicaReady(P0), None]


def test_a_slow_replica_takes_longer_from_that_instant_on() -> None:
    plain_s = lasted_s(run())
    half = Incident(plain_s / 2, "slows", P0, 3.0)

    assert lasted_s(run(Incident(0.0, "slows", P0, 3.0))) == pytest.approx(3 * plain_s, rel=0.02)
    assert lasted_s(run(half)) == pytest.approx(2 * plain_s, rel=0.02)
    assert lasted_s(run(half, Incident(plain_s, "slows", P0))) == pytest.approx(
        plain_s * (1 / 2 + 1 / 2 + (1 / 2 - 1 / 6)), rel=0.02
    )


def test_a_slow_replica_is_noticed_only_if_paces_are_followed() -> None:
    fleet, workload = a_fleet(replicas=3), chains(200, gap_s=0.3, seed=2)

    def paces(*, follow_pace: bool) -> dict[ReplicaId, float]:
        found: dict[ReplicaId, float] = {}

        def note(_: float, event: Event, __: list[Action]) -> None:
            if isinstance(event, PaceObserved):
                found.update(event.paces)

        simulate(
            fleet,
            workload,
            "least-tokens",
            seed=0,
            incidents=slowing([P0], 4.0, at_s=20.0),
            follow_pace=follow_pace,
            observe=note,
        )
        return found

    assert paces(follow_pace=True) == {P0: pytest.approx(4.0, rel=0.15)}
    assert paces(follow_pace=False) == {}
