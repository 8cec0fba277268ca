"""What models are asked for, counted as it happens: sums in which old news fades."""

import math
from dataclasses import dataclass, field

from concertmaster.core.request import ModelName
from concertmaster.core.standing import Demand

RISE_DEVIATIONS = 5.0
"""Standard deviations above the usual from which the usual is over: 3 in 100,000 by chance."""


@dataclass(slots=True)
class Flow:
    """Sums of one model.

    Attributes:
        tokens: Output tokens by which forecasts of what workflows need have changed.
        growths: How often they grew.
        squares: Sum of the squares of these growths.
        contexts: Sum over dispatches of prompt and half the expected answer.
    """

    tokens: float = 0.0
    growths: float = 0.0
    squares: float = 0.0
    output_tokens: float = 0.0
    prefill_tokens: float = 0.0
    contexts: float = 0.0
    dispatches: float = 0.0
    open_calls: float = 0.0
    live_workflows: float = 0.0

    def announce(self, tokens: int) -> None:
        """Note that a call changes by so many tokens what its workflow is known to need."""
        self.tokens += tokens
        if tokens > 0:
            self.growths += 1.0
            self.squares += float(tokens) * tokens

    def exceed(self, tokens: int, before_tokens: int) -> None:
        """Note that an answer outgrows its forecast: it belongs to what was announced before."""
        self.tokens += tokens
        self.squares += float(tokens) * (tokens + 2 * before_tokens)

    def take_in(self, fresh: "Flow", factor: float) -> None:
        """Let everything count for less, and add what is fresh."""
        for name in Flow.__slots__:
            setattr(self, name, factor * getattr(self, name) + getattr(fresh, name))


@dataclass(slots=True)
class _Account:
    """One model: what came since the last fading, and what is remembered.

    Attributes:
        window_s: How much time the memory stands for.
        window_squares: Sum of the squares of the weights of its seconds.
    """

    fresh: Flow = field(default_factory=Flow)
    whole: Flow = field(default_factory=Flow)
    window_s: float = 0.0
    window_squares: float = 0.0

    def fade(self, latest_s: float, factor: float) -> None:
        """Take in what is fresh; it alone counts if it is more than chance explains."""
        if self._has_risen(latest_s):
            self.whole, self.window_s, self.window_squares = Flow(), 0.0, 0.0
        self.whole.take_in(self.fresh, factor)
        self.window_s = factor * self.window_s + latest_s
        self.window_squares = factor * factor * self.window_squares + latest_s
        self.fresh = Flow()

    def _has_risen(self, latest_s: float) -> bool:
        if not latest_s or not self.window_s:
            return False
        usual = self.whole.tokens / self.window_s
        variance = self.whole.squares / self.window_s
        uncertainty = 1 / latest_s + self.window_squares / self.window_s**2
        chance = RISE_DEVIATIONS * math.sqrt(variance * uncertainty)
        return self.fresh.tokens / latest_s > usual + chance


class Demands:
    """What all models are asked for, over a fading memory.

    Args:
        memory_s: News counts with e^-1 of its weight after this long.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._accounts: dict[ModelName, _Account] = {}
        self._faded_s: float | None = None

    @property
    def models(self) -> list[ModelName]:
        """Models that were asked for anything."""
        return list(self._accounts)

    def flow(self, model: ModelName) -> Flow:
        """Return the sums since the last fading, to add to."""
        account = self._accounts.get(model)
        if account is None:
            account = self._accounts[model] = _Account()
        return account.fresh

    def dispatched(self, model: ModelName, prefill_tokens: int, context_tokens: float) -> None:
        """Note a call handed to a replica."""
        flow = self.flow(model)
        flow.dispatches += 1.0
        flow.prefill_tokens += prefill_tokens
        flow.contexts += context_tokens

    def fade(self, now_s: float) -> None:
        """Let time pass; memory begins at the first call of this.

        The memory's own length fades in the same way, so that rates are right from the start.
        """
        latest_s = 0.0 if self._faded_s is None else now_s - self._faded_s
        factor = math.exp(-latest_s / self._memory_s)
        self._faded_s = now_s
        for account in self._accounts.values():
            account.fade(latest_s, factor)

    def demand(self, model: ModelName, *, owed_tokens: int, owed_workflows: int) -> Demand:
        """Return rates as of the last fading."""
        account = self._accounts.get(model)
        if account is None or not account.window_s:
            return Demand(owed_tokens=owed_tokens, owed_workflows=owed_workflows)
        whole, window_s = account.whole, account.window_s
        return Demand(
            tokens_per_s=max(0.0, whole.tokens) / window_s,
            announcements_per_s=whole.growths / window_s,
            variance=whole.squares / window_s,
            uncertainty_per_s=account.window_squares / window_s**2,
            owed_tokens=owed_tokens,
            owed_workflows=owed_workflows,
            open_ratio=_ratio(whole.open_calls, whole.live_workflows, 1.0),
            prefill_ratio=_ratio(whole.prefill_tokens, whole.output_tokens, 0.0),
            context_tokens=max(1.0, _ratio(whole.contexts, whole.dispatches, 1.0)),
        )


def _ratio(part: float, whole: float, unknown: float) -> float:
    """Quotient of two sums; the third value where there is nothing to divide by."""
    return part / whole if whole > 1e-9 else unknown
