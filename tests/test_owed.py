"""What live workflows still owe a model, and what stands before a call in the line."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_policy, a_pool, a_request
from builders import a_waiting_call as a_call
from concertmaster.core.events import (
    ReplicaDemoted,
    ReplicaDied,
    ReplicaDraining,
    RequestArrived,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.outlook import Outlook
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.workflow import Owed, Workflows

M, X = ModelName("m"), ModelName("x")
MODELS = (M, X)


def needs(tokens: float, **changes: object) -> Forecast:
    """A forecast of short calls in a workflow that needs this much in all."""
    return a_forecast(5, remaining_tokens=Quantiles.exactly(tokens), **changes)


# The ledger.

steps = st.lists(
    st.tuples(
        st.sampled_from(("arrive", "stream", "answer", "lose", "close", "pass")),
        st.integers(0, 4),
        st.sampled_from(MODELS),
        st.integers(0, 300),
    ),
    max_size=60,
)


@given(steps)
def test_what_is_owed_is_what_the_live_workflows_need(  # noqa: C901, PLR0912  # one case a step
    history: list[tuple[str, int, ModelName, int]],
) -> None:
    workflows = Workflows(idle_s=50.0, most=3)
    open_calls: dict[WorkflowId, int] = {}
    owing: dict[WorkflowId, tuple[ModelName, int]] = {}
    now_s = 0.0
    for what, number, model, tokens in history:
        name = WorkflowId(f"w{number}")
        now_s += 1.0
        if what == "arrive":
            workflow = workflows.arrive(now_s, a_request("r", workflow_id=name))
            workflows.commit(workflow, model, tokens)
            open_calls[name] = open_calls.get(name, 0) + 1
            owing[name] = (model, tokens)
        elif what == "pass":
            now_s += tokens
        elif what == "close":
            workflows.close(name)
            if not open_calls.get(name):
                owing.pop(name, None)
        elif open_calls.get(name):
            at, left = owing[name]
            if what == "stream":
                workflows.stream(workflows.get(name), tokens)
                owing[name] = (at, max(1, left - tokens))
            else:
                workflows.settle(name, answered=what == "answer")
                open_calls[name] -= 1
                if what == "lose" and not open_calls[name]:
                    owing[name] = (at, 0)
        workflows.validate()
        forgotten = [one for one in owing if one not in workflows._by_id]
        assert all(not open_calls[one] for one in forgotten)
        for one in forgotten:
            del owing[one]
        for model_asked in MODELS:
            mine = [left for at, left in owing.values() if at == model_asked]
            found = workflows.owed(model_asked)
            assert (found.workflows, found.tokens) == (sum(map(bool, mine)), sum(mine))
            assert found.tokens >= 0
    for name, count in open_calls.items():
        for _ in range(count):
            workflows.settle(name)
        workflows.close(name)
    assert [workflows.owed(model) for model in MODELS] == [Owed(), Owed()]


def owed(scheduler: CheckedScheduler, model: ModelName = M) -> tuple[int, int]:
    found = scheduler.core.workflows.owed(model)
    return found.workflows, found.tokens


def test_a_workflow_still_owes_while_its_agent_thinks_between_two_calls() -> None:
    scheduler = CheckedScheduler()
    w = WorkflowId("w")
    scheduler.arrive("w/0", 0.0, needs(900), workflow_id=w)
    assert owed(scheduler) == (1, 900)

    scheduler.at(1.0, TokensStreamed(((RequestId("w/0"), 1, 3),)))
    assert owed(scheduler) == (1, 897)
    scheduler.at(2.0, RequestFinished(RequestId("w/0"), 1, 5))
    assert owed(scheduler) == (1, 895)

    scheduler.arrive("w/1", 3.0, needs(600), workflow_id=w)
    assert owed(scheduler) == (1, 600)
    scheduler.at(4.0, RequestFinished(RequestId("w/1"), 1, 5))
    scheduler.at(4.0, WorkflowClosed(w))
    assert owed(scheduler) == (0, 0)


def test_calls_that_run_at_once_owe_the_rest_of_their_workflow_once() -> None:
    scheduler = CheckedScheduler()
    for i in range(3):
        scheduler.arrive(f"w/{i}", 0.1 * i, needs(900), workflow_id=WorkflowId("w"))

    assert owed(scheduler) == (1, 900)


@pytest.mark.parametrize("end", ["cancelled", "failed", "expired"])
def test_a_workflow_that_got_no_answer_owes_nothing_until_it_asks_again(end: str) -> None:
    """Nobody closes it: its agent gave up, and what it would have needed will not be asked."""
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)))
    scheduler.arrive("other", 0.0, needs(5))
    scheduler.arrive("w/0", 0.0, needs(900), workflow_id=WorkflowId("w"))
    assert owed(scheduler) == (2, 905)

    if end == "cancelled":
        scheduler.at(1.0, RequestCancelled(RequestId("w/0")))
    elif end == "expired":
        scheduler.at(3600.0, RequestCancelled(RequestId("nobody")))
    else:
        scheduler.at(1.0, RequestFinished(RequestId("other"), 1, 1))
        scheduler.at(2.0, RequestFailed(RequestId("w/0"), 1, retriable=False))

    assert owed(scheduler)[1] <= 5
    scheduler.arrive("w/1", 3601.0, needs(70), workflow_id=WorkflowId("w"))
    assert owed(scheduler)[1] in (70, 74, 75)


def test_a_lost_branch_leaves_what_the_others_owe() -> None:
    scheduler = CheckedScheduler()
    for i in range(2):
        scheduler.arrive(f"w/{i}", 0.0, needs(900), workflow_id=WorkflowId("w"))

    scheduler.at(1.0, RequestCancelled(RequestId("w/0")))

    assert owed(scheduler) == (1, 900)


def test_a_workflow_owes_the_model_that_serves_it() -> None:
    """Two models in one lane: it is with the first of them until another takes the call."""
    fleet = a_fleet(a_pool("p", max_sequences=1), a_pool("q", model="x"))
    scheduler = CheckedScheduler(fleet, "random")
    on = {M: Quantiles.exactly(50.0), X: Quantiles.exactly(80.0)}
    forecast = Forecast(output_tokens=Quantiles.exactly(5.0), remaining_tokens_on=on)
    scheduler.arrive("a", 0.0, forecast)
    scheduler.arrive("b", 0.0, forecast)

    on_q = len(scheduler.replica("q-0").in_flight)
    assert (owed(scheduler), owed(scheduler, X)) == ((2 - on_q, 100 - 50 * on_q), (on_q, 80 * on_q))


# What waits.


def a_crowd(lengths: Sequence[int], of: str = "stjf") -> CheckedScheduler:
    """One replica that is taken, and calls of these lengths waiting for it."""
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), of)
    scheduler.arrive("blocker", 0.0, needs(10))
    for i, tokens in enumerate(lengths):
        scheduler.arrive(f"r{i}", 0.0, needs(tokens))
    return scheduler


def outlook(scheduler: CheckedScheduler) -> Outlook:
    return scheduler.core._outlook


@given(st.lists(st.integers(5, 3000), max_size=12))
def test_what_waits_for_a_pool_is_what_the_calls_in_line_owe(lengths: list[int]) -> None:
    scheduler = a_crowd(lengths)

    assert outlook(scheduler).waiting_tokens(scheduler.fleet.pools[0]) == sum(lengths)


def test_a_call_that_was_dispatched_waits_no_longer() -> None:
    scheduler = a_crowd([300])
    scheduler.at(1.0, RequestFinished(RequestId("blocker"), 1, 10))

    assert outlook(scheduler).waiting_tokens(scheduler.fleet.pools[0]) == 0


# Room, and readiness.


def test_there_is_room_while_a_replica_is_open_and_nobody_waits_for_the_pool() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=2)))
    pool, call = scheduler.fleet.pools[0], a_call("new")
    assert outlook(scheduler).has_room(call, pool)

    scheduler.arrive("a", 0.0)
    assert outlook(scheduler).has_room(call, pool)
    scheduler.arrive("b", 0.0)
    assert not outlook(scheduler).has_room(call, pool)


def test_there_is_no_room_behind_a_call_that_waits_for_more_kv() -> None:
    pool = a_pool(kv_blocks=100)  # 1,600 tokens
    scheduler = CheckedScheduler(a_fleet(pool))
    scheduler.arrive("a", 0.0, prompt_tokens=900)
    assert outlook(scheduler).has_room(a_call("small"), pool)

    scheduler.arrive("large", 1.0, prompt_tokens=1400)

    assert not outlook(scheduler).has_room(a_call("small"), pool)


def test_readiness_is_the_nearest_replica_that_stays() -> None:
    pool = a_pool()
    states = {"p-0": Readiness.DISK, "p-1": Readiness.SLEEPING}
    scheduler = CheckedScheduler(a_fleet(pool, replicas=3, states=states))
    view = outlook(scheduler)
    assert view.ready_s(pool) == 0.0
    assert [one.replica_id for one in view.in_service(pool)] == ["p-2"]

    scheduler.at(1.0, ReplicaDraining(ReplicaId("p-2")))
    assert view.ready_s(pool) == 2.0
    assert view.in_service(pool) == []
    scheduler.at(2.0, ReplicaDied(ReplicaId("p-1")))
    assert view.ready_s(pool) == 20.0
    scheduler.at(3.0, ReplicaDemoted(ReplicaId("p-0"), Readiness.HOST))
    assert view.ready_s(pool) == 5.0
    scheduler.at(4.0, ReplicaDied(ReplicaId("p-0")))
    assert math.isinf(view.ready_s(pool))


def test_open_calls_are_those_that_wait_for_a_model_and_those_that_run_on_it() -> None:
    fleet = a_fleet(a_pool("p", max_sequences=1), a_pool("q", model="x"))
    scheduler = CheckedScheduler(fleet, a_policy("fcfs"))
    for name, model in (("a", "m"), ("b", "m"), ("c", "x")):
        request = a_request(name, models=(ModelName(model),))
        scheduler.at(0.0, RequestArrived(request, needs(9)))

    def named(model: ModelName) -> list[str]:
        return sorted(str(c.request.request_id) for c in outlook(scheduler).open_calls(model))

    assert (named(M), named(X)) == (["a", "b"], ["c"])


def test_a_call_counts_the_mean_of_what_its_workflow_needs_on_the_model_in_question() -> None:
    law = Quantiles((0.1, 0.5, 0.9), (10.0, 100.0, 1000.0))
    forecast = Forecast(
        output_tokens=Quantiles.exactly(7), remaining_tokens=law, remaining_tokens_on={X: law}
    )
    call = a_call(forecast=forecast)

    assert call.remaining_tokens(M) == round(law.mean) > law.median
    assert a_call(forecast=a_forecast(7)).remaining_tokens(M) == 7
    elsewhere = Forecast(remaining_tokens=law, remaining_tokens_on={X: Quantiles.exactly(0.0)})
    assert a_call(forecast=elsewhere).remaining_tokens(X) == 1
