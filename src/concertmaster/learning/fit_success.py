"""Fits the success head to questions that several models have answered.

Networks learn all models of all sources together, each without one fold of the questions; what
they say of the fold left out gives the traits on which each model's loadings are fitted, so that
the probabilities are calibrated on texts that no network has seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from concertmaster.core.model_names import canonical
from concertmaster.core.request import ModelName
from concertmaster.learning.loadings import Sample, fit_loadings
from concertmaster.learning.networks import Floats, Net, Task
from concertmaster.predictors.encoder import Encoder
from concertmaster.predictors.kept import content_key
from concertmaster.predictors.lexical import lexical
from concertmaster.predictors.model_names import name_traits
from concertmaster.predictors.success import Prior, SuccessHead
from concertmaster.predictors.trunk import CLIP, Trunk, gated

FOLDS = 6
EPOCHS = 12
_MAX_DIRECTIONS = 4
_MODELS_PER_DIRECTION = 8
_SHARED_RATIO = 0.5
"""Sources that share more of their texts than this are one domain."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """One question and who solved it.

    Attributes:
        text: The prompt as a live call would have it.
        correct: Grade in 0…1 by model.
        group: Questions that are copies of each other share it; folds keep them together.
        source: Where it comes from; used in training alone, never by the head.
    """

    text: str
    correct: Mapping[ModelName, float]
    group: str
    source: str = ""


def fit_success(
    questions: Sequence[Labelled],
    encoder: Encoder,
    *,
    seed: int,
    progress: Progress | None = None,
) -> SuccessHead:
    """Fit a head; the same questions and seed give the same head.

    Args:
        questions: A few hundred at least; none that is kept back for tests.
        encoder: The one whose vectors the head will be given.
        seed: Of the networks.
        progress: Told a line a step.

    Raises:
        ValueError: There are fewer questions than folds.
    """
    if len(questions) < FOLDS:
        raise ValueError(f"at least {FOLDS} questions are needed, got {len(questions)}")
    say = progress or (lambda _: None)
    say(f"success: reading {len(questions)} questions")
    texts = [question.text for question in questions]
    numbers = np.hstack([encoder.encode(texts), np.stack([lexical(text) for text in texts])])
    table = _table(questions)
    scale = _Scale.of(numbers, encoder.dims)
    task = Task(scale.apply(numbers), table.labels, table.domains)
    nets, unseen = _cross_fitted(task, _folds(questions), seed, say)
    reading = _Reading.of(unseen, table)
    trunk = _trunk(scale, nets, reading)
    head = _assemble(questions, trunk, reading.traits(unseen), encoder.name)
    say(f"success: {len(head.models)} models, {head.trunk.traits} traits")
    return head


@dataclass(frozen=True, slots=True)
class _Scale:
    centre: Floats
    spread: Floats

    @classmethod
    def of(cls, numbers: Floats, dims: int) -> "_Scale":
        """Measure; the numbers of a vector share a scale, which keeps its shape."""
        spread = numbers.std(axis=0)
        spread[:dims] = spread[:dims].mean()
        return cls(numbers.mean(axis=0), np.maximum(spread, 1e-3).astype(np.float32))

    def apply(self, numbers: Floats) -> Floats:
        return np.asarray(np.clip((numbers - self.centre) / self.spread, -CLIP, CLIP), np.float32)


@dataclass(frozen=True, slots=True)
class _Table:
    """Labels by question and by (source, model), and domains by number."""

    labels: Floats
    columns: Sequence[tuple[int, str]]
    domains: NDArray[np.int64]


def _table(questions: Sequence[Labelled]) -> _Table:
    domain_of = _domains(questions)
    keys = sorted({(q.source, canonical(model)) for q in questions for model in q.correct})
    place = {key: number for number, key in enumerate(keys)}
    labels = np.full((len(questions), len(keys)), np.nan, np.float32)
    for row, question in enumerate(questions):
        for model, grade in question.correct.items():
            labels[row, place[question.source, canonical(model)]] = grade
    domains = np.array([domain_of[question.source] for question in questions], np.int64)
    return _Table(labels, [(domain_of[source], key) for source, key in keys], domains)


def _domains(questions: Sequence[Labelled]) -> dict[str, int]:
    """Give each source a number; those that mostly ask with the same words share one."""
    groups: dict[str, set[bytes]] = {}
    for question in questions:
        groups.setdefault(question.source, set()).add(content_key(question.text))
    kept: list[set[bytes]] = []
    found: dict[str, int] = {}
    for source in sorted(groups):
        mine = groups[source]
        shared = [len(mine & theirs) / min(len(mine), len(theirs)) for theirs in kept]
        if shared and max(shared) > _SHARED_RATIO:
            found[source] = shared.index(max(shared))
        else:
            found[source] = len(kept)
            kept.append(mine)
    return found


def _folds(questions: Sequence[Labelled]) -> NDArray[np.int64]:
    """Fold of each question, by a hash of its group."""
    digests = [blake2b(question.group.encode(), digest_size=4).digest() for question in questions]
    return np.array([int.from_bytes(digest) % FOLDS for digest in digests], np.int64)


def _cross_fitted(
    task: Task, folds: NDArray[np.int64], seed: int, say: Progress
) -> tuple[list[Net], Floats]:
    """One net a fold that it has not seen, and what each says of it.

    A net that misses a hard fold expects more everywhere, of that fold too; so each net's level
    in a domain is moved to the mean level of all nets.
    """
    nets: list[Net] = []
    for fold in range(FOLDS):
        rows = np.flatnonzero(folds != fold)
        nets.append(Net(task.rows(rows), epochs=EPOCHS, seed=seed * FOLDS + fold))
        say(f"success: network {fold + 1}/{FOLDS}")
    said = np.stack([net.outputs(task.inputs) for net in nets])
    for domain in range(int(task.domains.max()) + 1):
        rows = np.flatnonzero(task.domains == domain)
        levels = said[:, rows].mean(axis=1, keepdims=True)
        said[:, rows] += levels.mean(axis=0) - levels
    return nets, said[folds, np.arange(len(folds))]


@dataclass(frozen=True, slots=True)
class _Reading:
    """How outputs of the networks become traits: a few directions a domain.

    Attributes:
        weights: From outputs to directions and the domains' logits, shape (outputs, traits).
        bias: Shape (traits,).
        gates: Domain of each direction.
    """

    weights: Floats
    bias: Floats
    gates: NDArray[np.int64]

    @classmethod
    def of(cls, outputs: Floats, table: _Table) -> "_Reading":
        columns = np.array([domain for domain, _ in table.columns])
        domains = int(table.domains.max()) + 1
        parts = [
            _directions(outputs[table.domains == domain], np.flatnonzero(columns == domain))
            for domain in range(domains)
        ]
        gates = np.repeat(np.arange(domains), [part.shape[1] for part, _ in parts])
        logits = np.eye(outputs.shape[1], dtype=np.float32)[:, len(columns) :]
        weights = np.hstack([*[part for part, _ in parts], logits])
        bias = np.concatenate([*[bias for _, bias in parts], np.zeros(domains)])
        return cls(weights, bias.astype(np.float32), gates)

    def traits(self, outputs: Floats) -> Floats:
        return gated(outputs @ self.weights + self.bias, self.gates)


def _directions(outputs: Floats, columns: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Find the main directions in which a domain's log-odds vary, each of variance one."""
    wide = outputs.shape[1]
    count = min(_MAX_DIRECTIONS, 1 + len(columns) // _MODELS_PER_DIRECTION, len(columns))
    centred = outputs[:, columns] - outputs[:, columns].mean(axis=0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:count]
    basis *= np.where(basis.sum(axis=1) < 0, -1, 1)[:, None]
    scale = np.maximum((centred @ basis.T).std(axis=0), 1e-3)
    weights = np.zeros((wide, len(basis)), np.float32)
    weights[columns] = (basis / scale[:, None]).T
    return weights, -(outputs.mean(axis=0) @ weights)


def _assemble(
    questions: Sequence[Labelled], trunk: Trunk, traits: Floats, encoder: str
) -> SuccessHead:
    """Fit the loadings of all models to the traits, and put the head together."""
    spelling: dict[str, ModelName] = {}
    rows: dict[str, list[tuple[int, float]]] = {}
    for row, question in enumerate(questions):
        for model, grade in question.correct.items():
            spelling.setdefault(canonical(model), model)
            rows.setdefault(canonical(model), []).append((row, grade))
    keys = sorted(rows)
    samples = [_sample(rows[key], traits, key) for key in keys]
    fit = fit_loadings(samples)
    means, covs = fit.means.astype(np.float32), fit.covariances.astype(np.float32)
    return SuccessHead(
        trunk,
        Prior(fit.of_name.astype(np.float32), fit.spread.astype(np.float32)),
        {key: (means[number], covs[number]) for number, key in enumerate(keys)},
        names=[spelling[key] for key in keys],
        encoder=encoder,
    )


def _sample(rows: Sequence[tuple[int, float]], traits: Floats, key: str) -> Sample:
    chosen = traits[[row for row, _ in rows]].astype(np.float64)
    return Sample(chosen, np.array([grade for _, grade in rows], np.float64), name_traits(key))


def _trunk(scale: _Scale, nets: Sequence[Net], reading: _Reading) -> Trunk:
    readouts = [net.readout() for net in nets]
    bias = np.mean([bias @ reading.weights for _, bias in readouts], axis=0) + reading.bias
    last = np.concatenate([weights @ reading.weights for weights, _ in readouts]) / len(nets)
    return Trunk(
        centre=scale.centre,
        spread=scale.spread,
        first=np.hstack([net.weights[0] for net in nets]),
        first_bias=np.concatenate([net.biases[0] for net in nets]),
        second=np.stack([net.weights[1] for net in nets]),
        second_bias=np.stack([net.biases[1][None] for net in nets]),
        last=last.astype(np.float32),
        last_bias=bias.astype(np.float32),
        gates=reading.gates,
    )
