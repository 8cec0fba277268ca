"""Service times: from forecasts of tokens to honest seconds."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_pool, a_replica, a_request
from concertmaster.core.fleet import InFlight, PoolId
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import Request
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.service import ServiceTimes, Work, work_of

POOL = PoolId("p")
CALL = a_request(app="a", role="r", max_output_tokens=4096)
TOKENS = (10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 500.0, 900.0)


def tokens(*values: float, scale: float = 1.0) -> Forecast:
    law = Quantiles(LEVELS, tuple(value * scale for value in values or TOKENS))
    return Forecast(output_tokens=law)


EXACTLY_100 = Forecast(output_tokens=Quantiles.exactly(100.0))


def taught(ratios: list[float], *, every_s: float = 1.0) -> ServiceTimes:
    """Learn calls of 100 tokens that took so many times what the curve says."""
    service, replica = ServiceTimes(), a_replica()
    for i, ratio in enumerate(ratios):
        stated = service.predict(CALL, EXACTLY_100, replica)
        feed(service, i * every_s, stated, 100, ratio)
    return service


def feed(
    service: ServiceTimes,
    now_s: float,
    stated: Quantiles,
    output_tokens: int,
    ratio: float,
    *,
    request: Request = CALL,
    pool_id: PoolId = POOL,
) -> float:
    """Learn a call that took so many times what the curve says; return its seconds."""
    work = work_of(request, a_replica())
    actual_s = ratio * work.seconds(output_tokens)
    service.learn(
        now_s,
        request,
        pool_id,
        work=work,
        stated=stated,
        output_tokens=output_tokens,
        actual_s=actual_s,
    )
    return actual_s


def spread(law: Quantiles) -> float:
    return law.at(0.95) / law.at(0.05)


def test_an_idle_replica_takes_prefill_and_a_step_for_each_further_token() -> None:
    replica = a_replica()
    curve = replica.pool.curve
    expected_s = curve.prefill_s(100) + 99 * curve.step_s(1, 100)
    law = ServiceTimes().predict(CALL, EXACTLY_100, replica)
    assert law.values == pytest.approx([expected_s] * len(LEVELS))


def test_a_call_takes_the_same_whether_it_is_in_flight_yet_or_not() -> None:
    replica = a_replica()
    other = InFlight(
        request=a_request("other"), prefill_tokens=100, decode_tokens=40, expected_tokens=40
    )
    replica.admit(0.0, other, 200)
    before = work_of(CALL, replica)
    call = InFlight(request=CALL, prefill_tokens=100, decode_tokens=40, expected_tokens=40)
    replica.admit(0.0, call, 200)
    assert work_of(CALL, replica) == before
    assert before.first_s > work_of(CALL, a_replica()).first_s
    assert before.token_s > work_of(CALL, a_replica()).token_s


def test_a_cached_prefix_is_not_computed_again() -> None:
    replica, call = a_replica(), a_request(prompt_tokens=1000, prefix_hashes=(1, 2, 3))
    cold_s = work_of(call, replica).first_s
    replica.prefixes.touch((1, 2, 3))
    assert work_of(call, replica).first_s < cold_s / 2


def test_pace_scales_every_second_of_a_replica() -> None:
    service, replica = taught([1.0, 1.4, 0.8]), a_replica()
    usual = service.predict(CALL, tokens(), replica)
    replica.pace = 1.3
    assert service.predict(CALL, tokens(), replica).values == pytest.approx(
        [1.3 * value for value in usual.values]
    )


@given(
    st.lists(st.floats(0.0, 4096.0), min_size=8, max_size=8).map(sorted),
    st.floats(1.0, 5.0),
    st.lists(st.floats(1e-9, 1e9), max_size=20),
)
def test_more_tokens_never_take_fewer_seconds_and_none_take_less_than_none(
    values: list[float], more: float, ratios: list[float]
) -> None:
    service, replica = taught(ratios), a_replica()
    fewer = service.predict(CALL, tokens(*values), replica)
    longer = service.predict(CALL, tokens(*values, scale=more), replica)
    assert fewer.values[0] > 0
    pairs = zip(fewer.values, longer.values, strict=True)
    assert all(few <= many * (1 + 1e-9) for few, many in pairs)


def test_no_answer_is_taken_to_be_longer_than_the_caller_allows() -> None:
    short = a_request(app="a", role="r", max_output_tokens=50)
    law = ServiceTimes().predict(short, tokens(), a_replica())
    assert law.at(0.99) == pytest.approx(work_of(short, a_replica()).seconds(50))


def test_without_a_forecast_an_answer_is_taken_to_be_as_long_as_a_chat_answer() -> None:
    law = ServiceTimes().predict(CALL, NO_FORECAST, a_replica())
    assert law.median == pytest.approx(work_of(CALL, a_replica()).seconds(256))


def test_calls_that_take_longer_than_the_curve_move_the_law_within_thirty() -> None:
    fresh = ServiceTimes().predict(CALL, tokens(), a_replica())
    slow = taught([1.3] * 30).predict(CALL, tokens(), a_replica())
    assert slow.median > 1.2 * fresh.median


def test_ratios_that_vary_more_widen_the_law() -> None:
    steady = taught([1.0, 1.0, 1.0, 1.0] * 20).predict(CALL, tokens(), a_replica())
    varied = taught([0.4, 0.8, 1.2, 2.5] * 20).predict(CALL, tokens(), a_replica())
    assert spread(varied) > 1.3 * spread(steady)


def test_tails_of_tokens_and_of_ratios_are_composed_and_not_multiplied() -> None:
    rng = random.Random(1)
    service = ServiceTimes()
    replica = a_replica()
    ratios = sorted(rng.lognormvariate(0, 0.5) for _ in range(120))
    for i, ratio in enumerate(rng.sample(ratios, len(ratios))):
        stated = Quantiles.exactly(1e9)  # of which nothing is learnt but that it was too long
        feed(service, float(i), stated, 100, ratio, request=a_request(app="other"))
    service._offsets.clear()
    service._offsets.update(ServiceTimes()._offsets)
    law = service.predict(CALL, tokens(), replica)
    times_s = [work_of(CALL, replica).seconds(value) for value in TOKENS]
    assert law.at(0.95) < 0.9 * times_s[6] * ratios[114]
    assert law.at(0.95) > times_s[6]


def test_a_fifth_of_wild_ratios_leaves_the_median() -> None:
    wild = taught([1.0, 1.0, 1.0, 1.0, 50.0] * 20)
    assert wild.predict(CALL, EXACTLY_100, a_replica()).median == pytest.approx(
        work_of(CALL, a_replica()).seconds(100), rel=0.05
    )


def test_a_pool_that_rested_is_taken_to_be_as_it_was() -> None:
    slow = [1.3] * 60
    rested = taught(slow, every_s=100_000.0).predict(CALL, tokens(), a_replica())
    busy = taught(slow, every_s=1.0).predict(CALL, tokens(), a_replica())
    assert rested.median == pytest.approx(busy.median, rel=0.02)


def test_a_pool_is_not_judged_by_another() -> None:
    other = a_replica(pool=a_pool("q"))
    alone = ServiceTimes()
    slow = taught([3.0] * 30)
    slow._offsets.clear()
    slow._offsets.update(alone._offsets)
    assert slow.predict(CALL, tokens(), other) == alone.predict(CALL, tokens(), other)


def test_what_a_pool_learns_is_its_own() -> None:
    service, alone = taught([1.0] * 30), taught([1.0] * 30)
    for i in range(30):
        stated = Quantiles.exactly(1e9)
        feed(service, 30.0 + i, stated, 100, 3.0, pool_id=PoolId("q"))
    service._offsets.clear()
    service._offsets.update(alone._offsets)
    assert service.predict(CALL, tokens(), a_replica()) == alone.predict(
        CALL, tokens(), a_replica()
    )


def test_no_ratio_counts_for_more_than_eight() -> None:
    wild = taught([1e6] * 200)
    wild._offsets.clear()
    wild._offsets.update(ServiceTimes()._offsets)
    most_s = 8 * work_of(CALL, a_replica()).seconds(100)
    assert wild.predict(CALL, EXACTLY_100, a_replica()).at(0.99) <= most_s * (1 + 1e-9)


def test_predicting_changes_no_later_answer() -> None:
    asked, unasked = taught([1.0, 1.5, 0.7]), taught([1.0, 1.5, 0.7])
    for i in range(20):
        asked.predict(a_request(app=f"app {i}"), tokens(scale=1 + i), a_replica())
    assert asked.predict(CALL, tokens(), a_replica()) == unasked.predict(
        CALL, tokens(), a_replica()
    )
    assert len(asked._offsets) == len(unasked._offsets)
    assert len(asked._ratios) == len(unasked._ratios)


def test_what_does_not_adapt_learns_nothing() -> None:
    service, replica = ServiceTimes(adapt=False), a_replica()
    before = service.predict(CALL, tokens(), replica)
    for i in range(50):
        feed(service, float(i), before, 100, 4.0)
    assert service.predict(CALL, tokens(), replica) == before


@pytest.mark.parametrize("actual_s", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_ignored(actual_s: float) -> None:
    service, replica = ServiceTimes(), a_replica()
    before = service.predict(CALL, tokens(), replica)
    work = Work(1.0, 1.0)
    service.learn(0.0, CALL, POOL, work=work, stated=before, output_tokens=9, actual_s=actual_s)
    assert service.predict(CALL, tokens(), replica) == before


def test_groups_beyond_the_most_answer_with_what_is_coarser() -> None:
    service, replica = ServiceTimes(most_groups=3), a_replica()
    for i in range(30):
        call = a_request(app=f"app {i}", role="r")
        stated = service.predict(call, tokens(), replica)
        feed(service, float(i), stated, 100, 1.0, request=call)
    assert len(service._offsets) == 3


@pytest.mark.parametrize("shift", [2.5, 1.3, 1 / 1.3, 1 / 2.5])
@pytest.mark.parametrize("what", ["tokens", "ratio"])
def test_coverage_comes_back_within_five_hundred_labels_of_a_shift(what: str, shift: float) -> None:
    hits = covered(shift if what == "tokens" else 1.0, shift if what == "ratio" else 1.0)
    assert abs(sum(hits[500:1000]) / 500 - 0.95) <= 0.03
    assert abs(sum(hits[1500:2000]) / 500 - 0.95) <= 0.03


def covered(tokens_shift: float, ratio_shift: float, *, labels: int = 1000) -> list[bool]:
    """Whether P95 held: a thousand labels as forecast, then another under a shift."""
    rng, service, replica = random.Random(7), ServiceTimes(), a_replica()
    law = Quantiles.of_samples([rng.lognormvariate(4, 0.7) for _ in range(4000)], LEVELS)
    hits = []
    for i in range(2 * labels):
        stated = service.predict(CALL, Forecast(output_tokens=law), replica)
        count = rng.lognormvariate(4, 0.7) * (tokens_shift if i >= labels else 1.0)
        ratio = rng.lognormvariate(0, 0.15) * (ratio_shift if i >= labels else 1.0)
        actual_s = feed(service, i * 2.0, stated, max(1, round(count)), ratio)
        hits.append(actual_s <= stated.at(0.95))
    return hits


def test_without_adaptation_coverage_does_not_come_back() -> None:
    service, replica, rng = taught([1.0] * 50), a_replica(), random.Random(3)
    service.adapt = False
    stated = service.predict(CALL, EXACTLY_100, replica)
    hits = [
        feed(service, 60.0, stated, 100, 1.3 * rng.uniform(0.95, 1.05)) <= stated.at(0.95)
        for _ in range(300)
    ]
    assert sum(hits) == 0
