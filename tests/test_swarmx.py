"""Completion as a distribution: composed, compared, and decided again while a call waits."""

import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CheckedScheduler,
    a_fleet,
    a_forecast,
    a_pool,
    a_replica,
    a_request,
    a_view,
    a_waiting_call,
    placements,
)
from concertmaster.core.events import RequestFinished, TimerFired, TokensStreamed
from concertmaster.core.fleet import InFlight
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import RequestId, ServiceClass, WorkflowId
from concertmaster.core.sketch import (
    MASSES,
    RANKS,
    Bar,
    Measure,
    add,
    add_in_step,
    first_of,
    moments,
    of_moments,
    sketch_of,
)
from concertmaster.policies.catalog import policy
from concertmaster.policies.recipes.swarmx import OthersDelay, TailCompletion, TailRouter

LEVELS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
MEASURES = (Measure.mean(), Measure.cvar(0.95), Measure.quantile(0.95), Measure.quantile(0.5))

laws = st.lists(st.floats(1.0, 1000.0), min_size=len(LEVELS), max_size=len(LEVELS)).map(
    lambda values: Quantiles(LEVELS, tuple(sorted(values)))
)
every_measure = pytest.mark.parametrize("measure", MEASURES, ids=lambda one: one.name)


def a_smooth_law(rng: random.Random) -> Quantiles:
    """Answers of a role: a lognormal, or two of them that overlap."""
    middle, spread = rng.uniform(2.0, 6.0), rng.uniform(0.1, 0.9)
    shift = rng.choice((0.0, rng.uniform(0.0, 2.0)))
    draws = [rng.lognormvariate(middle + shift * (rng.random() < 0.4), spread) for _ in range(4000)]
    return Quantiles.of_samples(draws, LEVELS)


