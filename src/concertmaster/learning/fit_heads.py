"""Fits the heads on rehearsed rows: words and tool calls first, then the quantiles.

What the second phase sees of the first is made out of fold, by task: a head that was shown
scores of texts that the scorer had seen would trust them too much.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.learning.fit_words import FOLDS, Texts
from concertmaster.learning.trees import grow
from concertmaster.predictors.forest import Forest
from concertmaster.predictors.heads import HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.laws import expit, logit

ROUNDS = 150
TOOL_CALL_ROUNDS = 60
_TOOL_CALL_FOLDS = 2
EVENNESS = 0.65
"""How far small apps weigh as much as large ones: 0 not at all, 1 altogether."""

GROWTH_OF_REST: Mapping[str, object] = {"learning_rate": 0.1, "min_data_in_leaf": 50}
"""Growth of the heads of what remains: workflows of small apps go on unlike those of large ones,
and leaves of many rows would hold none of a small app alone."""

Floats = npt.NDArray[np.float64]


class HeadRows(NamedTuple):
    """Rehearsed calls as arrays, one row each.

    Attributes:
        features: ``FEATURES`` of each call.
        ranks: Of what it turned out to need, shape ``(rows, HEAD_TARGETS)``.
        tool_calls: 1 if the answer asked for a tool, 0 if not, NaN if nobody knows.
        folds: Rows of one task share a fold, 0…``FOLDS - 1``.
    """

    features: npt.NDArray[np.float32]
    ranks: Floats
    tool_calls: Floats
    texts: Sequence[str]
    apps: npt.NDArray[np.str_]
    folds: npt.NDArray[np.int64]

    def where(self, rows: npt.NDArray[np.bool_]) -> "HeadRows":
        """Return some of the rows."""
        texts = [text for text, kept in zip(self.texts, rows, strict=True) if kept]
        return HeadRows(
            self.features[rows],
            self.ranks[rows],
            self.tool_calls[rows],
            texts,
            self.apps[rows],
            self.folds[rows],
        )


def fit_heads(
    rows: HeadRows,
    *,
    seed: int,
    rounds: int = ROUNDS,
    progress: Callable[[str, float], None] = lambda _step, _share: None,
) -> Heads:
    """Fit all heads.

    Raises:
        InputError: LightGBM is not installed.
    """
    odds = logit(rows.ranks)
    weights = even_weights(rows.apps)
    progress("words", 0.0)
    words, word_scores = Texts(rows.texts).fit(odds, weights, rows.folds)
    progress("tool calls", 0.0)
    tool_call, asks = _tool_calls(rows, weights, seed=seed)
    figures = np.column_stack((rows.features, word_scores, asks)).astype(np.float32)
    quantiles = _quantiles(figures, odds, weights, seed=seed, rounds=rounds, progress=progress)
    return Heads(words, tool_call, quantiles)


def even_weights(apps: npt.NDArray[np.str_]) -> Floats:
    """Weigh rows so that an app of many calls does not drown the others; mean 1."""
    _, where, counts = np.unique(apps, return_inverse=True, return_counts=True)
    weights = counts[where] ** -EVENNESS
    even: Floats = weights * len(weights) / weights.sum()
    return even


def _tool_calls(rows: HeadRows, weights: Floats, *, seed: int) -> tuple[Forest, Floats]:
    """Fit the probability of a tool call; return it out of fold for each row too."""
    nobody_knows = bool(np.isnan(rows.tool_calls).all())
    labels = np.zeros(len(weights)) if nobody_knows else rows.tool_calls
    asks = np.zeros(len(weights))
    halves = rows.folds % _TOOL_CALL_FOLDS
    for half in np.unique(halves):
        inside = halves == half
        forest = _tool_call(rows.features[~inside], labels[~inside], weights[~inside], seed)
        asks[inside] = expit(forest.predict_many(rows.features[inside])[:, 0])
    return _tool_call(rows.features, labels, weights, seed), asks


def _tool_call(
    features: npt.NDArray[np.float32], labels: Floats, weights: Floats, seed: int
) -> Forest:
    return grow(
        features, [labels], [{"objective": "binary"}], weights, rounds=TOOL_CALL_ROUNDS, seed=seed
    )


def _quantiles(
    figures: npt.NDArray[np.float32],
    odds: Floats,
    weights: Floats,
    *,
    seed: int,
    rounds: int,
    progress: Callable[[str, float], None],
) -> Forest:
    pairs = [(j, level) for j in range(len(HEAD_TARGETS)) for level in LEVELS]
    growths = [{} if target == "output_tokens" else GROWTH_OF_REST for target in HEAD_TARGETS]
    grown = iter(range(1, len(pairs) + 1))
    return grow(
        figures,
        [odds[:, j] for j, _ in pairs],
        [{"objective": "quantile", "alpha": level, **growths[j]} for j, level in pairs],
        weights,
        rounds=rounds,
        seed=seed,
        progress=lambda: progress("quantiles", next(grown) / len(pairs)),
    )


__all__ = ["FOLDS", "HeadRows", "even_weights", "fit_heads"]
