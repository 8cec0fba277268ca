"""A second attempt for calls that are late: when, where, and what becomes of both."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_pool, a_waiting_call
from concertmaster.core.actions import Action, Cancel, Dispatch, Fail
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    ReplicaDied,
    ReplicaDraining,
    ReplicaOnTrial,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
)
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.hedging import (
    BURST,
    LEAST_CALLS,
    MEMORY_CALLS,
    UNKNOWN_FACTOR,
    Budget,
    Hedging,
    Tail,
)
from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.predictors.rates import PaceWatch

A = RequestId("a")
P0, P1 = ReplicaId("p-0"), ReplicaId("p-1")
FLOOR_S = 0.5
DUE_S = UNKNOWN_FACTOR * FLOOR_S
"""When a short prompt is late in a fleet that has seen nothing yet."""


def a_scheduler(fleet: Fleet | None = None, of: str = "fcfs/hedge:share=1") -> CheckedScheduler:
    return CheckedScheduler(fleet or a_fleet(replicas=2), of)


def hedges(actions: list[Action]) -> list[tuple[str, str]]:
    found = [action for action in actions if isinstance(action, Dispatch) and action.hedge]
    return [(action.request_id, action.replica_id) for action in found]


def a_race(scheduler: CheckedScheduler | None = None) -> CheckedScheduler:
    """One call on both replicas, heard of by neither."""
    scheduler = scheduler or a_scheduler()
    scheduler.arrive("a")
    assert hedges(scheduler.at(DUE_S, TimerFired())) == [("a", "p-1")]
    return scheduler


def is_idle(scheduler: CheckedScheduler) -> bool:
    replicas = scheduler.core.replicas.values()
    return not any(r.in_flight or r.kv.reserved_blocks or r.decode_tokens for r in replicas)


# When.


def test_a_late_call_is_sent_to_another_replica_beside_the_first() -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a")

    assert scheduler.core.next_wakeup_s() == DUE_S
    assert scheduler.at(DUE_S - 0.01, TimerFired()) == []
    (action,) = scheduler.at(DUE_S, TimerFired())

    assert isinstance(action, Dispatch)
    assert (action.replica_id, action.attempt, action.hedge) == ("p-1", 2, True)
    assert A in scheduler.replica("p-0").in_flight
    assert A in scheduler.replica("p-1").in_flight
    assert scheduler.core.next_wakeup_s() is None, "a call is hedged once"
    assert scheduler.at(100.0, TimerFired()) == []


def test_without_a_rule_nothing_is_late() -> None:
    scheduler = a_scheduler(of="fcfs")
    scheduler.arrive("a")

    assert scheduler.core.next_wakeup_s() is None
    assert scheduler.at(1000.0, TimerFired()) == []


@pytest.mark.parametrize("of", ["fcfs/hedge:share=0", "fcfs/hedge:share=1,floor_s=2000"])
def test_a_rule_without_a_budget_or_with_a_high_floor_sends_nothing(of: str) -> None:
    scheduler = a_scheduler(of=of)
    scheduler.arrive("a")

    assert hedges(scheduler.at(1000.0, TimerFired())) == []


def test_a_late_call_that_the_budget_holds_back_is_counted_once() -> None:
    scheduler = a_scheduler(of="fcfs/hedge:share=0")
    scheduler.arrive("a")
    for now_s in (DUE_S, 10.0, 100.0):
        scheduler.at(now_s, TimerFired())
    scheduler.arrive("b", now_s=100.0)
    scheduler.at(200.0, TimerFired())

    assert scheduler.core.races.short == 2
    assert a_race().core.races.short == 0


def test_a_call_that_has_begun_to_answer_is_not_late() -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a")
    scheduler.at(0.9, TokensStreamed(((A, 1, 1),)))

    assert scheduler.core.next_wakeup_s() is None
    assert scheduler.at(100.0, TimerFired()) == []


def test_calls_of_programs_are_not_hedged() -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a", service_class=ServiceClass.BATCH)

    assert scheduler.at(100.0, TimerFired()) == []


def test_a_long_prompt_is_late_later() -> None:
    """10,000 tokens take a second."""
    scheduler = a_scheduler()
    scheduler.arrive("a", prompt_tokens=10_000)

    due_s = scheduler.core.next_wakeup_s()

    assert due_s is not None
    assert due_s > 1.9 * UNKNOWN_FACTOR / 2


def test_what_is_late_follows_the_calls_that_were_seen() -> None:
    scheduler = a_scheduler()
    for number in range(LEAST_CALLS):
        scheduler.arrive(f"r{number}", 10.0 * number, prompt_tokens=1)
        request_id = RequestId(f"r{number}")
        scheduler.at(10.0 * number + 0.9, TokensStreamed(((request_id, 1, 1),)))
        scheduler.at(10.0 * number + 0.9, RequestFinished(request_id, 1, 1))
    scheduler.arrive("a", 1000.0)

    due_s = scheduler.core.next_wakeup_s()

    assert due_s == pytest.approx(1000.9), "all took 0.9 s where nothing is late before 0.5 s"


def test_hedges_do_not_stretch_what_is_late() -> None:
    """An overtaken call counts as late as it had to be, not as late as its hedge answered."""
    scheduler = a_scheduler()
    for number in range(3 * LEAST_CALLS):
        request_id, began_s = RequestId(f"r{number}"), 100.0 * number
        scheduler.arrive(f"r{number}", began_s, prompt_tokens=1)
        due_s = scheduler.core.next_wakeup_s()
        assert due_s is not None
        assert due_s - began_s == pytest.approx(DUE_S)
        assert hedges(scheduler.at(due_s, TimerFired()))
        scheduler.at(due_s + 0.3, TokensStreamed(((request_id, 2, 1),)))
        scheduler.at(due_s + 0.4, RequestFinished(request_id, 2, 1))


# Where.


def test_nobody_is_hedged_where_others_wait() -> None:
    scheduler = a_scheduler(a_fleet(a_pool(max_sequences=4, kv_blocks=64), replicas=2))
    scheduler.arrive("a")
    scheduler.arrive("large", 0.0, prompt_tokens=900)
    scheduler.arrive("waits", 0.0, prompt_tokens=1000)
    assert [call.request.request_id for call in scheduler.core.line] == ["waits"]

    assert hedges(scheduler.at(DUE_S, TimerFired())) == []


@pytest.mark.parametrize("event", [ReplicaDraining(P1), ReplicaDied(P1)])
def test_nobody_is_hedged_on_a_replica_that_leaves(event: ReplicaDraining | ReplicaDied) -> None:
    scheduler = a_scheduler()
    scheduler.at(0.0, event)
    scheduler.arrive("a")

    assert scheduler.at(100.0, TimerFired()) == []


def test_a_hedge_is_no_trial() -> None:
    scheduler = a_scheduler()
    scheduler.at(0.0, ReplicaDraining(P1))
    scheduler.arrive("a")
    scheduler.at(0.5, ReplicaOnTrial(P1))

    assert scheduler.at(100.0, TimerFired()) == []


def test_a_replica_that_is_half_full_takes_no_hedge() -> None:
    scheduler = a_scheduler(a_fleet(a_pool(max_sequences=2), replicas=2))
    scheduler.arrive("a")
    scheduler.arrive("b")
    scheduler.at(0.1, TokensStreamed(((RequestId("b"), 1, 1),)))

    assert scheduler.at(DUE_S, TimerFired()) == []
    scheduler.at(1.05, RequestFinished(RequestId("b"), 1, 2))
    wakeup_s = scheduler.core.next_wakeup_s()
    assert wakeup_s is not None, "it is looked at again"
    assert hedges(scheduler.at(wakeup_s, TimerFired())) == [("a", "p-1")]


def test_another_model_is_no_place_for_a_hedge() -> None:
    scheduler = a_scheduler(a_fleet(a_pool("p"), a_pool("q", model="x"), replicas=1))
    scheduler.arrive("a")

    assert scheduler.at(100.0, TimerFired()) == []


def test_the_replica_that_would_end_first_gets_the_hedge() -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q", slowness=4.0), a_pool("r", slowness=2.0))
    scheduler = a_scheduler(fleet)
    scheduler.arrive("a")

    assert hedges(scheduler.at(DUE_S, TimerFired())) == [("a", "r-0")]


def test_a_hedge_that_would_end_later_waits() -> None:
    """Elsewhere the prompt takes 1.5 s, 3 s at twice the seconds: a wait of 3 s is worth that."""
    hashes = tuple(range(58))
    facts: dict[str, Any] = {"prompt_tokens": 58 * 256 + 1, "prefix_hashes": hashes}
    scheduler = a_scheduler(of="prefix-affinity/hedge:share=1")
    scheduler.arrive("first", 0.0, **facts)
    scheduler.at(1.6, TokensStreamed(((RequestId("first"), 1, 1),)))
    scheduler.at(1.7, RequestFinished(RequestId("first"), 1, 2))
    (sent,) = scheduler.arrive("a", 10.0, **facts)
    assert isinstance(sent, Dispatch)
    assert sent.replica_id == "p-0"

    now_s = 10.0
    while not (done := hedges(scheduler.at(now_s, TimerFired()))):
        now_s = scheduler.core.next_wakeup_s() or 0.0
        assert 10.0 < now_s < 20.0

    assert done == [("a", "p-1")]
    assert 13.0 < now_s < 14.0


def test_a_whole_answer_is_late_only_once_it_cannot_just_be_long() -> None:
    """Nothing is heard of it before its end, which may take a second at the tail."""
    forecast = a_forecast(100.0)
    scheduler = a_scheduler()
    scheduler.arrive("a", 0.0, forecast, max_output_tokens=4000, streams=False)
    now_s = scheduler.core.next_wakeup_s()
    assert now_s is not None
    assert now_s > UNKNOWN_FACTOR

    while not hedges(scheduler.at(now_s, TimerFired())):
        now_s = scheduler.core.next_wakeup_s()
        assert now_s is not None

    assert 3.5 < now_s < 6.0, "a quarter of what it has taken is more than the answer takes anew"


# What becomes of both.


def test_the_first_to_begin_answers_and_the_hedge_is_stopped() -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, TokensStreamed(((A, 1, 1),))) == [Cancel(A, P1)]
    assert scheduler.core.races.outcomes == {"lost": 1}
    scheduler.at(1.2, TokensStreamed(((A, 2, 9),)))
    scheduler.at(1.2, RequestFinished(A, 2, 9))
    assert scheduler.replica("p-0").in_flight[A].streamed_tokens == 1, "news of a loser are old"
    scheduler.at(2.0, RequestFinished(A, 1, 7))
    assert is_idle(scheduler)


def test_a_hedge_that_begins_first_takes_over() -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, TokensStreamed(((A, 2, 1),))) == [Cancel(A, P0, overtaken=True)]
    assert scheduler.core.races.outcomes == {"won": 1}
    assert scheduler.core.in_flight(A) == scheduler.core.in_flight(A, 2) == P1
    assert scheduler.core.in_flight(A, 1) is None
    scheduler.at(2.0, RequestFinished(A, 2, 7))
    assert is_idle(scheduler)


@pytest.mark.parametrize(("attempt", "loser"), [(1, P1), (2, P0)])
def test_an_answer_that_comes_as_a_whole_decides_too(attempt: int, loser: ReplicaId) -> None:
    scheduler = a_race()

    (cancel,) = scheduler.at(1.1, RequestFinished(A, attempt, 30))

    assert isinstance(cancel, Cancel)
    assert cancel.replica_id == loser
    assert is_idle(scheduler)


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_workflow_is_given_what_one_attempt_made(attempt: int) -> None:
    plain = CheckedScheduler(a_fleet(replicas=2), "fcfs")
    plain.arrive("a", workflow_id=WorkflowId("w"))
    plain.at(1.1, TokensStreamed(((A, 1, 1),)))
    scheduler = a_scheduler()
    scheduler.arrive("a", workflow_id=WorkflowId("w"))
    scheduler.at(DUE_S, TimerFired())
    scheduler.at(1.1, TokensStreamed(((A, attempt, 1),)))

    mine, other = (one.core.workflows.get(WorkflowId("w")) for one in (scheduler, plain))

    assert mine == other


def test_a_hedge_that_breaks_costs_nothing() -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, RequestFailed(A, 2, retriable=True)) == []
    assert scheduler.core.races.outcomes == {"broke": 1}
    assert not scheduler.replica("p-1").in_flight
    assert scheduler.at(1.2, TokensStreamed(((A, 1, 1),))) == []
    scheduler.at(2.0, RequestFinished(A, 1, 7))
    assert is_idle(scheduler)


def test_a_hedge_goes_on_alone_where_the_first_attempt_breaks() -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, RequestFailed(A, 1, retriable=False)) == []
    assert scheduler.core.races.outcomes == {"alone": 1}
    assert not scheduler.replica("p-0").in_flight
    assert scheduler.core.in_flight(A) == P1
    scheduler.at(2.0, RequestFinished(A, 2, 7))
    assert is_idle(scheduler)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_where_both_break_the_call_is_tried_again_under_a_number_of_its_own(
    order: tuple[int, int],
) -> None:
    scheduler = a_race()

    scheduler.at(1.1, RequestFailed(A, order[0], retriable=True))
    (again,) = scheduler.at(1.2, RequestFailed(A, order[1], retriable=True))

    assert isinstance(again, Dispatch)
    assert (again.attempt, again.hedge) == (3, False)
    assert scheduler.at(9.0, TimerFired()) == [], "a call is hedged once"
    assert scheduler.at(9.1, RequestFailed(A, 3, retriable=True)) == [Fail(A, "engine_error")]
    assert is_idle(scheduler)


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_a_retry_may_be_hedged_but_no_fourth_attempt_is_made(order: tuple[int, int]) -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a")
    scheduler.at(0.1, RequestFailed(A, 1, retriable=True))
    assert hedges(scheduler.at(2.0, TimerFired()))
    scheduler.at(2.1, RequestFailed(A, order[0], retriable=True))

    last = scheduler.at(2.2, RequestFailed(A, order[1], retriable=True))

    assert last == [Fail(A, "engine_error")]


def test_a_call_at_its_last_attempt_is_not_hedged() -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a")
    for attempt in (1, 2):
        scheduler.at(0.1 * attempt, RequestFailed(A, attempt, retriable=True))

    assert scheduler.core.in_flight(A, 3) is not None
    assert scheduler.at(100.0, TimerFired()) == []


def test_a_call_that_was_hedged_is_not_watched_again() -> None:
    races = a_scheduler().core.races
    races._attempts = 9

    assert races._may_race(a_waiting_call("a", attempt=3))
    assert not races._may_race(a_waiting_call("a", attempt=3, hedge=2))


def test_the_pace_of_a_hedge_is_measured_where_it_runs() -> None:
    scheduler = a_race()
    pace = PaceWatch(scheduler.core)

    pace.note(1.1, TokensStreamed(((A, 2, 1),)))

    assert pace._calls[A].meter.replica_id == P1


@pytest.mark.parametrize(("dead", "other"), [(P0, P1), (P1, P0)])
def test_a_call_outlives_one_of_its_replicas(dead: ReplicaId, other: ReplicaId) -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, ReplicaDied(dead)) == [Cancel(A, dead)]
    assert scheduler.core.in_flight(A) == other
    scheduler.at(1.2, ReplicaDied(other))
    assert [call.attempt for call in scheduler.core.line] == [3]


def test_a_caller_that_leaves_stops_both() -> None:
    scheduler = a_race()

    assert scheduler.at(1.1, RequestCancelled(A)) == [Cancel(A, P1), Cancel(A, P0)]
    assert scheduler.core.races.outcomes == {"cancelled": 1}
    assert is_idle(scheduler)


def test_a_rule_comes_and_goes_with_the_policy() -> None:
    scheduler = a_scheduler()
    scheduler.arrive("a")
    scheduler.core.adopt(policy_named("fcfs"))
    assert scheduler.at(100.0, TimerFired()) == []
    scheduler.core.adopt(policy_named("fcfs/hedge:share=1"))
    scheduler.arrive("b", 200.0)

    assert hedges(scheduler.at(201.0, TimerFired())) == [("b", "p-0")]


def test_a_race_goes_on_though_the_rule_is_gone() -> None:
    scheduler = a_race()
    scheduler.core.adopt(policy_named("fcfs"))

    assert scheduler.at(1.1, TokensStreamed(((A, 2, 1),))) == [Cancel(A, P0, overtaken=True)]


# The rule itself.


def test_a_rule_is_named_after_a_slash() -> None:
    assert policy_named("las/hedge").hedge == Hedging()
    assert policy_named("las").hedge is None
    built = policy_named("swarmx:tail=0.9/hedge:level=0.9,share=0.1,floor_s=2/reactive")
    assert built.hedge == Hedging(level=0.9, share=0.1, floor_s=2.0)
    assert built.scaling is not None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("las/hegde", 'unknown scaling, residency or hedging "hegde" .did you mean "hedge"'),
        ("las/hedge/hedge", "expected at most one of each kind after a slash, found hedge, hedge"),
        ("las/hedge:level=3", 'level: expected a number, 0.5 to 0.9999, found "3"'),
        ("round-robin@arrival/hedge", "queue inside their replica, so all of them are late"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_in_one_line(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        policy_named(name)


@pytest.mark.parametrize("facts", [{"level": 1.0}, {"share": -0.1}, {"floor_s": 0.0}])
def test_a_rule_out_of_bounds_is_refused(facts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="hedging needs"):
        Hedging(**facts)


@given(share=st.floats(0.01, 1), calls=st.lists(st.booleans(), max_size=300))
def test_hedges_are_a_share_of_dispatches_and_a_burst(share: float, calls: list[bool]) -> None:
    budget, earned, spent = Budget(share), 0, 0
    for is_dispatch in calls:
        if is_dispatch:
            budget.earn()
            earned += 1
        else:
            spent += budget.take()
        assert spent <= BURST + share * earned + 1e-6


@given(st.floats(0.5, 0.99), st.lists(st.floats(0, 100), max_size=300))
def test_what_is_late_is_a_quantile_of_the_latest_calls(level: float, ratios: list[float]) -> None:
    tail = Tail(level)
    for ratio in ratios:
        tail.note(ratio)
    latest = ratios[-MEMORY_CALLS:]

    if len(latest) < LEAST_CALLS:
        assert tail.factor == UNKNOWN_FACTOR
    else:
        above = sum(ratio > tail.factor for ratio in latest)
        assert above <= (1 - level) * len(latest)
        assert tail.factor in (1.0, *latest)
