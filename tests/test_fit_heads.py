"""The fit of the heads: what it can tell apart, and what it must leave alone."""

import numpy as np
import pytest

from concertmaster.learning.fit_heads import HeadRows, fit_heads
from concertmaster.predictors.evidence import FEATURES
from concertmaster.predictors.heads import HEAD_TARGETS, LEVELS

MEDIAN = LEVELS.index(0.5)


def rows_with_a_small_app(*, small: int, large: int) -> HeadRows:
    """Ranks in the middle, but for one small app, which its first feature tells."""
    rng = np.random.default_rng(0)
    odd = np.arange(small + large) < small
    features = np.zeros((len(odd), len(FEATURES)), np.float32)
    features[:, :] = odd[:, None]
    ranks = np.where(odd, 0.9, rng.uniform(0.45, 0.55, len(odd)))
    return HeadRows(
        features,
        np.tile(ranks[:, None], len(HEAD_TARGETS)),
        np.full(len(odd), np.nan),
        [""] * len(odd),
        np.where(odd, "small", "large"),
        np.arange(len(odd)) % 4,
    )


def test_what_remains_is_told_apart_in_apps_of_forty_calls() -> None:
    pytest.importorskip("lightgbm", reason="training needs the extra train")
    pytest.importorskip("scipy", reason="training needs the extra train")

    heads = fit_heads(rows_with_a_small_app(small=40, large=1000), seed=0, rounds=40)

    _, odds = heads.predict(np.ones(len(FEATURES), np.float32), "")
    medians = dict(zip(HEAD_TARGETS, odds[:, MEDIAN], strict=True))
    assert medians["remaining_tokens"] > 1.0
    assert medians["remaining_calls"] > 1.0
    assert medians["output_tokens"] < 0.5
