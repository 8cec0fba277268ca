"""Fits the quantiles of the heads anew on labels of the fleet at hand; needs no texts.

Drift changes what figures of a call mean, not what its words mean: so laws go on from where
they are, the first phase of the heads is kept, and the second is grown again on the figures
that were kept beside each label (SwarmX 2.2 retrains its last layers alone for that reason).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.core.request import Request, WorkflowId
from concertmaster.learning.fit_heads import ROUNDS, even_weights
from concertmaster.learning.label_reader import latest_labels
from concertmaster.learning.labels import Label
from concertmaster.learning.trees import grow
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.evidence import Evidence, group_of, paths_of
from concertmaster.predictors.forest import Forest
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.interface import Completion
from concertmaster.predictors.laws import Path as Group
from concertmaster.predictors.laws import logit
from concertmaster.predictors.store import Store, pack_laws, read_store, unpack_laws, write_store

MIN_LABELS = 2_000
MOST_LABELS = 20_000
"""The newest labels that are read; 20,000 hold ten half-lives."""

HALF_LIFE_LABELS = 2_000
"""A label weighs half as much as one that came this many labels later."""

HELD_SHARE = 4
"""One over the share of workflows, the newest, that calibration is learnt on."""

SERIAL = "refit_serial"
"""Figure of a manifest: the last label that its laws have taken in."""

Floats = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """Labels as arrays, one row each, in the order of outcomes.

    Attributes:
        figures: ``FIGURES`` of each call, as the heads saw them.
        odds: Log odds of the rank of what came, shape ``(rows, HEAD_TARGETS)``; NaN where it
            is not known.
        groups: In the calibration.
        worths: In workflows: labels of one workflow resemble each other.
        held: Whether a row is of the newest workflows, kept for calibration.
    """

    figures: npt.NDArray[np.float32]
    odds: Floats
    apps: npt.NDArray[np.str_]
    groups: Sequence[Group]
    worths: Floats
    held: npt.NDArray[np.bool_]


def refit(
    store_folder: Path,
    labels_path: Path,
    out_folder: Path,
    seed: int,
    *,
    min_labels: int = MIN_LABELS,
    rounds: int = ROUNDS,
) -> Path:
    """Write a store that differs from another by what labels say; return its folder.

    Args:
        store_folder: The store to go on from.
        labels_path: Of a ``FeedbackStore``; may be written meanwhile.
        out_folder: Where to write; a store that is there is replaced.
        seed: Fixes all draws.
        min_labels: With figures; below, it declines. Of what remained of workflows a quarter
            of them must be known.
        rounds: Trees for each target and level.

    Raises:
        InputError: There are too few labels, LightGBM is not installed, or a file cannot be
            read or written.
    """
    store = read_store(store_folder)
    heads = Heads.from_arrays(store.parts["heads"])
    labels = latest_labels(labels_path, MOST_LABELS)
    evidence = unpack_laws(store.parts["laws"])
    rows = replayed(labels, evidence, known=_known(store, labels))
    _check(rows, labels_path, min_labels)
    partial = heads.with_quantiles(_grown(rows, ~rows.held, seed=seed, rounds=rounds))
    calibration = _recalibrated(store, rows, partial)
    everything = np.ones(len(rows.held), dtype=np.bool_)
    fitted = heads.with_quantiles(_grown(rows, everything, seed=seed, rounds=rounds))
    parts = {
        **store.parts,
        "laws": pack_laws(evidence),
        "heads": fitted.arrays(),
        "calibration": calibration.arrays(),
    }
    figures = {"refit_labels": len(rows.worths), SERIAL: labels[-1].serial, "trees": fitted.trees}
    manifest = replace(store.manifest, figures={**store.manifest.figures, **figures})
    write_store(out_folder, manifest, parts, store.seen)
    return out_folder


def _known(store: Store, labels: Sequence[Label]) -> int:
    """Return the serial up to which the laws of a store know these labels; 0 if of another file."""
    serial = store.manifest.figures.get(SERIAL, 0)
    newest = labels[-1].serial if labels else 0
    return serial if isinstance(serial, int) and serial <= newest else 0


def _check(rows: Rows, labels_path: Path, min_labels: int) -> None:
    found = len(rows.worths)
    if found < max(min_labels, 1):
        problem = f"expected at least {min_labels} labels with figures, found {found}"
        raise InputError(str(labels_path), "", problem, "it is tried again later")
    least = int((~np.isnan(rows.odds)).sum(axis=0).min())
    if least < min_labels // 4:
        problem = f"expected {min_labels // 4} labels of closed workflows, found {least}"
        raise InputError(str(labels_path), "", problem, "it is tried again later")


# Replay.


def replayed(labels: Sequence[Label], evidence: Evidence, *, known: int = 0) -> Rows:
    """Replay labels through the laws: each is ranked among those before it, then added.

    Args:
        labels: In the order of outcomes.
        evidence: Laws to go on from; left as they are after the last label.
        known: Serial up to which the laws have them already.
    """
    last = {label.workflow_id: label.serial for label in labels}
    calls: dict[WorkflowId, int] = {}
    kept: list[Label] = []
    odds: list[Floats] = []
    for label in labels:
        request = _request(label)
        if label.features is not None and len(label.features) == len(FIGURES):
            kept.append(label)
            odds.append(_odds(label, request, evidence))
        calls[label.workflow_id] = calls.get(label.workflow_id, 0) + 1
        fresh = label.serial > known
        evidence.learn(request, _completion(label), keep=fresh)
        if last[label.workflow_id] == label.serial and label.remaining_tokens is not None:
            evidence.close(label.workflow_id, keep=fresh)
    return Rows(
        np.array([label.features for label in kept], np.float32).reshape(-1, len(FIGURES)),
        np.array(odds, np.float64).reshape(-1, len(HEAD_TARGETS)),
        np.array([label.app for label in kept], np.str_),
        [group_of(_request(label)) for label in kept],
        np.array([calls[label.workflow_id] ** -0.5 for label in kept], np.float64),
        _newest(kept),
    )


def _odds(label: Label, request: Request, evidence: Evidence) -> Floats:
    """Log odds of the ranks of what came, in laws that do not know it yet."""
    paths = paths_of(request, label.model)
    truths = (label.output_tokens, label.remaining_tokens, label.remaining_calls)
    ranks = [
        np.nan if truth is None else evidence.laws[target].law(paths[target]).rank(truth)
        for target, truth in zip(HEAD_TARGETS, truths, strict=True)
    ]
    return logit(ranks)


def _newest(kept: Sequence[Label]) -> npt.NDArray[np.bool_]:
    """Mark the rows of the last quarter of workflows, by their first label."""
    order = list(dict.fromkeys(label.workflow_id for label in kept))
    newest = set(order[len(order) - len(order) // HELD_SHARE :])
    return np.array([label.workflow_id in newest for label in kept], np.bool_)


def _request(label: Label) -> Request:
    """Restore a call, as far as laws need it; of the models that it allowed, the one it got."""
    return Request(
        request_id=label.request_id,
        workflow_id=label.workflow_id,
        arrival_s=label.arrival_s,
        prompt_tokens=max(label.prompt_tokens, 1),
        max_output_tokens=max(label.max_output_tokens, 1),
        models=(label.model,),
        role=label.role,
        app=label.app,
        template=label.template,
        step=label.step,
        stage=label.stage,
    )


def _completion(label: Label) -> Completion:
    return Completion(
        model=label.model,
        output_tokens=label.output_tokens,
        finished_s=label.finished_s,
        tool_call=label.tool_call,
    )


# Fit.


def _grown(rows: Rows, used: npt.NDArray[np.bool_], *, seed: int, rounds: int) -> Forest:
    pairs = [(j, level) for j in range(len(HEAD_TARGETS)) for level in LEVELS]
    odds = rows.odds[used]
    return grow(
        rows.figures[used],
        [odds[:, j] for j, _ in pairs],
        [{"objective": "quantile", "alpha": level} for _, level in pairs],
        weights(rows.apps[used]),
        rounds=rounds,
        seed=seed,
    )


def weights(apps: npt.NDArray[np.str_]) -> Floats:
    """Weigh rows by age and by app, oldest first; mean 1."""
    ages = np.arange(len(apps))[::-1]
    aged = even_weights(apps) * 0.5 ** (ages / HALF_LIFE_LABELS)
    weighed: Floats = aged * len(aged) / aged.sum()
    return weighed


def _recalibrated(store: Store, rows: Rows, heads: Heads) -> Calibration:
    """Set offsets and trust of the groups seen lately, from labels that the heads never saw."""
    calibration = Calibration(LEVELS)
    calibration.restore(store.parts["calibration"])
    held = np.flatnonzero(rows.held)
    said = np.array([heads.odds(rows.figures[i]) for i in held], np.float64)
    for j, target in enumerate(HEAD_TARGETS):
        known = ~np.isnan(rows.odds[held, j])
        if known.any():
            chosen = held[known]
            calibration.fit(
                target,
                [rows.groups[i] for i in chosen],
                said[known, j],
                rows.odds[chosen, j],
                rows.worths[chosen],
            )
    return calibration
