"""How each model answers to the traits of texts, with what models have in common as a prior.

Empirical Bayes for logistic regressions side by side: loadings are drawn from a Gaussian whose
mean follows the model's name and whose covariance is shared; both are fitted by expectation and
maximisation with Laplace's approximation (Gelman & Hill 2007, "Data Analysis Using Regression
and Multilevel Models").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EVIDENCE_LABELS = 1_000
"""Labels that training counts for at most, so that live outcomes can still move a model."""

_ROUNDS = 12
_PRIOR_MODELS = 5.0
_PRIOR_SPREAD = 1.0
_RIDGE = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Outcomes of one model.

    Attributes:
        traits: Of the texts, shape (outcomes, traits).
        correct: 0…1, shape (outcomes,).
        name: What its name says, shape (name traits,).
    """

    traits: Floats
    correct: Floats
    name: Floats


@dataclass(frozen=True, slots=True)
class Loadings:
    """The fit.

    Attributes:
        of_name: Prior mean by name traits, shape (name traits, traits).
        spread: Prior covariance, shape (traits, traits).
        means: Of each model, shape (models, traits).
        covariances: Of each model, its evidence capped, shape (models, traits, traits).
    """

    of_name: Floats
    spread: Floats
    means: Floats
    covariances: Floats


def fit_loadings(samples: Sequence[Sample]) -> Loadings:
    """Fit all models and what they share; needs at least one sample."""
    names = np.stack([sample.name for sample in samples])
    traits = samples[0].traits.shape[1]
    of_name = np.zeros((names.shape[1], traits))
    spread = np.eye(traits)
    means: Floats = np.zeros((len(samples), traits))
    for _ in range(_ROUNDS):
        priors, sharp = np.asarray(names @ of_name, np.float64), _inverse(spread)
        parts = [
            _posterior(sample, mean, prior, sharp)
            for sample, mean, prior in zip(samples, means, priors, strict=True)
        ]
        means = np.stack([mean for mean, _ in parts])
        of_name = _by_name(names, means)
        off = means - names @ of_name
        open_ = np.stack([_inverse(sharp + seen) for _, seen in parts]).sum(axis=0)
        held = _PRIOR_MODELS * _PRIOR_SPREAD * np.eye(traits)
        spread = (open_ + off.T @ off + held) / (len(samples) + _PRIOR_MODELS)
    sharp = _inverse(spread)
    shares = [min(1.0, EVIDENCE_LABELS / len(sample.correct)) for sample in samples]
    covariances = [
        _inverse(sharp + share * seen) for share, (_, seen) in zip(shares, parts, strict=True)
    ]
    return Loadings(of_name, spread, means, np.stack(covariances))


def _posterior(
    sample: Sample, start: Floats, prior: Floats, sharp: Floats
) -> tuple[Floats, Floats]:
    """Mode of a model's loadings by two steps of Newton, and the precision its labels give."""
    mean = np.array(start, np.float64)
    for _ in range(2):
        odds = np.clip(sample.traits @ mean, -30, 30)
        chances = np.asarray(1 / (1 + np.exp(-odds)), np.float64)
        weights = np.maximum(chances * (1 - chances), 1e-3)
        seen = (sample.traits * weights[:, None]).T @ sample.traits
        pull = sample.traits.T @ (sample.correct - chances) - sharp @ (mean - prior)
        move = np.linalg.solve(seen + sharp, pull)
        step = min(1.0, 3.0 / max(float(np.abs(move).max()), 1e-9))
        mean = np.asarray(mean + move * step, np.float64)
    return mean, seen


def _inverse(matrix: Floats) -> Floats:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def _by_name(names: Floats, means: Floats) -> Floats:
    """Ridge regression of loadings on names; the constant is not held back."""
    held = np.diag([1e-6, *[_RIDGE] * (names.shape[1] - 1)])
    return np.asarray(np.linalg.solve(names.T @ names + held, names.T @ means), np.float64)
