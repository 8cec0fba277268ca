"""Whose turn it is among tenants: a flood of one costs the others a bounded wait."""

import heapq
import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_policy, a_pool
from concertmaster.core.actions import Dispatch
from concertmaster.core.events import RequestCancelled, RequestFinished, TimerFired, TokensStreamed
from concertmaster.core.fair_share import QUANTUM_S, PoolShare, engine_s
from concertmaster.core.fleet import PoolId
from concertmaster.core.request import RequestId

POOL = a_pool(max_sequences=1)
PROMPT_TOKENS = 100


class Call(NamedTuple):
    tenant: str
    at_s: float
    tokens: int
    weight: float = 1.0

    @property
    def lasts_s(self) -> float:
        return engine_s(POOL, PROMPT_TOKENS, self.tokens)


def a_scheduler(of: str = "least-tokens") -> CheckedScheduler:
    return CheckedScheduler(a_fleet(POOL), a_policy(of))


def dispatched_s(calls: Iterable[Call], of: str = "least-tokens") -> list[float]:
    """Play calls through one engine that does them one by one; return when each began."""
    scheduler = a_scheduler(of)
    news: list[tuple[float, int, int]] = []
    known = list(calls)
    began_s = [-1.0] * len(known)
    for number, call in enumerate(known):
        heapq.heappush(news, (call.at_s, 0, number))
    while news:
        now_s, is_end, number = heapq.heappop(news)
        call = known[number]
        if is_end:
            done = RequestFinished(RequestId(f"r{number}"), 1, call.tokens)
            actions = scheduler.at(now_s, done)
        else:
            actions = scheduler.arrive(
                f"r{number}",
                now_s,
                a_forecast(call.tokens),
                prompt_tokens=PROMPT_TOKENS,
                max_output_tokens=4096,
                tenant=call.tenant,
                tenant_weight=call.weight,
            )
        for action in (*actions, *scheduler.at(now_s, TimerFired())):
            if isinstance(action, Dispatch):
                begun = int(action.request_id[1:])
                began_s[begun] = now_s
                heapq.heappush(news, (now_s + known[begun].lasts_s, 1, begun))
    return began_s


def at_half_speed(calls: Iterable[Call]) -> list[float]:
    """When calls would begin on an engine of their own that is half as fast."""
    free_s, began_s = 0.0, []
    for call in calls:
        free_s = max(free_s, call.at_s)
        began_s.append(free_s)
        free_s += 2 * call.lasts_s
    return began_s


def a_flood(tenant: str, count: int, *, load: float, seed: int) -> list[Call]:
    """Calls at so many times the engine's speed."""
    rng, now_s, flood = random.Random(seed), 0.0, []
    for _ in range(count):
        call = Call(tenant, now_s, rng.randint(1, 60))
        flood.append(call)
        now_s += call.lasts_s / load
    return flood


LONGEST_S = Call("a", 0.0, 60).lasts_s
BOUND_S = QUANTUM_S + 3 * LONGEST_S

quiet = st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 60)), min_size=1, max_size=12)


@pytest.mark.parametrize("of", ["least-tokens", "least-tokens+las", "chimera:knows=length"])
@settings(max_examples=25)
@given(gaps=quiet, seed=st.integers(0, 99))
def test_a_flood_of_ten_times_the_load_costs_another_tenant_a_bounded_wait(
    of: str, gaps: list[tuple[float, int]], seed: int
) -> None:
    now_s, mine = 0.5, []
    for gap_s, tokens in gaps:
        mine.append(Call("quiet", now_s, tokens))
        now_s += gap_s
    flood = a_flood("flood", 60, load=10.0, seed=seed)

    began_s = dispatched_s([*mine, *flood], of)[: len(mine)]

    # its own order may differ where the policy has one; how many have begun by when may not
    for shared_s, alone_s in zip(sorted(began_s), sorted(at_half_speed(mine)), strict=True):
        assert shared_s <= alone_s + BOUND_S


def test_without_tenants_the_same_flood_is_waited_for() -> None:
    flood = a_flood("flood", 150, load=10.0, seed=1)
    late = flood[-1].at_s
    assert dispatched_s([Call("quiet", late, 10), *flood])[0] <= late + BOUND_S
    nobodys = [call._replace(tenant="") for call in (Call("quiet", late, 10), *flood)]
    assert dispatched_s(nobodys)[0] > late + 5 * BOUND_S


