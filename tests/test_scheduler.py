"""The core, one behaviour a test: arrival, waiting, room, death, sleep, refusal, cancellation."""

import random
from dataclasses import replace

import pytest

from builders import (
    CheckedScheduler,
    a_fleet,
    a_forecast,
    a_policy,
    a_pool,
    a_request,
    placements,
)
from concertmaster.core.actions import Action, Cancel, Dispatch, Fail, Reject, Wake
from concertmaster.core.events import (
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    ReplicaOnTrial,
    ReplicaReady,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import Fleet, PoolId, Readiness, ReplicaId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.queue import longest_overtaking_s
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.policies.admission import BoundedLine

P0, P1 = ReplicaId("p-0"), ReplicaId("p-1")


def one_at_a_time(replicas: int = 1) -> Fleet:
    return a_fleet(a_pool(max_sequences=1), replicas=replicas)


def finished(name: str, attempt: int = 1, output_tokens: int = 50) -> RequestFinished:
    return RequestFinished(RequestId(name), attempt, output_tokens)


def streamed(name: str, tokens: int, attempt: int = 1) -> TokensStreamed:
    return TokensStreamed(((RequestId(name), attempt, tokens),))


def waiting(scheduler: CheckedScheduler) -> list[str]:
    return [call.request.request_id for call in scheduler.core.line]


def assert_idle(scheduler: CheckedScheduler) -> None:
    for replica in scheduler.core.replicas.values():
        assert replica.in_flight == {}
        assert (replica.kv.reserved_blocks, replica.decode_tokens) == (0, 0)
    assert waiting(scheduler) == []


# Arrival and dispatch.


def test_a_call_is_dispatched_at_once_where_there_is_room() -> None:
    scheduler = CheckedScheduler()

    (action,) = scheduler.arrive("a", 3.0)

    assert isinstance(action, Dispatch)
    assert (action.request_id, action.replica_id, action.attempt) == ("a", "p-0", 1)
    assert (action.priority, action.waited_s) == (0, 0.0)
    assert scheduler.core.in_flight(RequestId("a")) == P0


def test_a_dispatch_records_what_every_open_replica_would_have_cost() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(), a_pool("q", slowness=2.0)))

    (action,) = scheduler.arrive("a", forecast=a_forecast(10))

    assert isinstance(action, Dispatch)
    costs_s = {str(replica): dict(costs) for replica, costs in action.costs_s.items()}
    assert costs_s["p-0"] == {
        "prefill_backlog": 0.0,
        "prefill": pytest.approx(0.0199),
        "decode": pytest.approx(10 * 0.01001),
        "in_flight_tokens": 0.0,
        "network": 0.0,
    }
    assert costs_s["q-0"]["prefill"] == pytest.approx(0.0398)
    assert action.candidates == 2
    assert action.cost_s == pytest.approx(sum(costs_s["p-0"].values()))


def test_a_dispatch_without_a_record_tells_the_chosen_cost_only() -> None:
    scheduler = Scheduler(a_fleet(replicas=2), a_policy(), random.Random(1))

    (action,) = scheduler.handle(0.0, RequestArrived(a_request()))

    assert isinstance(action, Dispatch)
    assert (action.candidates, action.costs_s) == (2, {})
    assert action.cost_s is not None


def test_a_dispatch_without_a_choice_has_no_cost() -> None:
    (action,) = CheckedScheduler().arrive("a")

    assert isinstance(action, Dispatch)
    assert (action.candidates, action.cost_s) == (1, None)


def test_engines_that_take_a_priority_get_the_key_in_milliseconds() -> None:
    fleet = a_fleet(a_pool(priority_scheduling=True))

    (action,) = CheckedScheduler(fleet, "edf").arrive("a", 3.0, deadline_s=4.5)

    assert isinstance(action, Dispatch)
    assert action.priority == 4500


def test_a_call_with_named_models_goes_only_to_these() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool("fast"), a_pool("slow", model="x", slowness=9.0)))

    assert placements(scheduler.arrive("a", models=(ModelName("x"),))) == {"a": "slow-0"}


