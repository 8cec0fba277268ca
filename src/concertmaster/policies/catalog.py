"""Every policy by name.

``PLACEMENT+ORDERING`` joins any two parts (``round-robin+las``); a placement alone is
first come, first served, and an ordering alone places by tokens. ``PLACEMENT@arrival`` chooses
the replica when a call arrives rather than when there is room. A recipe takes settings
after a colon (``chimera:tau=0.3,rule=paper``). Any of them may be followed by a scaling
(``round-robin/reactive``), for shared nodes a residency (``edf/lru-swap``), and a second
attempt for late calls (``las/hedge``), each after a slash, in any order, with settings in the
same way.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from concertmaster.core.errors import InputError, unknown_name
from concertmaster.core.hedging import Hedging
from concertmaster.core.policy import Ordering, Policy, Truth
from concertmaster.core.promise import KvRule
from concertmaster.core.standing import Scaling
from concertmaster.core.tenancy import Residency
from concertmaster.policies.filters import FitsKvCache
from concertmaster.policies.ordering import (
    EarliestDeadline,
    Fcfs,
    FeedbackQueues,
    LeastAttained,
    OldestWorkflow,
    ShortestJob,
    ShortestRemaining,
)
from concertmaster.policies.recipes.baselines import PLACEMENTS, baseline, murakkab
from concertmaster.policies.recipes.chimera import chimera
from concertmaster.policies.recipes.maestro import maestro
from concertmaster.policies.recipes.swarmx import swarmx
from concertmaster.policies.residency import Expected, LruSwap, NoColocation, Qlm
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
    "oldest": (OldestWorkflow(), 1.0),
}
"""Ordering and its aging, by name."""

ORDERS: Mapping[str, Ordering] = {
    name: ORDERINGS[name][0] for name in ("stjf", "las", "fcfs", "oldest")
}
"""Orders that a recipe may be told to keep."""

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


SWARMX: Mapping[str, Reader] = {
    "tail": number(0, 0.99),
    "batch_tail": number(0, 0.99),
    "cost": choice(cvar="cvar", quantile="quantile"),
    "others": number(0),
    "siblings": choice(yes=True, no=False),
    "near": number(0),
    "reroute_s": number(0.01),
    "order": choice(**ORDERS),
    "aging": number(1e-6),
    "law": choice(quantiles="quantiles", mean="mean"),
    "wait": choice(order="order", fifo="fifo"),
    "sum": choice(independent="independent", comonotone="comonotone"),
}
KV: Mapping[str, Reader] = {
    "kv": choice(**{"forecast": "forecast", "worst-case": "worst-case", "paged": "paged"}),
    "level": number(0.01, 0.9999),
    "margin": number(0),
    "eps": number(1e-6, 0.5),
    "returning": number(0, 1),
}
"""How KV is promised: settings of ``static`` and of every residency."""

EXPECTED: Mapping[str, Reader] = {
    "interactive": number(1),
    "residence": number(0),
    "hold_s": number(0),
    "hysteresis": number(0),
}

POINT = ("others", "siblings", "near", "reroute_s", "order", "aging", "wait")

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
            "order": choice(**ORDERS),
            "knows": choice(length=LENGTH, success=SUCCESS, both=LENGTH | SUCCESS),
        },
    ),
    "swarmx": Recipe(swarmx, SWARMX),
    "point": Recipe(partial(swarmx, law="mean"), {k: SWARMX[k] for k in POINT}),
    "murakkab": Recipe(murakkab, {"prompt": number(1), "output": number(1)}),
    "maestro": Recipe(
        maestro,
        {
            "people_s": number(0, 1800),
            "aging": number(1e-6),
            "admits": choice(yes=True, no=False),
            "person_s": number(0.1),
            "program_s": number(0.1),
            "doubt": number(0),
            **KV,
            **EXPECTED,
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

AT = "@arrival"
"""After the name of a placement: the replica is chosen on arrival, and calls queue inside it."""


class Tail(NamedTuple):
    """What may follow a slash: how many replicas there are, whose weights lie where, hedging.

    Attributes:
        build: Makes it.
        settings: What may follow its name.
    """

    build: Callable[..., Scaling | Residency | Hedging | None]
    settings: Mapping[str, Reader] = {}


_PACE: Mapping[str, Reader] = {"interval_s": number(0.1), "settle_s": number(0)}

SCALINGS: dict[str, Tail] = {
    "static": Tail(lambda: None),
    "reactive": Tail(
        Reactive, {**_PACE, "target": number(0.1), "tolerance": number(0, 1), "burst": number(0)}
    ),
    "foreseen": Tail(
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

RESIDENCIES: dict[str, Tail] = {
    "expected": Tail(Expected, EXPECTED),
    "lru-swap": Tail(LruSwap),
    "qlm": Tail(Qlm),
    "no-colocation": Tail(NoColocation),
}
"""Residencies by name, for nodes that models share."""

HEDGES: dict[str, Tail] = {
    "hedge": Tail(
        Hedging, {"level": number(0.5, 0.9999), "share": number(0, 1), "floor_s": number(0.001)}
    ),
}
"""What becomes of late calls, by name; without it they stay where they are."""

_TAILS = {"scaling": SCALINGS, "residency": RESIDENCIES, "hedging": HEDGES}

NAMES: tuple[str, ...] = (*PLACEMENTS, *ORDERINGS, *RECIPES)


def policy(name: str) -> Policy:
    """Build a policy by name.

    >>> policy("round-robin@arrival").binds
    'early'
    >>> policy("round-robin+las").ordering
    LeastAttained(drifts=True)

    Raises:
        InputError: If a part of the name is not known; it suggests the nearest.
    """
    whole, *tails = name.split("/")
    built = _unscaled(whole)
    kinds = [_kind_of(tail) for tail in tails]
    if len({*kinds}) < len(kinds):
        problem = f"expected at most one of each kind after a slash, found {', '.join(tails)}"
        raise InputError("", f"policy {name}", problem, "leave one out")
    for tail in tails:
        built = _with_tail(built, tail)
    return replace(built, name=name) if tails else built


def _kind_of(tail: str) -> str:
    base = tail.partition(":")[0]
    for kind, known in _TAILS.items():
        if base in known:
            return kind
    expected = "scaling, residency or hedging"
    raise unknown_name("", "policy", expected, base, SCALINGS | RESIDENCIES | HEDGES)


def _with_tail(built: Policy, name: str) -> Policy:
    base, _, text = name.partition(":")
    tail = (SCALINGS | RESIDENCIES | HEDGES)[base]
    promises = base == "static" or base in RESIDENCIES
    told = read_settings(base, text, {**tail.settings, **(KV if promises else {})})
    rule = {key: told.pop(key) for key in KV if key in told and key not in tail.settings}
    part: Any = tail.build(**told)
    if base in SCALINGS:
        return replace(built, scaling=part, **_promising(built, rule) if rule else {})
    if built.binds == "early" and base in HEDGES:
        problem = "calls bound on arrival queue inside their replica, so all of them are late"
        raise InputError("", f"policy {built.name}/{name}", problem, f"leave out {AT}")
    if base in HEDGES:
        return replace(built, hedge=part)
    if built.binds == "early":
        problem = f"calls bound on arrival cannot wait for the models that {base} moves"
        raise InputError("", f"policy {built.name}/{name}", problem, f"leave out {AT}")
    if not rule and built.kv is not None:
        return replace(built, residency=part)
    rule.setdefault("kv", "forecast" if base == "expected" else "paged")
    return replace(built, residency=part, **_promising(built, rule))


def _promising(built: Policy, rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes if KV is promised by a rule: the filter on free KV gives way to it."""
    facts = {"kind" if key == "kv" else key: value for key, value in rule.items()}
    kept = tuple(one for one in built.filters if not isinstance(one, FitsKvCache))
    return {"kv": KvRule(**facts), "filters": kept}


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
    placement, at, moment = name.partition(AT)
    if at and placement in PLACEMENTS and not moment:
        return baseline(name, placement, binds="early")
    placement, plus, ordering_name = name.partition("+")
    if not plus:
        placement, ordering_name = ("least-tokens", name) if name in ORDERINGS else (name, "fcfs")
    if placement not in PLACEMENTS:
        raise unknown_name("", "policy", "policy", placement, PLACEMENTS if plus else NAMES)
    if ordering_name not in ORDERINGS:
        raise unknown_name("", "policy", "ordering", ordering_name, ORDERINGS)
    ordering, aging = ORDERINGS[ordering_name]
    return baseline(name, placement, ordering, aging=aging)
