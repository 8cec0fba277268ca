"""What KV calls are promised, and when one more has room."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_pool, chains, placements
from concertmaster.compose import simulate
from concertmaster.core.events import RequestFinished, TokensStreamed, WorkflowClosed
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.memory import KvLedger
from concertmaster.core.request import RequestId, WorkflowId

LONG = Forecast(output_tokens=Quantiles((0.0, 0.5, 1.0), (0.0, 400.0, 2000.0)))


def on_one(of: str, *, kv_blocks: int = 4096) -> CheckedScheduler:
    return CheckedScheduler(a_fleet(a_pool(kv_blocks=kv_blocks)), f"fcfs/static:{of}")


def reserved(scheduler: CheckedScheduler) -> int:
    return scheduler.replica().kv.reserved_blocks


@pytest.mark.parametrize(
    ("of", "blocks"),
    [
        ("kv=worst-case", (100 + 3000) / 16),
        ("kv=paged", (100 + 1) / 16),
        ("kv=forecast", (100 + 440) / 16),
        ("kv=forecast,level=0.75,margin=0", (100 + 1200) / 16),
    ],
)
def test_each_rule_promises_its_own(of: str, blocks: float) -> None:
    scheduler = on_one(of)

    scheduler.arrive("r1", forecast=LONG, max_output_tokens=3000)

    assert reserved(scheduler) == -(-blocks // 1)


@pytest.mark.parametrize("of", ["kv=paged", "kv=forecast"])
def test_a_promise_grows_with_the_answer_and_is_taken_back(of: str) -> None:
    scheduler = on_one(of)
    scheduler.arrive("r1", forecast=LONG, max_output_tokens=3000)

    scheduler.at(1.0, TokensStreamed(((RequestId("r1"), 1, 1500),)))
    assert reserved(scheduler) == 100

    scheduler.at(2.0, RequestFinished(RequestId("r1"), 1, 1600))
    assert reserved(scheduler) == 0


def test_the_margin_widens_with_answers_that_outgrow_their_promise_and_narrows_again() -> None:
    scheduler = on_one("kv=forecast")

    def promised(name: str, tokens: int) -> int:
        scheduler.arrive(name, forecast=a_forecast(100), max_output_tokens=3000)
        blocks = reserved(scheduler)
        scheduler.at(0.0, RequestFinished(RequestId(name), 1, tokens))
        return blocks

    first = promised("r", 100)
    for i in range(40):
        promised(f"long {i}", 300)
    wide = promised("wide", 100)
    for i in range(200):
        promised(f"short {i}", 100)

    assert first == -(-210 // 16)
    assert wide > 1.2 * first
    assert promised("again", 100) == first


def test_room_is_by_the_tail_of_the_sum_and_not_the_sum_of_tails() -> None:
    """Of calls that mean 800 ± 600 tokens, more fit than if each took its 99th percentile."""
    scheduler = on_one("kv=forecast,eps=0.01", kv_blocks=2000)

    running = sum(
        len(placements(scheduler.arrive(f"r{i}", float(i), LONG, max_output_tokens=3000)))
        for i in range(60)
    )

    assert 32_000 / (100 + 1980) < running < 32_000 / (100 + 800)


@pytest.mark.parametrize(("eps", "fewer"), [(0.4, False), (0.001, True)])
def test_a_smaller_chance_lets_fewer_in(eps: float, *, fewer: bool) -> None:
    scheduler = on_one(f"kv=forecast,eps={eps}", kv_blocks=2000)
    for i in range(60):
        scheduler.arrive(f"r{i}", float(i), forecast=LONG, max_output_tokens=3000)

    assert (scheduler.replica().running_requests < 33) == fewer


def test_room_is_kept_for_agents_between_two_calls() -> None:
    """One that will come back with a long context takes room until its workflow is over."""
    plan = Forecast(
        output_tokens=Quantiles.exactly(100.0), remaining_tokens=Quantiles.exactly(5000.0)
    )
    scheduler = on_one("kv=forecast,returning=0.9", kv_blocks=1000)
    for i in range(2):
        scheduler.arrive(f"a{i}", forecast=plan, prompt_tokens=6000, workflow_id=f"w{i}")
        scheduler.at(0.0, RequestFinished(RequestId(f"a{i}"), 1, 50))
    scheduler.arrive("b", forecast=a_forecast(100), prompt_tokens=2000)

    assert placements(scheduler.arrive("c", forecast=a_forecast(50), prompt_tokens=4000)) == {}

    closed = scheduler.at(1.0, WorkflowClosed(WorkflowId("w0")))
    assert placements(closed) == {"c": "p-0"}


def test_a_call_alone_on_its_engine_is_never_refused() -> None:
    scheduler = on_one("kv=forecast", kv_blocks=64)

    assert placements(scheduler.arrive("r", forecast=LONG, prompt_tokens=1000)) == {"r": "p-0"}


changes = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.sampled_from(("reserve", "expect", "grow", "release")),
        st.integers(300, 4000),
    ),
    max_size=40,
)


@given(changes)
def test_ends_add_up_and_vanish(steps: list[tuple[str, str, int]]) -> None:
    ledger = KvLedger(capacity_blocks=1000, block_tokens=16)
    held: dict[str, int] = {}
    for letter, what, tokens in steps:
        name = RequestId(letter)
        if what == "reserve" and name not in held:
            ledger.reserve(name, tokens, (7,) if letter < "c" else ())
            held[name] = 0
        elif name in held and what == "expect":
            ledger.expect(name, tokens, tokens)
            held[name] = tokens
        elif name in held and what == "grow":
            ledger.grow(name, tokens)
            held[name] = max(held[name], tokens) if held[name] else 0
        elif name in held and what == "release":
            ledger.release(name)
            del held[name]
        ledger.validate()
        sharing = [one for one in held if one < "c"]
        doubled = 256 * (sum(1 for one in sharing if held[one]) - bool(sharing))
        assert ledger.end_tokens == sum(held.values()) - doubled
    for left in held:
        ledger.release(RequestId(left))
    assert (ledger.end_tokens, ledger.end_variance, ledger.reserved_blocks) == (0, 0, 0)


def test_forecasts_reserve_less_than_the_worst_case_and_preempt_no_more_than_paging() -> None:
    load = chains(150, gap_s=0.05, seed=random.Random(3).randrange(99))
    fleet = a_fleet(a_pool(kv_blocks=1600))
    worst, paged, ours = (
        simulate(fleet, load, f"fcfs/static:kv={kv}", seed=1)
        for kv in ("worst-case", "paged", "forecast")
    )

    assert worst.gauges
    assert paged.gauges
    assert ours.gauges
    assert ours.gauges.kv_reserved_gb_s < 0.75 * worst.gauges.kv_reserved_gb_s
    assert ours.gauges.preemptions <= paged.gauges.preemptions
    assert ours.duration_s < 1.1 * paged.duration_s
