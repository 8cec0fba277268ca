"""Models that share nodes: who comes up, who makes way, and what that costs."""

from dataclasses import replace

import pytest

from builders import (
    CheckedScheduler,
    a_call,
    a_forecast,
    a_plan,
    a_policy,
    a_replica,
    a_shared_fleet,
    a_sharing_pool,
    a_workload,
    placements,
)
from concertmaster.compose import simulate
from concertmaster.core.actions import Action, Demote, Resize, Wake
from concertmaster.core.errors import InputError
from concertmaster.core.events import (
    ReplicaDemoted,
    ReplicaDied,
    ReplicaReady,
    RequestFinished,
    TimerFired,
    TokensStreamed,
)
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.reclaim import Plan, cheapest
from concertmaster.core.request import ModelName, RequestId, ServiceClass
from concertmaster.core.tenancy import Step, StepKind, Want
from concertmaster.policies.catalog import policy
from concertmaster.policies.residency import Expected
from concertmaster.policies.scaling import Foreseen
from concertmaster.workload.records import RunRecords

RUNS, SLEEPS, DISK = Readiness.RUNNING, Readiness.SLEEPING, Readiness.DISK
A, B, C = (ReplicaId(f"{name}-0") for name in "abc")
TWO_FIT = 38_000_000_000
BATCH = ServiceClass.BATCH


def three_on_one(**changes: object) -> Fleet:
    """Two run, a third sleeps beside them."""
    facts: dict[str, object] = {
        "hbm_bytes": TWO_FIT,
        "states": {A: RUNS, B: RUNS, C: SLEEPS},
        **changes,
    }
    pools = [a_sharing_pool(name, max_sequences=4) for name in "abc"]
    return a_shared_fleet(*pools, **facts)  # type: ignore[arg-type]


def ask(
    scheduler: CheckedScheduler, name: str, model: str, now_s: float, **changes: object
) -> list[Action]:
    return scheduler.arrive(name, now_s, models=(ModelName(model),), **changes)  # type: ignore[arg-type]


def kinds(actions: list[Action], *wanted: type) -> list[Action]:
    return [action for action in actions if isinstance(action, wanted)]


# Who comes up.


def test_a_model_comes_up_at_once_where_memory_is_free() -> None:
    scheduler = CheckedScheduler(three_on_one(states={A: RUNS}), "fcfs/expected")

    assert kinds(ask(scheduler, "r1", "b", 0.0), Wake, Demote) == [Wake(B)]

    held = scheduler.replica("b-0").memory
    assert held is not None
    assert held.held(B).weights_bytes == 16_000_000_000, "reserved before the load"
    ready = scheduler.at(20.0, ReplicaReady(B))
    assert placements(ready) == {"r1": "b-0"}


def test_the_one_that_is_not_needed_makes_way() -> None:
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    ask(scheduler, "r1", "a", 0.0, workflow_id="w")
    scheduler.at(1.0, RequestFinished(RequestId("r1"), 1, 5))

    assert kinds(ask(scheduler, "r2", "c", 30.0), Wake, Demote) == [Demote(B, SLEEPS)]

    assert kinds(scheduler.at(30.0, ReplicaDemoted(B, SLEEPS)), Wake) == [Wake(C)]


def test_under_lru_swap_the_one_used_longest_ago_makes_way_needed_or_not() -> None:
    scheduler = CheckedScheduler(three_on_one(), "fcfs/lru-swap")
    for i in range(5):
        ask(scheduler, f"a{i}", "a", float(i))
        scheduler.at(i + 0.5, RequestFinished(RequestId(f"a{i}"), 1, 5))
    ask(scheduler, "b", "b", 6.0)
    scheduler.at(6.5, RequestFinished(RequestId("b"), 1, 5))

    assert kinds(ask(scheduler, "r2", "c", 7.0), Demote) == [Demote(A, SLEEPS)]


def test_expected_keeps_what_live_workflows_will_need() -> None:
    """The model used longest ago is the one that the next stage will ask for."""
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    plan = Forecast(
        output_tokens=Quantiles.exactly(5.0),
        remaining_by={ModelName("b"): 5.0, ModelName("a"): 90.0},
    )
    ask(scheduler, "r1", "b", 0.0, forecast=plan)
    scheduler.at(1.0, RequestFinished(RequestId("r1"), 1, 5))

    ask(scheduler, "r2", "c", 200.0)

    assert kinds(scheduler.at(201.0, TimerFired()), Demote) == [Demote(B, SLEEPS)]


