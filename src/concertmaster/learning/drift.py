"""Whether forecasts still hold: a test that may be read after every label.

Each outcome has a place in its forecast: the share of the predicted law below it. While
forecasts hold, places are even over 0…1. Bets are made against that: that outcomes are
higher or lower than said, more or less spread, more or less often beyond P95. A bet's
capital is multiplied by 1 + stake · (score - band) at each label, which grows on average
only if the score's mean is beyond the band. Capital that starts afresh at each label and is
summed is a Shiryaev-Roberts e-detector: between false alarms lie at least ``run_labels``
labels on average, and the first n labels hold one with probability n / ``run_labels`` at
most, whatever law forecasts have (Shin, Ramdas and Rinaldo, arXiv 2203.03532). It asks
that each label keeps to the band given those before it; answers of one workflow that
resemble each other strain that.

The mean tail pinball of SwarmX 2.2 sees one side: a token over-predicted costs it a
nineteenth of one under-predicted, and answers half as long as said move it by less than
its noise. It is reported here, and decides nothing.
"""

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean, median

from concertmaster.core.forecast import Quantiles
from concertmaster.learning.labels import LEVELS

Group = tuple[str, ...]
"""What is watched together, such as (app, role, model, GPU); its laws, or its chances."""

RUN_LABELS = 100_000
_EDGES = (0.0, *LEVELS, 1.0)
_P50, _P95 = LEVELS.index(0.5), LEVELS.index(0.95)
_TINY, _MOST = 1e-9, 1e12


class Change(StrEnum):
    """In which way outcomes have left their forecasts."""

    HIGHER = "higher"
    LOWER = "lower"
    WIDER = "wider"
    NARROWER = "narrower"
    HEAVIER_TAIL = "heavier_tail"
    LIGHTER_TAIL = "lighter_tail"


_BETS: tuple[tuple[int, float, float, float], ...] = (
    # which change, score that is expected at most (with the band), stake, share of capital
    (0, 0.05, 0.35, 0.15),
    (0, 0.05, 0.8, 0.15),
    (1, 0.05, 0.35, 0.15),
    (1, 0.05, 0.8, 0.15),
    (2, 0.03, 1.2, 0.1),
    (3, 0.03, 1.2, 0.1),
    (4, 0.07, 4.0, 0.1),
    (5, -0.03, 0.95, 0.1),
)
_CHANGES = tuple(Change)
_SILENT = tuple(dict(bet[:2] for bet in _BETS)[i] for i in range(2, len(_CHANGES)))
"""Scores at which bets on spread and tails neither win nor lose."""


@dataclass(frozen=True, slots=True)
class Health:
    """How forecasts of a group did over its latest labels.

    Attributes:
        coverage_p50: Share of outcomes at or below the median; 0.5 is right.
        coverage_p95: Share at or below P95; 0.95 is right.
        bias: Median of log(outcome / predicted median); 0 is right, 0.26 is 30 % longer. Of
            grades, the mean of grade - chance.
        tail_ratio: Mean pinball loss at P95 over its mean in the first window after a reset;
            ``None`` until that window is full.
    """

    labels: int
    coverage_p50: float
    coverage_p95: float
    bias: float
    tail_ratio: float | None


@dataclass(frozen=True, slots=True)
class Drift:
    """Forecasts of a group hold no longer.

    Attributes:
        kind: The bet that won most.
        since_s: Label after which it began, as far as the window reaches, on the driver's clock.
        statistic: Capital of all bets; an alarm is raised from ``run_labels`` on.
    """

    group: Group
    kind: Change
    since_s: float
    statistic: float
    health: Health


@dataclass(slots=True)
class _Seen:
    """One label: when, between which places it lies, what each change scores, its losses."""

    at_s: float
    low: float
    high: float
    scores: tuple[float, ...]
    error: float
    tail_pinball: float


@dataclass(slots=True)
class _State:
    """What is remembered of a group."""

    window: deque[_Seen]
    middle: Callable[[Iterable[float]], float]
    capital: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    quiet_labels: int = 0
    reference_labels: int = 0
    reference_sum: float = 0.0


