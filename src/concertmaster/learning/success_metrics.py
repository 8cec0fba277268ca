"""How good are forecasts of success? Ranking, calibration, and what routing gains by them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

SHARES: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of questions given to the big model, over which `gap_recovered` averages."""


def auc(correct: Floats, forecast: Floats) -> float | None:
    """Chance that a solved question has a higher forecast than an unsolved one; ties count half.

    ``None`` if all questions were solved, or none.

    >>> auc(np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.1, 0.9]))
    0.5
    """
    solved = correct > 0.5
    ones, zeros = int(solved.sum()), int((~solved).sum())
    if not ones or not zeros:
        return None
    above = float(_ranks(forecast)[solved].sum()) - ones * (ones + 1) / 2
    return above / (ones * zeros)


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[place]
    return ranks


def average_precision(correct: Floats, forecast: Floats) -> float | None:
    """Mean precision over solved questions, highest forecasts first; ``None`` without any.

    Equal forecasts are taken together.

    >>> average_precision(np.array([1.0, 0.0, 1.0]), np.array([0.9, 0.8, 0.7]))
    0.8333333333333333
    """
    solved = correct > 0.5
    if not solved.any():
        return None
    order = np.argsort(-forecast, kind="stable")
    last = np.append(np.flatnonzero(np.diff(forecast[order])), len(order) - 1)
    hits = np.cumsum(solved[order])[last]
    gained = np.diff(hits, prepend=0) / hits[-1]
    return float((gained * hits / (last + 1)).sum())


def mean_average_precision(pairs: Sequence[tuple[Floats, Floats]]) -> float | None:
    """Mean of `average_precision` over models, those without a solved question left out.

    Args:
        pairs: Outcomes and forecasts of each model.
    """
    found = [average_precision(*pair) for pair in pairs]
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known else None


def brier(correct: Floats, forecast: Floats) -> float:
    """Mean squared distance of forecasts to outcomes, 0…1.

    >>> brier(np.array([1.0, 0.0]), np.array([0.5, 0.5]))
    0.25
    """
    return float(np.mean((correct - forecast) ** 2))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Questions of like forecast: how many, the mean forecast, and the share solved."""

    questions: int
    forecast: float
    solved_ratio: float


def reliability(correct: Floats, forecast: Floats, *, bins: int = 15) -> list[ReliabilityBin]:
    """Table of forecasts against outcomes, in bins of equal mass from low to high forecasts."""
    order = np.argsort(forecast, kind="stable")
    return [
        ReliabilityBin(len(part), float(forecast[part].mean()), float(correct[part].mean()))
        for part in np.array_split(order, bins)
        if len(part)
    ]


def ece(correct: Floats, forecast: Floats, *, bins: int = 15) -> float:
    """How far are forecasts from shares solved, on average over the bins?

    The expected calibration error of Guo et al. 2017, "On Calibration of Modern Neural Networks",
    with bins of equal mass; each bin counts by its questions.

    >>> ece(np.array([0.0, 1.0]), np.array([0.25, 0.75]), bins=2)
    0.25
    """
    table = reliability(correct, forecast, bins=bins)
    off = sum(row.questions * abs(row.forecast - row.solved_ratio) for row in table)
    return off / len(correct)


@dataclass(frozen=True, slots=True)
class GapRecovered:
    """What forecasts gain over a blind mix, as a share of what an oracle gains.

    Attributes:
        ratio: Mean of gains by forecast over mean of gains by oracle.
        routed: Share solved at each of the shares, questions chosen by forecast.
        random: The same, chosen blindly.
        oracle: The same, chosen knowing the outcomes.
    """

    ratio: float | None
    routed: tuple[float, ...]
    random: tuple[float, ...]
    oracle: tuple[float, ...]


def gap_recovered(
    small: Floats,
    big: Floats,
    gain: Floats,
    *,
    shares: Sequence[float] = SHARES,
) -> GapRecovered:
    """How much of the oracle's advantage does routing by forecast recover at equal cost?

    At each share the big model gets that share of the questions and the small one the rest.
    The router gives it the questions of highest forecast gain, the oracle those of highest true
    gain, the blind mix any.
    The ratio is the sum over shares of (router − blind) over the sum of (oracle − blind), and
    ``None`` where the oracle gains nothing.

    Args:
        small: Outcomes of the small model, 0…1, a question each.
        big: Outcomes of the big one.
        gain: Forecast of the big one less forecast of the small one.
        shares: Of questions to the big model, 0…1.
    """
    truth = big - small
    routed = _solved(small, truth, gain, shares)
    oracle = _solved(small, truth, truth, shares)
    random = tuple(float(small.mean() + _share(small, share) * truth.mean()) for share in shares)
    possible = sum(oracle) - sum(random)
    ratio = (sum(routed) - sum(random)) / possible if possible > 1e-12 else None
    return GapRecovered(ratio, routed, random, oracle)


def _share(small: Floats, share: float) -> float:
    """Round to the share that whole questions allow."""
    return round(share * len(small)) / len(small)


def _solved(
    small: Floats, truth: Floats, gain: Floats, shares: Sequence[float]
) -> tuple[float, ...]:
    """Share solved if the questions of highest gain go to the big model."""
    added = np.concatenate([[0.0], np.cumsum(truth[np.argsort(-gain, kind="stable")])])
    counts = [round(share * len(small)) for share in shares]
    return tuple(float((small.sum() + added[count]) / len(small)) for count in counts)
