"""The questions a policy answers, in the order they are asked.

May the line take it (``Admission``), may its workflow begin (``Gate``), which pools may serve
it (``Router``), who goes first (``Ordering``), may this replica serve it (``Filter``), what
would that cost in seconds (``Scorer``), which one (``Picker``); and, now and then, how many
replicas there shall be (``Scaling``, in ``standing.py``) and whose weights lie where on nodes
that models share (``Residency``, in ``tenancy.py``). A policy owns no clock, no random source
and no memory: what it may know is handed to it, and the same question gets the same answer.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from concertmaster.core.events import RejectReason
from concertmaster.core.fleet import Pool, PoolId, Replica
from concertmaster.core.forecast import Forecast
from concertmaster.core.hedging import Hedging
from concertmaster.core.promise import KvRule
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, Request
from concertmaster.core.standing import Scaling
from concertmaster.core.tenancy import Residency
from concertmaster.core.wait import Crew, Wait
from concertmaster.core.workflow import Owed, Workflow

Binding: TypeAlias = Literal["late", "early"]
"""When a call gets its replica: once one has room for it, or on arrival."""

Truth: TypeAlias = Literal["length", "success"]
"""What an oracle may be told of a call: how long each model's answer is, and which are right."""


class Admission(Protocol):
    """May this call join the line?"""

    def refuses(self, request: Request, waiting_requests: int) -> RejectReason | None:
        """Return why not, or ``None`` to let it in."""

    def expires_s(self, request: Request) -> float:
        """Return the instant at which it is refused if it still waits."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A workflow shall not begin.

    Attributes:
        retry_after_s: Seconds after which it could; ``None`` if it never could.
    """

    reason: RejectReason
    retry_after_s: float | None


class Gate(Protocol):
    """May this workflow begin, and with which model? Asked at its first call only."""

    def judge(self, call: Waiting, pools: Sequence[Pool], view: "View") -> ModelName | Refusal:
        """Return why not, or the model that it is kept to; "" leaves it to the router.

        Args:
            call: The first call of a workflow; nothing has been noted of either.
            pools: Pools that can hold it, in the fleet's order; at least one.
            view: The fleet as it stands now.
        """


class View(Protocol):
    """What a router or a gate may ask about the fleet, the line and the live workflows."""

    @property
    def now_s(self) -> float:
        """Instant that is looked at, on the driver's clock."""

    def pools_of(self, model: ModelName) -> Sequence[Pool]:
        """Pools of a model, in the fleet's order."""

    def in_service(self, pool: Pool) -> Sequence[Replica]:
        """Replicas of a pool that serve now, in a stable order."""

    def ready_s(self, pool: Pool) -> float:
        """Seconds until a replica of the pool can serve; 0 if one does, infinite if none will."""

    def has_room(self, call: Waiting, pool: Pool) -> bool:
        """Whether a replica of the pool could take the call at once."""

    def room(self, call: Waiting, pool: Pool) -> Sequence[Replica]:
        """Replicas of the pool that could take the call at once; none while others wait for it."""

    def crew(self, pool: Pool) -> Crew | None:
        """Replicas of a pool that serve, as one body; ``None`` if none does."""

    def wait(self, call: Waiting, crew: Crew, *, fifo: bool = False) -> Wait:
        """Return the call's wait for a pool without room.

        Args:
            call: A call on its way in, or one that waits.
            crew: Of the pool.
            fifo: As if the line were first come, first served.
        """

    def waiting_tokens(self, pool: Pool) -> int:
        """Tokens that the workflows which wait for the pool still need."""

    def owed(self, model: ModelName) -> Owed:
        """Return what live workflows still need of a model, between their calls too."""

    def open_calls(self, model: ModelName) -> Iterable[Waiting]:
        """Walk through the calls that wait for a model or run on it."""


