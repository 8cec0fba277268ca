from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertmaster.core.cost import RateCurve
from concertmaster.core.request import RequestId
from concertmaster.physics.batching import (
    BatchingEngine,
    EngineCall,
    EngineSettings,
    Milestone,
)
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine
from concertmaster.physics.stretch import Stretch
from engine_builders import (
    FOR_EVER_S,
    a_call,
    drain,
    kinds,
)

# Both models against each other.


@dataclass
class History:
    """What a driver saw of one engine."""

    milestones: list[Milestone] = field(default_factory=list)
    sights: list[object] = field(default_factory=list)

    def look(self, engine: BatchingEngine, now_s: float) -> None:
        self.sights.append(engine.progress(now_s))
        self.sights.append((engine.running_requests, engine.waiting_requests))
        self.sights.append((engine.kv_used_blocks, engine.preemptions))
        self.sights.append((engine.generated_tokens, engine.prefilled_tokens))
        self.sights.append((engine.prefix_query_tokens, engine.prefix_hit_tokens))


Event = tuple[float, EngineCall | RequestId | float | int]


def replay(engine: BatchingEngine, events: list[Event]) -> History:
    """Submit calls, cancel ids, set slow-downs (a float) or KV blocks, and look after each."""
    history = History()
    for now_s, what in events:
        history.milestones += drain(engine, now_s)
        if isinstance(what, EngineCall):
            engine.submit(now_s, what)
        elif isinstance(what, int):
            history.milestones += engine.advance(now_s)
            engine.resize(now_s, what)
        elif isinstance(what, float):
            history.milestones += engine.advance(now_s)
            engine.slowdown = what
        else:
            history.sights.append(engine.cancel(now_s, what))
        history.look(engine, now_s)
    history.milestones += drain(engine)
    history.look(engine, FOR_EVER_S)
    return history


@st.composite
def curves(draw: st.DrawFn) -> RateCurve:
    """Draw odd times, so that an arrival and a step's end are never at the same instant."""
    parts = st.integers(0, 40)
    linear_s = sorted(0.000317 * (1 + draw(parts)) for _ in range(3))
    return RateCurve(
        fixed_s=0.000731 * (1 + draw(parts)),
        linear_tokens=(1, 100, 700),
        linear_s=tuple(linear_s),
        sequence_s=0.00000371 * draw(parts),
        kv_token_s=0.000000213 * draw(parts),
        prefill_pair_s=0.0000000173 * draw(parts),
    )


@st.composite
def engine_settings(draw: st.DrawFn) -> EngineSettings:
    max_sequences = draw(st.sampled_from([1, 2, 5, 30]))
    block_tokens = draw(st.sampled_from([1, 16, 32]))
    return EngineSettings(
        kv_blocks=draw(st.sampled_from([900, 940, 1100, 20_000])) // block_tokens + 1,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + draw(st.sampled_from([0, 1, 40, 300, 2000])),
        block_tokens=block_tokens,
        scheduling=draw(st.sampled_from(["fcfs", "priority"])),
        prefix_caching=draw(st.booleans()),
    )


@st.composite
def event_lists(draw: st.DrawFn) -> list[Event]:
    """Draw arrivals, some of them followed by a cancel or a slow-down."""
    gap_s = draw(st.sampled_from([0.00000917, 0.000917, 0.00917]))
    most_prompt = draw(st.sampled_from([20, 300, 600]))
    most_output = draw(st.sampled_from([3, 40, 300]))
    now_s = 0.0
    events: list[Event] = []
    for number in range(draw(st.integers(1, 25))):
        now_s += gap_s * draw(st.integers(0, 30))
        family, chunks = draw(st.integers(0, 2)), draw(st.integers(0, 3))
        call = a_call(
            f"r{number}",
            draw(st.integers(1, most_prompt)),
            draw(st.integers(1, most_output)),
            tuple(10 * family + chunk for chunk in range(chunks)),
            draw(st.integers(-1, 1)),
        )
        events.append((now_s, call))
        later_s = now_s + gap_s * (0.5 + draw(st.integers(0, 300)))
        match draw(st.integers(0, 9)):
            case 0 | 1:
                events.append((later_s, RequestId(f"r{draw(st.integers(0, number))}")))
            case 2:
                events.append((later_s, draw(st.sampled_from([1.0, 2.5]))))
            case _:
                pass
    return sorted(events, key=lambda event: event[0])


@settings(derandomize=True, deadline=None, max_examples=250)
@given(curves(), engine_settings(), event_lists())
def test_jumps_and_single_steps_agree(
    curve: RateCurve, engine_settings: EngineSettings, events: list[Event]
) -> None:
    fast = replay(FastEngine(curve, engine_settings), events)
    reference = replay(ReferenceEngine(curve, engine_settings), events)
    assert kinds(fast.milestones) == kinds(reference.milestones)
    times_s = [m.time_s for m in reference.milestones]
    assert [m.time_s for m in fast.milestones] == pytest.approx(times_s, rel=1e-9)
    assert fast.sights == reference.sights


@settings(derandomize=True, deadline=None, max_examples=250)
@given(curves(), engine_settings(), event_lists(), st.data())
def test_they_agree_while_kv_is_taken_and_given_back(
    curve: RateCurve, engine_settings: EngineSettings, events: list[Event], data: st.DataObject
) -> None:
    most = engine_settings.kv_blocks
    sizes = st.tuples(st.integers(0, len(events) - 1), st.integers(1, most))
    for place, blocks in data.draw(st.lists(sizes, max_size=6)):
        events.append((events[place][0] + 0.00000131 * (1 + len(events)), blocks))
    events = [*sorted(events, key=lambda event: event[0]), (FOR_EVER_S / 2, most)]

    fast = replay(FastEngine(curve, engine_settings), events)
    reference = replay(ReferenceEngine(curve, engine_settings), events)

    assert kinds(fast.milestones) == kinds(reference.milestones)
    times_s = [m.time_s for m in reference.milestones]
    assert [m.time_s for m in fast.milestones] == pytest.approx(times_s, rel=1e-9)
    assert fast.sights == reference.sights


@settings(derandomize=True, deadline=None, max_examples=100)
@given(curves(), engine_settings(), event_lists())
def test_each_call_ends_once_and_leaves_nothing_behind(
    curve: RateCurve, engine_settings: EngineSettings, events: list[Event]
) -> None:
    engine = FastEngine(curve, engine_settings)
    history = replay(engine, events)
    submitted = {what.request_id for _, what in events if isinstance(what, EngineCall)}
    cancelled = [what for _, what in events if not isinstance(what, EngineCall | float)]
    ended = [m.request_id for m in history.milestones if m.kind == "finished"]
    assert len(ended) == len(set(ended))
    assert submitted - set(ended) <= set(cancelled)
    assert [m.time_s for m in history.milestones] == sorted(m.time_s for m in history.milestones)
    assert (engine.kv_used_blocks, engine.running_requests, engine.waiting_requests) == (0, 0, 0)
    assert engine.next_milestone_s() is None


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 2000), st.integers(0, 99), st.integers(1, 60), st.floats(0, 1))
def test_steps_done_inverts_the_length_of_a_stretch(
    steps: int, growth: int, first: int, share: float
) -> None:
    stretch = Stretch()
    stretch.begin(3.0, steps, 0.00073 * first, 0.000000031 * growth)
    now_s = 3.0 + share * stretch.lasts_s(steps)
    done = stretch.steps_done(now_s)
    assert done == steps - 1 or stretch.lasts_s(done + 1) > now_s - 3.0
    assert stretch.lasts_s(done) <= now_s - 3.0
