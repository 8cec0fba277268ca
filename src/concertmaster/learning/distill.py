"""Makes the table of the static encoder out of a sentence encoder.

Three steps: the encoder's answer for each single piece (Minish Lab, "model2vec"), cut to its
main directions and weighted against frequent pieces (Arora et al. 2017), is the start; then the
table is fitted so that the mean over a text's pieces comes near the encoder's own vector of it.

``python -m concertmaster.learning.distill MODEL_FOLDER TEXTS.txt OUT.npz`` needs the extra
``hub``; the fit itself is numpy alone.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concertmaster.predictors.encoder import StaticEncoder
from concertmaster.predictors.hub import optional
from concertmaster.predictors.wordpiece import WordPiece

Floats = NDArray[np.float32]

FIT_TOKENS = 158
"""Pieces of a text that the fit reads: what the sentence encoder saw of it."""

SIF = 1e-3
"""Frequency at which a piece has half the weight of a rare one."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the sentence encoder says, in its own dimensions.

    Attributes:
        vocab: Pieces by id.
        pieces: Vector of each piece read alone, shape (pieces, wide).
        texts: Texts to fit on.
        vectors: Their vectors, shape (texts, wide).
    """

    vocab: Sequence[str]
    pieces: Floats
    texts: Sequence[str]
    vectors: Floats


def distill(
    teacher: Teacher,
    *,
    dims: int = 64,
    epochs: int = 12,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> StaticEncoder:
    """Fit a static encoder to a teacher; the same seed gives the same table.

    Args:
        teacher: Texts must hold nothing that is kept back for tests.
        dims: Length of the vectors.
        epochs: Passes over the texts; 0 leaves the start as it is.
        seed: Of the order of texts and of the pieces left out at random.
        progress: Told a line an epoch.
    """
    split = WordPiece(teacher.vocab)
    bags = [np.array(split.ids(text)[:FIT_TOKENS], np.int64) for text in teacher.texts]
    mean = teacher.vectors.mean(axis=0)
    basis = np.linalg.svd(teacher.vectors - mean, full_matrices=False)[2][:dims].T
    goal = ((teacher.vectors - mean) @ basis).astype(np.float32)
    fit = _Fit(_start(teacher.pieces, bags, basis, goal), goal, bags, seed)
    for epoch in range(epochs):
        loss = fit.epoch(rate=3e-3 * (1 - epoch / epochs) + 1e-4)
        if progress is not None:
            progress(f"table: pass {epoch + 1}/{epochs}, error {loss:.4f}")
    return _quantised(teacher.vocab, fit.table, fit.bias)


def _start(
    pieces: Floats, bags: Sequence[NDArray[np.int64]], basis: Floats, goal: Floats
) -> Floats:
    """Cut the pieces to the main directions, weigh them, bring them to the goal's length."""
    counts = np.bincount(np.concatenate(bags), minlength=len(pieces)) + 0.5
    weights = SIF / (SIF + counts / counts.sum())
    unit = pieces / np.linalg.norm(pieces, axis=1, keepdims=True)
    table = ((unit - unit.mean(axis=0)) @ basis) * weights[:, None]
    means = np.stack([table[bag].mean(axis=0) for bag in bags[:2000] if len(bag)])
    factor = np.linalg.norm(goal, axis=1).mean() / np.linalg.norm(means, axis=1).mean()
    return np.asarray(table * factor, np.float32)


