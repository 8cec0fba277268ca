"""Every policy by name.

``PLACEMENT+ORDERING`` joins any two parts (``round-robin+las``); a placement alone is
first come, first served, and an ordering alone places by tokens. A recipe takes settings
after a colon (``chimera:tau=0.3,rule=paper``). Any of them may end in a scaling
(``round-robin/reactive``), which takes settings in the same way.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from concertmaster.core.errors import InputError, unknown_name
from concertmaster.core.policy import Ordering, Policy, Truth
from concertmaster.core.standing import Scaling
from concertmaster.policies.ordering import (
    EarliestDeadline,
    Fcfs,
    FeedbackQueues,
    LeastAttained,
    ShortestJob,
    ShortestRemaining,
)
from concertmaster.policies.recipes.baselines import PLACEMENTS, baseline
from concertmaster.policies.recipes.chimera import chimera
from concertmaster.policies.routers import Cascade, RandomModel, Sticky, SurestPools
from concertmaster.policies.scaling import Foreseen, Reactive
from concertmaster.policies.settings import Reader, choice, number, read_settings

ORDERINGS: dict[str, tuple[Ordering, float]] = {
    "fcfs": (Fcfs(), 1.0),
    "sjf": (ShortestJob(), 0.1),
    "edf": (EarliestDeadline(), 1.0),
    "mlfq": (FeedbackQueues(), 1.0),
    "las": (LeastAttained(), 0.1),
    "stjf": (ShortestRemaining(), 0.1),
}
"""Ordering and its aging, by name."""

LENGTH: frozenset[Truth] = frozenset({"length"})
SUCCESS: frozenset[Truth] = frozenset({"success"})


class Recipe(NamedTuple):
    """A policy that is more than a placement and an ordering.

    Attributes:
        build: Makes it; the first argument is its full name.
        settings: What may follow its name.
    """

    build: Callable[..., Policy]
    settings: Mapping[str, Reader] = {}


RECIPES: dict[str, Recipe] = {
    "chimera": Recipe(
        chimera,
        {
            "worth_s": number(0),
            "tau": number(0),
            "tau_s": number(0),
            "min_gain": number(0, 1),
            "escalate": choice(yes=True, no=False),
            "aging": number(1e-6),
            "rule": choice(earned="earned", slack="slack", paper="paper"),
            "load": choice(owed="owed", open="open"),
            "switch_cost": choice(yes=True, no=False),
            "order": choice(stjf=ShortestRemaining(), las=LeastAttained(), fcfs=Fcfs()),
            "knows": choice(length=LENGTH, success=SUCCESS, both=LENGTH | SUCCESS),
        },
    ),
    "ltr": Recipe(lambda name: baseline(name, "vllm", ShortestJob(), aging=0.1)),
    "quality-only": Recipe(
        lambda name: baseline(
            name, "prefix-affinity", ShortestRemaining(), router=Sticky(SurestPools()), aging=0.1
        )
    ),
    "random-model": Recipe(
        lambda name: baseline(
            name, "prefix-affinity", ShortestRemaining(), router=Sticky(RandomModel()), aging=0.1
        )
    ),
    "cascade": Recipe(
        lambda name: baseline(
            name, "prefix-affinity", ShortestRemaining(), router=Cascade(), aging=0.1
        )
    ),
    "oracle-stjf": Recipe(
        lambda name: baseline(
            name, "least-tokens", ShortestRemaining(), aging=0.1, clairvoyant=LENGTH
        )
    ),
    "oracle-model": Recipe(
        lambda name: baseline(
            name, "least-tokens", router=SurestPools(), clairvoyant=LENGTH | SUCCESS
        )
    ),
}
"""Whole policies; those that are clairvoyant run in simulation only."""


class ScalingRecipe(NamedTuple):
    """A way to choose how many replicas there are.

    Attributes:
        build: Makes it.
        settings: What may follow its name.
    """

    build: Callable[..., Scaling | None]
    settings: Mapping[str, Reader] = {}


_PACE: Mapping[str, Reader] = {"interval_s": number(0.1), "settle_s": number(0)}

SCALINGS: dict[str, ScalingRecipe] = {
    "static": ScalingRecipe(lambda: None),
    "reactive": ScalingRecipe(
        Reactive, {**_PACE, "target": number(0.1), "tolerance": number(0, 1), "burst": number(0)}
    ),
    "foreseen": ScalingRecipe(
        Foreseen,
        {
            **_PACE,
            "memory_s": number(1),
            "level": number(0.5, 0.9999),
            "clear_s": number(1),
            "tolerance": number(0, 1),
        },
    ),
}
"""Scalings by name; without one the fleet stays as its file says."""

NAMES: tuple[str, ...] = (*PLACEMENTS, *ORDERINGS, *RECIPES)


def policy(name: str) -> Policy:
    """Build a policy by name.

    >>> policy("round-robin+las").ordering
    LeastAttained(drifts=True)

    Raises:
        InputError: If a part of the name is not known; it suggests the nearest.
    """
    whole, slash, scaling = name.partition("/")
    built = _unscaled(whole)
    return replace(built, name=name, scaling=_scaling(scaling)) if slash else built


def _scaling(name: str) -> Scaling | None:
    base, _, text = name.partition(":")
    if base not in SCALINGS:
        raise unknown_name("", "policy", "scaling", base, SCALINGS)
    recipe = SCALINGS[base]
    return recipe.build(**read_settings(base, text, recipe.settings))


def _unscaled(name: str) -> Policy:
    base, colon, text = name.partition(":")
    if base in RECIPES:
        recipe = RECIPES[base]
        return recipe.build(name, **read_settings(base, text, recipe.settings))
    if colon:
        problem = f"{base} takes no settings"
        raise InputError("", f"policy {name}", problem, f"write {base}")
    return _joined(name)


def _joined(name: str) -> Policy:
    placement, plus, ordering_name = name.partition("+")
    if not plus:
        placement, ordering_name = ("least-tokens", name) if name in ORDERINGS else (name, "fcfs")
    if placement not in PLACEMENTS:
        raise unknown_name("", "policy", "policy", placement, PLACEMENTS if plus else NAMES)
    if ordering_name not in ORDERINGS:
        raise unknown_name("", "policy", "ordering", ordering_name, ORDERINGS)
    ordering, aging = ORDERINGS[ordering_name]
    return baseline(name, placement, ordering, aging=aging)
