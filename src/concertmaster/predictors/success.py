"""Will this model solve this prompt? Probabilities that learn from outcomes.

A text has traits (`predictors.trunk`), a model has a loading on each, and the product is the
log-odds that it solves the text: item response theory (Lord 1980) with the item's side read off
the text.
Loadings are Gaussian: known well for models with many labels, and near what name and peers
suggest for the others; each outcome moves them (Kalman update of a logistic model, as in
Thompson-sampling routers), so a model counts after a few labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concertmaster.core.model_names import canonical
from concertmaster.core.request import ModelName
from concertmaster.predictors.chances import Chances
from concertmaster.predictors.lexical import lexical
from concertmaster.predictors.model_names import name_traits, tells_strength
from concertmaster.predictors.trunk import Floats, Trunk

MAX_MODELS = 512
"""Models to keep loadings of; outcomes of those beyond are not learnt."""

FORGOTTEN_RATIO = 1 / 4_000
"""Share of what is known of a model that each of its outcomes lets go."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is thought of a model before its outcomes.

    Attributes:
        of_name: Mean loadings by `name_traits`, shape (name traits, traits).
        spread: Covariance of loadings around that mean, shape (traits, traits).
    """

    of_name: Floats
    spread: Floats


def _chances(loadings: Sequence[tuple[Floats, Floats]], traits: Floats) -> list[float]:
    """Probability that each model solves a prompt, from its loadings: mean and covariance."""
    if not loadings:
        return []
    means = np.stack([mean for mean, _ in loadings]) @ traits
    spreads = np.stack([cov for _, cov in loadings]) @ traits @ traits
    odds = means / np.sqrt(1 + math.pi / 8 * np.maximum(spreads, 0))
    chances: list[float] = (1 / (1 + np.exp(-np.clip(odds, -30, 30)))).tolist()
    return chances


class SuccessHead:
    """Probability that each model solves a prompt.

    Args:
        trunk: Gives the traits of a text.
        prior: Of models without labels.
        loadings: Of models with labels: mean and covariance by canonical name.
        names: Spellings given in training.
        encoder: Name of the encoder whose vectors the trunk was fitted on.
    """

    def __init__(
        self,
        trunk: Trunk,
        prior: Prior,
        loadings: Mapping[str, tuple[Floats, Floats]],
        *,
        names: Sequence[ModelName],
        encoder: str,
    ) -> None:
        self.models = tuple(names)
        self.encoder = encoder
        self.trunk = trunk
        self.prior = prior
        self._loadings = dict(loadings)
        self._keys: dict[str, str] = {}
        self._named: dict[str, tuple[Floats, Floats] | None] = {}

    def predict(
        self, text: str, embedding: Floats, models: Sequence[ModelName]
    ) -> dict[ModelName, float]:
        """Probability that each model solves the prompt, 0…1.

        A model without labels is judged by its name if that gives a size or a tier, and is left
        out otherwise.

        Args:
            text: The prompt.
            embedding: Its vector by the encoder named in `encoder`, shape (dims,).
            models: Whom to ask about, in any spelling.

        Raises:
            ValueError: The vector has another length than the head was fitted on.
        """
        return self.predict_from(self.traits(text, embedding), models)

    def traits(self, text: str, embedding: Floats) -> Floats:
        """Return the few numbers that stand for a text: what to keep until its outcome is known.

        Raises:
            ValueError: The vector has another length than the head was fitted on.
        """
        numbers = np.concatenate([embedding, lexical(text)])
        if len(numbers) != self.trunk.inputs:
            raise ValueError(
                f"the head reads vectors of {self.encoder!r} with "
                f"{self.trunk.inputs - len(numbers) + len(embedding)} numbers, "
                f"got {len(embedding)}"
            )
        return self.trunk.of(numbers)

    def predict_from(self, traits: Floats, models: Sequence[ModelName]) -> dict[ModelName, float]:
        """Answer as `predict` does, from what `traits` gave."""
        return dict(self.foresee(lambda: traits, models))

    def foresee(self, traits: Callable[[], Floats], models: Sequence[ModelName]) -> Chances:
        """Answer as `predict_from` does, once somebody asks, from what is known at this instant.

        Args:
            traits: Gives what `traits` would; asked once at most.
            models: Whom to ask about, in any spelling.
        """
        asked = dict.fromkeys(models)
        known = [(model, loading) for model in asked if (loading := self._loading(model))]
        loadings = [loading for _, loading in known]
        return Chances([model for model, _ in known], lambda: _chances(loadings, traits()))

    def learn(self, text: str, embedding: Floats, model: ModelName, correct: float) -> None:
        """Take in whether the model solved the prompt, or its grade in 0…1.

        Raises:
            ValueError: The grade lies outside, or the vector has another length.
        """
        self.learn_from(self.traits(text, embedding), model, correct)

    def learn_from(
        self, traits: Floats, model: ModelName, correct: float, *, worth: float = 1.0
    ) -> None:
        """Learn as `learn` does, from what `traits` gave; ``worth`` counts labels, 0…1."""
        if not 0 <= correct <= 1:
            raise ValueError(f"a grade lies in 0…1, got {correct}")
        key = self._key(model)
        if key not in self._loadings:
            if len(self._loadings) >= MAX_MODELS:
                return
            self._loadings[key] = self._from_name(model)
        self._loadings[key] = self._moved(*self._loadings[key], traits, correct, worth)

    def _moved(
        self, mean: Floats, cov: Floats, traits: Floats, correct: float, worth: float
    ) -> tuple[Floats, Floats]:
        """Kalman step on the log-odds, after letting go a little of what was known."""
        forgotten = FORGOTTEN_RATIO * worth
        cov = (1 - forgotten) * cov + forgotten * self.prior.spread
        reach = cov @ traits
        spread = float(reach @ traits)
        odds = float(mean @ traits) / math.sqrt(1 + math.pi / 8 * max(spread, 0.0))
        chance = 1 / (1 + math.exp(-min(max(odds, -30.0), 30.0)))
        weight = worth * chance * (1 - chance)
        gain = reach / (1 + weight * spread)
        mean = mean + gain * np.float32(worth * (correct - chance))
        return mean, np.asarray(cov - weight * np.outer(gain, reach), np.float32)

    def _loading(self, model: ModelName) -> tuple[Floats, Floats] | None:
        return self._loadings.get(self._key(model)) or self._by_name(model)

    def _from_name(self, model: ModelName) -> tuple[Floats, Floats]:
        mean = name_traits(model).astype(np.float32) @ self.prior.of_name
        return mean, self.prior.spread

    def _by_name(self, model: ModelName) -> tuple[Floats, Floats] | None:
        """Judge a model without labels by its name, once; ``None`` if that tells nothing."""
        if model not in self._named:
            loading = self._from_name(model) if tells_strength(model) else None
            if len(self._named) >= MAX_MODELS:
                return loading
            self._named[model] = loading
        return self._named[model]

    def _key(self, model: ModelName) -> str:
        key = self._keys.get(model)
        if key is None:
            key = canonical(model)
            if len(self._keys) < MAX_MODELS:
                self._keys[model] = key
        return key

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Everything `from_arrays` needs, what was learnt included; no Python objects."""
        keys = list(self._loadings)
        traits = self.trunk.traits
        means = [self._loadings[key][0] for key in keys]
        covs = [self._loadings[key][1] for key in keys]
        return {f"trunk_{name}": value for name, value in self.trunk.arrays().items()} | {
            "prior_of_name": self.prior.of_name,
            "prior_spread": self.prior.spread,
            "models": np.array(self.models, np.str_),
            "encoder": np.array([self.encoder], np.str_),
            "keys": np.array(keys, np.str_),
            "means": np.array(means, np.float32).reshape(-1, traits),
            "covariances": np.array(covs, np.float32).reshape(-1, traits, traits),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "SuccessHead":
        """Restore what `arrays` gave."""
        trunk = {
            name.removeprefix("trunk_"): value
            for name, value in arrays.items()
            if name.startswith("trunk_")
        }
        floats = {
            name: arrays[name].astype(np.float32)
            for name in ("prior_of_name", "prior_spread", "means", "covariances")
        }
        loadings = zip(floats["means"], floats["covariances"], strict=True)
        return cls(
            Trunk.from_arrays(trunk),
            Prior(floats["prior_of_name"], floats["prior_spread"]),
            dict(zip([str(key) for key in arrays["keys"]], loadings, strict=True)),
            names=[ModelName(str(name)) for name in arrays["models"]],
            encoder=str(arrays["encoder"][0]),
        )