def test_a_call_that_fits_one_pool_only_goes_there() -> None:
    small = a_pool("small", kv_blocks=10)
    scheduler = CheckedScheduler(a_fleet(small, a_pool("large", slowness=9.0)))

    assert placements(scheduler.arrive("a", prompt_tokens=160)) == {"a": "large-0"}


def test_a_call_goes_where_its_longest_answer_fits_if_there_is_such_a_pool() -> None:
    pools = a_pool("small", kv_blocks=100), a_pool("large", slowness=9.0)
    scheduler = CheckedScheduler(a_fleet(*pools))

    assert placements(scheduler.arrive("a", max_output_tokens=1500)) == {"a": "small-0"}
    assert placements(scheduler.arrive("b", max_output_tokens=1501)) == {"b": "large-0"}


# Late binding.


def test_a_call_waits_in_the_line_until_a_replica_has_room() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a", 0.0)

    assert scheduler.arrive("b", 1.0) == []
    assert waiting(scheduler) == ["b"]

    (action,) = scheduler.at(5.0, finished("a"))
    assert isinstance(action, Dispatch)
    assert (action.request_id, action.waited_s) == ("b", 4.0)


def test_the_choice_of_replica_is_made_when_there_is_room_not_at_arrival() -> None:
    scheduler = CheckedScheduler(one_at_a_time(replicas=2))
    assert placements(scheduler.arrive("a")) == {"a": "p-0"}
    assert placements(scheduler.arrive("b")) == {"b": "p-1"}
    scheduler.arrive("c")

    assert placements(scheduler.at(1.0, finished("b"))) == {"c": "p-1"}


def test_the_order_of_waiting_calls_uses_what_was_learned_while_they_waited() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=2)), "las")
    busy = WorkflowId("busy")
    scheduler.arrive("busy/0", 0.0, workflow_id=busy)
    scheduler.arrive("blocker", 0.0)
    scheduler.arrive("busy/1", 1.0, workflow_id=busy)
    scheduler.arrive("fresh", 1.1)

    scheduler.at(9.0, streamed("busy/0", 500))

    assert placements(scheduler.at(10.0, finished("blocker"))) == {"fresh": "p-0"}


def test_long_prompts_close_a_replica_and_the_timer_reopens_it() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("long", 0.0, prompt_tokens=10_000)
    assert scheduler.arrive("short", 0.01) == []

    wakeup_s = scheduler.core.next_wakeup_s()

    assert wakeup_s is not None
    assert wakeup_s == pytest.approx(1.05 - scheduler.policy.window_s, abs=0.01)
    assert scheduler.at(wakeup_s - 1e-6, TimerFired()) == []
    assert placements(scheduler.at(wakeup_s, TimerFired())) == {"short": "p-0"}


def test_a_replica_is_not_kept_closed_by_prefill_of_calls_that_are_gone() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("long", 0.0, prompt_tokens=30_000)
    scheduler.arrive("short", 0.0)

    actions = scheduler.at(0.1, RequestCancelled(RequestId("long")))

    assert actions == [Cancel(RequestId("long"), P0), *scheduler.history[-1][2][1:]]
    assert placements(actions) == {"short": "p-0"}


def test_many_tiny_prompts_do_not_close_a_replica() -> None:
    scheduler = CheckedScheduler()

    placed = [scheduler.arrive(f"r{i}", prompt_tokens=10, max_output_tokens=10) for i in range(20)]

    assert all(placed)


def test_without_a_line_there_is_nothing_to_wake_up_for() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("long", prompt_tokens=10_000)

    assert scheduler.core.next_wakeup_s() is None


def test_kv_room_is_what_was_promised_not_a_count_of_calls() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(kv_blocks=100)))
    scheduler.arrive("half", 0.0, a_forecast(1), prompt_tokens=799)
    scheduler.at(0.2, streamed("half", 1))

    assert placements(scheduler.arrive("fits", 1.0, a_forecast(1), prompt_tokens=799)) != {}
    assert scheduler.arrive("not", 2.0, a_forecast(1), prompt_tokens=16) == []


