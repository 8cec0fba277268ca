import pytest

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import RequestId
from concertmaster.physics.batching import (
    EngineSettings,
    Scheduling,
)
from concertmaster.physics.prefix_cache import BlockPool
from engine_builders import (
    CHUNK,
    CURVE,
    FOR_EVER_S,
    EngineType,
    a_call,
    both,
    drain,
    ends_s,
    kinds,
    starts_s,
)

# What a step is.


@both
def test_a_lone_call_takes_one_prefill_and_one_decode_step_a_token(
    engine_type: EngineType,
) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100))
    engine.submit(2.0, a_call("a", prompt_tokens=100, output_tokens=3))
    milestones = drain(engine)
    first_s = 2.0 + CURVE.step_s(0, 0, 100, 5050)
    last_s = first_s + CURVE.step_s(1, 101) + CURVE.step_s(1, 102)
    assert kinds(milestones) == [("a", "first_token"), ("a", "finished")]
    assert [m.time_s for m in milestones] == pytest.approx([first_s, last_s])
    assert (engine.prefilled_tokens, engine.generated_tokens) == (100, 3)


@both
def test_a_long_prompt_is_computed_in_chunks_beside_decoding(engine_type: EngineType) -> None:
    engine = engine_type(
        CURVE, EngineSettings(kv_blocks=1000, max_batch_tokens=100, max_sequences=10)
    )
    engine.submit(0.0, a_call("short", prompt_tokens=10, output_tokens=50))
    engine.submit(0.0, a_call("long", prompt_tokens=250, output_tokens=1))
    first_s = starts_s(drain(engine))
    pairs = [sum(range(s + 1, e + 1)) for s, e in ((0, 99), (99, 198), (198, 250))]
    steps_s = [
        CURVE.step_s(1, 11, 99, pairs[0]),
        CURVE.step_s(1, 12, 99, pairs[1]),
        CURVE.step_s(1, 13, 52, pairs[2]),
    ]
    assert first_s["long"] == pytest.approx(first_s["short"] + sum(steps_s))


@both
def test_a_call_that_arrives_during_a_step_waits_for_its_end(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100))
    engine.submit(0.0, a_call("a", output_tokens=80))
    a_starts_s = CURVE.step_s(0, 0, 10, 55)
    step_s = CURVE.step_s(1, 11)
    engine.submit(a_starts_s + 0.3 * step_s, a_call("b", prompt_tokens=1))
    assert (engine.running_requests, engine.waiting_requests) == (1, 1)
    first_s = starts_s(drain(engine))["b"]
    assert first_s == pytest.approx(a_starts_s + step_s + CURVE.step_s(1, 12, 1, 1))


@both
def test_a_full_batch_makes_the_next_call_wait_for_a_finish(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100, max_sequences=2))
    for name, tokens in (("a", 50), ("b", 20), ("c", 2)):
        engine.submit(0.0, a_call(name, output_tokens=tokens))
    milestones = drain(engine)
    order = [m.request_id for m in milestones if m.kind == "finished"]
    assert order == ["b", "c", "a"]
    assert starts_s(milestones)["c"] > ends_s(milestones)["b"]


@both
def test_a_slow_engine_takes_longer_from_the_next_step_on(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100))
    engine.submit(0.0, a_call("a", output_tokens=3))
    engine.slowdown = 10.0
    first_s = CURVE.step_s(0, 0, 10, 55)
    last_s = first_s + 10 * (CURVE.step_s(1, 11) + CURVE.step_s(1, 12))
    assert [m.time_s for m in drain(engine)] == pytest.approx([first_s, last_s])


@both
def test_progress_counts_tokens_of_calls_that_started(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100, max_sequences=1))
    engine.submit(0.0, a_call("a", output_tokens=100))
    engine.submit(0.0, a_call("b"))
    now_s = CURVE.step_s(0, 0, 10, 55) + CURVE.step_s(1, 11) + 1e-6
    assert engine.progress(now_s) == [("a", 2)]
    assert engine.generated_tokens == 2


# What is refused, dropped, forgotten.


@both
def test_a_call_that_can_never_fit_is_refused(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=4))
    engine.submit(0.0, a_call("fits", prompt_tokens=60, output_tokens=5))
    with pytest.raises(InvalidRequestError, match=r"need 5 KV blocks of 16 tokens, .* has 4"):
        engine.submit(0.0, a_call("never", prompt_tokens=60, output_tokens=6))
    assert len(ends_s(drain(engine))) == 1


