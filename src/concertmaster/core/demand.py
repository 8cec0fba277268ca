"""What models are asked for, counted as it happens: sums in which old news fades."""

import math
from dataclasses import dataclass

from concertmaster.core.request import ModelName
from concertmaster.core.standing import Demand


@dataclass(slots=True)
class Flow:
    """Decayed sums of one model.

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

    def fade(self, factor: float) -> None:
        """Let everything count for less."""
        for name in Flow.__slots__:
            setattr(self, name, factor * getattr(self, name))


class Demands:
    """The flows of all models over a fading memory.

    Args:
        memory_s: News counts with e^-1 of its weight after this long.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._flows: dict[ModelName, Flow] = {}
        self._begun_s: float | None = None
        self._faded_s = 0.0

    @property
    def models(self) -> list[ModelName]:
        """Models that were asked for anything."""
        return list(self._flows)

    def flow(self, model: ModelName) -> Flow:
        """Return the sums of a model, to add to."""
        flow = self._flows.get(model)
        if flow is None:
            flow = self._flows[model] = Flow()
        return flow

    def dispatched(self, model: ModelName, prefill_tokens: int, context_tokens: float) -> None:
        """Note a call handed to a replica."""
        flow = self.flow(model)
        flow.dispatches += 1.0
        flow.prefill_tokens += prefill_tokens
        flow.contexts += context_tokens

    def fade(self, now_s: float) -> None:
        """Let time pass; memory begins at the first call of this."""
        if self._begun_s is None:
            self._begun_s = self._faded_s = now_s
        factor = math.exp((self._faded_s - now_s) / self._memory_s)
        self._faded_s = now_s
        for flow in self._flows.values():
            flow.fade(factor)

    def demand(self, model: ModelName, *, owed_tokens: int, owed_workflows: int) -> Demand:
        """Return rates as of the last fading.

        A sum that fades with ``memory_s`` counts as much as ``window_s`` seconds of news; with
        little of it, the rate is uncertain.
        """
        flow = self._flows.get(model)
        if flow is None or self._begun_s is None or self._faded_s <= self._begun_s:
            return Demand(owed_tokens=owed_tokens, owed_workflows=owed_workflows)
        fresh = math.exp((self._begun_s - self._faded_s) / self._memory_s)
        window_s = self._memory_s * (1 - fresh)
        return Demand(
            tokens_per_s=max(0.0, flow.tokens) / window_s,
            announcements_per_s=flow.growths / window_s,
            variance=flow.squares / window_s,
            uncertainty_per_s=(1 + fresh) / (2 * window_s),
            owed_tokens=owed_tokens,
            owed_workflows=owed_workflows,
            open_ratio=_ratio(flow.open_calls, flow.live_workflows, 1.0),
            prefill_ratio=_ratio(flow.prefill_tokens, flow.output_tokens, 0.0),
            context_tokens=max(1.0, _ratio(flow.contexts, flow.dispatches, 1.0)),
        )


def _ratio(part: float, whole: float, unknown: float) -> float:
    """Quotient of two sums; the third value where there is nothing to divide by."""
    return part / whole if whole > 1e-9 else unknown