def test_room_is_promised_for_a_long_answer_not_for_a_median_one() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(kv_blocks=100)))
    forecast = Forecast(output_tokens=Quantiles((0.5, 0.9), (32.0, 320.0)))

    scheduler.arrive("a", 0.0, forecast, prompt_tokens=16, max_output_tokens=1000)

    assert scheduler.replica().kv.reserved_blocks == 21
    assert scheduler.replica().decode_tokens == 32


def test_an_idle_replica_takes_what_its_kv_cannot_promise() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(kv_blocks=100)))

    found = scheduler.arrive("a", 0.0, a_forecast(9000), prompt_tokens=1500, max_output_tokens=9000)

    assert placements(found) == {"a": "p-0"}
    assert scheduler.replica().kv.free_blocks == 0


def test_a_clock_that_goes_backwards_is_taken_to_stand_still() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a", 100.0)
    scheduler.at(50.0, RequestArrived(a_request("b", arrival_s=100.0)))

    (action,) = scheduler.at(20.0, finished("a"))

    assert isinstance(action, Dispatch)
    assert action.waited_s == 0.0


# A finite wait.


def test_a_long_call_is_not_starved_by_a_flood_of_short_ones() -> None:
    """Short jobs at 150 % of capacity for ever, shortest job first."""
    policy = a_policy("sjf", aging=100.0, admission=BoundedLine(max_wait_s=1e9))
    scheduler = CheckedScheduler(one_at_a_time(), policy)
    service_s, bound_s = 0.3, longest_overtaking_s(policy.aging)
    gap_s = service_s / 1.5
    scheduler.arrive("r0", 0.0, a_forecast(5))
    scheduler.arrive("long", 0.0, a_forecast(20_000), max_output_tokens=20_000)
    running, free_s, count = "r0", service_s, 1
    overtakers: list[float] = []
    while running != "long":
        while count * gap_s < free_s:
            scheduler.arrive(f"r{count}", count * gap_s, a_forecast(5))
            count += 1
        ((running, _),) = placements(scheduler.at(free_s, finished(running))).items()
        if running != "long":
            overtakers.append(gap_s * int(running.removeprefix("r")))
        free_s += service_s

    assert len(overtakers) > 5
    assert max(overtakers) <= bound_s
    assert waiting(scheduler) != []


def test_a_large_prompt_is_not_starved_by_small_calls_from_another_lane() -> None:
    """The small calls may also go to a pool too small for the large one, and there is a flood."""
    small = a_pool("small", model="x", kv_blocks=64)
    scheduler = CheckedScheduler(a_fleet(a_pool(kv_blocks=256), small), "fcfs")
    running: list[str] = []
    for i in range(10):
        running += placements(scheduler.arrive(f"r{i}", 0.1 * i, prompt_tokens=400))
    assert len(running) == 10
    assert scheduler.arrive("large", 2.0, prompt_tokens=3500) == []

    on_p: list[str] = []
    for i in range(10, 100):
        now_s = 2.0 + 0.1 * i
        scheduler.arrive(f"r{i}", now_s, prompt_tokens=400)
        found = placements(scheduler.at(now_s, finished(running.pop(0))))
        running += found
        on_p += [name for name, replica in found.items() if replica == "p-0"]
        if on_p:
            break

    assert on_p == ["large"]


def test_a_call_that_no_replica_has_room_for_does_not_hold_up_other_pools() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1), a_pool("q", model="x")))
    scheduler.arrive("a", models=(ModelName("m"),))
    scheduler.arrive("stuck", models=(ModelName("m"),))

    assert placements(scheduler.arrive("b", models=(ModelName("x"),))) == {"b": "q-0"}


# Death.


def test_calls_that_nobody_has_seen_a_token_of_are_retried_elsewhere() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2))
    scheduler.arrive("a")

    (action,) = scheduler.at(1.0, ReplicaDied(P0))

    assert isinstance(action, Dispatch)
    assert (action.request_id, action.replica_id, action.attempt) == ("a", "p-1", 2)
    assert action.waited_s == 1.0


