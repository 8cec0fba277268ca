"""What a replica has promised: KV blocks, prefill, prefixes; all of it comes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_curve, a_pool, a_replica, a_request, a_waiting_call
from concertmaster.core.cost import RateCurve
from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.fleet import InFlight, Replica
from concertmaster.core.memory import KvLedger, PrefixIndex
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId
from concertmaster.policies.filters import FitsKvCache

R1, R2 = RequestId("r1"), RequestId("r2")


def a_call_in_flight(name: str = "r1", prompt_tokens: int = 100, expected: int = 50) -> InFlight:
    return InFlight(
        request=a_request(name, prompt_tokens=prompt_tokens),
        prefill_tokens=prompt_tokens,
        decode_tokens=expected,
        expected_tokens=expected,
    )


def totals(replica: Replica) -> tuple[int, int, int, int]:
    return (
        replica.kv.reserved_blocks,
        replica.prefill_tokens,
        replica.decode_tokens,
        replica.context_tokens,
    )


# KV.


def test_a_promise_is_kept_in_whole_blocks() -> None:
    ledger = KvLedger(capacity_blocks=10, block_tokens=16)
    ledger.reserve(R1, 17)

    assert (ledger.reserved_blocks, ledger.free_blocks) == (2, 8)


def test_a_promise_grows_but_never_shrinks_before_its_release() -> None:
    ledger = KvLedger(capacity_blocks=10, block_tokens=16)
    ledger.reserve(R1, 32)
    ledger.grow(R1, 33)
    ledger.grow(R1, 1)
    assert ledger.reserved_blocks == 3

    ledger.release(R1)

    ledger.validate()
    assert ledger.free_blocks == 10


def test_growth_past_the_capacity_leaves_nothing_free_rather_than_less() -> None:
    ledger = KvLedger(capacity_blocks=2, block_tokens=16)
    ledger.reserve(R1, 32)
    ledger.grow(R1, 320)

    assert (ledger.reserved_blocks, ledger.free_blocks) == (20, 0)


def test_a_call_holds_one_promise() -> None:
    ledger = KvLedger(capacity_blocks=10, block_tokens=16)
    ledger.reserve(R1, 1)

    with pytest.raises(AssertionError, match="r1 already holds a promise"):
        ledger.reserve(R1, 1)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 500)), max_size=40))
def test_the_kv_total_is_always_the_sum_of_the_promises(steps: list[tuple[int, int]]) -> None:
    ledger = KvLedger(capacity_blocks=8, block_tokens=16)
    held: set[RequestId] = set()
    for i, tokens in steps:
        name = RequestId(f"r{i}")
        if name not in held:
            ledger.reserve(name, tokens)
            held.add(name)
        elif tokens % 3:
            ledger.grow(name, tokens)
        else:
            ledger.release(name)
            held.remove(name)
        ledger.validate()
    for name in held:
        ledger.release(name)
    assert ledger.reserved_blocks == 0


# Prefixes.


def test_a_hit_ends_at_the_first_chunk_that_is_missing() -> None:
    index = PrefixIndex(capacity_chunks=10)
    index.touch((1, 2, 3))

    assert index.hit_tokens((1, 2, 9, 3)) == 2 * PREFIX_CHUNK_TOKENS
    assert index.hit_tokens((2, 3)) == 2 * PREFIX_CHUNK_TOKENS
    assert index.hit_tokens(()) == 0


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    index = PrefixIndex(capacity_chunks=3)
    index.touch((1, 2, 3))
    index.touch((7,))

    assert index.hit_tokens((1, 2, 3)) == 2 * PREFIX_CHUNK_TOKENS
    assert index.hit_tokens((7,)) == PREFIX_CHUNK_TOKENS


def test_the_prefix_used_longest_ago_is_forgotten_first() -> None:
    index = PrefixIndex(capacity_chunks=2)
    index.touch((1,))
    index.touch((2,))
    index.touch((1,))
    index.touch((3,))

    assert [index.hit_tokens((chunk,)) > 0 for chunk in (1, 2, 3)] == [True, False, True]


def test_a_replica_that_slept_has_no_prefix() -> None:
    index = PrefixIndex(capacity_chunks=2)
    index.touch((1, 2))
    index.clear()

    assert index.hit_tokens((1,)) == 0


# Replicas.


def test_a_call_enters_every_ledger_and_leaves_every_ledger() -> None:
    replica = a_replica()
    replica.admit(5.0, a_call_in_flight(), 150)
    assert totals(replica) == (10, 100, 50, 150)
    assert replica.prefill_clear_s == 5.0 + 100 * replica.pool.prefill_token_s

    replica.release(R1)

    replica.validate()
    assert totals(replica) == (0, 0, 0, 0)
    assert replica.prefill_clear_s == 0.0


def test_prefill_queues_behind_prefill() -> None:
    replica = a_replica()
    for i in range(2):
        replica.admit(5.0, a_call_in_flight(f"r{i}", prompt_tokens=2000), 2000)

    assert replica.prefill_clear_s == pytest.approx(5.0 + 2 * 0.21, abs=0.01)


def test_the_first_token_ends_prefill_and_later_ones_wear_decode_down() -> None:
    replica = a_replica()
    replica.admit(0.0, a_call_in_flight(), 150)

    assert replica.stream(R1, 1) == 1
    assert (replica.prefill_tokens, replica.decode_tokens) == (0, 49)
    assert replica.stream(R1, 31) == 30
    assert replica.decode_tokens == 19


def test_an_answer_longer_than_predicted_has_always_one_token_to_go() -> None:
    replica = a_replica()
    replica.admit(0.0, a_call_in_flight(expected=50), 150)
    replica.stream(R1, 300)

    assert replica.decode_tokens == 1
    assert replica.kv.reserved_blocks == 25
    replica.validate()


def test_old_news_of_progress_is_ignored() -> None:
    replica = a_replica()
    replica.admit(0.0, a_call_in_flight(), 150)
    replica.stream(R1, 20)

    assert replica.stream(R1, 20) == 0
    assert replica.stream(R1, 3) == 0
    assert replica.in_flight[R1].streamed_tokens == 20


def test_a_ledger_that_was_not_cleared_is_noticed() -> None:
    replica = a_replica("p-7")
    replica.context_tokens = 3

    with pytest.raises(AssertionError, match=r"p-7 is idle but holds \(0, 0, 3\)"):
        replica.validate()


# Facts.


def test_an_empty_prompt_is_refused_by_name_and_value() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        a_request(prompt_tokens=0)

    assert str(refusal.value) == "request 'r1': prompt_tokens must be at least 1, got 0"


def test_a_cap_of_no_tokens_is_refused_by_name_and_value() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        a_request(max_output_tokens=-2)

    assert str(refusal.value) == "request 'r1': max_output_tokens must be at least 1, got -2"


# Tokens to seconds.


def test_a_cached_prefix_costs_no_prefill_and_a_whole_hit_costs_one_token() -> None:
    curve = a_curve()

    assert curve.prefill_s(1000, cached_tokens=500) == pytest.approx(curve.prefill_s(500))
    assert curve.prefill_s(512, cached_tokens=512) == pytest.approx(curve.prefill_s(1))


def test_a_long_prompt_pays_for_every_chunk() -> None:
    curve = a_curve()

    assert curve.prefill_s(5000, chunk_tokens=2048) == pytest.approx(0.5 + 3 * 0.0099)


def test_decoding_reads_the_whole_context_every_step() -> None:
    curve = a_curve()
    extra_s = curve.decode_s(10, batch=4, kv_tokens=4e6) - curve.decode_s(10, batch=4, kv_tokens=0)

    assert extra_s == pytest.approx(10 * 4e6 * curve.kv_token_s)


def test_service_is_prefill_and_decode_and_its_longest_is_the_cap() -> None:
    pool = a_pool()

    assert pool.service_s(100, 50, batch=1) == pytest.approx(0.0199 + 50 * (0.01 + 125e-7))
    assert pool.longest_s(a_request()) == pool.service_s(100, 50, batch=1)


def test_rates_go_on_beyond_the_last_point_as_between_the_last_two() -> None:
    curve = RateCurve(fixed_s=0.0, linear_tokens=(1, 11, 21), linear_s=(1.0, 2.0, 4.0))

    assert [curve.linear_at_s(n) for n in (0, 1, 6, 16, 21, 31)] == [0.0, 1.0, 1.5, 3.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ((1,), (1.0,), "a rate curve needs at least two points, as many times as counts"),
        ((1, 2), (1.0,), "a rate curve needs at least two points, as many times as counts"),
        ((2, 2), (1.0, 1.0), "linear_tokens must increase, got (2, 2)"),
    ],
)
def test_a_curve_without_an_order_is_refused(
    tokens: tuple[int, ...], seconds: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=r"rate curve|increase") as refusal:
        RateCurve(fixed_s=0.0, linear_tokens=tokens, linear_s=seconds)

    assert str(refusal.value) == message


def test_a_prefix_that_two_calls_share_is_held_once_until_the_last_lets_go() -> None:
    ledger = KvLedger(capacity_blocks=200, block_tokens=16)
    ledger.reserve(R1, 600, (7, 8))
    ledger.reserve(R2, 700, (7, 8))
    ledger.validate()
    assert ledger.reserved_blocks == 32 + (38 - 32) + (44 - 32)
    assert ledger.shared_blocks((7, 8, 9)) == 32
    assert ledger.shared_blocks((9, 8)) == 0

    ledger.release(R1)
    ledger.validate()
    assert ledger.reserved_blocks == 44

    ledger.grow(R2, 720)
    ledger.release(R2)
    ledger.validate()
    assert ledger.reserved_blocks == 0
    assert ledger.shared_blocks((7,)) == 0


def test_a_replica_that_holds_the_prefix_has_room_where_another_has_not() -> None:
    pool = a_pool(kv_blocks=80)
    warm, cold = a_replica("warm", pool=pool), a_replica("cold", pool=pool)
    first = a_request("first", prompt_tokens=800, prefix_hashes=(1, 2, 3))
    other = a_request("other", prompt_tokens=800, prefix_hashes=(4, 5, 6))
    for replica, request in ((warm, first), (cold, other)):
        call = InFlight(request=request, prefill_tokens=800, decode_tokens=10, expected_tokens=10)
        replica.admit(0.0, call, 810)

    again = a_request("next", prompt_tokens=850, prefix_hashes=(1, 2, 3))
    newcomer = a_waiting_call("next", request=again)
    assert FitsKvCache().keep(newcomer, pool, [warm, cold]) == [warm]
