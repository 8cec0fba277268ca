"""Small networks with one output a column of a table with gaps, trained in numpy."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

WIDE, NARROW, RANK = 192, 64, 16
_DROPPED_INPUTS, _DROPPED = 0.1, 0.3
_DECAY = 0.05
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Task:
    """What to fit.

    Attributes:
        inputs: Shape (rows, inputs).
        labels: 0…1, NaN where unknown, shape (rows, columns).
        domains: Number of the domain each row comes from.
    """

    inputs: Floats
    labels: Floats
    domains: NDArray[np.int64]

    def rows(self, chosen: NDArray[np.int64]) -> "Task":
        """Keep some rows."""
        return Task(self.inputs[chosen], self.labels[chosen], self.domains[chosen])


class Net:
    """Two hidden layers, a narrow linear one, and an output for each column and domain.

    Columns are trained on the cross-entropy of the labels that are there, domains on that of a
    softmax; AdamW (Loshchilov & Hutter 2019) with a rate that rises and falls once.
    """

    def __init__(self, task: Task, *, epochs: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._columns = task.labels.shape[1]
        outputs = self._columns + int(task.domains.max()) + 1
        sizes = (task.inputs.shape[1], WIDE, NARROW, RANK, outputs)
        self.weights = [self._drawn(wide, narrow) for wide, narrow in pairwise(sizes)]
        self.weights[3] *= np.float32(0.1)  # columns with few labels must not keep a random start
        self.biases = [np.zeros(size, np.float32) for size in sizes[1:]]
        self.biases[3][: self._columns] = _log_odds(task.labels)
        self._moments = [
            (np.zeros_like(part), np.zeros_like(part)) for part in (*self.weights, *self.biases)
        ]
        self._train(task, epochs)

    def _drawn(self, wide: int, narrow: int) -> Floats:
        return self._rng.normal(0, (1.5 / wide) ** 0.5, (wide, narrow)).astype(np.float32)

    def outputs(self, inputs: Floats) -> Floats:
        """Log-odds of each column, then logits of the domains, a row an input."""
        first = np.maximum(inputs @ self.weights[0] + self.biases[0], 0)
        second = np.maximum(first @ self.weights[1] + self.biases[1], 0)
        weights, bias = self.readout()
        return np.asarray(second @ weights + bias, np.float32)

    def readout(self) -> tuple[Floats, Floats]:
        """Weights (narrow, outputs) and bias from the second hidden layer to the outputs."""
        weights = self.weights[2] @ self.weights[3]
        bias = self.biases[2] @ self.weights[3] + self.biases[3]
        return weights.astype(np.float32), bias.astype(np.float32)

    def _train(self, task: Task, epochs: int) -> None:
        rows = len(task.inputs)
        steps = epochs * -(-rows // _BATCH)
        step = 0
        for _ in range(epochs):
            order = self._rng.permutation(rows)
            for at in range(0, rows, _BATCH):
                step += 1
                self._step(task.rows(order[at : at + _BATCH]), step, _rate(step / steps))

    def _step(self, batch: Task, step: int, rate: float) -> None:
        masks = [
            self._mask(len(batch.inputs), size, dropped)
            for size, dropped in (
                (batch.inputs.shape[1], _DROPPED_INPUTS),
                (WIDE, _DROPPED),
                (NARROW, _DROPPED),
            )
        ]
        layers: list[Floats] = [batch.inputs * masks[0]]
        for layer in (0, 1):
            raw = layers[-1] @ self.weights[layer] + self.biases[layer]
            layers.append(np.asarray(np.maximum(raw, 0) * masks[layer + 1], np.float32))
        layers.append(np.asarray(layers[-1] @ self.weights[2] + self.biases[2], np.float32))
        outputs = np.asarray(layers[-1] @ self.weights[3] + self.biases[3], np.float32)
        slope = _slope(outputs, batch)
        self._adam(self._slopes(layers, masks, slope), step, rate)

    def _mask(self, rows: int, size: int, dropped: float) -> Floats:
        kept = self._rng.random((rows, size), np.float32) >= dropped
        return kept.astype(np.float32) / np.float32(1 - dropped)

    def _slopes(self, layers: list[Floats], masks: list[Floats], slope: Floats) -> list[Floats]:
        """Slopes of all weights, then of all biases, by going back through the layers."""
        weights: list[Floats] = []
        biases: list[Floats] = []
        for layer in (3, 2, 1, 0):
            weights.insert(0, np.asarray(layers[layer].T @ slope, np.float32))
            biases.insert(0, slope.sum(axis=0))
            slope = np.asarray(slope @ self.weights[layer].T, np.float32)
            if layer in (1, 2):
                slope = slope * (layers[layer] > 0) * masks[layer]
        return weights + biases

    def _adam(self, slopes: list[Floats], step: int, rate: float) -> None:
        damp = (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        parts = (*self.weights, *self.biases)
        for part, slope, (first, second) in zip(parts, slopes, self._moments, strict=True):
            first[...] += 0.1 * (slope - first)
            second[...] += 0.001 * (slope * slope - second)
            held = 1 - rate * _DECAY * (part.ndim > 1)
            part[...] = held * part - rate * damp * first / (np.sqrt(second) + 1e-8)


def _slope(outputs: Floats, batch: Task) -> Floats:
    """Slope of the loss at the outputs; a row with many labels counts as their square root."""
    columns = batch.labels.shape[1]
    there = ~np.isnan(batch.labels)
    share = 1 / np.sqrt(np.maximum(there.sum(axis=1, keepdims=True), 1))
    wrong = _sigmoid(outputs[:, :columns]) - np.where(there, batch.labels, 0)
    logits = outputs[:, columns:]
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    chances[np.arange(len(chances)), batch.domains] -= 1
    slope = np.hstack([wrong * there * share, chances]) / len(outputs)
    return slope.astype(np.float32)


def _sigmoid(odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -30, 30))), np.float32)


def _log_odds(labels: Floats) -> Floats:
    """Log-odds of each column's mean, drawn in from certainty."""
    there = ~np.isnan(labels)
    share = (np.nansum(labels, axis=0) + 0.5) / (there.sum(axis=0) + 1.0)
    return np.asarray(np.log(share / (1 - share)), np.float32)


def _rate(done: float) -> float:
    """Learning rate: up over the first third, then down to nothing along cosines."""
    share = done / 0.3 if done < 0.3 else 1 - (done - 0.3) / 0.7
    return float(2e-3 * (0.5 - 0.5 * np.cos(np.pi * share))) + 1e-5
