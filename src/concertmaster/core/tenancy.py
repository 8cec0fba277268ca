"""What a residency policy sees of nodes that models share, and the questions it answers."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from concertmaster.core.fleet import Readiness, Replica
from concertmaster.core.request import ModelName

StepKind: TypeAlias = Literal["shrink", "drop", "unload", "demote", "drain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What is asked of a model, now and soon.

    Attributes:
        waiting_calls: Calls that wait for it.
        waited_s: Seconds that they have waited, in sum.
        interactive_calls: Those of them that a person waits for.
        interactive_waited_s: Seconds that those have waited, in sum.
        oldest_s: Longest wait of one call.
        served_s: Since the latest replica that serves it came up; 0 if one starts or none does.
        first_due_s: Earliest deadline among them; infinite if none has one.
        owing_workflows: Live workflows that will need it, by forecast.
        held_workflows: Those of them whose calls wait for models that nobody serves yet.
        owing_people: Those of the others that a person waits for.
        calls: Calls that have ever arrived for it.
        calls_per_s: Calls that arrived for it lately.
        interactive_ratio: Share of these that a person waited for.
    """

    model: ModelName
    waiting_calls: int = 0
    waited_s: float = 0.0
    interactive_calls: int = 0
    interactive_waited_s: float = 0.0
    oldest_s: float = 0.0
    served_s: float = 0.0
    first_due_s: float = math.inf
    owing_workflows: int = 0
    held_workflows: int = 0
    owing_people: int = 0
    calls: int = 0
    calls_per_s: float = 0.0
    interactive_ratio: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One way to free memory of a node. Each kind frees what those before it free, and more.

    Attributes:
        kind: "shrink" takes KV that holds nothing, "drop" takes cold prefixes with it, "unload"
            ends a sleeping engine, "demote" moves the weights of an idle one away, "drain" does
            so once the calls there have ended.
        to: Where the weights go; ``None`` if they stay.
        hbm_bytes: GPU memory that it frees.
        want: What is asked of its model.
        back_s: Seconds more that its model then needs to be ready.
        redo_s: Seconds of prefill that must be done again for what is dropped.
        unused_s: Since it was last given a call, or came up.
        resident_s: Since it came up; infinite if it does not run.
        replicas: Of its model that run, this one included; 1 if it does not.
        busy_s: Until the calls there have ended, by forecast.
        busy_interactive: Whether a person waits for one of these.
    """

    kind: StepKind
    replica: Replica
    to: Readiness | None = None
    hbm_bytes: int = 0
    want: Want
    back_s: float = 0.0
    redo_s: float = 0.0
    unused_s: float = 0.0
    resident_s: float = math.inf
    replicas: int = 1
    busy_s: float = 0.0
    busy_interactive: bool = False


class Residency(Protocol):
    """Whose weights lie where on nodes that models share?"""

    @property
    def colocates(self) -> bool:
        """Whether several models may run on one node."""

    def price_s(self, step: Step, want: Want) -> float | None:
        """Seconds that a step costs others; the cheapest are taken. ``None`` forbids it.

        Args:
            step: A step on the node.
            want: For whom memory is needed.
        """

    def worth(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Whether a model that calls wait for shall be brought up at this price."""

    def spreads(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Whether another replica of a model that runs shall be brought up for calls that wait."""

    def prefetches(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Whether a model that nobody waits for yet shall be brought up at this price."""