@pytest.mark.parametrize("of", ["least-tokens", "chimera:knows=length"])
@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_one_tenant_alone_is_served_as_if_there_were_none(of: str, seed: int) -> None:
    flood = a_flood("only", 40, load=3.0, seed=seed)

    assert dispatched_s(flood, of) == dispatched_s([c._replace(tenant="") for c in flood], of)


@pytest.mark.parametrize("weight", [2, 3, 5])
def test_two_who_flood_are_served_by_their_weights(weight: int) -> None:
    calls = [
        Call(tenant, 0.001 * i, 40, weight=own)
        for i in range(200)
        for tenant, own in (("light", 1.0), ("heavy", float(weight)))
    ]
    began_s = dispatched_s(calls)
    horizon_s = sorted(began_s)[150]
    served = Counter(c.tenant for c, s in zip(calls, began_s, strict=True) if s <= horizon_s)

    assert served["heavy"] / served["light"] == pytest.approx(weight, rel=0.15)


def test_who_was_idle_has_saved_nothing() -> None:
    """Both flood from 20 s on; one had the engine for itself until then, and pays nothing."""
    early = [Call("busy", 0.0, 40) for _ in range(80)]
    late = [Call("idle", 20.0, 40) for _ in range(60)]
    began_s = dispatched_s([*early, *late])
    idle_s, busy_s = began_s[80:], [s for s in began_s[:80] if s >= 20.0]

    contended_s = min(max(idle_s), max(busy_s))
    shares = [sum(s <= contended_s for s in one) for one in (idle_s, busy_s)]
    assert shares[0] == pytest.approx(shares[1], abs=4)


# Accounts.


def test_a_call_is_charged_what_it_wrote_and_not_what_was_forecast() -> None:
    scheduler = a_scheduler()
    facts = {"prompt_tokens": 100, "max_output_tokens": 4096}
    scheduler.arrive("first", 0.0, a_forecast(10), tenant="a", **facts)
    scheduler.arrive("long", 0.0, a_forecast(10), tenant="a", **facts)
    scheduler.arrive("other", 0.0, a_forecast(10), tenant="b", **facts)
    scheduler.at(1.0, RequestFinished(RequestId("first"), 1, 10))
    share = scheduler.core.line.shares._pools[PoolId("p")]
    assert share._used_s["a"] == pytest.approx(engine_s(POOL, 100, 10))
    scheduler.at(2.0, RequestFinished(RequestId("long"), 1, 500))
    assert share._used_s["a"] == pytest.approx(engine_s(POOL, 100, 500))


def test_a_call_that_is_cancelled_is_charged_what_it_had_written() -> None:
    scheduler = a_scheduler()
    for name in ("first", "second"):
        scheduler.arrive(name, 0.0, a_forecast(40), tenant="a")
    scheduler.at(1.0, RequestFinished(RequestId("first"), 1, 10))
    scheduler.at(1.5, TokensStreamed(((RequestId("second"), 1, 7),)))
    scheduler.at(2.0, RequestCancelled(RequestId("second")))
    share = scheduler.core.line.shares._pools[PoolId("p")]
    assert share._used_s["a"] == pytest.approx(engine_s(POOL, 100, 7))


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "leave", "charge"]), st.sampled_from("abc")),
        max_size=60,
    )
)
def test_who_has_had_least_is_never_behind_and_the_floor_never_falls(
    acts: list[tuple[str, str]],
) -> None:
    share, waiting = PoolShare(), Counter[str]()
    floor_s = 0.0
    for act, tenant in acts:
        if act == "enter":
            share.enter(tenant)
            waiting[tenant] += 1
        elif act == "leave" and waiting[tenant]:
            share.leave(tenant)
            waiting[tenant] -= 1
        elif act == "charge":
            share.charge(tenant, 0.7)
        share.validate({name: count for name, count in waiting.items() if count})
        assert share.floor_s >= floor_s
        floor_s = share.floor_s
        turns = [share.turn(name) for name, count in waiting.items() if count]
        assert min(turns, default=0) == 0


def test_accounts_of_tenants_who_are_gone_are_forgotten() -> None:
    share = PoolShare()
    for i in range(3000):
        share.enter("stays")
        share.charge("stays", 1.0)
        share.enter(f"t{i}")
        share.leave(f"t{i}")
        share.leave("stays")
    assert len(share._used_s) < 2000
