"""Predictions as data: a distribution as quantiles, and what is predicted of a call.

Distributions of independent things are composed, never summed level by level: the P95 of
a sum is far below the sum of the P95s (SwarmX 2.2 leaves the operator open; our ruling).
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from itertools import pairwise
from operator import le, lt

from concertmaster.core.facts import fact
from concertmaster.core.request import ModelName

_BODY = [i / 40 for i in range(2, 36)]
_TAIL = [1 - 0.1 * 0.8**i for i in range(40)]
_EDGES: tuple[float, ...] = (0.0, 0.004, 0.012, 0.03, *_BODY, *_TAIL, 1.0)
_CELLS = tuple(((low + high) / 2, high - low) for low, high in pairwise(_EDGES))
_SPLIT = 4
GRID: tuple[float, ...] = tuple(
    low + (high - low) * (2 * part + 1) / (2 * _SPLIT)
    for low, high in pairwise(_EDGES)
    for part in range(_SPLIT)
)
"""Levels of a composed distribution: even in the body, finer towards both tails."""
_FINE_CELLS = tuple((level, _CELLS[i // _SPLIT][1] / _SPLIT) for i, level in enumerate(GRID))


@fact(frozen=True, slots=True)
class Quantiles:
    """A distribution, as values at increasing probability levels.

    Between two levels the quantile function is linear; beyond the outermost levels it is
    flat, so give levels as far out as matters.

    >>> Quantiles((0.1, 0.5, 0.9), (10.0, 20.0, 60.0)).at(0.7)
    40.0
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.values):
            raise ValueError("quantiles need as many values as levels, at least one")
        if not all(map(lt, self.levels, self.levels[1:])):
            raise ValueError(f"levels must increase, got {self.levels}")
        if not all(map(le, self.values, self.values[1:])):
            raise ValueError(f"values must not decrease, got {self.values}")

    @classmethod
    def exactly(cls, value: float) -> "Quantiles":
        """Return the distribution that is always ``value``."""
        return cls((0.5,), (value,))

    @classmethod
    def of_samples(cls, samples: Sequence[float], levels: Sequence[float] = GRID) -> "Quantiles":
        """Return the empirical quantiles of at least one sample.

        >>> Quantiles.of_samples([3.0, 1.0, 2.0], levels=(0.0, 0.5, 1.0)).values
        (1.0, 2.0, 3.0)
        """
        ranked = sorted(samples)
        last = len(ranked) - 1
        values = []
        for level in levels:
            low = math.floor(level * last)
            high = min(low + 1, last)
            values.append(ranked[low] + (ranked[high] - ranked[low]) * (level * last - low))
        return cls(tuple(levels), tuple(values))

    def at(self, level: float) -> float:
        """Value that the quantity stays below with probability ``level``."""
        levels, values = self.levels, self.values
        i = bisect_left(levels, level)
        if i == 0:
            return values[0]
        if i == len(levels):
            return values[-1]
        if levels[i] == level:
            return values[i]
        share = (level - levels[i - 1]) / (levels[i] - levels[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])

    @property
    def median(self) -> float:
        """Value at level 0.5."""
        return self.at(0.5)

    @property
    def mean(self) -> float:
        """Expected value.

        >>> Quantiles.exactly(3.0).mean
        3.0
        """
        levels, values = self.levels, self.values
        total = levels[0] * values[0] + (1 - levels[-1]) * values[-1]
        for i in range(1, len(levels)):
            total += (levels[i] - levels[i - 1]) * (values[i] + values[i - 1]) / 2
        return total

    def tail_mean(self, level: float) -> float:
        """Mean of the worst ``1 - level`` share of cases (CVaR).

        >>> round(Quantiles((0.0, 1.0), (0.0, 1.0)).tail_mean(0.9), 3)
        0.95
        """
        total, weight = 0.0, 0.0
        for low, high in pairwise(_EDGES):
            start = max(low, level)
            if start < high:
                total += (self.at(start) + self.at(high)) / 2 * (high - start)
                weight += high - start
        return total / weight if weight else self.values[-1]

    def shift(self, seconds: float) -> "Quantiles":
        """Add a constant."""
        return Quantiles(self.levels, tuple(value + seconds for value in self.values))

    def scale(self, factor: float) -> "Quantiles":
        """Multiply by a constant that is not negative."""
        return Quantiles(self.levels, tuple(value * factor for value in self.values))

    def cap(self, most: float) -> "Quantiles":
        """Never above ``most``."""
        if self.values[-1] <= most:
            return self
        return Quantiles(self.levels, tuple(min(value, most) for value in self.values))

    def compose(self, other: "Quantiles") -> "Quantiles":
        """Return the distribution of the sum of two independent quantities.

        >>> coin = Quantiles((0.0, 0.499999, 0.500001, 1.0), (0.0, 0.0, 1.0, 1.0))
        >>> round(coin.compose(coin).mean, 2)
        1.0
        """
        sums = [
            (mine + theirs, my_mass * their_mass)
            for mine, my_mass in _atoms(self)
            for theirs, their_mass in _atoms(other)
        ]
        return _from_atoms(sums)

    @staticmethod
    def mix(parts: Iterable[tuple[float, "Quantiles"]]) -> "Quantiles":
        """Return the law of a quantity that follows each part with the given weight."""
        weighted = [(weight, part) for weight, part in parts if weight > 0]
        total = math.fsum(weight for weight, _ in weighted)
        if total <= 0:
            raise ValueError("a mixture needs a positive weight")
        return _from_atoms(
            [
                (value, mass * weight / total)
                for weight, part in weighted
                for value, mass in _atoms(part, _FINE_CELLS)
            ]
        )