def test_a_call_that_was_seen_fails_once_and_is_not_retried() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2))
    scheduler.arrive("a")
    scheduler.at(0.5, streamed("a", 1))

    assert scheduler.at(1.0, ReplicaDied(P0)) == [Fail(RequestId("a"), "replica_died")]
    assert scheduler.at(1.1, ReplicaDied(P0)) == []
    assert scheduler.at(1.2, finished("a")) == []
    assert_idle(scheduler)


def test_a_retried_call_keeps_its_place_in_the_line() -> None:
    scheduler = CheckedScheduler(one_at_a_time(replicas=2))
    for i, name in enumerate(("a", "b", "c")):
        scheduler.arrive(name, float(i))
    assert waiting(scheduler) == ["c"]
    scheduler.at(5.0, ReplicaDied(P0))

    assert placements(scheduler.at(6.0, finished("b"))) == {"a": "p-1"}


def test_a_call_fails_after_three_attempts() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a")
    for attempt in (1, 2):
        (action,) = scheduler.at(1.0, RequestFailed(RequestId("a"), attempt, retriable=True))
        assert isinstance(action, Dispatch)
        assert action.attempt == attempt + 1

    assert scheduler.at(2.0, RequestFailed(RequestId("a"), 3, retriable=True)) == [
        Fail(RequestId("a"), "engine_error")
    ]
    assert_idle(scheduler)


def test_what_the_engine_broke_for_good_is_not_retried() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a")

    assert scheduler.at(1.0, RequestFailed(RequestId("a"), 1, retriable=False)) == [
        Fail(RequestId("a"), "engine_error")
    ]


def test_news_of_an_attempt_that_is_over_is_ignored() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2))
    scheduler.arrive("a")
    scheduler.at(1.0, ReplicaDied(P0))

    assert scheduler.at(1.1, streamed("a", 30)) == []
    assert scheduler.at(1.2, RequestFailed(RequestId("a"), 1, retriable=False)) == []
    assert scheduler.at(1.3, finished("a")) == []

    call = scheduler.replica("p-1").in_flight[RequestId("a")]
    assert call.streamed_tokens == 0


def test_with_all_replicas_dead_newcomers_are_refused_and_the_line_waits() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a")
    scheduler.arrive("b")
    scheduler.at(1.0, ReplicaDied(P0))

    assert scheduler.arrive("late", 2.0) == [Reject(RequestId("late"), "no_replica", 1.0)]

    assert placements(scheduler.at(9.0, ReplicaReady(P0))) == {"a": "p-0"}
    assert placements(scheduler.at(10.0, finished("a", attempt=2))) == {"b": "p-0"}


def test_a_dead_replica_gets_nothing_until_it_is_ready() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2), "round-robin")
    scheduler.at(0.0, ReplicaDied(P0))
    for i in range(4):
        assert placements(scheduler.arrive(f"r{i}")) == {f"r{i}": "p-1"}

    scheduler.at(1.0, ReplicaReady(P0))

    assert placements(scheduler.arrive("next", 1.0)) == {"next": "p-0"}


def test_a_replica_that_died_has_lost_its_prefixes() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a", prompt_tokens=300, prefix_hashes=(1,))
    assert scheduler.replica().prefixes.hit_tokens((1,)) > 0

    scheduler.at(1.0, ReplicaDied(P0))
    scheduler.at(2.0, RequestCancelled(RequestId("a")))
    scheduler.at(3.0, ReplicaReady(P0))

    assert scheduler.replica().prefixes.hit_tokens((1,)) == 0


def test_a_draining_replica_finishes_what_it_has_and_takes_nothing() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2), "round-robin")
    scheduler.arrive("a")
    scheduler.at(1.0, ReplicaDraining(P0))

    assert placements(scheduler.arrive("b", 2.0)) == {"b": "p-1"}
    assert placements(scheduler.arrive("c", 2.0)) == {"c": "p-1"}
    assert scheduler.at(3.0, finished("a")) == []
    assert scheduler.replica().running_requests == 0


