"""What the study of memory compares: arms by name, and which level each goes without."""

from collections.abc import Mapping
from typing import NamedTuple

from concertmaster.forecaster import RECENT, SHIPPED


class Arm(NamedTuple):
    """A policy as it is run.

    Attributes:
        policy: As in the catalog.
        forecasts: ``recent``: lengths seen lately by role. ``default``: the shipped heads, which
            read prompts and tell what remains of a workflow. Both are warmed up on tasks that
            are not held out.
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

OURS, TRAINED = "maestro", "maestro, trained"
"""The recipe with lengths by role, which are cheap to run, and with trained forecasts."""

ALONE, ALONE_FCFS = "maestro/no-colocation:kv=forecast", "fcfs/no-colocation"
"""One model a node: with the recipe's order and KV, and as published."""

ALL_ADMITTED = "maestro:admits=no"
WORST, PAGED = "maestro:kv=worst-case", "maestro:kv=paged"
NO_FETCH = "maestro:hysteresis=1000000"
PLACED, PLAIN = "prefix-affinity/expected", "fcfs/expected"

WITHOUT: Mapping[str, str] = {
    WORST: "node: KV by forecast; the cap is promised",
    PAGED: "node: KV by forecast; the prompt is promised, engines preempt",
    "maestro/lru-swap:kv=forecast": "node: weights by expected need; least recently used goes",
    NO_FETCH: "node: fetching ahead, and second replicas that end others",
    ALL_ADMITTED: "global: admission; no workflow is refused at its first call",
    PLACED: "global: order; first come, first served, placed by what would end first",
    PLAIN: "global and cluster: order and placement; the replica with fewest tokens",
}
"""The recipe without a part, and which part."""

RIVALS = (FCFS, EDF, EDF_EXPECTED, ORACLE, OURS)
"""Compared at every contention."""

GROUPS = "maestro/qlm:kv=forecast"
MORE_RIVALS = (EDF_GROUPS, GROUPS, TRAINED)
"""Compared in the full grid; trained forecasts under high contention by default too."""

ARMS: Mapping[str, Arm] = {
    **{name: Arm(name) for name in (*RIVALS, EDF_GROUPS, GROUPS, *WITHOUT, ALONE, ALONE_FCFS)},
    TRAINED: Arm(OURS, SHIPPED),
}
"""Every arm of the study."""
