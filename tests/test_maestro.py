"""The recipe: who goes first, and near and cold against far and warm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CheckedScheduler,
    a_fleet,
    a_forecast,
    a_pool,
    a_request,
    a_shared_fleet,
    a_sharing_pool,
    a_waiting_call,
    a_workflow,
    placements,
)
from concertmaster.core.actions import Wake
from concertmaster.core.events import RequestFinished, TimerFired
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.forecast import Quantiles
from concertmaster.core.policy import Ordering
from concertmaster.core.queue import line_key
from concertmaster.core.request import ModelName, RequestId, ServiceClass
from concertmaster.policies.catalog import policy
from concertmaster.policies.ordering import PeopleFirst
from concertmaster.policies.residency import Expected, LruSwap

BATCH, PERSON = ServiceClass.BATCH, ServiceClass.INTERACTIVE
RUNS, SLEEPS, DISK = Readiness.RUNNING, Readiness.SLEEPING, Readiness.DISK
NEAR, FAR = ReplicaId("m-0"), ReplicaId("m-1")


# Who goes first.


def in_order(*calls: tuple[str, ServiceClass, float], of: str = "maestro") -> list[str]:
    """Let calls (name, class, tokens of their workflow) wait for one place, and serve them."""
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), of)
    scheduler.arrive("first", 0.0)
    for name, service_class, tokens in calls:
        forecast = a_forecast(10, remaining_tokens=Quantiles.exactly(tokens))
        scheduler.arrive(name, 0.0, forecast, service_class=service_class)
    served, running = [], "first"
    for i in range(len(calls)):
        done = RequestFinished(RequestId(running), 1, 5)
        (running,) = placements(scheduler.at(1.0 + i, done))
        served.append(running)
    return served


def test_people_go_before_programs_and_short_workflows_before_long_ones() -> None:
    calls = [("a", BATCH, 10.0), ("b", PERSON, 900.0), ("c", BATCH, 500.0), ("d", PERSON, 50.0)]

    assert in_order(*calls) == ["d", "b", "a", "c"]


def test_a_workflow_of_programs_gives_way_less_the_more_it_has_waited() -> None:
    ordering: Ordering = PeopleFirst(60.0)
    request, pool = a_request(service_class=BATCH), a_pool()

    gives_s = [
        ordering.urgency_s(request, a_forecast(10), a_workflow(waited_s=waited_s), pool)
        for waited_s in (0.0, 40.0, 60.0, 500.0)
    ]

    as_a_person = ordering.urgency_s(a_request(), a_forecast(10), a_workflow(), pool)
    assert [s - as_a_person for s in gives_s] == pytest.approx([60.0, 20.0, 0.0, 0.0])


def test_the_line_notes_what_a_workflow_has_waited() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), "maestro")
    scheduler.arrive("r1", 0.0)
    scheduler.arrive("r2", 1.0, workflow_id="w")
    scheduler.at(8.0, RequestFinished(RequestId("r1"), 1, 5))

    assert scheduler.core.workflows._by_id["w"].waited_s == 7.0  # type: ignore[index]


@given(
    st.floats(0, 1e6),
    st.sampled_from([BATCH, PERSON]),
    st.integers(1, 100_000),
    st.floats(0, 1e4),
    st.floats(0, 5000),
)
def test_nobody_is_overtaken_by_a_call_that_comes_later_than_the_stated_bound(
    tokens: float, service_class: ServiceClass, prompt: int, waited_s: float, later_s: float
) -> None:
    """The worst call against the best one that comes ``later_s`` after it."""
    of, pool = policy("maestro"), a_pool()
    forecast = a_forecast(5, remaining_tokens=Quantiles.exactly(tokens))
    request = a_request(service_class=service_class, prompt_tokens=prompt)
    urgency_s = of.ordering.urgency_s(request, forecast, a_workflow(waited_s=waited_s), pool)
    mine = line_key(urgency_s=urgency_s, arrival_s=0.0, aging=of.aging)
    best = line_key(urgency_s=0.0, arrival_s=later_s, aging=of.aging)

    assert best >= mine or later_s < 2 * 60.0 / of.aging


# Where.


def two_sites(
    near: Readiness, far: Readiness, *, far_s: float = 0.08, sequences: int = 1
) -> CheckedScheduler:
    pool = a_sharing_pool("m", max_sequences=sequences)
    fleet = a_shared_fleet(pool, nodes=2, states={NEAR: near, FAR: far}, network_s=(0.001, far_s))
    return CheckedScheduler(fleet, "maestro:returning=0")


def ask(scheduler: CheckedScheduler, name: str, now_s: float, **changes: object) -> dict[str, str]:
    actions = scheduler.arrive(name, now_s, models=(ModelName("m"),), **changes)  # type: ignore[arg-type]
    woken = [one.replica_id for one in actions if isinstance(one, Wake)]
    return {**placements(actions), **({"woken": woken[0]} if woken else {})}


@pytest.mark.parametrize(
    ("near", "far", "expected"),
    [
        (RUNS, RUNS, {"r": NEAR}),
        (SLEEPS, RUNS, {"r": FAR}),
        (DISK, RUNS, {"r": FAR}),
        (SLEEPS, SLEEPS, {"woken": NEAR}),
        (DISK, SLEEPS, {"woken": FAR}),
        (DISK, DISK, {"woken": NEAR}),
    ],
)
def test_near_and_cold_against_far_and_warm(
    near: Readiness, far: Readiness, expected: dict[str, str]
) -> None:
    assert ask(two_sites(near, far), "r", 0.0) == expected


def test_the_near_one_comes_up_once_waiting_for_the_far_one_takes_as_long() -> None:
    scheduler = two_sites(SLEEPS, RUNS)
    ask(scheduler, "r0", 0.0)
    ask(scheduler, "r1", 0.0)
    woken = []
    for step in range(1, 60):
        woken += [
            (one.replica_id, step / 10)
            for one in scheduler.at(step / 10, TimerFired())
            if isinstance(one, Wake)
        ]

    ((replica_id, at_s),) = woken
    assert replica_id == NEAR
    assert 2.0 <= at_s < 3.0, "no sooner than the load takes"


@pytest.mark.parametrize(("service_class", "place"), [(PERSON, NEAR), (BATCH, FAR)])
def test_distance_weighs_more_for_people(service_class: ServiceClass, place: ReplicaId) -> None:
    """The near one is busy enough to be worth the way for a program only."""
    scheduler = two_sites(RUNS, RUNS, far_s=0.08, sequences=8)
    assert ask(scheduler, "busy", 0.0, prompt_tokens=1800, service_class=BATCH)

    assert ask(scheduler, "r", 0.0, service_class=service_class) == {"r": place}


def test_a_prompt_takes_time_on_the_way() -> None:
    of = policy("maestro")
    far = two_sites(RUNS, RUNS).replica("m-1")
    costs = [
        of.costs_s(0.0, a_waiting_call(request=a_request(prompt_tokens=tokens)), far)["distance"]
        for tokens in (1, 100_001)
    ]

    assert costs[1] - costs[0] == pytest.approx(4 * 100_000 * 4 / 1.25e8)


def test_another_residency_takes_the_place_of_its_own() -> None:
    assert policy("maestro:interactive=2,residence=5").residency == Expected(
        interactive=2.0, residence=5.0
    )
    swapping = policy("maestro/lru-swap:kv=forecast")
    assert (swapping.residency, swapping.ordering) == (LruSwap(), PeopleFirst(60.0))
