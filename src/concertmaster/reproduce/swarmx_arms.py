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

AFFINE, LATE_AFFINE = "prefix-affinity@arrival", "prefix-affinity"
"""Rivals that go where the prompt's prefix is, unless that replica is busy."""

OURS, ROLES, FROZEN = "swarmx", "swarmx, by role", "swarmx, frozen"
POINT_ROLES = "point, by role"
SETTLED = "swarmx, struck before"
"""The recipe on a fleet to which an incident came before the first arrival."""

MEANS_OF: Mapping[str, str] = {OURS: POINT, ROLES: POINT_ROLES}
"""The recipe, and the same on the means of its forecasts."""

FIFO, COMONOTONE = "swarmx:wait=fifo", "swarmx:sum=comonotone"
WITHOUT: Mapping[str, tuple[str, str]] = {
    ROLES: ("words of the prompt", OURS),
    POINT: ("distributions: means instead", OURS),
    POINT_ROLES: ("distributions: means instead", ROLES),
    FIFO: ("the true order: a wait as if first come were first served", ROLES),
    COMONOTONE: ("independence: all parts at the same percentile", ROLES),
}
"""The recipe without a part, which part, and the arm that has it."""

FORESEEN = "swarmx/foreseen"
"""The recipe end to end."""

STATIC = (f"{BLIND}/static", f"{LATE}/static")
REACTIVE = (
    (f"{BLIND}/reactive", f"{BLIND}/reactive:target=12"),
    (f"{LATE}/reactive", f"{LATE}/reactive:target=12"),
)
"""Its rivals, as published and in their best form; ``reactive`` at two prices of GPU time."""

SAME_ROUTER = ("swarmx/static", "swarmx/reactive", FORESEEN)
"""What scaling alone is worth; all but the last in the full grid alone."""

SCALED = (*STATIC, *chain(*REACTIVE), FORESEEN)
MORE_SCALED = SAME_ROUTER[:-1]

ARMS: Mapping[str, Arm] = {
    **{name: Arm(name) for name in (BLIND, LATE, RANDOM, TWO, LATE_TWO, MEANS, CALLS)},
    **{name: Arm(name) for name in (AFFINE, LATE_AFFINE)},
    POINT: Arm("point", "trained"),
    POINT_ROLES: Arm("point"),
    OURS: Arm("swarmx", "trained"),
    ROLES: Arm("swarmx"),
    FROZEN: Arm("swarmx", adapts=False),
    SETTLED: Arm("swarmx"),
    **{name: Arm(name) for name in (FIFO, COMONOTONE, *SCALED, *MORE_SCALED)},
}
"""Every arm of the study."""

ROUTERS = (BLIND, LATE, MEANS, POINT_ROLES, ROLES)
DEEP_ROUTERS = (OURS, TWO, LATE_TWO, FIFO, POINT)
MORE_ROUTERS = (RANDOM, CALLS, AFFINE, LATE_AFFINE, COMONOTONE)
"""Compared on a fleet that stays as it is: in every world; beside them in deep research, and in
every world of the full grid; in the full grid alone."""

SEARCHED = (ROLES, BLIND, TWO, LATE, LATE_TWO)
MORE_SEARCHED = (MEANS, OURS)
"""Whose highest rate is searched; the latter carry no more or take long: in the full grid alone."""

ADAPTING = ROLES
DRIFTERS = (ADAPTING, FROZEN)
"""Compared through incidents with what ``SETTLED`` says can be reached."""
