"""Work ahead in the line: sums that are kept, against sums that are counted."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_pool, a_waiting_call
from concertmaster.core.events import RequestCancelled, TimerFired, TokensStreamed
from concertmaster.core.fleet import PoolId
from concertmaster.core.ladder import Ladder, Rank, Work, total
from concertmaster.core.queue import Lane, Waiting
from concertmaster.core.request import ModelName, RequestId, WorkflowId

MODEL = ModelName("llama-3.1-8b-instruct")


@given(st.integers(0, 100_000), st.integers(1, 600))
def test_what_is_kept_is_what_a_walk_would_count(seed: int, steps: int) -> None:
    rng, ladder, inside = random.Random(seed), Ladder(), dict[Rank, Work]()
    for serial in range(steps):
        if inside and rng.random() < 0.3:
            gone = rng.choice(sorted(inside))
            del inside[gone]
            ladder.remove(gone)
        else:
            rank = (float(rng.randrange(40)), serial)
            inside[rank] = Work(1, rng.randrange(9000), rng.randrange(900), rng.randrange(10**6))
            ladder.add(rank, inside[rank])
    ladder.validate(inside.items())
    place = (float(rng.randrange(42)), rng.randrange(steps))

    assert ladder.before(place) == total(work for rank, work in inside.items() if rank < place)


def a_lane(calls: int, rng: random.Random) -> tuple[Lane, list[Waiting]]:
    lane = Lane((PoolId("p"),))
    waiting = [
        a_waiting_call(f"r{i}", serial=i, key=rng.uniform(0, 9), forecast=a_forecast(float(i + 1)))
        for i in range(calls)
    ]
    for call in waiting:
        lane.push(call)
    return lane, waiting


@pytest.mark.parametrize("fifo", [False, True])
def test_nobody_goes_before_itself_however_its_key_is_told(*, fifo: bool) -> None:
    lane, waiting = a_lane(200, random.Random(1))
    call = waiting[100]

    ahead = lane.ahead(call, call.key + 100.0, MODEL, fifo=fifo)

    assert ahead.calls == (100 if fifo else 199)


def test_a_call_whose_key_has_grown_changes_its_place() -> None:
    lane, waiting = a_lane(50, random.Random(1))
    first = min(waiting, key=lambda call: call.rank())
    stranger = a_waiting_call("stranger", serial=99)
    before = lane.ahead(stranger, 4.0, MODEL)
    lane.head(lambda call: 5.0 if call is first else call.key)

    lane.validate()
    assert lane.ahead(stranger, 4.0, MODEL) == before.less(first.work(MODEL))


@given(seed=st.integers(0, 10_000))
def test_crews_and_sums_stay_true_through_a_busy_hour(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(
        a_pool("fast", max_sequences=2), a_pool("slow", max_sequences=2, slowness=4.0), replicas=3
    )
    scheduler = CheckedScheduler(fleet, "swarmx:order=las")
    now_s = 0.0
    for i in range(40):
        now_s += rng.expovariate(5.0)
        forecast, workflow = a_forecast(rng.uniform(1, 500)), WorkflowId(f"w{rng.randrange(9)}")
        scheduler.arrive(f"r{i}", now_s, forecast, workflow_id=workflow)
        if rng.random() < 0.5:
            told = RequestId(f"r{rng.randrange(i + 1)}")
            scheduler.at(now_s, TokensStreamed(((told, 1, rng.randrange(1, 300)),)))
        if rng.random() < 0.2:
            scheduler.at(now_s, RequestCancelled(RequestId(f"r{rng.randrange(i + 1)}")))
        scheduler.at(now_s, TimerFired())

    assert len(scheduler.core.line) > 0
