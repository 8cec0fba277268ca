"""Trains a predictor: rehearses workflows, fits the heads, and calibrates on what they missed.

Every workflow is rehearsed once after most of the others, and again from nothing: so the
heads meet groups that are known well and groups that were never seen, and learn to tell
them apart by what the laws say of themselves.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.learning.fit_heads import FOLDS, ROUNDS, HeadRows, fit_heads
from concertmaster.learning.fit_success import Labelled, fit_success
from concertmaster.learning.rehearsal import Row, absorb, rehearse
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.encoder import Encoder, StaticEncoder
from concertmaster.predictors.evidence import Evidence, group_of
from concertmaster.predictors.heads import HEAD_TARGETS, LEVELS, Heads
from concertmaster.predictors.laws import Floats, Path, logit
from concertmaster.predictors.store import pack_laws
from concertmaster.workload.plan import WorkflowPlan

CALIBRATION_FOLD = 0
TURNS = 4
COLD_PASSES = 1
PRIMING = 3
"""Calls of one app that prime the laws, for each that is rehearsed."""

Progress = Callable[[str, float], None]
Arrays = dict[str, npt.NDArray[Any]]


class Effort(NamedTuple):
    """How much work a training is worth.

    Attributes:
        most_calls: Calls of one app that are rehearsed after most others.
        cold_calls: Calls of one app that are rehearsed from nothing, in each cold pass.
        rounds: Trees for each target and level.
    """

    most_calls: int = 8000
    cold_calls: int = 600
    rounds: int = ROUNDS


FULL = Effort()


class Trained(NamedTuple):
    """The parts of a store, and what to say of them.

    Attributes:
        parts: Arrays by name, by part.
        figures: What was used, for the manifest.
        notes: What a reader of the store should know.
    """

    parts: dict[str, Arrays]
    figures: dict[str, object]
    notes: tuple[str, ...] = ()


class _Seen(NamedTuple):
    """What one rehearsed call gives to the fit."""

    features: npt.NDArray[np.float32]
    ranks: list[float]
    tool_call: float
    text: str
    app: str
    fold: int


class Fitted(NamedTuple):
    """What training makes of workflows."""

    evidence: Evidence
    heads: Heads
    calibration: Calibration


def train(
    plans: Sequence[WorkflowPlan],
    questions: Sequence[Labelled],
    *,
    encoder: Encoder,
    seed: int,
    progress: Progress,
) -> Trained:
    """Train all parts of a store; without questions there is no success head.

    Raises:
        InputError: LightGBM is not installed.
    """
    evidence, heads, calibration = train_workflows(plans, seed=seed, progress=progress)
    parts = {
        "laws": pack_laws(evidence),
        "heads": heads.arrays(),
        "calibration": calibration.arrays(),
    }
    notes: tuple[str, ...] = ("no questions: success is not forecast",)
    if questions:
        head = fit_success(questions, encoder, seed=seed, progress=lambda step: progress(step, 0.0))
        parts["success"] = head.arrays()
        notes = ()
        if isinstance(encoder, StaticEncoder):
            parts["encoder"] = encoder.arrays()
    figures: dict[str, object] = {"trees": heads.trees, "rounds": FULL.rounds}
    return Trained(parts, figures, notes)


def train_workflows(
    plans: Sequence[WorkflowPlan], *, seed: int, progress: Progress, effort: Effort = FULL
) -> Fitted:
    """Fit laws, heads and calibration.

    The calibration is learnt on a quarter of the tasks from heads that were fitted on the
    others, by the same code that keeps it while serving.
    """
    rows = rehearsed(plans, seed=seed, progress=progress, effort=effort)
    held = rows.folds == CALIBRATION_FOLD
    fit = partial(fit_heads, seed=seed, rounds=effort.rounds)
    trial = fit(rows.where(~held), progress=_within(progress, "calibration: "))
    calibration = calibrated(plans, trial, seed=seed, progress=progress, effort=effort)
    heads = fit(rows, progress=progress)
    evidence = Evidence()
    absorb(_shuffled(plans, seed), evidence)
    return Fitted(evidence, heads, calibration)


def rehearsed(
    plans: Sequence[WorkflowPlan], *, seed: int, progress: Progress, effort: Effort = FULL
) -> HeadRows:
    """Rehearse in several orders and gather the rows."""
    rows: list[_Seen] = []
    for turn in range(TURNS):
        progress("rehearsing", turn / (TURNS + COLD_PASSES))
        rows += _rehearsed_late(plans, turn, seed=seed, effort=effort)
    for i in range(COLD_PASSES):
        progress("rehearsing", (TURNS + i) / (TURNS + COLD_PASSES))
        some = _thinned(_shuffled(plans, seed + i), effort.cold_calls)
        rows += map(_seen, rehearse(some, Evidence()))
    features, ranks, tool_calls, texts, apps, folds = zip(*rows, strict=True)
    return HeadRows(
        np.stack(features),
        np.array(ranks),
        np.array(tool_calls),
        texts,
        np.array(apps),
        np.array(folds),
    )


def _rehearsed_late(
    plans: Sequence[WorkflowPlan], turn: int, *, seed: int, effort: Effort
) -> Iterator[_Seen]:
    """Rehearse the tasks whose turn it is, once the laws know the others."""
    shuffled = _shuffled(plans, seed)
    others = [plan for plan in shuffled if _turn_of(plan) != turn]
    mine = [plan for plan in shuffled if _turn_of(plan) == turn]
    evidence = Evidence()
    absorb(_thinned(others, PRIMING * effort.most_calls), evidence)
    return map(_seen, rehearse(_thinned(mine, effort.most_calls // TURNS), evidence))


def _seen(row: Row) -> _Seen:
    return _Seen(
        row.look.features,
        [row.look.laws[name].rank(row.truth[name]) for name in HEAD_TARGETS],
        float("nan") if row.call.tool_call is None else float(row.call.tool_call),
        row.call.prompt_text,
        row.plan.app,
        fold_of(row.plan),
    )


def calibrated(
    plans: Sequence[WorkflowPlan],
    heads: Heads,
    *,
    seed: int,
    progress: Progress,
    effort: Effort = FULL,
) -> Calibration:
    """Hold the heads against tasks that they never saw, and set the offsets."""
    progress("calibrating", 0.0)
    shuffled = _shuffled(plans, seed)
    evidence = Evidence()
    absorb((plan for plan in shuffled if fold_of(plan) != CALIBRATION_FOLD), evidence)
    some = _thinned(shuffled, effort.most_calls)
    held = [plan for plan in some if fold_of(plan) == CALIBRATION_FOLD]
    groups, worths, odds, truths = zip(
        *(_held_against(row, heads) for row in rehearse(held, evidence)), strict=True
    )
    calibration = Calibration(LEVELS)
    for j, target in enumerate(HEAD_TARGETS):
        columns = (np.array(parts)[:, j] for parts in (odds, truths, worths))
        calibration.fit(target, groups, *columns)
    return calibration


def _held_against(row: Row, heads: Heads) -> tuple[Path, list[float], Floats, Floats]:
    """Return a label's group and worths, what the heads said of it, and what came.

    What remained at the calls of one workflow is one label, how long their answers were is
    more than that.
    """
    _, odds = heads.predict(row.look.features, row.asked.prompt.text)
    ranks = [row.look.laws[target].rank(row.truth[target]) for target in HEAD_TARGETS]
    calls = len(row.plan.calls)
    worths = [calls**-0.5, 1 / calls, 1 / calls]
    return group_of(row.asked.request), worths, np.asarray(odds, dtype=np.float64), logit(ranks)


def fold_of(plan: WorkflowPlan) -> int:
    """Return the fold of a task; not the hash that holds the test split out.

    >>> from types import SimpleNamespace as Plan
    >>> fold_of(Plan(task="a", workflow_id="w")) == fold_of(Plan(task="a", workflow_id="v"))
    True
    """
    return _hash_of(plan) % FOLDS


def _turn_of(plan: WorkflowPlan) -> int:
    """Return when a task is rehearsed; folds and turns cut across each other."""
    return _hash_of(plan) // FOLDS % TURNS


def _hash_of(plan: WorkflowPlan) -> int:
    key = plan.task or plan.workflow_id
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big")


def _shuffled(plans: Sequence[WorkflowPlan], seed: int) -> list[WorkflowPlan]:
    shuffled = sorted(plans, key=lambda plan: plan.workflow_id)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _thinned(plans: Sequence[WorkflowPlan], most_calls: int) -> list[WorkflowPlan]:
    """Keep the first workflows of each app, up to a number of calls."""
    calls: dict[str, int] = {}
    kept = []
    for plan in plans:
        before = calls.get(plan.app, 0)
        if before < most_calls:
            calls[plan.app] = before + len(plan.calls)
            kept.append(plan)
    return kept


def _within(progress: Progress, name: str) -> Progress:
    return lambda step, share: progress(name + step, share)