class Router(Protocol):
    """Which pools may serve this call?"""

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Choose at least one of the pools that can hold the call, in a stable order.

        Args:
            call: The call; its workflow tells where the calls before it went.
            pools: Pools that can hold it, in the fleet's order; at least one.
            view: The fleet as it stands now.
            rng: Source of randomness.
        """


class Ordering(Protocol):
    """Which waiting call goes next?"""

    @property
    def drifts(self) -> bool:
        """True if a call's urgency may grow while it waits; it must never shrink."""

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Seconds by which it is less urgent than an immediate call; smallest goes first.

        Args:
            request: The call.
            forecast: What is predicted of it.
            workflow: Its workflow so far.
            pool: The first pool it may go to, to turn tokens into seconds.
        """


class Filter(Protocol):
    """Which of these replicas may serve this call at all?"""

    @property
    def name(self) -> str:
        """Stable name: it appears in traces and explanations."""

    def keep(self, call: Waiting, pool: Pool, replicas: Iterable[Replica]) -> list[Replica]:
        """Drop replicas of one pool where serving would fail, not where it is merely slow.

        It takes a pool's replicas at once, so that what they share is computed once.
        """


class Scorer(Protocol):
    """What would this replica cost this call?"""

    @property
    def name(self) -> str:
        """Stable name: it appears in traces and explanations."""

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds added to the call. 0.0 is free, lower is better, never negative.

        A scorer sees one replica at a time, so it cannot grade on a curve: a replica's
        cost does not depend on which others were offered.
        """


class Picker(Protocol):
    """Which of the remaining replicas gets the call?"""

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Choose from a non-empty sequence; the same inputs give the same choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All answers together.

    Attributes:
        aging: Seconds of urgency that a second of waiting is worth; above 0, so that no call
            waits for ever.
        window_s: Prefill that a replica may have been handed ahead of time. Smaller keeps
            more calls in the line, where their order can still change.
        kv_level: Probability with which an answer shall fit the KV room promised to it.
        gate: Whether a workflow may begin; ``None`` lets all of them.
        kv: How KV is promised; ``None`` promises an answer at ``kv_level`` and leaves the test
            of room to a filter.
        residency: Whose weights lie where on shared nodes; ``None`` where there are none.
        scaling: How many replicas there shall be; ``None`` leaves the fleet as its file says.
        binds: "late": calls wait in the line until a replica has room. "early": every replica
            that serves is open to any number of calls, and those it cannot run queue inside it.
        reroute_s: A call that has waited this long is routed again, and once more each time its
            wait has doubled; ``None`` for never.
        siblings: Whether it is written down when calls in flight are expected to end, so that
            what a call costs can be weighed against the end of its siblings.
        by_mean: Whether laws of output tokens are reduced to their means before they are composed.
        hedge: When a late call goes to a second replica as well; ``None`` for never.
        clairvoyant: What a named oracle is told: the driver then forecasts that from the truth.
    """

    name: str
    admission: Admission
    router: Router
    ordering: Ordering
    filters: tuple[Filter, ...]
    scorers: tuple[Scorer, ...]
    picker: Picker
    aging: float = 1.0
    window_s: float = 0.25
    kv_level: float = 0.9
    gate: Gate | None = None
    kv: KvRule | None = None
    residency: Residency | None = None
    scaling: Scaling | None = None
    binds: Binding = "late"
    reroute_s: float | None = None
    siblings: bool = False
    by_mean: bool = False
    hedge: Hedging | None = None
    clairvoyant: frozenset[Truth] = frozenset()

    def __post_init__(self) -> None:
        if self.aging <= 0:
            raise ValueError(f"policy {self.name!r}: aging must be above 0, got {self.aging}")
        if self.reroute_s is not None and self.reroute_s <= 0:
            raise ValueError(f"policy {self.name!r}: reroute_s must be above 0")

    @property
    def bones(self) -> tuple[object, ...]:
        """What a scheduler has built in: another policy can take over only if it agrees."""
        return (self.binds, self.kv, self.residency, self.scaling)

    def costs_s(self, now_s: float, call: Waiting, replica: Replica) -> Mapping[str, float]:
        """Seconds by scorer, for the record."""
        return {scorer.name: scorer.cost_s(now_s, call, replica) for scorer in self.scorers}
