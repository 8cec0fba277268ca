"""What models are asked for, counted as it happens: sums in which old news fades."""

import math
from dataclasses import dataclass, field

from concertmaster.core.request import ModelName
from concertmaster.core.standing import Demand


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
        """Note that workflows are now known to need so many more tokens, or fewer."""
        self.tokens += tokens
        if tokens > 0:
            self.growths += 1.0
            self.squares += float(tokens) * tokens

    def take_in(self, fresh: "Flow", factor: float) -> None:
        """Let everything count for less, and add what is fresh."""
        for name in Flow.__slots__:
            setattr(self, name, factor * getattr(self, name) + getattr(fresh, name))


@dataclass(slots=True)
class _Account:
    """One model: what came since the last fading, the last that was taken in, and all."""

    fresh: Flow = field(default_factory=Flow)
    latest: Flow = field(default_factory=Flow)
    whole: Flow = field(default_factory=Flow)


class Demands:
    """What all models are asked for, over a fading memory.

    Args:
        memory_s: News counts with e^-1 of its weight after this long.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._accounts: dict[ModelName, _Account] = {}
        self._faded_s: float | None = None
        self._latest_s = 0.0
        self._window_s = 0.0
        self._window_squares = 0.0

    @property
    def models(self) -> list[ModelName]:
        """Models that were asked for anything."""
        return list(self._accounts)

    def flow(self, model: ModelName) -> Flow:
        """Return the sums since the last fading, to add to."""
        return self._account(model).fresh

    def _account(self, model: ModelName) -> _Account:
        account = self._accounts.get(model)
        if account is None:
            account = self._accounts[model] = _Account()
        return account

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
        self._faded_s, self._latest_s = now_s, latest_s
        self._window_s = factor * self._window_s + latest_s
        self._window_squares = factor * factor * self._window_squares + latest_s
        for account in self._accounts.values():
            account.whole.take_in(account.fresh, factor)
            account.latest, account.fresh = account.fresh, Flow()

    def demand(self, model: ModelName, *, owed_tokens: int, owed_workflows: int) -> Demand:
        """Return rates as of the last fading."""
        account, window_s = self._accounts.get(model), self._window_s
        if account is None or not window_s or not self._latest_s:
            return Demand(owed_tokens=owed_tokens, owed_workflows=owed_workflows)
        whole, latest = account.whole, account.latest
        return Demand(
            tokens_per_s=max(0.0, whole.tokens) / window_s,
            announcements_per_s=whole.growths / window_s,
            variance=whole.squares / window_s,
            uncertainty_per_s=self._window_squares / window_s**2,
            latest_tokens_per_s=max(0.0, latest.tokens) / self._latest_s,
            latest_variance=latest.squares / self._latest_s,
            latest_s=self._latest_s,
            owed_tokens=owed_tokens,
            owed_workflows=owed_workflows,
            open_ratio=_ratio(whole.open_calls, whole.live_workflows, 1.0),
            prefill_ratio=_ratio(whole.prefill_tokens, whole.output_tokens, 0.0),
            context_tokens=max(1.0, _ratio(whole.contexts, whole.dispatches, 1.0)),
        )


def _ratio(part: float, whole: float, unknown: float) -> float:
    """Quotient of two sums; the third value where there is nothing to divide by."""
    return part / whole if whole > 1e-9 else unknown
