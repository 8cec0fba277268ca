"""Forecasts that are trained for a study, kept on disk by what they were trained on."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from concertmaster.learning.datasets import seen_hashes
from concertmaster.learning.trainer import train
from concertmaster.predictors.manifest import Manifest, TrainedOn
from concertmaster.predictors.store import default_encoder, write_store
from concertmaster.reproduce.fingerprint import code_fingerprint
from concertmaster.workload.plan import WorkflowPlan


def trained_store(plans: Sequence[WorkflowPlan], *, name: str, seed: int, keep_in: Path) -> Path:
    """Return the folder of a store that was trained on these workflows.

    Args:
        plans: What it learns from.
        name: Of the plans; with their count, the seed and the code it tells them from others.
        seed: Fixes the training.
        keep_in: Folder of such folders.
    """
    key = hashlib.sha256(f"{code_fingerprint()} {name} {len(plans)} {seed}".encode())
    folder = keep_in / "stores" / key.hexdigest()[:16]
    if not folder.exists():
        _settle(_written(plans, name, seed, folder), folder)
    return folder


def _written(plans: Sequence[WorkflowPlan], name: str, seed: int, folder: Path) -> Path:
    trained = train(plans, [], encoder=default_encoder(), seed=seed, progress=_quiet)
    about = TrainedOn(names=(name,), workflows=len(plans), held_out=False, seed=seed)
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    write_store(own, Manifest(trained_on=about), trained.parts, seen_hashes(plans, ()))
    return own


def _quiet(_stage: str, _done: float) -> None:
    """Tell nobody."""


def _settle(own: Path, folder: Path) -> None:
    """Put a store in place, unless another process was first."""
    try:
        own.rename(folder)
    except OSError:
        if not folder.exists():
            raise
