"""How good are forecasts of counts? Losses of quantiles, coverage, and order.

Arrays hold a call each; what is stated has a column a level.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.int64]


def pinball(truth: Floats, stated: Floats, levels: Sequence[float]) -> Floats:
    """Mean loss of stated quantiles by level, in the unit of the truth; true quantiles are best.

    Args:
        truth: Shape ``(calls,)``, at least one.
        stated: Quantiles, shape ``(calls, levels)``.
        levels: In 0…1, one a column.

    >>> pinball(np.array([10.0]), np.array([[8.0, 14.0]]), (0.5, 0.9)).round(3).tolist()
    [1.0, 0.4]
    """
    steps = np.asarray(levels, dtype=np.float64)
    errors = truth[:, None] - stated
    losses: Floats = np.maximum(steps * errors, (steps - 1) * errors).mean(axis=0)
    return losses


def skill(loss: float, baseline: float) -> float | None:
    """Share of a baseline's loss that is saved: 1 is perfect, 0 no better, below 0 worse.

    ``None`` where the baseline loses nothing, so that there is nothing to save.

    >>> skill(3.0, 4.0), skill(0.0, 0.0)
    (0.25, None)
    """
    return 1 - loss / baseline if baseline > 0 else None


def coverage(truth: Floats, stated: Floats) -> Floats:
    """Share of calls that stay at or below what was stated, by level, in 0…1.

    >>> coverage(np.array([1.0, 5.0]), np.array([[1.0, 9.0], [1.0, 9.0]])).tolist()
    [0.5, 1.0]
    """
    shares: Floats = (truth[:, None] <= stated).mean(axis=0)
    return shares


def kendall_tau_distance(truth: Floats, stated: Floats, pairs: Pairs) -> float | None:
    """Share of pairs that are stated in the wrong order, in 0…1; ties in what is stated half.

    Pairs whose truth is equal have no order and do not count; ``None`` if no pair has one.

    Args:
        truth: Shape ``(calls,)``.
        stated: One value a call, for example the median.
        pairs: Row numbers, shape ``(pairs, 2)``.

    >>> both = np.array([[0, 1]])
    >>> kendall_tau_distance(np.array([1.0, 2.0]), np.array([9.0, 3.0]), both)
    1.0
    """
    left, right = pairs[:, 0], pairs[:, 1]
    true_order = np.sign(truth[left] - truth[right])
    stated_order = np.sign(stated[left] - stated[right])
    ordered = true_order != 0
    if not ordered.any():
        return None
    agreement = (true_order * stated_order)[ordered]
    return float((1 - agreement).mean() / 2)


def random_pairs(groups: npt.NDArray[np.int64], *, partners: int, seed: int) -> Pairs:
    """Pair each row with rows drawn from its own group, never with itself.

    Args:
        groups: Number of each row's group, shape ``(rows,)``.
        partners: How many to draw for each row; groups of one row have none.
        seed: Of the draws.

    Returns:
        Row numbers, shape ``(pairs, 2)``.
    """
    rng = np.random.default_rng(seed)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        if len(rows) > 1:
            at = np.repeat(np.arange(len(rows)), partners)
            step = rng.integers(1, len(rows), len(at))
            found.append(np.stack((rows[at], rows[(at + step) % len(rows)]), axis=1))
    return np.concatenate(found)