def drawn(law: Quantiles, draws: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.maximum(1.0, np.interp(draws.random(200_000), law.levels, law.values))


# Sketches.


def test_the_composed_p95_is_that_of_a_monte_carlo_within_three_percent() -> None:
    rng, draws, p95 = random.Random(5), np.random.default_rng(5), Measure.quantile(0.95)
    errors = []
    for _ in range(100):
        one, other = a_smooth_law(rng), a_smooth_law(rng)
        sums = drawn(one, draws) + drawn(other, draws)
        composed = p95.of(add(sketch_of(one), sketch_of(other)))
        errors.append(abs(composed / float(np.quantile(sums, 0.95)) - 1))

    assert max(errors) < 0.03
    assert sorted(errors)[len(errors) // 2] < 0.01


@every_measure
@given(one=laws, other=laws, more=st.floats(0.0, 100.0))
def test_a_longer_part_never_lowers_a_cost(
    measure: Measure, one: Quantiles, other: Quantiles, more: float
) -> None:
    base = sketch_of(one)
    longer = [value + more for value in base]

    assert (
        measure.of(add(longer, sketch_of(other))) >= measure.of(add(base, sketch_of(other))) - 1e-6
    )


@given(one=laws, other=laws)
def test_a_sum_keeps_order_and_mean(one: Quantiles, other: Quantiles) -> None:
    total = add(sketch_of(one), sketch_of(other))

    assert list(total) == sorted(total)
    means = moments(sketch_of(one))[0] + moments(sketch_of(other))[0]
    assert moments(total)[0] == pytest.approx(means, rel=0.05)


@given(one=laws, other=laws)
def test_what_is_large_together_has_the_longer_tail(one: Quantiles, other: Quantiles) -> None:
    apart, together = (how(sketch_of(one), sketch_of(other)) for how in (add, add_in_step))
    tail = Measure.cvar(0.95)

    assert tail.of(apart) <= tail.of(together) * 1.02


@given(mean=st.floats(0.1, 1e4), ratio=st.floats(0.01, 1.0))
def test_a_lognormal_has_the_moments_it_was_asked_for(mean: float, ratio: float) -> None:
    variance = (ratio * mean) ** 2

    found = moments(of_moments(mean, variance))

    assert found[0] == pytest.approx(mean, rel=0.02)
    assert found[1] == pytest.approx(variance, rel=0.2)


def test_the_first_of_many_is_that_of_a_monte_carlo() -> None:
    rng = random.Random(3)
    atoms = [(float(value), 1.0) for value in range(1, 201)]
    for count in (1, 4, 20):
        least = sorted(min(rng.uniform(0, 200) for _ in range(count)) for _ in range(20_000))
        assert Measure.quantile(0.9).of(first_of(count, atoms)) == pytest.approx(
            least[int(0.9 * len(least))], rel=0.05
        )


@given(bar=laws, law=laws, now_s=st.floats(0.0, 1200.0))
def test_what_passes_a_bar_is_what_a_double_loop_says(
    bar: Quantiles, law: Quantiles, now_s: float
) -> None:
    ends_s = sketch_of(bar)
    for seconds in law.values:
        slow_s = sum(
            mass * max(0.0, now_s + seconds - max(now_s, end_s))
            for mass, end_s in zip(MASSES, ends_s, strict=True)
        )
        assert Bar(ends_s).passed_s(now_s, seconds) == pytest.approx(slow_s, abs=1e-6)


def test_a_certain_quantity_costs_itself_by_every_measure() -> None:
    assert {measure.of((7.0,)) for measure in MEASURES} == {7.0}
    assert {round(measure.of([7.0] * len(RANKS)), 9) for measure in MEASURES} == {7.0}


# Now on a slow GPU, or later on a fast one.


def routed(
    waits_s: Sequence[float], tokens: float = 100.0, *, full: tuple[str, ...] = ("fast",)
) -> tuple[str, ...]:
    router = policy("swarmx").router
    assert isinstance(router, TailRouter)
    pools = [a_pool("fast"), a_pool("slow", slowness=4.0)]
    call = a_waiting_call(forecast=a_forecast(tokens))
    view = a_view(full=full, waits_s={"fast": waits_s, "slow": waits_s})
    return router.route(call, pools, view, random.Random(1))


def test_a_fast_pool_that_frees_soon_is_waited_for() -> None:
    assert routed((0.01,)) == ("fast",)


def test_a_long_wait_sends_a_call_to_the_slow_pool_or_whichever_frees_first() -> None:
    assert routed((1e4,)) == ("fast", "slow")


def test_the_longer_the_answer_the_longer_the_wait_for_speed() -> None:
    pool = a_pool("fast")
    wait_s = 100.0 * pool.decode_token_s

    assert "slow" in routed((wait_s,), tokens=20.0)
    assert routed((wait_s,), tokens=2000.0) == ("fast",)


@given(waits_s=laws, tokens=st.floats(1.0, 5000.0), both=st.booleans())
def test_a_call_may_always_go_somewhere(waits_s: Quantiles, tokens: float, *, both: bool) -> None:
    full = ("fast", "slow") if both else ("fast",)

    assert routed(sketch_of(waits_s), tokens, full=full)


@pytest.mark.parametrize("name", ["swarmx", "swarmx:near=0.5", "swarmx:cost=cvar", "point"])
def test_where_no_pool_will_serve_again_every_pool_is_waited_for(name: str) -> None:
    pools = [a_pool("p"), a_pool("q")]
    view = a_view(replicas={"p": 0, "q": 0}, wake_s={"p": math.inf, "q": math.inf})

    forecast = Forecast(output_tokens=Quantiles((0.1, 0.9), (10.0, 500.0)))
    call = a_waiting_call(forecast=forecast)

    found = policy(name).router.route(call, pools, view, random.Random(1))

    assert found == ("p", "q")


def test_a_call_that_ends_before_its_sibling_costs_nothing() -> None:
    measures = dict.fromkeys(ServiceClass, Measure.mean())
    scorer, replica = TailCompletion(measures), a_replica("p-0")
    call = a_waiting_call(forecast=a_forecast(100.0))
    alone_s = scorer.cost_s(0.0, call, replica)
    call.workflow.ends[RequestId("sibling")] = Bar((1000.0,))

    assert alone_s > 0
    assert scorer.cost_s(0.0, call, replica) == 0.0
    assert scorer.cost_s(1000.0, call, replica) == pytest.approx(alone_s)


def test_a_prompt_that_is_held_takes_less_from_those_that_run() -> None:
    scorer = OthersDelay(dict.fromkeys(ServiceClass, Measure.mean()))
    holder, other = a_replica("p-0"), a_replica("p-1")
    holder.prefixes.touch(tuple(range(8)))
    request = a_request(prompt_tokens=2100, prefix_hashes=tuple(range(8)))
    call = a_waiting_call(request=request, forecast=a_forecast(100.0))
    for replica in (holder, other):
        running = a_request(f"of {replica.replica_id}")
        flight = InFlight(request=running, prefill_tokens=9, decode_tokens=50, expected_tokens=50)
        replica.admit(0.0, flight, 150)

    saved_s = 2048 * other.pool.prefill_token_s
    assert scorer.cost_s(0.0, call, other) - scorer.cost_s(0.0, call, holder) == pytest.approx(
        saved_s
    )


def test_a_call_that_was_told_to_wait_is_routed_again_and_starts_on_the_slow_pool() -> None:
    fleet = a_fleet(
        a_pool("fast", max_sequences=1), a_pool("slow", max_sequences=1, slowness=4.0), replicas=1
    )
    scheduler = CheckedScheduler(fleet, "swarmx")
    soon_over = a_forecast(10.0)
    assert placements(scheduler.arrive("r0", 0.0, soon_over)) == {"r0": "fast-0"}
    assert placements(scheduler.arrive("r1", 0.0, a_forecast(400.0))) == {}

    started: dict[str, str] = {}
    for i in range(1, 20):
        wakeup_s = scheduler.core.next_wakeup_s()
        assert wakeup_s is not None
        assert wakeup_s < 100.0, "a call waits for a pool that does not keep its forecast"
        far_on = TokensStreamed(((RequestId("r0"), 1, 500 * i),))
        started |= placements(scheduler.at(wakeup_s, far_on))
        if started:
            break
    assert started == {"r1": "slow-0"}


@pytest.mark.parametrize("name", ["swarmx", "swarmx:order=stjf,tail=0.95,cost=cvar", "point"])
@given(seed=st.integers(0, 10_000))
def test_nobody_waits_for_ever_while_others_finish(name: str, seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(
        a_pool("fast", max_sequences=1), a_pool("slow", max_sequences=1, slowness=4.0), replicas=1
    )
    scheduler = CheckedScheduler(fleet, name)
    running: list[str] = []
    now_s = 0.0
    for i in range(12):
        now_s += rng.random()
        forecast = a_forecast(rng.uniform(1, 500))
        workflow = WorkflowId(f"w{rng.randrange(4)}")
        running += placements(scheduler.arrive(f"r{i}", now_s, forecast, workflow_id=workflow))
    for _ in range(200):
        if not running:
            break
        now_s += rng.random()
        done = running.pop(rng.randrange(len(running)))
        running += placements(scheduler.at(now_s, RequestFinished(RequestId(done), 1, 5)))
        while not running and len(scheduler.core.line):
            wakeup_s = scheduler.core.next_wakeup_s()
            assert wakeup_s is not None
            now_s = max(now_s, wakeup_s)
            running += placements(scheduler.at(now_s, TimerFired()))

    assert len(scheduler.core.line) == 0


# Bound on arrival.


def test_a_call_bound_on_arrival_waits_inside_its_replica() -> None:
    fleet = a_fleet(a_pool(max_sequences=1), replicas=2)
    scheduler = CheckedScheduler(fleet, "round-robin@arrival")

    found = [placements(scheduler.arrive(f"r{i}")) for i in range(6)]

    assert [next(iter(one.values())) for one in found] == ["p-0", "p-1"] * 3
    assert len(scheduler.core.line) == 0


def test_the_ledgers_of_a_replica_that_queues_come_back_to_zero() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1), replicas=1), "vllm@arrival")
    for i in range(5):
        scheduler.arrive(f"r{i}", forecast=Forecast(output_tokens=Quantiles.exactly(50.0)))
    assert scheduler.replica().kv.reserved_blocks > 0

    for i in range(5):
        scheduler.at(1.0, RequestFinished(RequestId(f"r{i}"), 1, 50))

    scheduler.replica().validate()
    assert scheduler.replica().kv.reserved_blocks == 0
