"""Distributions for the hot path: a handful of values at fixed ranks, composed in microseconds.

``Quantiles`` keeps what was predicted, at 300 levels once composed; a decision that weighs
many candidates keeps each distribution as one value for each cell of probability, fine
towards the upper tail, and a cost is a weighted sum of these values.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import NormalDist
from typing import TypeAlias

from concertmaster.core.forecast import Quantiles

Sketch: TypeAlias = Sequence[float]
"""Values that never fall, one for each of ``RANKS``; or a single one, which is certain."""

EDGES: tuple[float, ...] = (
    *(0.0, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.58, 0.66, 0.72, 0.77, 0.81, 0.84, 0.87, 0.89),
    *(0.91, 0.925, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 1.0),
)
RANKS: tuple[float, ...] = tuple((low + high) / 2 for low, high in pairwise(EDGES))
MASSES: tuple[float, ...] = tuple(high - low for low, high in pairwise(EDGES))

_BELOW = (0.0, *accumulate(MASSES))
_PAIR_MASSES = tuple(mine * theirs for mine in MASSES for theirs in MASSES)
_PAIRS = range(len(_PAIR_MASSES))
_NORMAL = tuple(NormalDist().inv_cdf(rank) for rank in RANKS)
_LAST = len(RANKS) - 1
_OUTLIVED = 0.25


def sketch_of(law: Quantiles, *, most: float = math.inf) -> Sketch:
    """Return a law as a sketch, its values between 1 and ``most``.

    >>> sketch_of(Quantiles.exactly(300.0), most=256)
    (256.0,)
    """
    if len(law.values) == 1:
        return (min(max(law.values[0], 1.0), float(most)),)
    return tuple(min(max(law.at(rank), 1.0), float(most)) for rank in RANKS)


def affine(sketch: Sketch, factor: float, shift: float = 0.0) -> Sketch:
    """Return the sketch of ``factor * x + shift``; the factor is not negative."""
    return [factor * value + shift for value in sketch]


def add(one: Sketch, other: Sketch) -> Sketch:
    """Return the distribution of a sum of two independent quantities.

    >>> add((1.0,), (2.0,))
    [3.0]
    """
    if len(one) == 1:
        return affine(other, 1.0, one[0])
    if len(other) == 1:
        return affine(one, 1.0, other[0])
    sums = [mine + theirs for mine in one for theirs in other]
    order = sorted(_PAIRS, key=sums.__getitem__)
    levels = list(accumulate(map(_PAIR_MASSES.__getitem__, order), initial=0.0))
    return [_read(sums, order, levels, rank) for rank in RANKS]


def add_in_step(one: Sketch, other: Sketch) -> Sketch:
    """Return the distribution of a sum whose terms are large together (comonotone)."""
    if len(one) == 1 or len(other) == 1:
        return add(one, other)
    return [mine + theirs for mine, theirs in zip(one, other, strict=True)]


def _read(
    values: Sequence[float], order: Sequence[int], levels: Sequence[float], rank: float
) -> float:
    """Read a rank off a discrete law, each value standing at the middle of its mass.

    Args:
        values: In any order.
        order: Their indices, by value.
        levels: Mass before each of them in that order, and all of it at last.
        rank: A probability.
    """
    i = bisect_right(levels, rank) - 1
    if 2 * rank < levels[i] + levels[i + 1]:
        i -= 1
    if i < 0:
        return values[order[0]]
    if i + 2 >= len(levels):
        return values[order[-1]]
    low, high = values[order[i]], values[order[i + 1]]
    share = (2 * rank - levels[i] - levels[i + 1]) / (levels[i + 2] - levels[i])
    return low + share * (high - low)


def middle(sketch: Sketch) -> float:
    """Return the value at the rank next to the median."""
    return sketch[len(sketch) // 2]


def moments(sketch: Sketch) -> tuple[float, float]:
    """Return mean and variance.

    >>> moments((5.0,))
    (5.0, 0.0)
    """
    if len(sketch) == 1:
        return sketch[0], 0.0
    mean = sum(mass * value for mass, value in zip(MASSES, sketch, strict=True))
    square = sum(mass * value * value for mass, value in zip(MASSES, sketch, strict=True))
    return mean, max(0.0, square - mean * mean)


def of_moments(mean: float, variance: float) -> Sketch:
    """Return the lognormal of this mean and variance: a sum of lengths, by Fenton and Wilkinson."""
    if variance <= 0.0 or mean <= 0.0:
        return (mean,)
    spread_log = math.log1p(variance / (mean * mean))
    centre, sigma = math.log(mean) - spread_log / 2, math.sqrt(spread_log)
    return [math.exp(centre + sigma * z) for z in _NORMAL]


class Bar:
    """Instants at which something ends, with how far others are expected to end after it.

    >>> Bar((12.0,)).passed_s(2.0, 13.0)
    3.0

    Args:
        ends_s: Their distribution.

    Attributes:
        middle_s: The instant next to the median.
    """

    __slots__ = ("_below", "_ends_s", "_moment", "middle_s")

    def __init__(self, ends_s: Sketch) -> None:
        masses = MASSES if len(ends_s) > 1 else (1.0,)
        self.middle_s = middle(ends_s)
        self._ends_s = ends_s
        self._below = (0.0, *accumulate(masses))
        moments = (mass * end_s for mass, end_s in zip(masses, ends_s, strict=True))
        self._moment = (0.0, *accumulate(moments))

    def passed_s(self, now_s: float, seconds: float) -> float:
        """Return the expected seconds beyond it of what ends so many seconds from now."""
        below, moment, end_s = self._below, self._moment, now_s + seconds
        over = bisect_left(self._ends_s, now_s)
        passed = bisect_left(self._ends_s, end_s, over)
        later_s = end_s * (below[passed] - below[over]) - (moment[passed] - moment[over])
        return seconds * below[over] + max(0.0, later_s)


def left_over(sketch: Sketch, done: float) -> Iterable[tuple[float, float]]:
    """Yield (value, mass) of what remains of a quantity that has come to ``done``.

    A quantity beyond all its values is taken to go on for a quarter of what it has come to,
    as long tails do.
    """
    past = bisect_right(sketch, done)
    if past == len(sketch):
        yield max(1.0, _OUTLIVED * done), 1.0
    elif len(sketch) == 1:
        yield sketch[0] - done, 1.0
    else:
        left = 1.0 - _BELOW[past]
        for i in range(past, len(sketch)):
            yield sketch[i] - done, MASSES[i] / left


def first_of(count: int, atoms: Sequence[tuple[float, float]]) -> Sketch:
    """Return the distribution of the least of ``count`` independent draws from a discrete law.

    Args:
        count: At least 1.
        atoms: (value, mass), in the order of their values.
    """
    levels = list(accumulate(mass for _, mass in atoms))
    total = levels[-1]
    found = []
    for rank in RANKS:
        wanted = total * (1.0 - (1.0 - rank) ** (1.0 / count))
        i = min(bisect_left(levels, wanted), len(atoms) - 1)
        below, start = (levels[i - 1], atoms[i - 1][0]) if i else (0.0, 0.0)
        share = min(1.0, (wanted - below) / (levels[i] - below))
        found.append(start + share * (atoms[i][0] - start))
    return found


@dataclass(frozen=True, slots=True)
class Measure:
    """What a distribution costs, as one number: a weighted sum of a sketch's values.

    >>> rising = [float(i) for i in range(len(RANKS))]
    >>> Measure.mean().of(rising) < Measure.cvar(0.95).of(rising)
    True

    Attributes:
        name: Tells measures apart.
        terms: Places of the values that count, each with its weight; these sum to 1.
    """

    name: str
    terms: tuple[tuple[int, float], ...]

    def of(self, sketch: Sketch) -> float:
        """Return the cost of a distribution; of a certain quantity, the quantity itself."""
        if len(sketch) == 1:
            return sketch[0]
        return sum(weight * sketch[i] for i, weight in self.terms)

    @classmethod
    def _weighted(cls, name: str, weights: Sequence[float]) -> "Measure":
        return cls(name, tuple((i, weight) for i, weight in enumerate(weights) if weight))

    @classmethod
    def mean(cls) -> "Measure":
        """Return the measure that looks at no tail."""
        return cls._weighted("mean", MASSES)

    @classmethod
    def cvar(cls, level: float) -> "Measure":
        """Return the mean of the worst ``1 - level`` share of cases, for a level below 1."""
        worst = [max(0.0, high - max(low, level)) for low, high in pairwise(EDGES)]
        total = math.fsum(worst)
        return cls._weighted(f"cvar {level:g}", [mass / total for mass in worst])

    @classmethod
    def quantile(cls, level: float) -> "Measure":
        """Return the value that is kept to with probability ``level``."""
        weights = [0.0] * len(RANKS)
        high = min(bisect_left(RANKS, level), _LAST)
        low = max(0, high - 1)
        span = RANKS[high] - RANKS[low]
        share = min(1.0, max(0.0, (level - RANKS[low]) / span)) if span else 1.0
        weights[low] += 1.0 - share
        weights[high] += share
        return cls._weighted(f"quantile {level:g}", weights)