@pytest.mark.parametrize("name", ["round-robin", "round-robin@arrival"])
def test_a_replica_on_trial_takes_one_call_until_it_is_known_to_serve(name: str) -> None:
    scheduler = CheckedScheduler(a_fleet(), name)
    scheduler.at(0.0, ReplicaDraining(P0))
    for call in ("a", "b", "c"):
        assert scheduler.arrive(call, 1.0) == []

    assert placements(scheduler.at(2.0, ReplicaOnTrial(P0))) == {"a": "p-0"}
    assert placements(scheduler.arrive("d", 2.5)) == {}
    assert placements(scheduler.at(3.0, ReplicaReady(P0))) == dict.fromkeys("bcd", "p-0")


def test_a_replica_that_fails_its_trial_takes_nothing() -> None:
    scheduler = CheckedScheduler(a_fleet())
    scheduler.at(0.0, ReplicaDraining(P0))
    scheduler.at(1.0, ReplicaOnTrial(P0))
    assert placements(scheduler.arrive("a", 1.5)) == {"a": "p-0"}

    scheduler.at(2.0, ReplicaDraining(P0))

    assert scheduler.at(2.0, RequestFailed(RequestId("a"), 1, retriable=True)) == []


# Sleep.

ASLEEP = {"p-0": Readiness.DISK, "p-1": Readiness.SLEEPING}


def test_a_call_to_a_pool_that_sleeps_wakes_one_replica_the_nearest() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2, states=ASLEEP))

    assert scheduler.arrive("a", 0.0) == [Wake(P1)]
    assert scheduler.arrive("b", 0.1) == []

    assert placements(scheduler.at(2.0, ReplicaReady(P1))) == {"a": "p-1", "b": "p-1"}


def test_nobody_is_woken_while_another_pool_can_serve() -> None:
    fleet = a_fleet(a_pool(), a_pool("q"), states={"p-0": Readiness.SLEEPING})

    assert placements(CheckedScheduler(fleet).arrive("a")) == {"a": "q-0"}


def test_a_replica_that_dies_while_it_wakes_is_replaced_by_the_next() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2, states=ASLEEP))
    scheduler.arrive("a")

    assert scheduler.at(1.0, ReplicaDied(P1)) == [Wake(P0)]
    assert placements(scheduler.at(20.0, ReplicaReady(P0))) == {"a": "p-0"}


def test_a_replica_demoted_under_a_call_is_woken_again_for_it() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a")

    assert scheduler.at(1.0, ReplicaDemoted(P0, Readiness.SLEEPING)) == [Wake(P0)]
    assert placements(scheduler.at(3.0, ReplicaReady(P0))) == {"a": "p-0"}


def test_when_the_last_running_replica_drains_a_sleeping_one_is_woken() -> None:
    scheduler = CheckedScheduler(
        a_fleet(a_pool(max_sequences=1), replicas=2, states={"p-1": Readiness.SLEEPING})
    )
    scheduler.arrive("a", 0.0)
    scheduler.arrive("b", 1.0)

    assert scheduler.at(2.0, ReplicaDraining(P0)) == [Wake(P1)]
    assert scheduler.arrive("c", 3.0) == []
    assert placements(scheduler.at(4.0, ReplicaReady(P1))) == {"b": "p-1"}


def test_a_call_that_finds_only_draining_and_sleeping_replicas_wakes_one() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2, states={"p-1": Readiness.SLEEPING}))
    scheduler.at(0.0, ReplicaDraining(P0))

    assert scheduler.arrive("a", 1.0) == [Wake(P1)]


def test_a_call_that_an_engine_refused_wakes_a_replica_if_none_takes_it() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=2, states={"p-1": Readiness.SLEEPING}))
    scheduler.arrive("a", 0.0)
    assert scheduler.at(1.0, ReplicaDraining(P0)) == []

    assert scheduler.at(2.0, RequestFailed(RequestId("a"), 1, retriable=True)) == [Wake(P1)]


# Refusal.


def refusal(actions: list[Action]) -> Reject:
    (action,) = actions
    assert isinstance(action, Reject)
    return action


