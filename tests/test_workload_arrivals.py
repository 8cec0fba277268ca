"""When workflows arrive: rates, burstiness, merging and scaling."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertmaster.core.request import WorkflowId
from concertmaster.workload.arrivals import (
    ArrivalKind,
    ArrivalSpec,
    arrivals_s,
    window_arrivals_s,
)
from concertmaster.workload.load import load_workloads
from concertmaster.workload.merge import Timing, merge
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.rhythms import Bursts, Step
from concertmaster.workload.sources import Source

POISSON = ArrivalSpec(kind="poisson")


def source(name: str, instants_s: Sequence[float], *, timed: bool = True) -> Source:
    plans = [
        WorkflowPlan(workflow_id=WorkflowId(f"{name}{at}"), arrival_s=instant_s, calls=())
        for at, instant_s in enumerate(instants_s)
    ]
    return Source(name=name, plans=plans, timed=timed)


def ids(plans: Sequence[WorkflowPlan]) -> list[str]:
    return [plan.workflow_id for plan in plans]


def merged(sources: Sequence[Source], timing: Timing, seed: int = 1) -> list[WorkflowPlan]:
    return merge(sources, timing, random.Random(seed))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_burstiness_asked_for(cv: float) -> None:
    instants_s = arrivals_s(40_000, 5.0, cv, random.Random(1))
    gaps_s = [later - earlier for earlier, later in pairwise(instants_s)]
    assert instants_s[0] == 0.0
    assert fmean(gaps_s) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps_s) / fmean(gaps_s) == pytest.approx(cv, rel=0.1, abs=1e-6)


@pytest.mark.parametrize("cv", [0.0, 1.0, 4.0])
def test_short_windows_hold_the_expected_count_however_bursty(cv: float) -> None:
    rng = random.Random(2)
    counts = [len(list(window_arrivals_s(0.0, 60.0, 0.5, cv, rng))) for _ in range(2000)]
    assert fmean(counts) == pytest.approx(30, rel=0.1)


def test_arrivals_of_a_window_lie_in_it() -> None:
    instants_s = list(window_arrivals_s(600.0, 60.0, 2.0, 2.0, random.Random(1)))
    assert instants_s == sorted(instants_s)
    assert all(600.0 <= instant_s < 660.0 for instant_s in instants_s)


instants = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=20)
kinds: st.SearchStrategy[ArrivalKind | None] = st.sampled_from([None, "trace", "poisson", "gamma"])


@given(first=instants, second=instants, kind=kinds, seed=st.integers(0, 9))
def test_merging_keeps_every_workflow_and_sorts_them(
    first: list[float], second: list[float], kind: ArrivalKind | None, seed: int
) -> None:
    sources = [source("a", first), source("b", second), source("a", first)]
    spec = None if kind is None else ArrivalSpec(kind=kind, cv=2.0)
    drawn = kind in {"poisson", "gamma"}
    plans = merged(sources, Timing(arrivals=spec, rate_rps=2.0 if drawn else None), seed)
    keys = [(plan.arrival_s, plan.workflow_id) for plan in plans]
    expected = [*ids(sources[0].plans), *ids(sources[1].plans)]
    expected += [f"{name}~2" for name in ids(sources[0].plans)]
    assert sorted(ids(plans)) == sorted(expected)
    assert keys == sorted(keys)
    assert keys[0][0] == 0.0


@given(recorded=instants, scale=st.floats(0.1, 10.0))
def test_scaling_divides_every_gap(recorded: list[float], scale: float) -> None:
    plain = merged([source("a", recorded)], Timing())
    scaled = {p.workflow_id: p for p in merged([source("a", recorded)], Timing(rate_scale=scale))}
    for plan in plain:
        arrival_s = scaled[plan.workflow_id].arrival_s
        assert arrival_s == pytest.approx(plan.arrival_s / scale)


@given(recorded=st.lists(st.floats(0.0, 1e4), min_size=2, max_size=20), rate=st.floats(0.1, 50.0))
def test_a_replayed_trace_has_the_rate_asked_for(recorded: list[float], rate: float) -> None:
    if max(recorded) - min(recorded) < 1.0:
        recorded = [*recorded, max(recorded) + 1.0]
    plans = merged([source("a", recorded)], Timing(rate_rps=rate))
    assert (len(plans) - 1) / plans[-1].arrival_s == pytest.approx(rate)


def test_drawn_arrivals_have_the_rate_asked_for_times_the_scale() -> None:
    sources = [source("a", [0.0] * 3000, timed=False), source("b", [0.0] * 1000, timed=False)]
    plans = merged(sources, Timing(arrivals=POISSON, rate_rps=3.0, rate_scale=2.0))
    assert (len(plans) - 1) / plans[-1].arrival_s == pytest.approx(6.0, rel=0.05)
    early = sum(name.startswith("a") for name in ids(plans[:2000]))
    assert early == pytest.approx(1500, rel=0.05)


def test_drawn_arrivals_without_a_rate_keep_the_recorded_one() -> None:
    sources = [source("a", [0.5 * at for at in range(2001)]), source("b", [0.0, 1.0])]
    plans = merged(sources, Timing(arrivals=POISSON))
    assert (len(plans) - 1) / plans[-1].arrival_s == pytest.approx(3.0, rel=0.1)


def test_drawn_arrivals_keep_the_recorded_order_and_shuffle_what_has_none() -> None:
    plans = [f"a{at}" for at in range(50)]
    timing = Timing(arrivals=POISSON, rate_rps=1.0)
    instants_s = [float(at) for at in range(50)]
    assert ids(merged([source("a", instants_s)], timing)) == plans
    shuffled = ids(merged([source("a", [0.0] * 50, timed=False)], timing))
    assert shuffled != plans
    assert sorted(shuffled) == sorted(plans)


def test_a_limit_keeps_the_first_to_arrive() -> None:
    sources = [source("a", [0.0, 2.0, 4.0]), source("b", [0.0, 1.0, 9.0])]
    assert ids(merged(sources, Timing(limit=4))) == ["a0", "b0", "b1", "a1"]
    assert len(merged(sources, Timing(limit=4, arrivals=POISSON, rate_rps=1.0))) == 4


def test_a_poisson_law_ignores_the_burstiness() -> None:
    assert ArrivalSpec(kind="poisson", cv=3.0).gap_cv == 1.0
    assert ArrivalSpec.parse("gamma:3").gap_cv == 3.0


@given(
    factor=st.floats(0.1, 20.0),
    on_s=st.floats(1.0, 100.0),
    off_s=st.floats(1.0, 100.0),
    even_s=st.lists(st.floats(0.0, 1e4), min_size=2),
)
def test_a_rhythm_keeps_the_order_and_bursts_keep_whole_periods(
    factor: float, on_s: float, off_s: float, even_s: list[float]
) -> None:
    bursts = Bursts(factor=factor, on_s=on_s, off_s=off_s)
    for rhythm in (bursts, Step(factor=factor, at_s=on_s)):
        moved_s = [rhythm.instant_s(one) for one in sorted(even_s)]
        assert all(a <= b + 1e-6 for a, b in pairwise(moved_s))
    ends_s = [k * (on_s + off_s) for k in range(5)]
    assert [bursts.instant_s(one) for one in ends_s] == pytest.approx(ends_s, abs=1e-6)


def test_a_burst_is_denser_by_its_factor_and_a_step_from_its_instant_on() -> None:
    rng = random.Random(1)
    bursts = ArrivalSpec.parse("burst:4:30:90").instants_s(40_000, 10.0, rng)
    loud = sum(one % 120.0 >= 90.0 for one in bursts)
    assert loud / (len(bursts) - loud) == pytest.approx(4 * 30 / 90, rel=0.05)
    assert len(bursts) / bursts[-1] == pytest.approx(10.0, rel=0.05)

    step = ArrivalSpec.parse("step:3:600").instants_s(20_000, 5.0, rng)
    before = sum(one < 600.0 for one in step)
    assert before / 600.0 == pytest.approx(5.0, rel=0.05)
    assert (len(step) - before) / (step[-1] - 600.0) == pytest.approx(15.0, rel=0.05)


def test_equal_seeds_give_equal_workloads_and_others_do_not(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    rows = [
        {
            "workflow_id": f"w{count}",
            "stage_index": 0,
            "parents": [],
            "prompt_tokens": 9,
            "output_tokens": 9,
        }
        for count in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    specs = [str(path), "sample#data"]
    options = {"arrivals": ArrivalSpec(kind="gamma", cv=2.0), "rate_rps": 4.0}
    first, again, other = (
        load_workloads(specs, seed=seed, **options)  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.workflows != other.workflows
    moved = {plan.workflow_id: replace(plan, arrival_s=0.0) for plan in other}
    assert all(moved[plan.workflow_id] == replace(plan, arrival_s=0.0) for plan in first)
