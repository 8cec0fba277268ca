"""Builders of fitted heads that need no training."""

import numpy as np

from concertmaster.predictors.forest import Forest
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.laws import logit
from concertmaster.predictors.words import BUCKETS, WordScores


def some_heads(*, lift: float = 0.0, seed: int | None = None) -> Heads:
    """Heads that lift every rank; with a seed they say something of their own of each call."""
    outputs = len(HEAD_TARGETS) * len(LEVELS)
    rng = np.random.default_rng(seed or 0)
    leaves = np.tile(logit(LEVELS) + lift, len(HEAD_TARGETS))[:, None].repeat(2, axis=1)
    if seed is not None:
        leaves = leaves + rng.normal(size=leaves.shape)
    quantiles = Forest(
        rng.integers(0, len(FIGURES), (outputs, 1)).astype(np.int16),
        rng.normal(size=(outputs, 1)).astype(np.float32),
        leaves.astype(np.float32),
        outputs=outputs,
    )
    none = np.zeros((1, 1), dtype=np.float32)
    asks = Forest(none.astype(np.int16), none, np.zeros((1, 2), dtype=np.float32), outputs=1)
    words = WordScores(
        np.zeros((len(HEAD_TARGETS), BUCKETS), dtype=np.float32),
        np.ones(BUCKETS, dtype=np.float32),
        np.zeros(len(HEAD_TARGETS), dtype=np.float32),
    )
    return Heads(words, asks, quantiles)