@both
def test_an_id_is_used_once_at_a_time(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=4))
    engine.submit(0.0, a_call("a"))
    with pytest.raises(InvalidRequestError, match="'a' is in the engine already"):
        engine.submit(0.0, a_call("a"))
    engine.submit(FOR_EVER_S, a_call("a"))


@pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, 0)])
def test_a_call_has_at_least_one_token_of_each_kind(prompt: int, output: int) -> None:
    with pytest.raises(InvalidRequestError, match="must be at least 1, got 0"):
        a_call("a", prompt_tokens=prompt, output_tokens=output)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least"):
        EngineSettings(kv_blocks=0)
    with pytest.raises(ValueError, match=r"max_batch_tokens \(8\) must be at least"):
        EngineSettings(kv_blocks=1, max_batch_tokens=8, max_sequences=9)
    with pytest.raises(ValueError, match="block_tokens must divide 256, got 48"):
        EngineSettings(kv_blocks=1, block_tokens=48)


@both
def test_cancelling_frees_blocks_at_once_and_the_step_still_takes_its_time(
    engine_type: EngineType,
) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100))
    engine.submit(0.0, a_call("a", prompt_tokens=160, output_tokens=50))
    assert engine.kv_used_blocks == 10
    assert engine.cancel(0.001, RequestId("a"))
    assert not engine.cancel(0.001, RequestId("a"))
    assert (engine.kv_used_blocks, engine.running_requests) == (0, 0)
    assert engine.next_milestone_s() is None
    engine.submit(0.002, a_call("b"))
    first_s = starts_s(drain(engine))["b"]
    assert first_s == pytest.approx(
        CURVE.step_s(0, 0, 160, 160 * 161 / 2) + CURVE.step_s(0, 0, 10, 55)
    )


@both
def test_a_dead_process_forgets_its_calls_and_its_cache(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=100))
    engine.submit(0.0, a_call("a", CHUNK + 1, 50, (1,)))
    engine.advance(0.1)
    generated_tokens = engine.generated_tokens
    engine.clear()
    assert engine.next_milestone_s() is None
    assert (engine.running_requests, engine.waiting_requests, engine.kv_used_blocks) == (0, 0, 0)
    assert engine.generated_tokens == generated_tokens > 1
    engine.submit(0.2, a_call("a", CHUNK + 1, 1, (1,)))
    assert ends_s(drain(engine)).keys() == {"a"}
    assert engine.prefix_hit_tokens == 0


# Prefix caching.


@both
def test_a_cached_prefix_shortens_prefill(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=1000))
    engine.submit(0.0, a_call("a", 3 * CHUNK, 1, (1, 2, 3)))
    drain(engine)
    engine.submit(10.0, a_call("b", 3 * CHUNK, 1, (1, 2, 9)))
    assert engine.prefilled_tokens == 4 * CHUNK
    assert (engine.prefix_query_tokens, engine.prefix_hit_tokens) == (6 * CHUNK, 2 * CHUNK)
    pairs = sum(range(2 * CHUNK + 1, 3 * CHUNK + 1))
    assert ends_s(drain(engine))["b"] == pytest.approx(10.0 + CURVE.step_s(0, 0, CHUNK, pairs))


@both
def test_a_prompt_that_is_cached_whole_still_computes_something(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=1000))
    for now_s in (0.0, 10.0):
        engine.submit(now_s, a_call("a", 2 * CHUNK, 1, (1, 2)))
        drain(engine)
    assert engine.prefix_hit_tokens == CHUNK


@both
def test_running_sequences_share_the_blocks_of_a_prefix(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=1000))
    engine.submit(0.0, a_call("a", 2 * CHUNK, 50, (1, 2)))
    engine.submit(0.0, a_call("b", 2 * CHUNK + 1, 50, (1, 2)))
    drain(engine, 0.05)
    assert engine.running_requests == 2
    assert engine.kv_used_blocks == 2 * CHUNK // 16 + 1 + 1


@both
def test_without_prefix_caching_nothing_is_looked_up(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=1000, prefix_caching=False))
    for name in ("a", "b"):
        engine.submit(0.0, a_call(name, 2 * CHUNK, 1, (1, 2)))
    drain(engine)
    assert (engine.prefix_query_tokens, engine.prefix_hit_tokens) == (0, 0)


