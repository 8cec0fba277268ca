"""The pace of replicas out of pairs of expected and actual seconds."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.fleet import PoolId, ReplicaId
from concertmaster.predictors.pace import MAX_PACE, MIN_PACE, PaceTracker

P0, P1, P2, Q0 = (ReplicaId(name) for name in ("p-0", "p-1", "p-2", "q-0"))
POOLS = {P0: PoolId("p"), P1: PoolId("p"), P2: PoolId("p"), Q0: PoolId("q")}


def tracker() -> PaceTracker:
    return PaceTracker(POOLS)


def taught(
    pace: float, count: int, of: ReplicaId = P0, *, into: PaceTracker | None = None
) -> PaceTracker:
    """Observations a second apart, with some noise."""
    found, rng = into or tracker(), random.Random(1)
    for second in range(count):
        found.observe(float(second), of, 2.0, 2.0 * pace * rng.uniform(0.98, 1.02))
    return found


def test_nothing_is_known_at_first() -> None:
    assert [tracker().pace(0.0, replica_id) for replica_id in POOLS] == [1.0] * 4


def test_one_observation_moves_a_pace_a_little() -> None:
    assert 1.0 < taught(2.0, 1).pace(0.0, P0) < 1.4


@pytest.mark.parametrize("pace", [0.5, 1.0, 1.3, 4.0])
def test_thirty_observations_give_the_pace(pace: float) -> None:
    assert taught(pace, 30).pace(30.0, P0) == pytest.approx(pace, rel=0.08)


def test_a_slow_down_is_followed_within_thirty_completions_and_so_is_its_end() -> None:
    found = taught(1.0, 60)
    for after_s in (60.0, 90.0):
        pace = 1.3 if after_s == 60.0 else 1.0
        for second in range(30):
            found.observe(after_s + second, P0, 1.0, pace)

        assert found.pace(after_s + 30, P0) == pytest.approx(pace, rel=0.03)


@given(
    pace=st.floats(0.5, 4.0),
    wild=st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_a_fifth_of_the_observations_may_be_anything(
    pace: float, wild: list[float], order: random.Random
) -> None:
    ratios = [*wild, *(pace * (0.98 + 0.04 * i / 25) for i in range(26))]
    order.shuffle(ratios)
    found = tracker()
    for second, ratio in enumerate(ratios):
        found.observe(float(second), Q0, 1.0, ratio)

    whole = taught(pace, 32, Q0).pace(32.0, Q0)
    assert found.pace(32.0, Q0) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize(("pace", "bound"), [(1e-3, MIN_PACE), (1e3, MAX_PACE)])
def test_a_pace_stays_within_its_bounds(pace: float, bound: float) -> None:
    assert taught(pace, 32).pace(32.0, P0) == bound


def test_a_replica_that_was_not_observed_has_the_pace_of_its_pool() -> None:
    found = taught(2.0, 20, P0)
    taught(2.0, 20, P1, into=found)

    assert 1.5 < found.pace(20.0, P2) < 2.0
    assert found.pace(20.0, Q0) == 1.0


def test_one_slow_replica_does_not_make_its_pool_slow() -> None:
    found = taught(8.0, 32, P0)
    for healthy in (P1, P2):
        taught(1.0, 32, healthy, into=found)

    assert found.pace(32.0, P1) == pytest.approx(1.0, abs=0.02)
    assert found.pace(32.0, P0) > 6.5


def test_what_is_old_counts_for_less_and_less() -> None:
    found = taught(2.0, 30)

    paces = [found.pace(30.0 + minutes * 60, P0) for minutes in (0, 5, 15, 60)]

    assert paces == sorted(paces, reverse=True)
    assert paces[0] > 1.8
    assert paces[-1] == pytest.approx(1.0, abs=0.01)


def test_the_present_weighs_more_than_what_was_before_a_pause() -> None:
    found = taught(2.0, 20)
    for second in range(8):
        found.observe(1000.0 + second, P0, 1.0, 1.0)

    assert found.pace(1008.0, P0) == pytest.approx(1.0, abs=0.03)


def test_only_the_latest_observations_are_kept() -> None:
    found = taught(2.0, 500)

    ((recent,),) = [list(in_pool.values()) for in_pool in found._recent.values()]
    assert len(recent._seen) == 32


def test_a_replica_that_is_forgotten_begins_anew() -> None:
    found = taught(2.0, 30)
    found.forget(P0)
    found.forget(P1)

    assert found.pace(30.0, P0) == 1.0
