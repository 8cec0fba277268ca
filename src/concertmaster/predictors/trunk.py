"""From the numbers of a text to its traits: a few small networks whose answers are averaged.

A trait says how hard a text is within one domain, along one direction in which models differ,
times the probability that the text belongs to the domain; the probabilities are traits too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CLIP = 4.0
"""Standard deviations beyond which an input counts no further."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """Networks of two hidden layers, side by side.

    Attributes:
        centre: Mean of each input, shape (inputs,).
        spread: Its scale, shape (inputs,).
        first: Weights of the first layers side by side, shape (inputs, nets × wide).
        first_bias: Shape (nets × wide,).
        second: Weights of the second layers, shape (nets, wide, narrow).
        second_bias: Shape (nets, 1, narrow).
        last: Read-out, already divided by the number of nets, shape (nets × narrow, outputs).
        last_bias: Shape (outputs,).
        gates: Domain of each direction; the last outputs are the domains' logits.
    """

    centre: Floats
    spread: Floats
    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats
    last: Floats
    last_bias: Floats
    gates: NDArray[np.int64]

    @property
    def inputs(self) -> int:
        """Numbers wanted of a text."""
        return len(self.centre)

    @property
    def traits(self) -> int:
        """Numbers given: the domains' probabilities first, then the directions."""
        return len(self.last_bias)

    def of(self, numbers: Floats) -> Floats:
        """Traits of one text, shape (traits,)."""
        scaled = np.clip((numbers - self.centre) / self.spread, -CLIP, CLIP)
        hidden = np.maximum(scaled @ self.first + self.first_bias, 0)
        nets, wide, _ = self.second.shape
        deeper = np.maximum(hidden.reshape(nets, 1, wide) @ self.second + self.second_bias, 0)
        out = deeper.reshape(-1) @ self.last + self.last_bias
        traits: Floats = gated(out[None], self.gates)[0]
        return traits

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Weights, halved in precision, by name."""
        halved = {
            name: getattr(self, name).astype(np.float16)
            for name in ("first", "first_bias", "second", "second_bias", "last")
        }
        whole = {name: getattr(self, name) for name in ("centre", "spread", "last_bias", "gates")}
        return halved | whole

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Trunk":
        """Restore what `arrays` gave."""
        floats = {
            name: arrays[name].astype(np.float32)
            for name in cls.__dataclass_fields__
            if name != "gates"
        }
        return cls(**floats, gates=arrays["gates"].astype(np.int64))


def gated(outputs: Floats, gates: NDArray[np.int64]) -> Floats:
    """Turn outputs (directions, then domains' logits) into traits, a row a text."""
    directions = len(gates)
    logits = outputs[:, directions:]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return np.hstack([shares, outputs[:, :directions] * shares[:, gates]])
