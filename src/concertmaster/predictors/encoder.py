"""Text to vectors: what a prompt is about, in a few numbers that heads can read.

Every encoder answers with unit rows and looks at a bounded part of a text, so that the
longest prompt costs little more than a short one.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from concertmaster.predictors.wordpiece import WordPiece

Vectors = NDArray[np.float32]

STATIC_CHARS = 4_000
"""Characters that the static and the hashed encoder read: half at the head, half at the tail."""


class Encoder(Protocol):
    """What is a text about?"""

    @property
    def name(self) -> str:
        """Tells encoders apart whose vectors must not be mixed."""

    @property
    def dims(self) -> int:
        """Length of each vector."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row a text, shape (texts, dims), of length 1; all zero for an empty text."""


def excerpt(text: str, chars: int) -> str:
    """Head and tail of a text that is longer than ``chars``; half of them each.

    >>> excerpt("abcdefgh", 4)
    'ab gh'
    """
    if len(text) <= chars:
        return text
    half = chars // 2
    return f"{text[:half]} {text[len(text) - half :]}"


def unit_rows(vectors: NDArray[np.floating]) -> Vectors:
    """Scale each row to length 1; a row of zeros stays."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


class StaticEncoder:
    """Mean of one stored vector a subword, distilled from a sentence encoder.

    No network runs: a 500-token prompt costs a fraction of a millisecond.
    Weights against frequent words (Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for
    Sentence Embeddings") are part of the table.

    Args:
        vocab: WordPiece pieces by id.
        table: A row a piece, int8, shape (pieces, dims).
        scale: What one step of the table is worth, by column.
        bias: Added to the mean, by column.
    """

    def __init__(
        self,
        vocab: Sequence[str],
        table: NDArray[np.int8],
        scale: Vectors,
        bias: Vectors,
    ) -> None:
        self.dims = int(table.shape[1])
        self.name = f"static-{self.dims}"
        self.pieces = WordPiece(vocab)
        self._vocab = vocab
        self._table = table
        self._scale = scale.astype(np.float32)
        self._bias = bias.astype(np.float32)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row a text; see `Encoder`."""
        rows = np.zeros((len(texts), self.dims), np.float32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.pieces.ids(excerpt(text, STATIC_CHARS))
            if ids:
                total = self._table[ids].sum(axis=0, dtype=np.int32)
                row[:] = total * (self._scale / len(ids)) + self._bias
        return unit_rows(rows)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything `from_arrays` needs; no array holds Python objects."""
        vocab = np.frombuffer("\n".join(self._vocab).encode(), np.uint8)
        return {"vocab": vocab, "table": self._table, "scale": self._scale, "bias": self._bias}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "StaticEncoder":
        """Restore what `arrays` gave."""
        vocab = arrays["vocab"].tobytes().decode().split("\n")
        table = arrays["table"].astype(np.int8, copy=False)
        return cls(
            vocab,
            table,
            arrays["scale"].astype(np.float32),
            arrays["bias"].astype(np.float32),
        )


def fresh_part(text: str, previous: str) -> str:
    """Cut off the longest common head of two prompts, back to the start of a word.

    >>> fresh_part("system rules. user: hello", "system rules. user: hi")
    'hello'
    """
    shared = _shared_chars(text, previous)
    while 0 < shared < len(text) and not text[shared - 1].isspace():
        shared -= 1
    return text[shared:]


def _shared_chars(text: str, other: str) -> int:
    """Length of the common head, by halving: comparing slices runs at memory speed."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def encode_fresh(
    encoder: Encoder, text: str, previous: str = "", *, fresh_ratio: float = 0.7
) -> Vectors:
    """Vector of a prompt in which the part not seen in the previous prompt weighs more.

    Calls of one workflow mostly repeat a long shared head, so their plain vectors look alike.

    Args:
        encoder: Asked for the whole and for the fresh part.
        text: Prompt of this call.
        previous: Prompt of the call before it in the workflow; empty for the first.
        fresh_ratio: Weight of the fresh part, 0…1; the whole has the rest.

    Returns:
        A vector of length 1, shape (dims,); all zero for an empty text.
    """
    fresh = fresh_part(text, previous) if previous else text
    if not fresh or fresh == text:
        whole: Vectors = encoder.encode([text])[0]
        return whole
    both = encoder.encode([text, fresh])
    mixed = (1.0 - fresh_ratio) * both[0] + fresh_ratio * both[1]
    vector: Vectors = unit_rows(mixed[None])[0]
    return vector
