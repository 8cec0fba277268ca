"""Which workflows are over."""

import random

from concertmaster.core.request import WorkflowId
from concertmaster.gateway.idle import IdleWatch

A, B, C = (WorkflowId(name) for name in "abc")


def one_call(watch: IdleWatch, now_s: float, workflow_id: WorkflowId, **facts: bool) -> None:
    watch.begin(now_s, workflow_id, **facts)
    watch.settle(now_s, workflow_id)


def test_a_workflow_is_over_once_it_has_been_idle_for_long() -> None:
    watch = IdleWatch(idle_s=600.0)
    one_call(watch, 0.0, A)
    one_call(watch, 100.0, B)
    one_call(watch, 200.0, A)

    assert watch.over(699.0) == []
    assert watch.over(700.0) == [B]
    assert watch.over(800.0) == [A]
    assert watch.over(9000.0) == []
    assert len(watch) == 0


def test_idle_time_begins_with_the_last_outcome() -> None:
    watch = IdleWatch(idle_s=600.0)
    watch.begin(0.0, A)
    assert watch.over(5000.0) == []
    watch.settle(5000.0, A)

    assert watch.over(5599.0) == []
    assert watch.over(5600.0) == [A]


def test_the_longest_idle_is_found_behind_those_that_came_before_it() -> None:
    watch = IdleWatch(idle_s=600.0)
    watch.begin(0.0, A)
    one_call(watch, 1.0, B)
    watch.settle(400.0, A)

    assert watch.over(601.0) == [B]
    assert watch.over(1000.0) == [A]


def test_a_workflow_with_an_open_call_keeps_no_other_one_alive() -> None:
    watch = IdleWatch(idle_s=600.0)
    watch.begin(0.0, A)
    one_call(watch, 1.0, B)

    assert watch.over(601.0) == [B]
    assert watch.over(602.0) == []


def test_a_client_may_say_that_a_call_is_the_last() -> None:
    watch = IdleWatch()
    watch.begin(0.0, A)
    watch.begin(1.0, A, is_final=True)
    watch.settle(2.0, A)
    assert watch.over(2.0) == []
    watch.settle(3.0, A)

    assert watch.over(3.0) == [A]
    assert watch.over(3.0) == []


def test_a_call_after_the_last_one_takes_the_word_back() -> None:
    watch = IdleWatch()
    one_call(watch, 0.0, A, is_final=True)
    watch.begin(0.5, A)
    assert watch.over(1.0) == []
    watch.settle(1.0, A)

    assert watch.over(1.0) == []
    assert watch.over(601.0) == [A]


def test_a_workflow_that_comes_back_is_over_once_more() -> None:
    watch = IdleWatch(idle_s=10.0)
    one_call(watch, 0.0, A)
    assert watch.over(10.0) == [A]
    one_call(watch, 20.0, A)

    assert watch.over(30.0) == [A]


def test_of_too_many_workflows_the_longest_idle_are_over_and_never_an_open_one() -> None:
    watch = IdleWatch(most=2)
    watch.begin(0.0, A)
    one_call(watch, 1.0, B)
    one_call(watch, 2.0, C)

    assert watch.over(3.0) == [B]
    assert len(watch) == 2


def test_whatever_comes_each_life_of_a_workflow_ends_once() -> None:
    rng = random.Random(1)
    watch = IdleWatch(idle_s=20.0, most=30)
    open_calls: list[WorkflowId] = []
    alive: set[WorkflowId] = set()
    for second in range(3000):
        workflow_id = WorkflowId(f"w{rng.randrange(60)}")
        if rng.random() < 0.5:
            watch.begin(float(second), workflow_id, is_final=rng.random() < 0.2)
            open_calls.append(workflow_id)
            alive.add(workflow_id)
        elif open_calls:
            watch.settle(float(second), open_calls.pop(rng.randrange(len(open_calls))))
        for one in watch.over(float(second)):
            assert one not in open_calls
            alive.remove(one)
        assert len(watch) == len(alive)


def test_a_workflow_that_others_say_is_over_is_forgotten_at_once() -> None:
    watch = IdleWatch(idle_s=600.0)
    one_call(watch, 0.0, A)

    assert watch.end(A)
    assert len(watch) == 0
    assert watch.over(9000.0) == []
    assert not watch.end(A)
    assert not watch.end(B)


def test_one_that_its_client_called_over_too_is_over_once() -> None:
    watch = IdleWatch()
    one_call(watch, 0.0, A, is_final=True)

    assert watch.end(A)
    assert watch.over(0.0) == []


def test_one_with_an_open_call_is_over_once_that_has_its_outcome() -> None:
    watch = IdleWatch(idle_s=600.0)
    watch.begin(0.0, A)

    assert not watch.end(A)
    assert watch.over(1.0) == []
    watch.settle(2.0, A)
    assert watch.over(2.0) == [A]
