"""What the study of tails compares: arms by name, and what each may know."""

from collections.abc import Mapping
from itertools import chain
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


BLIND, RANDOM, TWO = "round-robin@arrival", "random@arrival", "power-of-two@arrival"
"""Rivals as published: they choose on arrival. The attainment of the first settles the load."""

LATE, LATE_TWO = "round-robin", "power-of-two"
"""Their best form here: they choose among replicas with room once there is one."""

MEANS, CALLS, POINT = "murakkab", "llm-d-latency", "point"
"""Rivals that know lengths: means by model, means by call, and our forecasts reduced to means."""

OURS, ROLES, FROZEN = "swarmx", "swarmx, by role", "swarmx, frozen"
SETTLED = "swarmx, struck before"
"""The recipe on a fleet to which an incident came before the first arrival."""

WITHOUT: Mapping[str, str] = {
    ROLES: "words of the prompt",
    POINT: "distributions: means instead",
    "swarmx:wait=fifo": "the true order: a wait as if first come were first served",
    "swarmx:sum=comonotone": "independence: all parts at the same percentile",
}
"""The recipe without a part, and which part."""

FORESEEN = "swarmx/foreseen"
"""The recipe end to end."""

STATIC = (f"{BLIND}/static", f"{LATE}/static")
REACTIVE = (
    (f"{BLIND}/reactive", f"{BLIND}/reactive:target=12"),
    (f"{LATE}/reactive", f"{LATE}/reactive:target=12"),
)
"""Its rivals, as published and in their best form; ``reactive`` at two prices of GPU time."""

SAME_ROUTER = ("swarmx/static", "swarmx/reactive", FORESEEN)
"""What scaling alone is worth."""

SCALED = (*STATIC, *chain(*REACTIVE), *SAME_ROUTER)

ARMS: Mapping[str, Arm] = {
    **{name: Arm(name) for name in (BLIND, LATE, RANDOM, TWO, LATE_TWO, MEANS, CALLS)},
    POINT: Arm("point", "trained"),
    OURS: Arm("swarmx", "trained"),
    ROLES: Arm("swarmx"),
    FROZEN: Arm("swarmx", adapts=False),
    SETTLED: Arm("swarmx"),
    **{name: Arm(name, "trained") for name in WITHOUT if ":" in name},
    **{name: Arm(name) for name in SCALED},
}
"""Every arm of the study."""

ROUTERS = (BLIND, LATE, TWO, LATE_TWO, MEANS, POINT, OURS)
MORE_ROUTERS = (RANDOM, CALLS)
"""Compared on a fleet that stays as it is; the latter in the full grid."""

SEARCHED = (BLIND, LATE, TWO, LATE_TWO, ROLES)
MORE_SEARCHED = (MEANS, OURS)
"""Whose highest rate is searched; the latter, which take longer to run, in the full grid."""

ADAPTING = ROLES
DRIFTERS = (ADAPTING, FROZEN)
"""Compared through incidents with what ``SETTLED`` says can be reached."""
