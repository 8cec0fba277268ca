"""Decoding stands still while others' prompts are computed: the share of prefill, and its price."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_replica, a_request, a_waiting_call
from concertmaster.core.fleet import InFlight, Replica
from concertmaster.core.prefill_share import PREFILL_MEMORY_S
from concertmaster.core.service import MOST_PREFILL, service_on, stretch

PROMPT_TOKENS = 500


def hand(replica: Replica, now_s: float, name: str) -> None:
    call = InFlight(
        request=a_request(name, prompt_tokens=PROMPT_TOKENS),
        prefill_tokens=PROMPT_TOKENS,
        decode_tokens=10,
        expected_tokens=10,
    )
    replica.admit(now_s, call, PROMPT_TOKENS + 10)


def busy(every_s: float, until_s: float = 300.0) -> Replica:
    """A replica that is handed a call at equal distances, each gone before the next but one."""
    replica = a_replica()
    for number in range(int(until_s / every_s)):
        hand(replica, number * every_s, f"c{number}")
        if number > 1:
            replica.release(a_request(f"c{number - 2}").request_id)
    return replica


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_steady_stream_of_prompts_takes_its_share(share: float) -> None:
    prefill_s = PROMPT_TOKENS * a_replica().pool.prefill_token_s

    assert busy(prefill_s / share).prefill_share.ratio(300.0) == pytest.approx(share, rel=0.05)


def test_what_was_long_ago_counts_for_little_and_never_for_less_than_nothing() -> None:
    replica = a_replica()
    assert replica.prefill_share.ratio(5.0) == 0.0
    hand(replica, 5.0, "a")
    fresh = replica.prefill_share.ratio(5.0)

    assert replica.prefill_share.ratio(5.0 + PREFILL_MEMORY_S) == pytest.approx(fresh / 2.71828)
    assert 0.0 <= replica.prefill_share.ratio(1e6) < 1e-9


def test_of_two_equal_batches_the_one_amid_prompts_decodes_more_slowly() -> None:
    quiet, amid = a_replica(), busy(0.1)
    for name in ("x", "y"):
        hand(quiet, 0.0, name)
    call = a_waiting_call("new")
    quiet_s, amid_s = (service_on(299.9, call, one).token_s for one in (quiet, amid))

    assert len(quiet.in_flight) == len(amid.in_flight)
    share = amid.prefill_share.ratio(299.9)
    assert share > 0.1
    assert amid_s == pytest.approx(quiet_s / (1 - share), rel=0.01)


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_more_prefill_never_makes_decoding_faster(one: float, other: float) -> None:
    less, more = sorted((one, other))

    assert 1.0 <= stretch(less) <= stretch(more) <= 1 / (1 - MOST_PREFILL) + 1e-9
