"""The waiting line: one order, expiry, and a wait that is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_request, a_waiting_call
from concertmaster.core.fleet import PoolId
from concertmaster.core.queue import (
    MAX_URGENCY_S,
    Lane,
    Waiting,
    WaitingLine,
    line_key,
    longest_overtaking_s,
)

POOLS = (PoolId("p"),)


def a_keyed_call(name: str, key: float, serial: int, **changes: object) -> Waiting:
    facts: dict[str, object] = {"request": a_request(name), "key": key, "serial": serial}
    return a_waiting_call(name, **{**facts, **changes})


def a_line(*calls: Waiting) -> WaitingLine:
    line = WaitingLine()
    for call in calls:
        line.push(call)
    line.validate()
    return line


def drain(lane: Lane) -> list[str]:
    names = []
    while (head := lane.head(None)) is not None:
        names.append(str(head.request.request_id))
        lane.remove(head)
    return names


# Order.


def test_the_smallest_key_goes_first_and_ties_go_by_serial() -> None:
    lane = Lane(POOLS)
    for name, key, serial in [("c", 2.0, 3), ("late", 1.0, 2), ("early", 1.0, 1), ("z", 0.5, 9)]:
        lane.push(a_keyed_call(name, key, serial))

    assert drain(lane) == ["z", "early", "late", "c"]


def test_a_call_taken_from_the_middle_leaves_the_order_of_the_others() -> None:
    calls = [a_keyed_call(f"r{i}", float(i), i) for i in range(5)]
    lane = Lane(POOLS)
    for call in calls:
        lane.push(call)

    lane.remove(calls[0])
    lane.remove(calls[3])

    assert drain(lane) == ["r1", "r2", "r4"]


def test_a_lane_does_not_hoard_calls_that_are_gone() -> None:
    lane = Lane(POOLS)
    for i in range(5000):
        call = a_keyed_call(f"r{i}", float(-i), i)
        lane.push(call)
        if i:
            lane.remove(call)

    assert len(lane) == 1
    assert len(lane._heaps[""]) < 100


def test_a_call_that_comes_back_under_its_name_is_not_mistaken_for_the_old_one() -> None:
    lane = Lane(POOLS)
    old, again = a_keyed_call("r", 1.0, 1), a_keyed_call("r", 9.0, 3)
    lane.push(old)
    lane.remove(old)
    lane.push(again)
    lane.push(a_keyed_call("other", 5.0, 2))

    assert drain(lane) == ["other", "r"]


def test_keys_that_have_grown_are_put_right_before_the_head_is_named() -> None:
    lane = Lane(POOLS)
    for i in range(3):
        lane.push(a_keyed_call(f"r{i}", float(i), i))
    keys = {"r0": 10.0, "r1": 7.0, "r2": 2.0}

    head = lane.head(lambda call: keys[call.request.request_id])

    assert head is not None
    assert head.request.request_id == "r2"
    assert head.key == 2.0


def test_an_empty_lane_has_no_head() -> None:
    assert Lane(POOLS).head(None) is None


# The bound.


@given(st.floats(-1e9, 1e9), st.floats(0.0, 1e6), st.floats(0.01, 100.0))
def test_urgency_moves_a_key_by_no_more_than_the_clamp(
    urgency_s: float, arrival_s: float, aging: float
) -> None:
    moved = line_key(urgency_s=urgency_s, arrival_s=arrival_s, aging=aging) - aging * arrival_s

    assert -1e-3 <= moved <= MAX_URGENCY_S + 1e-3


def test_the_clamp_is_exact_at_both_ends() -> None:
    assert line_key(urgency_s=-5.0, arrival_s=2.0, aging=1.0) == 2.0
    assert line_key(urgency_s=1e9, arrival_s=2.0, aging=1.0) == MAX_URGENCY_S + 2.0
    assert longest_overtaking_s(0.1) == 36_000.0


arrivals = st.lists(
    st.tuples(st.floats(0.0, 2e4), st.floats(-10.0, 1e5), st.floats(0.0, 1e5)),
    min_size=2,
    max_size=25,
)


@given(arrivals, st.floats(0.2, 20.0))
def test_nobody_who_came_later_than_the_bound_goes_first(
    plans: list[tuple[float, float, float]], aging: float
) -> None:
    """Urgencies drift upwards while calls wait: each has a first and a last one."""
    lane = Lane(POOLS)
    grown_s = {}
    for serial, (arrival_s, urgency_s, growth_s) in enumerate(plans):
        name = f"r{serial}"
        grown_s[name] = urgency_s + growth_s
        key = line_key(urgency_s=urgency_s, arrival_s=arrival_s, aging=aging)
        lane.push(a_keyed_call(name, key, serial, request=a_request(name, arrival_s=arrival_s)))

    def current_key(call: Waiting) -> float:
        request = call.request
        urgency_s = grown_s[request.request_id]
        return line_key(urgency_s=urgency_s, arrival_s=request.arrival_s, aging=aging)

    earliest_left_s = sorted(arrival_s for arrival_s, _, _ in plans)
    while (head := lane.head(current_key)) is not None:
        lane.remove(head)
        overtaken_s = head.request.arrival_s - earliest_left_s[0]
        assert overtaken_s <= longest_overtaking_s(aging) + 1e-6
        earliest_left_s.remove(head.request.arrival_s)


# The line.


def test_calls_with_the_same_pools_share_a_lane_and_empty_lanes_go() -> None:
    line = a_line(
        a_keyed_call("a", 1.0, 1),
        a_keyed_call("b", 2.0, 2),
        a_keyed_call("c", 3.0, 3, pools=(PoolId("p"), PoolId("q"))),
    )
    assert [len(lane) for lane in line.lanes.values()] == [2, 1]

    removed = [line.remove(call.request.request_id) for call in list(line)]

    line.validate()
    assert [call.request.request_id for call in removed] == ["a", "b", "c"]
    assert line.lanes == {}
    assert len(line) == 0


def test_calls_expire_in_the_order_of_their_time_and_only_then() -> None:
    line = a_line(
        a_keyed_call("late", 1.0, 1, expires_s=30.0),
        a_keyed_call("soon", 2.0, 2, expires_s=10.0),
        a_keyed_call("next", 3.0, 3, expires_s=20.0),
    )
    assert line.next_expiry_s() == 10.0
    assert line.pop_expired(9.999) == []

    assert [call.request.request_id for call in line.pop_expired(20.0)] == ["soon", "next"]
    line.validate()
    assert line.next_expiry_s() == 30.0


def test_a_call_that_left_does_not_expire() -> None:
    call = a_keyed_call("a", 1.0, 1, expires_s=10.0)
    line = a_line(call)
    line.remove(call.request.request_id)

    assert line.next_expiry_s() is None
    assert line.pop_expired(99.0) == []


def test_a_call_that_waits_again_is_not_looked_at_when_its_first_wait_had_planned() -> None:
    line, call = WaitingLine(), a_waiting_call()
    line.push(call)
    line.review_at(5.0, call)
    line.remove(call.request.request_id)
    call.attempt += 1
    line.push(call)

    assert line.next_review_s() is None
    assert line.next_expiry_s() == call.expires_s


def test_a_lane_that_differs_from_the_index_is_noticed() -> None:
    line = a_line(a_keyed_call("a", 1.0, 1))
    line.lanes[POOLS].push(a_keyed_call("stray", 2.0, 2))

    with pytest.raises(AssertionError, match="a lane and the index differ"):
        line.validate()