class _Fit:
    """Adam on the squared distance between means of rows and goals."""

    _DROPPED = 0.2
    _BATCH = 256

    def __init__(
        self, table: Floats, goal: Floats, bags: Sequence[NDArray[np.int64]], seed: int
    ) -> None:
        self.table = table
        self.bias = np.zeros(table.shape[1], np.float32)
        self._goal = goal
        self._bags = bags
        self._rng = np.random.default_rng(seed)
        self._first = np.zeros_like(table)
        self._second = np.zeros_like(table)
        self._steps = 0

    def epoch(self, rate: float) -> float:
        """One pass over all texts; the mean squared distance before each step."""
        filled = np.array([row for row, bag in enumerate(self._bags) if len(bag)])
        order = self._rng.permutation(filled)
        batches = [order[at : at + self._BATCH] for at in range(0, len(order), self._BATCH)]
        return float(np.mean([self._step(rows, rate) for rows in batches]))

    def _step(self, rows: NDArray[np.int64], rate: float) -> float:
        kept = [self._thinned(self._bags[row]) for row in rows]
        sizes = np.array([len(bag) for bag in kept])
        flat, starts = np.concatenate(kept), np.concatenate([[0], np.cumsum(sizes)[:-1]])
        means = np.add.reduceat(self.table[flat], starts, axis=0) / sizes[:, None]
        off = (means + self.bias - self._goal[rows]).astype(np.float32)
        self.bias -= np.float32(rate) * 10 * off.mean(axis=0)
        slope = np.repeat(off * np.float32(2 / len(rows)) / sizes[:, None], sizes, axis=0)
        self._adam(flat, slope.astype(np.float32), rate)
        return float((off**2).sum(axis=1).mean())

    def _thinned(self, bag: NDArray[np.int64]) -> NDArray[np.int64]:
        kept = bag[self._rng.random(len(bag)) >= self._DROPPED]
        return kept if len(kept) else bag

    def _adam(self, flat: NDArray[np.int64], slope: Floats, rate: float) -> None:
        """Move the rows at hand; the moments of the others wait."""
        order = np.argsort(flat, kind="stable")
        rows, starts = np.unique(flat[order], return_index=True)
        total = np.add.reduceat(slope[order], starts, axis=0)
        self._steps += 1
        self._first[rows] += 0.1 * (total - self._first[rows])
        self._second[rows] += 0.001 * (total**2 - self._second[rows])
        damp = np.sqrt(1 - 0.999**self._steps) / (1 - 0.9**self._steps)
        move = self._first[rows] / (np.sqrt(self._second[rows]) + 1e-8)
        self.table[rows] -= (rate * damp * move).astype(np.float32)


def _quantised(vocab: Sequence[str], table: Floats, bias: Floats) -> StaticEncoder:
    """Round to int8, a scale a column; one value in ten thousand is clipped."""
    scale = np.quantile(np.abs(table), 0.9999, axis=0) / 127
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    steps: NDArray[np.int8] = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
    return StaticEncoder(vocab, steps, np.asarray(scale, np.float32), bias)


def ask_teacher(folder: Path, texts: Sequence[str]) -> Teacher:
    """Run a BERT-like encoder over its own pieces and over texts; a minute for 2,000 texts.

    Raises:
        InputError: The extra ``hub`` is not installed.
    """
    torch, transformers = optional("torch", "hub"), optional("transformers", "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    vocab = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    alone = [[first, number, last] for number in range(len(vocab))]
    read = [
        tokenizer(text, truncation=True, max_length=FIT_TOKENS + 2)["input_ids"] for text in texts
    ]

    def run(rows: Sequence[Sequence[int]]) -> Floats:
        with torch.inference_mode():
            ids = torch.tensor(rows)
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        mean: Floats = hidden.last_hidden_state.mean(dim=1).float().numpy()
        return mean

    pieces = np.concatenate([run(alone[at : at + 512]) for at in range(0, len(alone), 512)])
    vectors = np.concatenate([run([row]) for row in read])
    return Teacher(vocab, pieces, texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def main(arguments: Sequence[str]) -> None:
    """Entry: folder of the encoder, file of texts (one a line), file to write."""
    folder, texts, out = (Path(argument) for argument in arguments)
    lines = [line for line in texts.read_text("utf-8").splitlines() if line.strip()]
    encoder = distill(ask_teacher(folder, lines), progress=print)
    np.savez_compressed(out, allow_pickle=False, **encoder.arrays())


if __name__ == "__main__":
    main(sys.argv[1:])
