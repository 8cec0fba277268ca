"""What people run today, each in its best form: late binding and whole-fleet views for all."""

from concertmaster.core.policy import Ordering, Picker, Policy, Router, Scorer, Truth
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.filters import FitsKvCache
from concertmaster.policies.ordering import Fcfs
from concertmaster.policies.pickers import LeastCost, LeastRecent, PowerOfTwo, Uniform
from concertmaster.policies.routers import AnyPool
from concertmaster.policies.scorers import (
    Decode,
    InFlightTokens,
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

REQUESTS: tuple[Scorer, ...] = (RunningRequests(),)

PLACEMENTS: dict[str, tuple[tuple[Scorer, ...], Picker]] = {
    "random": ((), Uniform()),
    "round-robin": ((), LeastRecent()),
    "least-requests": (REQUESTS, LeastCost()),
    "vllm": ((WeightedRequests(),), LeastCost()),
    "least-tokens": (TOKENS, LeastCost()),
    "power-of-two": (REQUESTS, PowerOfTwo()),
    "prefix-affinity": (CACHED_TOKENS, LeastCost()),
}


def baseline(
    name: str,
    placement: str,
    ordering: Ordering | None = None,
    *,
    router: Router | None = None,
    aging: float = 1.0,
    clairvoyant: frozenset[Truth] = frozenset(),
) -> Policy:
    """Put a placement and an ordering together; FCFS over every pool unless told otherwise."""
    scorers, picker = PLACEMENTS[placement]
    return Policy(
        name=name,
        admission=BoundedLine(),
        router=router or AnyPool(),
        ordering=ordering or Fcfs(),
        filters=(FitsKvCache(),),
        scorers=scorers,
        picker=picker,
        aging=aging,
        clairvoyant=clairvoyant,
    )
