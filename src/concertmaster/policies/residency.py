"""Residencies: which models are in service on nodes that they share."""

import math
from dataclasses import dataclass

from concertmaster.core.tenancy import Step, Want

SILENT_CALLS = 3.0
"""Calls that did not come, at the rate of late, after which no more are taken to come: with
Poisson arrivals a model that is still used is silent for so long one time in twenty."""


def weight(interactive_ratio: float, interactive: float) -> float:
    """Return what a second of a model's callers counts for, if some of them are people.

    >>> weight(0.5, 4.0)
    2.5
    """
    return 1.0 + (interactive - 1.0) * interactive_ratio


def coming_per_s(step: Step) -> float:
    """Return the calls a second still to be expected for a model; none once it is silent."""
    silent = step.unused_s * step.want.calls_per_s > SILENT_CALLS
    return 0.0 if silent else step.want.calls_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Give up what will be missed least; swap once waiting has cost as much as swapping.

    A step costs the seconds that calls to come will wait because of it. A swap is made when the
    seconds that calls have waited for it add up to its price (rent until that has cost as much
    as buying), so a call waits for a swap at the longest as long as the swap costs others.

    Attributes:
        interactive: What a second of a person's wait counts for; a program's counts 1.
        residence: A model that will be asked for stays up at least this many times what
            coming back would take.
        hold_s: Longest wait after which a batch call may end a model that people use.
        hysteresis: Times its price that a prefetch must gain.
    """

    interactive: float = 4.0
    residence: float = 3.0
    hold_s: float = 300.0
    hysteresis: float = 2.0
    colocates: bool = True

    def price_s(self, step: Step, want: Want) -> float | None:
        """Multiply the seconds that its model then takes longer by the calls that will come."""
        mine = step.want
        rate = coming_per_s(step)
        soon = mine.owing_workflows - mine.held_workflows + rate * step.back_s
        if step.kind == "shrink":
            return 0.0
        if step.kind == "drop":
            return step.redo_s * min(1.0, soon)
        if self._is_protected(step, want, soon):
            return None
        callers = weight(mine.interactive_ratio, self.interactive)
        if step.kind == "drain":
            out_s = step.busy_s + (1 + self.residence) * step.back_s
            soon = mine.owing_workflows + rate * out_s
            return callers * soon * out_s / step.replicas
        return callers * soon * step.back_s / step.replicas

    def _is_protected(self, step: Step, want: Want, soon: float) -> bool:
        """Whether it has hardly come up, or people use it and no person asks for its place."""
        if step.kind == "unload":
            return False
        if step.kind == "drain" and step.resident_s < self.residence * step.back_s and soon > 0:
            return True
        mine = step.want
        coming = mine.interactive_ratio * coming_per_s(step) * self.hold_s
        people = step.busy_interactive or mine.owing_people + coming >= 1
        return people and not want.interactive_calls and want.oldest_s < self.hold_s

    def worth(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Compare what waiting has cost with the price."""
        waited_s = want.waited_s + (self.interactive - 1) * want.interactive_waited_s
        return waited_s >= price_s or want.oldest_s >= self.hold_s

    def spreads(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Compare what waiting has cost with the price and the load, once waits are as long."""
        people_s = min(want.interactive_waited_s, want.interactive_calls * want.served_s)
        waited_s = min(want.waited_s, want.waiting_calls * want.served_s)
        waited_s += (self.interactive - 1) * people_s
        dear_s = self.hysteresis * (price_s + ready_s)
        return min(want.oldest_s, want.served_s) >= ready_s and waited_s >= dear_s

    def prefetches(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Compare the seconds that workflows on their way would wait with the price."""
        callers = weight(want.interactive_ratio, self.interactive)
        return callers * want.owing_workflows * ready_s > self.hysteresis * price_s


class OnDemand:
    """Swaps as soon as a call asks for it, and for nothing else."""

    __slots__ = ()

    def worth(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Agree: what may not be given up has no price."""
        return True

    def spreads(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Take memory that is free, once waits are as long as the load."""
        return price_s == 0.0 and want.oldest_s >= ready_s

    def prefetches(self, want: Want, ready_s: float, price_s: float) -> bool:
        """Wait to be asked."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class LruSwap(OnDemand):
    """Swap on demand and end the model that was used longest ago, as llama-swap does."""

    horizon_s: float = 86_400.0
    colocates: bool = True

    def price_s(self, step: Step, want: Want) -> float | None:
        """Ask more for what was used later."""
        if step.kind in ("shrink", "drop"):
            return 0.0
        return max(0.0, self.horizon_s - step.unused_s) + step.busy_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Qlm(OnDemand):
    """A queue for each model, earliest deadline first; a swap serves a whole group (QLM).

    A model is swapped out once its calls have ended, and made to end them only for a call with
    a deadline.
    """

    colocates: bool = True

    def price_s(self, step: Step, want: Want) -> float | None:
        """Allow a swap between groups; the longest unused goes first."""
        if step.kind in ("shrink", "drop"):
            return 0.0
        if step.kind == "drain" and want.first_due_s == math.inf:
            return None
        return 1 / (1 + step.unused_s) + step.busy_s


@dataclass(frozen=True, slots=True, kw_only=True)
class NoColocation(OnDemand):
    """One model a node, the hottest first: those with the most calls so far.

    A model that runs gives way to one that does not only if that was asked for more often by
    two standard deviations of the difference, so the choice settles; a second replica gives
    way to any model that has none. It is learnt as calls come, since no file says it.
    """

    colocates: bool = False

    def price_s(self, step: Step, want: Want) -> float | None:
        """Give up engines that sleep for good, second replicas, and models that are colder."""
        if step.kind == "unload":
            return 0.0
        lead = want.calls - step.want.calls
        hotter = lead > 2 * math.sqrt(want.calls + step.want.calls)
        return 1.0 if step.replicas > 1 or hotter else None
