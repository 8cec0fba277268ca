"""The fitted part of the forecaster: from the figures of a call to quantiles of its rank.

Two phases, as in Maestro (3.1): first the probability that the answer asks for a tool and
what the words say, then the quantiles, which see both. All in log odds of ranks, see
``laws``, so that one fit serves every app, role and model.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from concertmaster.predictors.evidence import FEATURES
from concertmaster.predictors.forest import Forest
from concertmaster.predictors.laws import expit
from concertmaster.predictors.words import WordScores

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels of every forecast."""

HEAD_TARGETS = ("output_tokens", "remaining_tokens", "remaining_calls")
"""Targets with a head of their own; the others answer with the law of their group."""

FIGURES = (*FEATURES, *(f"words_{target}" for target in HEAD_TARGETS), "tool_call")
"""What the second phase sees."""

Floats = npt.NDArray[np.float32]


class Heads:
    """Word scores, the probability of a tool call, and one forest for all quantiles.

    Args:
        tool_call: Log odds of a tool call from ``FEATURES``; one output.
        quantiles: Log odds of ranks from ``FIGURES``; an output for each target and level.
    """

    def __init__(self, words: WordScores, tool_call: Forest, quantiles: Forest) -> None:
        self._words = words
        self._tool_call = tool_call
        self._quantiles = quantiles

    def predict(self, features: Floats, text: str) -> tuple[float, Floats]:
        """Return the probability of a tool call and log odds, shape ``(targets, levels)``."""
        figures = self.figures(features, text)
        return float(figures[-1]), self.odds(figures)

    def figures(self, features: Floats, text: str) -> Floats:
        """Return ``FIGURES``: what the first phase says, beside what it was told."""
        asks = expit(self._tool_call.predict(features)[0])
        return np.concatenate((features, self._words.scores(text), (asks,)), dtype=np.float32)

    def odds(self, figures: Floats) -> Floats:
        """Return log odds, shape ``(targets, levels)``; they do not decrease with the level."""
        odds = self._quantiles.predict(figures).reshape(len(HEAD_TARGETS), len(LEVELS))
        return np.sort(odds, axis=1)

    def with_quantiles(self, quantiles: Forest) -> "Heads":
        """Return the same first phase under another second one."""
        return Heads(self._words, self._tool_call, quantiles)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what ``from_arrays`` needs."""
        parts = {
            "words": self._words.arrays(),
            "tool_call": self._tool_call.arrays(),
            "quantiles": self._quantiles.arrays(),
        }
        return {
            f"{name}.{key}": array
            for name, arrays in parts.items()
            for key, array in arrays.items()
        }

    @property
    def trees(self) -> int:
        """Count of trees in all forests."""
        return self._tool_call.trees + self._quantiles.trees

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> "Heads":
        """Restore what ``arrays`` kept."""
        return cls(
            WordScores.from_arrays(part(arrays, "words")),
            Forest.from_arrays(part(arrays, "tool_call")),
            Forest.from_arrays(part(arrays, "quantiles")),
        )


def part(
    arrays: Mapping[str, npt.NDArray[np.generic]], name: str
) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays below a name, without it."""
    head = f"{name}."
    return {key.removeprefix(head): array for key, array in arrays.items() if key.startswith(head)}
