"""Calls and a driver for engine models, for tests."""

import pytest

from concertmaster.core.cost import RateCurve
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId
from concertmaster.physics.batching import (
    BatchingEngine,
    EngineCall,
    Milestone,
)
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine

CURVE = RateCurve(
    fixed_s=0.00371,
    linear_tokens=(1, 512, 2048),
    linear_s=(0.00113, 0.0091, 0.0371),
    sequence_s=0.0000213,
    kv_token_s=0.000000117,
    prefill_pair_s=0.0000000023,
)
CHUNK = PREFIX_CHUNK_TOKENS
FOR_EVER_S = 1e9
ENGINES = [FastEngine, ReferenceEngine]
both = pytest.mark.parametrize("engine_type", ENGINES)
EngineType = type[FastEngine] | type[ReferenceEngine]


def a_call(
    name: str,
    prompt_tokens: int = 10,
    output_tokens: int = 5,
    prefix_hashes: tuple[int, ...] = (),
    priority: int = 0,
) -> EngineCall:
    return EngineCall(
        request_id=RequestId(name),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefix_hashes=prefix_hashes,
        priority=priority,
    )


def drain(engine: BatchingEngine, until_s: float = FOR_EVER_S) -> list[Milestone]:
    milestones: list[Milestone] = []
    while (at_s := engine.next_milestone_s()) is not None and at_s <= until_s:
        milestones.extend(engine.advance(at_s))
    return milestones


def ends_s(milestones: list[Milestone]) -> dict[str, float]:
    return {m.request_id: m.time_s for m in milestones if m.kind == "finished"}


def starts_s(milestones: list[Milestone]) -> dict[str, float]:
    return {m.request_id: m.time_s for m in milestones if m.kind == "first_token"}


def kinds(milestones: list[Milestone]) -> list[tuple[str, str]]:
    return [(m.request_id, m.kind) for m in milestones]
