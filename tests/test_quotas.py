"""What tenants may use: rates, calls in flight, and what is said of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.errors import QuotaError
from concertmaster.gateway.quotas import Bucket, Quota
from concertmaster.state.keys import Limits


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def refused(quota: Quota, prompt_tokens: int = 1) -> tuple[str, dict[str, str]]:
    with pytest.raises(QuotaError) as found:
        quota.begin(prompt_tokens)
    return str(found.value), {k.decode(): v.decode() for k, v in found.value.headers}


def test_requests_a_minute_flow_back_one_by_one() -> None:
    clock = Clock()
    quota = Quota(Limits(requests_per_min=30), clock)
    for left in range(29, -1, -1):
        assert b"x-ratelimit-remaining-requests: %d\r\n" % left in quota.begin(1)
    problem, headers = refused(quota)
    assert problem == "the tenant is at its limit of 30 requests a minute: try again in 2.000 s"
    assert headers == {
        "retry-after": "2",
        "retry-after-ms": "2000",
        "x-ratelimit-limit-requests": "30",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
    }
    clock.now_s += 1.99
    refused(quota)
    clock.now_s += 0.011
    quota.begin(1)
    refused(quota)


def test_prompts_count_at_once_and_output_when_it_is_known() -> None:
    clock = Clock()
    quota = Quota(Limits(tokens_per_min=600), clock)
    assert b"remaining-tokens: 500\r\n" in quota.begin(100)
    quota.end(700, 1.0)
    problem, headers = refused(quota, 100)
    assert "600 tokens a minute" in problem
    assert headers["retry-after-ms"] == "30000"  # 300 tokens are missing at 10 a second
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now_s += 30.001
    quota.begin(100)


def test_a_prompt_beyond_the_limit_passes_when_nothing_was_used() -> None:
    clock = Clock()
    quota = Quota(Limits(tokens_per_min=100), clock)
    quota.begin(1000)
    _, headers = refused(quota)
    assert headers["retry-after"] == "541"


def test_requests_in_flight_are_bounded_and_a_wait_is_guessed_from_those_that_ended() -> None:
    quota = Quota(Limits(in_flight=2), Clock())
    quota.begin(1)
    assert quota.begin(1) == b""
    problem, headers = refused(quota)
    assert "2 requests in flight" in problem
    assert headers == {"retry-after": "1", "retry-after-ms": "500"}
    for _ in range(50):
        quota.end(1, 12.0)
        quota.begin(1)
    assert refused(quota)[1]["retry-after"] == "6"
    quota.end(1, 12.0)
    quota.begin(1)


def test_who_is_refused_is_charged_nothing() -> None:
    quota = Quota(Limits(requests_per_min=10, tokens_per_min=100, in_flight=1), Clock())
    quota.begin(10)
    for _ in range(20):
        _, headers = refused(quota)
    assert headers["x-ratelimit-remaining-requests"] == "9"
    assert headers["x-ratelimit-remaining-tokens"] == "90"


def test_other_limits_keep_what_was_used() -> None:
    quota = Quota(Limits(requests_per_min=10), Clock())
    for _ in range(8):
        quota.begin(1)
    quota.limit(Limits(requests_per_min=20, in_flight=20))
    assert b"remaining-requests: 11\r\n" in quota.begin(1)
    quota.limit(Limits(requests_per_min=5))
    refused(quota)
    quota.limit(Limits())
    assert quota.begin(1) == b""


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5000)), max_size=60),
)
def test_a_bucket_gives_at_most_a_minute_and_its_rate(
    per_min: int, wishes: list[tuple[float, float]]
) -> None:
    now_s, taken = 0.0, 0.0
    bucket = Bucket(per_min, now_s)
    for gap_s, wanted in wishes:
        now_s += gap_s
        if not bucket.wait_s(now_s, wanted):
            bucket.take(now_s, min(wanted, per_min))
            taken += min(wanted, per_min)
        assert taken <= per_min * (1 + now_s / 60) * (1 + 1e-9)


@given(st.integers(1, 10_000), st.floats(0, 20_000), st.floats(0.1, 20_000))
def test_the_wait_that_is_told_is_enough_and_no_longer(
    per_min: int, taken: float, wanted: float
) -> None:
    bucket = Bucket(per_min, 0.0)
    bucket.take(0.0, taken)
    wait_s = bucket.wait_s(0.0, wanted)
    if wait_s > 0.01:
        assert bucket.wait_s(wait_s * 0.99, wanted) > 0
    assert bucket.wait_s(wait_s * (1 + 1e-9) + 1e-6, wanted) == 0