def test_a_busy_model_ends_its_calls_before_it_goes() -> None:
    scheduler = CheckedScheduler(three_on_one(states={A: RUNS, B: RUNS, C: DISK}), "fcfs/lru-swap")
    ask(scheduler, "r1", "a", 0.0)
    ask(scheduler, "r2", "b", 1.0)

    assert kinds(ask(scheduler, "r3", "c", 2.0), Demote, Wake) == []
    assert scheduler.replica("a-0").draining

    assert kinds(scheduler.at(3.0, RequestFinished(RequestId("r1"), 1, 5)), Demote) == [
        Demote(A, SLEEPS)
    ]


def test_without_colocation_a_model_gives_way_to_a_hotter_one_only() -> None:
    scheduler = CheckedScheduler(three_on_one(states={A: RUNS}), "fcfs/no-colocation")
    changes: list[Action] = []

    def call(model: str, count: int, since_s: float) -> list[Action]:
        found: list[Action] = []
        for i in range(count):
            now_s = since_s + i
            found += ask(scheduler, f"{model}{now_s}", model, now_s, forecast=a_forecast(5))
            if model in "ab":
                scheduler.at(now_s, RequestFinished(RequestId(f"{model}{now_s}"), 1, 5))
        return kinds(found, Wake, Demote)

    call("a", 10, 0.0)
    assert call("c", 10, 100.0) == [], "as hot, and it came later"
    assert call("c", 8, 200.0) == [], "hotter, but by chance perhaps"
    changes += call("c", 10, 300.0)
    assert changes == [Demote(A, SLEEPS)]
    changes += kinds(scheduler.at(320.0, ReplicaDemoted(A, SLEEPS)), Wake)
    assert changes[1:] == [Wake(C)]


def test_without_colocation_the_hottest_models_are_served() -> None:
    """Five models, of which one is asked for as often as all others together, over two nodes."""
    pools = [a_sharing_pool(name) for name in "abcde"]
    fleet = a_shared_fleet(*pools, nodes=2, hbm_bytes=TWO_FIT)
    order = "edcba" + 30 * "ababacabad"
    plans = [
        a_plan(f"w{i:03d}", a_call(models=(ModelName(name),)), arrival_s=1.0 * i)
        for i, name in enumerate(order)
    ]

    run = simulate(fleet, a_workload(*plans), "fcfs/no-colocation", seed=1)

    late = [call for call in run.calls if call.arrival_s > 100.0 and call.outcome == "served"]
    assert {call.model for call in late} == {"a", "b"}
    assert run.gauges
    assert run.gauges.replica_starts <= 6, "the choice settles"


def test_without_colocation_a_node_with_sleepers_takes_one_model() -> None:
    sleepers = three_on_one(states={A: SLEEPS, B: SLEEPS, C: SLEEPS})
    scheduler = CheckedScheduler(sleepers, "fcfs/no-colocation")

    assert kinds(ask(scheduler, "r1", "b", 0.0), Wake) == [Wake(B)]
    scheduler.at(2.0, ReplicaReady(B))
    assert kinds(ask(scheduler, "r2", "c", 3.0), Wake) == []


def test_without_ram_weights_go_back_to_disk() -> None:
    fleet = three_on_one(host_bytes=0, states={A: RUNS, B: RUNS})
    scheduler = CheckedScheduler(fleet, "fcfs/lru-swap")

    assert kinds(ask(scheduler, "r1", "c", 1.0), Demote) == [Demote(A, DISK)]


def people_of(scheduler: CheckedScheduler, models: str, at_s: range) -> list[Action]:
    """Let people use these models once a second; return what that sets in motion."""
    found: list[Action] = []
    for second in at_s:
        for model in models:
            name = f"{model}{second}"
            found += ask(scheduler, name, model, float(second), forecast=a_forecast(5))
            found += scheduler.at(float(second), RequestFinished(RequestId(name), 1, 5))
    return kinds(found, Demote, Wake)


def test_programs_do_not_end_a_model_that_people_use() -> None:
    of = a_policy("fcfs/expected", residency=Expected(hold_s=100.0))
    scheduler = CheckedScheduler(three_on_one(), of)
    people_of(scheduler, "ab", range(60))
    ask(scheduler, "batch", "c", 60.0, service_class=BATCH)

    assert people_of(scheduler, "ab", range(61, 159)) == []

    assert people_of(scheduler, "ab", range(159, 163)), "but not for ever"


