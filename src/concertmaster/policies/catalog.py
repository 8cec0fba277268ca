"""Every policy by name.

``PLACEMENT+ORDERING`` joins any two parts (``round-robin+las``); a placement alone is
first come, first served, and an ordering alone places by tokens.
"""

from collections.abc import Callable

from concertmaster.core.errors import unknown_name
from concertmaster.core.policy import Ordering, Policy
from concertmaster.policies.ordering import (
    EarliestDeadline,
    Fcfs,
    FeedbackQueues,
    LeastAttained,
    ShortestJob,
    ShortestRemaining,
)
from concertmaster.policies.recipes.baselines import PLACEMENTS, baseline
from concertmaster.policies.routers import SurestPools

ORDERINGS: dict[str, tuple[Ordering, float]] = {
    "fcfs": (Fcfs(), 1.0),
    "sjf": (ShortestJob(), 0.1),
    "edf": (EarliestDeadline(), 1.0),
    "mlfq": (FeedbackQueues(), 1.0),
    "las": (LeastAttained(), 0.1),
}
"""Ordering and its aging, by name."""

ORACLES: dict[str, Callable[[], Policy]] = {
    "oracle-stjf": lambda: baseline(
        "oracle-stjf", "least-tokens", ShortestRemaining(), aging=0.1, clairvoyant=True
    ),
    "oracle-model": lambda: baseline(
        "oracle-model", "least-tokens", router=SurestPools(), clairvoyant=True
    ),
}
"""Clairvoyant references: they read the truth, so they run in simulation and replay only."""

NAMES: tuple[str, ...] = (*PLACEMENTS, *ORDERINGS, *ORACLES)


def policy(name: str) -> Policy:
    """Build a policy by name.

    >>> policy("round-robin+las").ordering
    LeastAttained(drifts=True)

    Raises:
        InputError: If a part of the name is not known; it suggests the nearest.
    """
    if name in ORACLES:
        return ORACLES[name]()
    placement, plus, ordering_name = name.partition("+")
    if not plus:
        placement, ordering_name = ("least-tokens", name) if name in ORDERINGS else (name, "fcfs")
    if placement not in PLACEMENTS:
        raise unknown_name("", "policy", "policy", placement, PLACEMENTS if plus else NAMES)
    if ordering_name not in ORDERINGS:
        raise unknown_name("", "policy", "ordering", ordering_name, ORDERINGS)
    ordering, aging = ORDERINGS[ordering_name]
    return baseline(name, placement, ordering, aging=aging)