def _atoms(
    law: Quantiles, cells: Iterable[tuple[float, float]] = _CELLS
) -> list[tuple[float, float]]:
    """Return (middle value, mass) of each cell.

    A sum pairs all cells of two laws, so it takes the coarse ones; a mixture takes the fine.
    """
    return [(law.at(level), mass) for level, mass in cells]


def _from_atoms(atoms: list[tuple[float, float]]) -> Quantiles:
    """Read the quantiles off a discrete law, each atom standing at the middle of its mass."""
    atoms.sort()
    levels: list[float] = []
    below = 0.0
    for _, mass in atoms:
        levels.append(below + mass / 2)
        below += mass
    values: list[float] = []
    i, last = 0, len(atoms) - 1
    for level in GRID:
        while i < last and levels[i] < level:
            i += 1
        low, high = max(0, i - 1), i
        span = levels[high] - levels[low]
        share = min(max((level - levels[low]) / span, 0.0), 1.0) if span > 0 else 0.0
        values.append(atoms[low][0] + share * (atoms[high][0] - atoms[low][0]))
    return Quantiles(GRID, tuple(_rising(values)))


def _rising(values: Iterable[float]) -> Iterable[float]:
    """Undo rounding that would let a later value fall below an earlier one."""
    highest = -math.inf
    for value in values:
        highest = max(highest, value)
        yield highest


UNKNOWN_OUTPUT_TOKENS = 256
"""What a call is taken to produce when nothing is known; the order of a chat answer."""


@fact(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is predicted of one call and of the rest of its workflow.

    Attributes:
        output_tokens: Of this call, on a model without an entry of its own; ``None`` if
            nothing is predicted.
        output_tokens_on: Of this call, by model.
        success: Probability that the model solves it, by model.
        remaining_tokens: Output tokens of the workflow from here on, this call included, on a
            model without an entry of its own.
        remaining_tokens_on: The same, by the model that serves the rest of the workflow.
        remaining_by: Mean output tokens of the workflow from here on, this call included, by
            the model that its calls name; "" stands for those that name none. Empty where all
            calls go with this one.
        remaining_calls: Calls of the workflow from here on, this call included.
        remaining_tool_s: Seconds of tools and people between those calls.
        tool_call: Probability that the answer asks for a tool; ``None`` if nothing is predicted.
        source: Which step of the fallback answered ("role", "app", "model", "global", "none").
    """

    output_tokens: Quantiles | None = None
    output_tokens_on: Mapping[ModelName, Quantiles] = field(default_factory=dict)
    success: Mapping[ModelName, float] = field(default_factory=dict)
    remaining_tokens: Quantiles | None = None
    remaining_tokens_on: Mapping[ModelName, Quantiles] = field(default_factory=dict)
    remaining_by: Mapping[ModelName, float] = field(default_factory=dict)
    remaining_calls: Quantiles | None = None
    remaining_tool_s: Quantiles | None = None
    tool_call: float | None = None
    source: str = "none"

    def output_law(self, model: ModelName) -> Quantiles | None:
        """Distribution of this call's output tokens on ``model``, if one is known."""
        return self.output_tokens_on.get(model, self.output_tokens)

    def remaining_on(self, model: ModelName) -> Quantiles | None:
        """Distribution of what the workflow still needs if ``model`` serves it."""
        return self.remaining_tokens_on.get(model, self.remaining_tokens)

    def elsewhere(self, model: ModelName) -> Mapping[ModelName, int]:
        """Return the output tokens that calls bound to other models than this will need.

        >>> by = {ModelName("m"): 30.0, ModelName("x"): 400.2, ModelName(""): 5.0}
        >>> Forecast(remaining_by=by).elsewhere(ModelName("m"))
        {'x': 400}
        """
        named = {one: round(mean) for one, mean in self.remaining_by.items()}
        return {one: tokens for one, tokens in named.items() if one not in ("", model) and tokens}

    def output_at(self, model: ModelName, level: float, most: int) -> int:
        """Output tokens on ``model`` at a probability level, from 1 to the caller's cap.

        >>> Forecast().output_at(ModelName("m"), 0.5, 100)
        100
        """
        law = self.output_law(model)
        tokens = UNKNOWN_OUTPUT_TOKENS if law is None else math.ceil(law.at(level))
        return max(1, min(tokens, most))


NO_FORECAST = Forecast()