def test_a_model_that_people_have_left_is_free_to_go() -> None:
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    people_of(scheduler, "ab", range(60))
    people_of(scheduler, "a", range(60, 70))
    ask(scheduler, "batch", "c", 70.0, service_class=BATCH)
    people_of(scheduler, "a", range(71, 80))

    assert scheduler.replica("b-0").readiness is RUNS
    assert scheduler.replica("b-0").draining, "silent for twenty seconds at a call a second"


def test_what_waits_for_a_model_that_is_down_asks_for_no_other_meanwhile() -> None:
    """B is owed a stage only by the workflow that waits for C; it would keep A from going."""
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    plan = Forecast(
        output_tokens=Quantiles.exactly(5.0),
        remaining_by={ModelName("c"): 5.0, ModelName("b"): 90.0},
    )
    ask(scheduler, "r", "c", 200.0, forecast=plan)

    want = scheduler.core._wants.soon(200.0, ModelName("b"))
    assert (want.owing_workflows, want.held_workflows, want.owing_people) == (1, 1, 0)
    assert scheduler.replica("b-0").draining or scheduler.replica("a-0").draining


def test_memory_that_is_freed_for_one_is_not_taken_by_another() -> None:
    pools = [a_sharing_pool(name) for name in "abcd"]
    fleet = a_shared_fleet(*pools, hbm_bytes=TWO_FIT, states={A: RUNS, B: RUNS, C: SLEEPS})
    scheduler = CheckedScheduler(fleet, "fcfs/lru-swap")
    ask(scheduler, "a", "a", 1.0)
    assert kinds(ask(scheduler, "c", "c", 2.0), Demote) == [Demote(B, SLEEPS)]
    ask(scheduler, "d", "d", 1.5)

    assert kinds(scheduler.at(2.2, TimerFired()), Demote) == []
    after = scheduler.at(2.3, ReplicaDemoted(B, SLEEPS))

    assert kinds(after, Wake) == [Wake(C)]


def test_people_end_a_model_that_only_programs_use() -> None:
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    now_s = 0.0
    for i in range(60):
        now_s = float(i)
        ask(scheduler, f"a{i}", "a", now_s)
        scheduler.at(now_s, RequestFinished(RequestId(f"a{i}"), 1, 5))
    ask(scheduler, "batch", "b", now_s, service_class=BATCH)
    ask(scheduler, "person", "c", now_s)
    for _ in range(100):
        now_s += 0.1
        scheduler.at(now_s, TimerFired())

    assert scheduler.replica("b-0").draining


# What steps cost.


def a_step(kind: StepKind = "demote", name: str = "p-0", **changes: object) -> Step:
    """One whose model gets a call every ten seconds."""
    want = Want(model=ModelName("p"), calls_per_s=0.1)
    facts: dict[str, object] = {"replica": a_replica(name), "want": want, "back_s": 20.0}
    return Step(kind=kind, **{**facts, **changes})  # type: ignore[arg-type]


NEED = Want(model=ModelName("q"), waiting_calls=1, oldest_s=1.0)


@pytest.mark.parametrize(
    ("step", "price_s"),
    [
        (a_step("shrink"), 0.0),
        (a_step("drop", redo_s=3.0), 3.0),
        (a_step("drop", redo_s=3.0, back_s=5.0), 1.5),
        (a_step("unload"), 40.0),
        (a_step(), 40.0),
        (a_step(replicas=4), 10.0),
        (a_step(unused_s=29.0), 40.0),
        (a_step(unused_s=31.0), 0.0),
        (a_step(want=Want(model=ModelName("p"), owing_workflows=5)), 100.0),
        (a_step(want=Want(model=ModelName("p"), owing_workflows=5, held_workflows=3)), 40.0),
        (a_step("drain", busy_s=7.0), 8.7 * 87.0),
    ],
)
def test_a_step_costs_what_calls_to_come_will_wait(step: Step, price_s: float) -> None:
    assert Expected().price_s(step, NEED) == pytest.approx(price_s)


@pytest.mark.parametrize(("resident_s", "may"), [(59.0, False), (60.0, True)])
def test_a_busy_model_that_has_just_come_up_stays_a_while(*, resident_s: float, may: bool) -> None:
    step = a_step("drain", busy_s=7.0, resident_s=resident_s)

    assert (Expected(residence=3.0).price_s(step, NEED) is not None) == may
    assert Expected(residence=3.0).price_s(a_step(resident_s=resident_s), NEED) == 40.0


