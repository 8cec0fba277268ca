"""What the study of memory compares: arms by name, and which level each goes without."""

from collections.abc import Mapping
from typing import NamedTuple

from concertmaster.forecaster import RECENT, SHIPPED


class Arm(NamedTuple):
    """A policy as it is run.

    Attributes:
        policy: As in the catalog.
        forecasts: ``recent``: lengths seen lately by role. ``default``: the shipped heads, which
            read prompts. Both are warmed up on tasks that are not held out.
    """

    policy: str
    forecasts: str = RECENT


FCFS, EDF = "fcfs/lru-swap", "edf/lru-swap"
"""Rivals that swap as llama-swap does."""

EDF_GROUPS = "edf/qlm"
"""Earliest deadline first in a better form: a queue for each model, swaps shared by a group."""

EDF_EXPECTED = "edf/expected"
"""Earliest deadline first in its best form: on the memory that the recipe manages."""

ORACLE = "oracle-stjf/expected"
"""Knows lengths and what remains of each workflow: shortest first, on the recipe's memory."""

OURS = "maestro"
ALONE, ALONE_FCFS = "maestro/no-colocation:kv=forecast", "fcfs/no-colocation"
"""One model a node: with the recipe's order and KV, and as published."""

WORST, PAGED = "maestro:kv=worst-case", "maestro:kv=paged"
NO_FETCH = "maestro:hysteresis=1000000"
PLACED, PLAIN = "prefix-affinity/expected", "fcfs/expected"
ROLES = "maestro, by role"

WITHOUT: Mapping[str, str] = {
    WORST: "node: KV by forecast; the cap is promised",
    PAGED: "node: KV by forecast; the prompt is promised, engines preempt",
    "maestro/lru-swap:kv=forecast": "node: weights by expected need; least recently used goes",
    "maestro/qlm:kv=forecast": "node: weights by expected need; groups of one model",
    NO_FETCH: "node: fetching ahead, and second replicas that end others",
    PLACED: "global: order; first come, first served, placed by what would end first",
    PLAIN: "global and cluster: order and placement; the replica with fewest tokens",
    ROLES: "words of prompts: lengths by role",
}
"""The recipe without a part, and which part."""

ARMS: Mapping[str, Arm] = {
    **{name: Arm(name) for name in (FCFS, EDF, EDF_GROUPS, EDF_EXPECTED, ORACLE, ALONE_FCFS)},
    **{name: Arm(name, SHIPPED) for name in (OURS, ALONE, *WITHOUT)},
    PLACED: Arm(PLACED),
    PLAIN: Arm(PLAIN),
    ROLES: Arm("maestro"),
}
"""Every arm of the study."""

RIVALS = (FCFS, EDF, EDF_GROUPS, EDF_EXPECTED, ORACLE, OURS)
"""Compared at every contention."""
