"""Nobody starves: the longest wait under overload that never ends stays under a stated bound.

The bound (``docs/policies/chimera.md``): a call with urgency ``u`` that arrives at ``t`` is
overtaken only by calls that arrive before ``t + u / aging``, with ``u`` at most
``MAX_URGENCY_S``; so it is dispatched by the time that all which arrived before then is done.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CheckedScheduler,
    a_call,
    a_fleet,
    a_plan,
    a_policy,
    a_pool,
    a_request,
    a_waiting_call,
    a_workload,
)
from concertmaster.compose import simulate
from concertmaster.core.events import RequestFinished
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.outlook import key_of
from concertmaster.core.queue import MAX_URGENCY_S, line_key, longest_overtaking_s
from concertmaster.core.request import ModelName, RequestId
from concertmaster.policies.catalog import NAMES, policy
from concertmaster.workload.plan import Workload

LOAD = 1.3
STREAM_S = 1200.0
POOL = a_pool(max_sequences=1)
SHORT_TOKENS, LONG_TOKENS = 40, 1000
SHORT_S = POOL.service_s(100, SHORT_TOKENS, batch=1)
LONG_S = POOL.service_s(100, LONG_TOKENS, batch=1)


def an_endless_stream(replicas: int) -> Workload:
    """Short workflows at 1.3 times what the fleet can serve, and a long one among the first."""
    gap_s = SHORT_S / (LOAD * replicas)
    short = [
        a_plan(
            f"s{i:05d}",
            a_call(0, prompt_tokens=100, output_tokens=SHORT_TOKENS),
            arrival_s=gap_s * i,
        )
        for i in range(int(STREAM_S / gap_s))
    ]
    long = a_plan(
        "long",
        a_call(0, prompt_tokens=100, output_tokens=LONG_TOKENS, max_output_tokens=2048),
        arrival_s=10.0,
    )
    return a_workload(long, *short)


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long calls waited, by the name of their workflow, and when they came."""

    arrival_s: dict[str, float]
    waited_s: dict[str, float]


def waits(of: str, replicas: int = 1) -> Waits:
    run = simulate(a_fleet(POOL, replicas=replicas), an_endless_stream(replicas), of, seed=1)
    served = [call for call in run.calls if call.dispatched_s is not None]
    assert len(served) == len(run.calls), "a call was refused, so that its wait is not known"
    return Waits(
        arrival_s={call.workflow_id: call.arrival_s for call in served},
        waited_s={c.workflow_id: (c.dispatched_s or 0.0) - c.arrival_s for c in served},
    )


def bound_s(arrival_s: float, urgency_s: float, aging: float) -> float:
    """Longest wait: overtaking, and the drain of all that had come when it ends.

    Work comes at ``LOAD`` seconds a second to a fleet that never idles, so what has come by an
    instant is done by ``LOAD`` times that instant, and the long workflow's own work with it.
    """
    overtaken_s = min(urgency_s, MAX_URGENCY_S) / aging
    assert overtaken_s <= longest_overtaking_s(aging)
    return LOAD * (arrival_s + overtaken_s) - arrival_s + LONG_S + SHORT_S


@pytest.mark.parametrize("replicas", [1, 2])
def test_under_endless_overload_every_call_waits_at_most_the_bound(replicas: int) -> None:
    found = waits("chimera:knows=length", replicas)

    for name, waited_s in found.waited_s.items():
        urgency_s = LONG_S if name == "long" else SHORT_S
        assert waited_s <= bound_s(found.arrival_s[name], urgency_s, aging=0.1), name
    assert found.waited_s["long"] < STREAM_S / 4
    assert found.waited_s["long"] > 0.5 * LONG_S / 0.1, "nothing was overtaken: a test of nothing"


def test_without_aging_the_same_stream_starves_the_long_workflow_to_its_end() -> None:
    starved_s = waits("chimera:knows=length,aging=0.000001").waited_s["long"]

    assert starved_s > STREAM_S
    assert starved_s > 5 * waits("chimera:knows=length").waited_s["long"]


# The rule behind it.

remaining = st.floats(1.0, 1e6)


@given(st.floats(0.0, 1e6), st.floats(0.0, 1e5), st.floats(-10.0, 1e5), st.floats(1e-6, 10.0))
def test_a_later_call_of_equal_urgency_has_no_smaller_key(
    arrival_s: float, later_s: float, urgency_s: float, aging: float
) -> None:
    earlier, later = (
        line_key(urgency_s=urgency_s, arrival_s=at_s, aging=aging)
        for at_s in (arrival_s, arrival_s + later_s)
    )

    assert earlier <= later


@pytest.mark.parametrize("name", NAMES)
@given(tokens=remaining, arrivals=st.lists(st.floats(0.0, 100.0), min_size=2, max_size=8))
def test_a_later_call_of_equal_urgency_never_overtakes(
    name: str, tokens: float, arrivals: list[float]
) -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), name)
    forecast = Forecast(
        output_tokens=Quantiles.exactly(5.0), remaining_tokens=Quantiles.exactly(tokens)
    )
    scheduler.arrive("blocker", 0.0, forecast)
    for i, arrival_s in enumerate(sorted(arrivals)):
        scheduler.arrive(f"r{i}", arrival_s, forecast)

    running, order = "blocker", []
    for i in range(len(arrivals)):
        done = RequestFinished(RequestId(running), 1, 1)
        (dispatch,) = scheduler.at(200.0 + i, done)
        running = str(getattr(dispatch, "request_id", ""))
        order.append(running)

    assert order == [f"r{i}" for i in range(len(arrivals))]


@pytest.mark.parametrize("name", NAMES)
@given(first=remaining, second=remaining, arrival_s=st.floats(0.0, 1e5), margin_s=st.floats(1, 99))
def test_a_call_is_never_overtaken_by_one_that_comes_after_the_bound(
    name: str, first: float, second: float, arrival_s: float, margin_s: float
) -> None:
    """By its own urgency, which is at most the clamp."""
    chosen, pool = policy(name), a_pool()

    def key(tokens: float, at_s: float) -> float:
        forecast = Forecast(remaining_tokens_on={ModelName("m"): Quantiles.exactly(tokens)})
        request = a_request(arrival_s=at_s, max_output_tokens=4096)
        return key_of(chosen, a_waiting_call(request=request, forecast=forecast), pool)

    own = key(first, arrival_s)
    overtaken_s = (own - chosen.aging * arrival_s) / chosen.aging
    assert overtaken_s <= longest_overtaking_s(chosen.aging) + 1e-3
    assert own < key(second, arrival_s + overtaken_s + margin_s)


def test_aging_is_never_nothing() -> None:
    with pytest.raises(ValueError, match="aging must be above 0"):
        a_policy("chimera", aging=0.0)
