"""Fits the linear word scores, out of fold: no text is scored by a fit that saw its task."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from concertmaster.predictors.words import BUCKETS, WordScores, buckets

DAMPING = 30.0
STEPS = 60
FOLDS = 4

Array = npt.NDArray[np.float64]


class Texts:
    """The texts of all rows as a sparse matrix; rows of equal text share one line of it."""

    def __init__(self, texts: Sequence[str]) -> None:
        from scipy.sparse import csr_matrix  # noqa: PLC0415  # comes with the train extra

        lines: dict[str, int] = {}
        self._line_of = np.array([lines.setdefault(text, len(lines)) for text in texts])
        found = [buckets(text) for text in lines]
        counts = np.array([one.size for one in found])
        starts = np.concatenate(([0], np.cumsum(counts)))
        columns = np.concatenate(found)
        used = np.bincount(columns, minlength=BUCKETS)
        self._rarity = np.log((1 + len(found)) / (1 + used)) + 1
        owners = np.repeat(np.arange(len(found)), counts)
        lengths = np.sqrt(np.bincount(owners, self._rarity[columns] ** 2, len(found)))
        values = self._rarity[columns] / lengths[owners]
        self._matrix: Any = csr_matrix((values, columns, starts), shape=(len(found), BUCKETS))

    def fit(
        self, targets: Array, weights: Array, folds: npt.NDArray[np.int64]
    ) -> tuple[WordScores, Array]:
        """Return the scores for serving, and those of each row from the other folds.

        Args:
            targets: Log odds of ranks, shape ``(rows, targets)``.
            weights: Of the rows; they average 1.
            folds: Of the rows; those of one task share a fold.
        """
        coefficients, offsets = self._solve(targets, weights)
        scores = np.zeros_like(targets)
        for fold in np.unique(folds):
            inside = folds == fold
            part, part_offsets = self._solve(targets, np.where(inside, 0.0, weights))
            lines = self._matrix[self._line_of[inside]]
            scores[inside] = lines @ part.T + part_offsets
        arrays = (coefficients * self._rarity, self._rarity, offsets)
        words = WordScores(*(array.astype(np.float32) for array in arrays))
        return words, scores

    def _solve(self, targets: Array, weights: Array) -> tuple[Array, Array]:
        """Ridge regression, one target after the other."""
        from scipy.sparse import diags  # noqa: PLC0415
        from scipy.sparse.linalg import lsqr  # noqa: PLC0415

        offsets = np.average(targets, axis=0, weights=weights)
        lines = self._matrix.shape[0]
        mass = np.bincount(self._line_of, weights, minlength=lines)
        root = np.sqrt(mass)
        design = diags(root) @ self._matrix
        found = []
        for j in range(targets.shape[1]):
            total = np.bincount(self._line_of, weights * (targets[:, j] - offsets[j]), lines)
            label = np.divide(total, root, out=np.zeros(lines), where=root > 0)
            found.append(lsqr(design, label, damp=DAMPING**0.5, iter_lim=STEPS)[0])
        return np.stack(found), offsets
