"""What the words of a prompt say of the work ahead: a linear score over hashed word pairs.

Only the two ends of a prompt are read: the task stands at the start, what happened last at
the end. Scores are made out of fold when the heads are fitted, so that they mean as much on
a prompt that nobody has seen (naive text features add nothing on the public workflows).
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import repeat
from zlib import crc32

import numpy as np
import numpy.typing as npt

from concertmaster.predictors.kept import Kept

HEAD_CHARS, TAIL_CHARS = 300, 250
BUCKETS = 1 << 17
HEADS = 512
"""Starts of prompts whose buckets are kept: what an agent asks mostly begins as before."""

Floats = npt.NDArray[np.float32]
_TOKEN = re.compile(r"\w+|[^\w\s]")
_ASCII_TOKEN = re.compile(rb"\w+|[^\w\s\x1c-\x1f]")
"""The same on bytes, where four control characters do not count as spaces by themselves."""

_HALF = BUCKETS // 2


def buckets(text: str) -> npt.NDArray[np.int32]:
    """Return the hashed words and word pairs of both ends of a text, each once.

    >>> buckets("").size
    0
    """
    return np.concatenate((_heads.of(text[:HEAD_CHARS]), _hashed(text[-TAIL_CHARS:], _HALF)))


def _hashed(text: str, offset: int) -> npt.NDArray[np.int32]:
    """Return the buckets in rising order."""
    words = _words(text.lower())
    if not words:
        return np.zeros(0, dtype=np.int32)
    hashes = list(map(crc32, words))
    pairs = map(crc32, words[1:], map(crc32, repeat(b" "), hashes))
    ordered = np.array([*hashes, *pairs], dtype=np.uint32)
    ordered %= _HALF
    ordered.sort()
    first = np.empty(len(ordered), dtype=np.bool_)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first].astype(np.int32) + np.int32(offset)


def _words(text: str) -> list[bytes]:
    """Return words and marks in UTF-8; those of plain text are found without decoding each."""
    if text.isascii():
        return _ASCII_TOKEN.findall(text.encode())
    found = _TOKEN.findall(text)
    return "\n".join(found).encode("utf-8", "replace").split(b"\n") if found else []


_heads: Kept[npt.NDArray[np.int32]] = Kept(partial(_hashed, offset=0), entries=HEADS)


class WordScores:
    """Linear scores of a text, one for each target of the heads.

    Args:
        weights: Shape ``(targets, BUCKETS)``; a text's score is the sum over its buckets,
            divided by the length of the text as a vector of ``rarity``.
        rarity: How much a bucket counts in that length.
        offsets: Score of a text without words, by target.
    """

    def __init__(self, weights: Floats, rarity: Floats, offsets: Floats) -> None:
        self._by_bucket = np.ascontiguousarray(np.vstack((weights, rarity**2)).T)
        self._rarity = rarity
        self._offsets = offsets
        self._kept = Kept(self._scores)

    def scores(self, text: str) -> Floats:
        """Return the scores of a text, shape ``(targets,)``, in log odds of a rank."""
        return self._kept.of(text)

    def _scores(self, text: str) -> Floats:
        found = buckets(text)
        if not found.size:
            return self._offsets
        total = self._by_bucket[found].sum(axis=0)
        scores: Floats = self._offsets + total[:-1] / np.sqrt(total[-1])
        return scores

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what ``from_arrays`` needs."""
        weights = self._by_bucket[:, :-1].T.astype(np.float16)
        return {
            "weights": weights,
            "rarity": self._rarity.astype(np.float16),
            "offsets": self._offsets,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> "WordScores":
        """Restore what ``arrays`` kept."""
        names = ("weights", "rarity", "offsets")
        return cls(*(np.asarray(arrays[name], dtype=np.float32) for name in names))