def test_the_least_recently_released_chunk_goes_first_and_its_tail_before_its_head() -> None:
    pool = BlockPool(EngineSettings(kv_blocks=4 * CHUNK // 16))
    for chunks in ([1, 2], [3, 4]):
        pool.take(2 * CHUNK // 16)
        assert all(pool.share(chunk) for chunk in chunks)
        pool.release(0, chunks)
    pool.refer([1])
    pool.release(0, [1])
    pool.take(1)
    assert [pool.leading_hits([chunk]) for chunk in (1, 2, 3, 4)] == [1, 0, 1, 1]
    pool.take(CHUNK // 16)
    assert [pool.leading_hits([chunk]) for chunk in (1, 2, 3, 4)] == [1, 0, 1, 0]


def test_a_chunk_in_use_is_not_evicted_and_a_second_copy_stays_private() -> None:
    pool = BlockPool(EngineSettings(kv_blocks=2 * CHUNK // 16))
    pool.take(CHUNK // 16)
    assert pool.share(1)
    assert not pool.share(1)
    pool.take(CHUNK // 16)
    assert pool.leading_hits([1]) == 1
    assert pool.room_blocks == 0


# Want of blocks.


@both
def test_the_last_admitted_goes_first_when_blocks_run_out_and_is_back_first(
    engine_type: EngineType,
) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=9, max_sequences=8))
    for name in ("a", "b", "c"):
        engine.submit(0.0, a_call(name, prompt_tokens=40, output_tokens=60))
    engine.submit(0.0, a_call("late", prompt_tokens=1, output_tokens=1))
    milestones = drain(engine)
    assert engine.preemptions == 3
    assert [name for name in ends_s(milestones) if name != "late"] == ["a", "b", "c"]
    assert starts_s(milestones)["late"] > ends_s(milestones)["a"]
    assert engine.generated_tokens == 181
    assert engine.prefilled_tokens > 121


@both
def test_the_worst_priority_goes_first_when_blocks_run_out(engine_type: EngineType) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=6, scheduling="priority"))
    engine.submit(0.0, a_call("bad", prompt_tokens=32, output_tokens=60, priority=5))
    engine.submit(0.0, a_call("good", prompt_tokens=32, output_tokens=60, priority=-5))
    milestones = drain(engine)
    assert engine.preemptions == 1
    assert [m.request_id for m in milestones if m.kind == "finished"] == ["good", "bad"]


@both
def test_nobody_is_admitted_in_a_step_that_preempts_but_in_the_next(
    engine_type: EngineType,
) -> None:
    engine = engine_type(CURVE, EngineSettings(kv_blocks=6, scheduling="priority"))
    engine.submit(0.0, a_call("bad", 32, 60, priority=5))
    engine.submit(0.0, a_call("good", 32, 60, priority=-5))
    drain(engine, 0.02)
    engine.submit(0.02, a_call("small", 1, 60))
    now_s = 0.02
    while not engine.preemptions:
        now_s = engine.next_milestone_s() or now_s
        engine.advance(now_s)
    assert (engine.running_requests, engine.waiting_requests) == (1, 2)
    good_tokens = dict(engine.progress(now_s))[RequestId("good")]
    small_starts_s = starts_s(drain(engine, now_s + 0.02))["small"]
    two_steps_s = CURVE.step_s(1, 32 + good_tokens) + CURVE.step_s(1, 33 + good_tokens, 1, 1)
    assert small_starts_s == pytest.approx(now_s + two_steps_s)


@both
def test_priority_orders_the_line_and_its_absence_does_not(engine_type: EngineType) -> None:
    def order(scheduling: Scheduling) -> list[str]:
        engine = engine_type(
            CURVE, EngineSettings(kv_blocks=100, max_sequences=1, scheduling=scheduling)
        )
        for name, priority in (("first", 0), ("bad", 3), ("good", -3), ("also good", -3)):
            engine.submit(0.0, a_call(name, priority=priority))
        return [m.request_id for m in drain(engine) if m.kind == "finished"]

    assert order("priority") == ["first", "good", "also good", "bad"]
    assert order("fcfs") == ["first", "bad", "good", "also good"]