def test_one_more_replica_comes_up_for_waits_since_the_last_one_did() -> None:
    want = Want(model=ModelName("q"), waiting_calls=10, waited_s=900.0, oldest_s=90.0)

    spreads = [
        Expected().spreads(replace(want, served_s=served_s), 1.0, 20.0)
        for served_s in (0.0, 0.9, 4.1, 4.3, 60.0)
    ]

    assert spreads == [False, False, False, True, True], "42 s for ten calls since it came up"
    assert not Expected().spreads(replace(want, served_s=4.9), 5.0, 0.0), "a load takes longer"


def test_what_turns_out_superfluous_is_left_out() -> None:
    small = a_step("shrink", "p-0", hbm_bytes=5)
    large = a_step("demote", "p-1", hbm_bytes=100)

    assert cheapest([small, large], 5, Expected(), NEED) == Plan((small,), 0.0)
    assert cheapest([small, large], 50, Expected(), NEED) == Plan((large,), 40.0)
    assert cheapest([small, large], 105, Expected(), NEED) == Plan((large, small), 40.0)
    assert cheapest([small, large], 106, Expected(), NEED) is None


# What is foreseen.


def test_the_model_of_the_next_stage_comes_up_while_the_stage_before_runs() -> None:
    scheduler = CheckedScheduler(three_on_one(states={A: RUNS, B: SLEEPS}), "fcfs/expected")
    plan = Forecast(
        output_tokens=Quantiles.exactly(500.0),
        remaining_by={ModelName("a"): 500.0, ModelName("b"): 90.0},
    )

    assert kinds(ask(scheduler, "r1", "a", 0.0, forecast=plan), Wake) == [Wake(B)]


def test_nothing_is_fetched_if_others_would_lose_more() -> None:
    scheduler = CheckedScheduler(
        three_on_one(states={A: RUNS, B: RUNS, C: SLEEPS}), "fcfs/expected"
    )
    both = Forecast(
        output_tokens=Quantiles.exactly(500.0),
        remaining_by={ModelName("a"): 500.0, ModelName("b"): 90.0, ModelName("c"): 9.0},
    )
    for i in range(4):
        actions = ask(scheduler, f"r{i}", "a", 100.0 + i, forecast=both)
        assert kinds(actions, Wake, Demote) == []


# KV moves to where it is needed.


def test_kv_is_granted_before_the_call_is_sent_and_taken_from_idle_neighbours() -> None:
    pools = [a_sharing_pool("a"), a_sharing_pool("b")]
    fleet = a_shared_fleet(*pools, hbm_bytes=TWO_FIT, states={A: RUNS, B: RUNS})
    scheduler = CheckedScheduler(fleet, "fcfs/expected:kv=worst-case")
    ask(scheduler, "r1", "a", 0.0, prompt_tokens=20_000, max_output_tokens=5000)
    scheduler.at(9.0, RequestFinished(RequestId("r1"), 1, 5))
    before = scheduler.replica("a-0").kv.capacity_blocks
    assert before * 16 >= 25_000

    actions = ask(scheduler, "r2", "b", 10.0, prompt_tokens=20_000, max_output_tokens=5000)

    first, second, sent = actions
    assert isinstance(first, Resize)
    assert isinstance(second, Resize)
    assert (first.replica_id, second.replica_id) == (A, B)
    assert first.kv_blocks < before
    assert placements([sent]) == {"r2": "b-0"}


def test_a_call_that_would_overfill_the_node_waits() -> None:
    pools = [a_sharing_pool("a"), a_sharing_pool("b")]
    fleet = a_shared_fleet(*pools, hbm_bytes=TWO_FIT, states={A: RUNS, B: RUNS})
    scheduler = CheckedScheduler(fleet, "fcfs/expected:kv=worst-case")
    ask(scheduler, "r1", "a", 0.0, prompt_tokens=20_000, max_output_tokens=5000)

    assert placements(ask(scheduler, "r2", "b", 1.0, prompt_tokens=20_000)) == {}

    finished = scheduler.at(9.0, RequestFinished(RequestId("r1"), 1, 5))
    assert placements(finished) == {"r2": "b-0"}


def test_a_promise_runs_ahead_of_the_answer_that_outgrows_it() -> None:
    pools = [a_sharing_pool("a")]
    fleet = a_shared_fleet(*pools, hbm_bytes=TWO_FIT, states={A: RUNS})
    scheduler = CheckedScheduler(fleet, "fcfs/expected")
    ask(scheduler, "r1", "a", 0.0, forecast=a_forecast(10), max_output_tokens=30_000)

    for tokens in range(100, 25_000, 100):
        scheduler.at(tokens / 100, TokensStreamed(((RequestId("r1"), 1, tokens),)))
        kv = scheduler.replica("a-0").kv
        assert kv.capacity_blocks * 16 >= 100 + tokens + 100