class DriftWatch:
    """Watches groups of forecasts; a label costs some ten microseconds.

    Args:
        step: Outcomes closer than half of this to a quantile are taken as tied with it: 1 for
            tokens, 0 for seconds.
        run_labels: Labels between false alarms of a group, on average and at least.
        window: Labels that figures are taken from, and that the beginning is sought in.
        rearm_labels: Labels after an alarm before the group may raise another, unless it is
            reset by then.
        max_groups: Groups to watch; the one without labels for longest is forgotten.
    """

    def __init__(
        self,
        *,
        step: float = 1.0,
        run_labels: float = RUN_LABELS,
        window: int = 256,
        rearm_labels: int = 2_000,
        max_groups: int = 256,
    ) -> None:
        self._half_step = step / 2
        self._run_labels = run_labels
        self._window = window
        self._rearm_labels = rearm_labels
        self._max_groups = max_groups
        self._groups: OrderedDict[Group, _State] = OrderedDict()

    def add(self, group: Group, law: Quantiles, actual: float, at_s: float) -> Drift | None:
        """Take in an outcome beside what was predicted; return an alarm if this one raises it.

        Args:
            group: Whose it is.
            law: The forecast, as it was made before the outcome was known.
            actual: The outcome, in the forecast's unit; a label is ignored where either is no
                number, negative or beyond 10^12.
            at_s: When it was known, on the driver's clock.
        """
        said = law.values
        if not (0.0 <= actual <= _MOST and 0.0 <= said[0] <= said[-1] <= _MOST):
            return None
        return self._take_in(group, _see(law, actual, at_s, self._half_step), median)

    def add_grade(self, group: Group, chance: float, grade: float, at_s: float) -> Drift | None:
        """Take in a grade beside the chance of success that was stated.

        Args:
            group: Whose it is; not one that has laws.
            chance: The forecast of the grade, 0…1.
            grade: The outcome, 0…1; a label is ignored where either lies outside.
            at_s: When it was known, on the driver's clock.
        """
        if not (0.0 <= grade <= 1.0 and 0.0 <= chance <= 1.0):
            return None
        return self._take_in(group, _see_grade(chance, grade, at_s), fmean)

    def _take_in(
        self, group: Group, seen: _Seen, middle: Callable[[Iterable[float]], float]
    ) -> Drift | None:
        state = self._state(group, middle)
        state.window.append(seen)
        if state.reference_labels < self._window:
            state.reference_labels += 1
            state.reference_sum += seen.tail_pinball
        if state.quiet_labels:
            state.quiet_labels -= 1
            return None
        statistic = _bet(state.capital, seen.scores)
        return self._alarm(group, state, statistic) if statistic >= self._run_labels else None

    def health(self, group: Group) -> Health | None:
        """Figures over the latest labels of a group; ``None`` if it has none."""
        state = self._groups.get(group)
        return _health(state, self._window) if state is not None else None

    @property
    def groups(self) -> tuple[Group, ...]:
        """Groups being watched, the one without labels for longest first."""
        return tuple(self._groups)

    def reset(self, group: Group | None = None) -> None:
        """Begin again with a group, or all, because its forecasts come from another fit."""
        if group is None:
            self._groups.clear()
        else:
            self._groups.pop(group, None)

    def _state(self, group: Group, middle: Callable[[Iterable[float]], float]) -> _State:
        state = self._groups.get(group)
        if state is None:
            state = self._groups[group] = _State(deque(maxlen=self._window), middle)
            if len(self._groups) > self._max_groups:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(group)
        return state

    def _alarm(self, group: Group, state: _State, statistic: float) -> Drift:
        shares = [capital * bet[-1] for capital, bet in zip(state.capital, _BETS, strict=True)]
        winner = shares.index(max(shares))
        state.capital = [0.0] * len(_BETS)
        state.quiet_labels = self._rearm_labels
        return Drift(
            group=group,
            kind=_CHANGES[_BETS[winner][0]],
            since_s=_began_s(state.window, winner),
            statistic=statistic,
            health=_health(state, self._window),
        )


Range = tuple[float, float]