def test_a_model_that_nobody_serves_is_refused_for_good() -> None:
    found = CheckedScheduler().arrive("a", models=(ModelName("gpt"),))

    assert refusal(found) == Reject(RequestId("a"), "model_not_found", None)


@pytest.mark.parametrize("kv_blocks", [4096, 10], ids=["context", "KV room"])
def test_a_prompt_that_fits_nowhere_is_refused_for_good(kv_blocks: int) -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(kv_blocks=kv_blocks)))
    longest = min(32_768, 16 * kv_blocks)

    found = scheduler.arrive("a", prompt_tokens=longest)

    assert refusal(found) == Reject(RequestId("a"), "too_long", None)
    assert placements(scheduler.arrive("b", prompt_tokens=longest - 1)) == {"b": "p-0"}


def test_a_full_line_turns_the_newest_away_and_says_when_to_come_back() -> None:
    scheduler = CheckedScheduler(one_at_a_time(), a_policy(max_waiting=2))
    for name in ("running", "first", "second"):
        assert placements(scheduler.arrive(name)) == ({"running": "p-0"} if name[0] == "r" else {})

    assert refusal(scheduler.arrive("third")) == Reject(RequestId("third"), "queue_full", 1.0)
    assert waiting(scheduler) == ["first", "second"]


@pytest.mark.parametrize(
    ("finish_every_s", "expected_s"), [(0.01, 1.0), (3.0, 30.0), (500.0, 120.0)]
)
def test_retry_after_is_the_time_to_drain_the_line_within_bounds(
    finish_every_s: float, expected_s: float
) -> None:
    scheduler = CheckedScheduler(one_at_a_time(), a_policy(max_waiting=10))
    for i in range(40):
        scheduler.arrive(f"done{i}", i * finish_every_s)
        scheduler.at(i * finish_every_s, finished(f"done{i}"))
    end_s = 40 * finish_every_s
    for i in range(11):
        scheduler.arrive(f"r{i}", end_s)

    found = refusal(scheduler.arrive("late", end_s))

    assert found.reason == "queue_full"
    assert found.retry_after_s == pytest.approx(expected_s)


def test_a_call_that_has_waited_too_long_is_refused_by_the_timer() -> None:
    policy = a_policy(admission=BoundedLine(max_wait_s=30.0))
    scheduler = CheckedScheduler(one_at_a_time(), policy)
    scheduler.arrive("a", 0.0)
    scheduler.arrive("b", 5.0)
    assert scheduler.core.next_wakeup_s() == 35.0

    assert scheduler.at(35.0, TimerFired()) == [Reject(RequestId("b"), "waited_too_long", 1.0)]
    assert scheduler.core.next_wakeup_s() is None
    assert scheduler.at(36.0, finished("a")) == []


def test_a_call_whose_time_has_come_is_refused_even_if_room_comes_with_it() -> None:
    policy = a_policy(admission=BoundedLine(max_wait_s=30.0))
    scheduler = CheckedScheduler(one_at_a_time(), policy)
    scheduler.arrive("a", 0.0)
    scheduler.arrive("b", 5.0)

    assert refusal(scheduler.at(40.0, finished("a"))).reason == "waited_too_long"


def test_an_id_that_is_still_open_is_a_mistake_of_the_driver() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a")
    scheduler.arrive("b")

    with pytest.raises(AssertionError, match="a runs already"):
        scheduler.arrive("a")
    with pytest.raises(AssertionError, match="b waits already"):
        scheduler.arrive("b")


# Cancellation.


def test_a_waiting_call_that_is_cancelled_just_leaves() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a")
    scheduler.arrive("b")

    assert scheduler.at(1.0, RequestCancelled(RequestId("b"))) == []
    assert scheduler.at(2.0, finished("a")) == []
    assert_idle(scheduler)


def test_a_running_call_that_is_cancelled_is_stopped_and_makes_room() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a")
    scheduler.arrive("b")

    first, *rest = scheduler.at(1.0, RequestCancelled(RequestId("a")))

    assert first == Cancel(RequestId("a"), P0)
    assert placements(rest) == {"b": "p-0"}
    assert scheduler.at(1.1, finished("a")) == []
    assert placements(scheduler.at(1.2, finished("b"))) == {}
    assert_idle(scheduler)