# A replica that comes back unasked.


def test_one_that_comes_up_where_there_is_no_memory_is_sent_away() -> None:
    scheduler = CheckedScheduler(three_on_one(), "fcfs/expected")
    scheduler.at(0.0, ReplicaDied(C))

    assert scheduler.at(1.0, ReplicaReady(C)) == [Demote(C, DISK)]

    scheduler.at(2.0, ReplicaDemoted(C, DISK))
    assert scheduler.replica("c-0").readiness is DISK
    assert not scheduler.replica("c-0").draining


# The whole of it.


def cycle(of: str, *, calls: int = 240) -> RunRecords:
    """Calls for A, B, C, A, B, C… over room for two, at 55 % of what two models can serve."""
    pools = [a_sharing_pool(name, max_sequences=1) for name in "abc"]
    fleet = a_shared_fleet(*pools, hbm_bytes=TWO_FIT, states={A: RUNS, B: RUNS, C: SLEEPS})
    plans = [
        a_plan(
            f"w{i:03d}",
            a_call(models=(ModelName("abc"[i % 3]),), output_tokens=100),
            arrival_s=0.6 * i,
        )
        for i in range(calls)
    ]
    return simulate(fleet, a_workload(*plans), of, seed=1)


def p95_s(run: RunRecords) -> float:
    assert all(call.finished_s is not None for call in run.calls)
    lasted_s = sorted((call.finished_s or 0.0) - call.arrival_s for call in run.calls)
    return lasted_s[int(0.95 * len(lasted_s))]


def test_a_cycle_over_too_few_places_costs_a_third_of_the_swaps_and_less_time() -> None:
    swapped, ours = cycle("fcfs/lru-swap"), cycle("fcfs/expected")

    assert ours.gauges
    assert swapped.gauges
    assert 3 * ours.gauges.replica_starts <= swapped.gauges.replica_starts
    assert p95_s(ours) < p95_s(swapped)


@pytest.mark.parametrize("of", ["fcfs/expected", "edf/qlm", "stjf/lru-swap:kv=worst-case"])
def test_more_models_are_served_than_without_colocation(of: str) -> None:
    served = {call.model for call in cycle(of, calls=30).calls if call.outcome == "served"}

    assert served == {"a", "b", "c"}


def test_shared_nodes_need_somebody_who_decides() -> None:
    with pytest.raises(InputError, match="write fcfs/expected, or another residency"):
        cycle("fcfs", calls=1)


@pytest.mark.parametrize(
    "name",
    ["las/foreseen:level=0.95/expected:hold_s=9", "las/expected:hold_s=9/foreseen:level=0.95"],
)
def test_a_scaling_and_a_residency_stand_side_by_side(name: str) -> None:
    both = policy(name)

    assert both.name == name
    assert both.scaling == Foreseen(level=0.95)
    assert both.residency == Expected(hold_s=9.0)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fcfs/expected/qlm", "expected at most one of each kind after a slash"),
        ("fcfs/static/reactive", "found static, reactive"),
        (
            "fcfs/expcted",
            'unknown scaling, residency or hedging "expcted" .did you mean "expected"',
        ),
        ("fcfs/foreseen/", 'unknown scaling, residency or hedging ""'),
        ("round-robin@arrival/expected", "bound on arrival cannot wait"),
    ],
)
def test_what_follows_a_slash_is_checked(name: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        policy(name)


def test_a_residency_leaves_the_rule_of_kv_as_it_is_unless_told() -> None:
    assert policy("maestro/lru-swap").kv == policy("maestro").kv
    assert policy("maestro:kv=worst-case/qlm").kv == policy("maestro:kv=worst-case").kv
    assert policy("maestro/lru-swap:kv=paged").kv == policy("fcfs/lru-swap").kv


def test_kv_is_a_setting_of_every_residency_and_of_static() -> None:
    assert policy("edf/lru-swap").kv == policy("edf/static:kv=paged").kv
    rule = policy("edf/expected:level=0.7").kv
    assert rule is not None
    assert (rule.kind, rule.level) == ("forecast", 0.7)
    assert not policy("edf/static:kv=worst-case").filters
    with pytest.raises(InputError, match="expected forecast or worst-case or paged"):
        policy("edf/static:kv=all")