def places(values: Sequence[float], actual: float, half_step: float = 0.0) -> tuple[Range, Range]:
    """Return between which of ``LEVELS`` an outcome lies: at least, and at most.

    Both are the same unless it is tied with quantiles: then the law says no more than that
    its share of 0…1 begins below the first of them and ends above the last.

    >>> eight = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    >>> places(eight, 3.5)
    ((0.25, 0.5), (0.25, 0.5))
    >>> places(eight, 4.0)
    ((0.25, 0.5), (0.5, 0.75))
    >>> places((5.0,) * 8, 5.0)
    ((0.0, 0.99), (0.05, 1.0))
    """
    i = bisect_left(values, actual - half_step)
    j = bisect_right(values, actual + half_step)
    if i == j:
        return (_EDGES[i], _EDGES[i + 1]), (_EDGES[i], _EDGES[i + 1])
    return (_EDGES[i], _EDGES[j]), (_EDGES[i + 1], _EDGES[j + 1])


def _see(law: Quantiles, actual: float, at_s: float, half_step: float) -> _Seen:
    same = law.levels == LEVELS
    values = law.values if same else [law.at(level) for level in LEVELS]
    least, most = places(values, actual, half_step)
    missed = actual - values[_P95]
    return _Seen(
        at_s,
        (least[0] + most[0]) / 2,
        (least[1] + most[1]) / 2,
        _scores(least, most),
        math.log(max(actual, _TINY) / max(values[_P50], _TINY)),
        max(0.95 * missed, -0.05 * missed),
    )


def _see_grade(chance: float, grade: float, at_s: float) -> _Seen:
    """Score how far a grade is from its chance; its places are the top ``chance`` if solved."""
    gain, failed = grade - chance, 1.0 - chance
    low, high = (failed, 1.0) if grade > 0.5 else (0.0, failed)
    return _Seen(at_s, low, high, (gain, -gain, *_SILENT), gain, 0.0)


def _scores(least: Range, most: Range) -> tuple[float, ...]:
    """Score a label for each ``Change``; where it is tied, as badly as it may have been.

    Place is 2u - 1, spread |2u - 1| - 1/2, and the tail u > 0.95, as means over the range of
    places u; their means are 0, 0 and 0.05 while forecasts hold, whatever the law.
    """
    if least == most:
        spreads = [_spread(*least)]
    else:
        (a, b), (c, d) = least, most
        spreads = [_spread(a, b), _spread(c, d), _spread(a, d), _spread(c, b)]
    return (
        least[0] + least[1] - 1.0,
        1.0 - most[0] - most[1],
        min(spreads),
        -max(spreads),
        1.0 - _share_below(*least, 0.95),
        _share_below(*most, 0.95) - 1.0,
    )


def _spread(low: float, high: float) -> float:
    """Mean of |2u - 1| over a range, less its mean over all."""
    if low == high:
        return abs(2 * low - 1) - 0.5
    return (_far(high) - _far(low)) / (high - low) - 0.5


def _far(place: float) -> float:
    """Integrate |2u - 1| from 0 to ``place``."""
    return place - place * place if place < 0.5 else 0.5 - place + place * place


def _share_below(low: float, high: float, level: float) -> float:
    if low >= level:
        return 0.0
    return 1.0 if high <= level else (level - low) / (high - low)


def _bet(capital: list[float], scores: tuple[float, ...]) -> float:
    """Let every bet take in a label; return the capital of all."""
    total = 0.0
    for i, (change, expected, stake, share) in enumerate(_BETS):
        capital[i] = (1.0 + capital[i]) * (1.0 + stake * (scores[change] - expected))
        total += share * capital[i]
    return total


def _began_s(window: Sequence[_Seen], winner: int) -> float:
    """Return after which label of the window the winning bet has gained most."""
    change, expected, stake, _ = _BETS[winner]
    best, gained, since_s = -math.inf, 0.0, window[0].at_s
    for seen in reversed(window):
        if gained > best:
            best, since_s = gained, seen.at_s
        gained += math.log1p(stake * (seen.scores[change] - expected))
    return since_s if best >= gained else window[0].at_s


def _health(state: _State, full: int) -> Health:
    window = state.window
    labels = len(window)
    pinball = math.fsum(seen.tail_pinball for seen in window) / labels
    reference = state.reference_sum / state.reference_labels
    settled = state.reference_labels == full and reference > 0.0
    return Health(
        labels=labels,
        coverage_p50=math.fsum(_share_below(seen.low, seen.high, 0.5) for seen in window) / labels,
        coverage_p95=math.fsum(_share_below(seen.low, seen.high, 0.95) for seen in window) / labels,
        bias=state.middle(seen.error for seen in window),
        tail_ratio=pinball / reference if settled else None,
    )