def test_cancelling_an_unknown_or_finished_call_does_nothing() -> None:
    scheduler = CheckedScheduler()
    assert scheduler.at(0.0, RequestCancelled(RequestId("never"))) == []
    scheduler.arrive("a")
    scheduler.at(1.0, finished("a"))

    assert scheduler.at(2.0, RequestCancelled(RequestId("a"))) == []
    assert_idle(scheduler)


def test_a_cancelled_name_can_be_used_again_and_its_old_attempt_stays_over() -> None:
    scheduler = CheckedScheduler(one_at_a_time())
    scheduler.arrive("a")
    scheduler.at(1.0, RequestCancelled(RequestId("a")))

    assert placements(scheduler.arrive("a", 2.0)) == {"a": "p-0"}


# Workflows.


def test_a_workflow_attains_the_service_of_all_its_calls() -> None:
    scheduler = CheckedScheduler()
    for i in range(2):
        scheduler.arrive(f"w/{i}", workflow_id=WorkflowId("w"))
        scheduler.at(1.0, streamed(f"w/{i}", 20))

    workflow = scheduler.core.workflows.get(WorkflowId("w"))

    assert workflow.output_tokens == 40
    each_s = 100 * scheduler.replica().pool.prefill_token_s + 20 * 0.01
    assert workflow.attained_s == pytest.approx(2 * each_s)


def test_a_closed_workflow_is_forgotten() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a", workflow_id=WorkflowId("w"))
    scheduler.at(1.0, finished("a"))
    scheduler.at(1.0, WorkflowClosed(WorkflowId("w")))

    assert len(scheduler.core.workflows) == 0


# Shares.


def shares(policy: str, calls: int = 1600) -> dict[str, int]:
    scheduler = CheckedScheduler(a_fleet(replicas=8), policy, seed=7)
    counts = {str(replica): 0 for replica in scheduler.core.replicas}
    running: list[str] = []
    for i in range(calls):
        (replica,) = placements(
            scheduler.arrive(f"r{i}", float(i), prompt_tokens=10, max_output_tokens=5)
        ).values()
        counts[replica] += 1
        running.append(f"r{i}")
        if len(running) == 24:
            leaver = running.pop((i * 7919) % 24)  # any of them: answers differ in length
            scheduler.at(i + 0.5, finished(leaver, output_tokens=5))
    return counts


@pytest.mark.parametrize("policy", ["random", "power-of-two", "least-requests", "least-tokens"])
def test_equal_replicas_get_equal_shares(policy: str) -> None:
    counts = shares(policy)

    assert sum(counts.values()) == 1600
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 18.5, counts  # 1 % level at 7 degrees of freedom


def test_round_robin_gives_exactly_equal_shares() -> None:
    assert set(shares("round-robin").values()) == {200}


# What invariants notice.


def test_a_running_call_missing_from_its_replica_is_noticed() -> None:
    scheduler = CheckedScheduler()
    scheduler.arrive("a")
    scheduler.replica().release(RequestId("a"))

    with pytest.raises(AssertionError, match="the running calls are not those on replicas"):
        scheduler.core.validate()


def test_a_policy_without_aging_is_refused() -> None:
    with pytest.raises(ValueError, match="aging must be above 0") as refused:
        replace(a_policy("sjf"), aging=0.0)

    assert str(refused.value) == "policy 'sjf': aging must be above 0, got 0.0"


def test_a_fleet_counts_its_gpus_and_builds_fresh_replicas_each_time() -> None:
    fleet = a_fleet(a_pool(tensor_parallel=4), a_pool("q"), replicas=3)

    assert fleet.gpus == 15
    assert [r.replica_id for r in fleet.build()] == list(fleet.replicas)
    assert fleet.build()[0] is not fleet.build()[0]
    assert fleet.pools[0].pool_id == PoolId("p")
