"""What people run today, each in its best form: late binding and whole-fleet views for all."""

from dataclasses import replace

from concertmaster.core.policy import Binding, Ordering, Picker, Policy, Router, Scorer, Truth
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.filters import FitsKvCache
from concertmaster.policies.ordering import Fcfs
from concertmaster.policies.pickers import LeastCost, LeastRecent, PowerOfTwo, Uniform
from concertmaster.policies.routers import AnyPool
from concertmaster.policies.scorers import (
    Decode,
    InFlightTokens,
    MeanLatency,
    Network,
    Prefill,
    PrefillBacklog,
    PrefillMiss,
    RunningRequests,
    WeightedRequests,
)

TOKENS: tuple[Scorer, ...] = (PrefillBacklog(), Prefill(), Decode(), InFlightTokens(), Network())
"""Seconds to the last token, by tokens in flight and rate curves."""

CACHED_TOKENS: tuple[Scorer, ...] = (
    PrefillBacklog(),
    PrefillMiss(),
    Decode(),
    InFlightTokens(),
    Network(),
)
"""The same, with credit for the prefix that a replica holds."""

PREDICTED_LATENCY: tuple[Scorer, ...] = (PrefillBacklog(), PrefillMiss(), Decode(), Network())
"""Time to first token and per token after it, as predicted for the call on each replica."""

REQUESTS: tuple[Scorer, ...] = (RunningRequests(),)

PLACEMENTS: dict[str, tuple[tuple[Scorer, ...], Picker]] = {
    "random": ((), Uniform()),
    "round-robin": ((), LeastRecent()),
    "least-requests": (REQUESTS, LeastCost()),
    "vllm": ((WeightedRequests(),), LeastCost()),
    "least-tokens": (TOKENS, LeastCost()),
    "power-of-two": (REQUESTS, PowerOfTwo()),
    "prefix-affinity": (CACHED_TOKENS, LeastCost()),
    "llm-d-latency": (PREDICTED_LATENCY, LeastCost()),
}


def baseline(
    name: str,
    placement: str,
    ordering: Ordering | None = None,
    *,
    router: Router | None = None,
    aging: float = 1.0,
    clairvoyant: frozenset[Truth] = frozenset(),
    binds: Binding = "late",
) -> Policy:
    """Put a placement and an ordering together; FCFS over every pool unless told otherwise.

    A call that is bound on arrival meets no filter: its replica's own line is where it waits.
    """
    scorers, picker = PLACEMENTS[placement]
    return Policy(
        name=name,
        admission=BoundedLine(),
        router=router or AnyPool(),
        ordering=ordering or Fcfs(),
        filters=(FitsKvCache(),) if binds == "late" else (),
        scorers=scorers,
        picker=picker,
        aging=aging,
        binds=binds,
        clairvoyant=clairvoyant,
    )


def murakkab(name: str = "murakkab", *, prompt: float = 1024, output: float = 256) -> Policy:
    """Choose by mean latencies of a profile, placed for the least sum over all calls.

    Args:
        name: How it was called.
        prompt: Mean prompt tokens of the workload, as profiled.
        output: Mean output tokens.
    """
    plan = baseline(name, "least-requests")
    scorer = MeanLatency(prompt_tokens=round(prompt), output_tokens=output)
    return replace(plan, scorers=(scorer, Network()))
