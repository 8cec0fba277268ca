"""What the study of tails compares: arms by name, and what each may know."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Forecasts = Literal["recent", "trained"]


class Arm(NamedTuple):
    """A policy as it is run.

    Attributes:
        policy: As in the catalog.
        forecasts: ``recent``: lengths seen lately by role. ``trained``: heads that read prompts,
            trained on workflows of other seeds. Both are warmed up on more of these.
        adapts: Whether it learns while it is measured, lengths and paces both.
    """

    policy: str
    forecasts: Forecasts = "recent"
    adapts: bool = True


BLIND, RANDOM, TWO = "round-robin", "random", "power-of-two"
"""Rivals that choose on arrival; the attainment of the first settles the load."""

MEANS, CALLS, POINT = "murakkab", "llm-d-latency", "point"
"""Rivals that know lengths: means by model, means by call, and our forecasts reduced to means."""

OURS, ROLES, FROZEN = "swarmx", "swarmx, by role", "swarmx, frozen"

WITHOUT: Mapping[str, str] = {
    ROLES: "words of the prompt",
    "swarmx:law=mean": "distributions: means instead",
    "swarmx:wait=fifo": "the true order: a wait as if first come were first served",
    "swarmx:sum=comonotone": "independence: all parts at the same percentile",
}
"""The recipe without a part, and which part."""

ARMS: Mapping[str, Arm] = {
    BLIND: Arm("round-robin@arrival"),
    RANDOM: Arm("random@arrival"),
    TWO: Arm("power-of-two@arrival"),
    MEANS: Arm("murakkab"),
    CALLS: Arm("llm-d-latency"),
    POINT: Arm("point", "trained"),
    OURS: Arm("swarmx", "trained"),
    ROLES: Arm("swarmx"),
    FROZEN: Arm("swarmx", adapts=False),
    **{name: Arm(name, "trained") for name in WITHOUT if ":" in name},
}
"""Every arm of the study."""

ROUTERS = (BLIND, TWO, MEANS, POINT, OURS)
MORE_ROUTERS = (RANDOM, CALLS)
"""Compared on a fleet that stays as it is; the latter in the full grid."""

SEARCHED = (BLIND, TWO, ROLES)
MORE_SEARCHED = (MEANS, OURS)
"""Whose highest rate is searched; the latter, which take longer to run, in the full grid."""

ADAPTING = ROLES
DRIFTERS = (ADAPTING, FROZEN)
"""Compared through incidents; the first says what can be reached."""
