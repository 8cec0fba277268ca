"""An encoder without a table: words and pairs of words, hashed."""

import re
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from concertmaster.predictors.encoder import STATIC_CHARS, Vectors, excerpt, unit_rows

_WORD = re.compile(r"\w+")


class HashedEncoder:
    """Counts of hashed words and word pairs, projected to a few numbers.

    Each feature falls in a bucket with a sign (Weinberger et al. 2009, "Feature Hashing for
    Large Scale Multitask Learning"); the same text gives the same vector in every process.

    Args:
        dims: Buckets, where no projection is given.
        projection: Learned, shape (buckets, dims); its buckets and dims hold then.
    """

    def __init__(self, dims: int = 256, projection: NDArray[np.float32] | None = None) -> None:
        self._projection = projection
        self._buckets = dims if projection is None else int(projection.shape[0])
        self.dims = dims if projection is None else int(projection.shape[1])
        self.name = f"hashed-{self.dims}" + ("" if projection is None else "-projected")

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row a text; see `Encoder`."""
        counts = np.zeros((len(texts), self._buckets), np.float32)
        for row, text in zip(counts, texts, strict=True):
            self._count(row, excerpt(text, STATIC_CHARS))
        damped = np.sign(counts) * np.log1p(np.abs(counts))
        return unit_rows(damped if self._projection is None else damped @ self._projection)

    def _count(self, row: Vectors, text: str) -> None:
        words = [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text.lower())]
        pairs = [b" ".join(pair) for pair in pairwise(words)]
        hashes = np.array([crc32(part) for part in words + pairs], np.uint32)
        signs = np.where(hashes & 1, 1.0, -1.0).astype(np.float32)
        np.add.at(row, (hashes >> 1) % self._buckets, signs)
