"""Measures a store on recorded workflows and questions that it was not trained on.

Workflows are replayed through the predictor as they would have been served. Frozen, nothing
but the history of each workflow is learnt; online, each call is forecast before it is learnt.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.core.forecast import Quantiles
from concertmaster.core.request import ModelName
from concertmaster.learning.baselines import Baselines, timed_apps
from concertmaster.learning.datasets import Rows
from concertmaster.learning.evaluate_success import evaluate_success
from concertmaster.learning.metrics import (
    coverage,
    kendall_tau_distance,
    pinball,
    random_pairs,
    skill,
)
from concertmaster.learning.rehearsal import NO_MODEL, Served, serve
from concertmaster.predictors.evidence import TARGETS
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.store import Store, judge_of, restore
from concertmaster.workload.plan import WorkflowPlan

STATED = (0.5, 0.9, 0.95, 0.99)
"""Levels whose coverage is told."""

LEAST_ROWS = 300
"""Calls of a group from which on its coverage is held against what was stated."""

COVERAGE_TOLERANCE = 0.03
"""How far the coverage of such a group may be off before it is flagged."""

FIRST_LABELS = 300
PARTNERS = 10
"""Calls of the same app that each call is ordered against."""

Floats = npt.NDArray[np.float64]
Which = npt.NDArray[np.bool_]
Figures = dict[str, Any]
Progress = Callable[[str, float], None]

_AT = [LEVELS.index(level) for level in STATED]
_MEDIAN = LEVELS.index(0.5)


@dataclass(frozen=True, slots=True)
class Calls:
    """Forecasts and what came of them, a call a row, in the order of serving.

    Attributes:
        apps: App of each call.
        roles: App and role.
        steps: Step of the fallback that answered.
        truth: Shape ``(calls, TARGETS)``; NaN where it was not recorded.
        stated: Shape ``(calls, TARGETS, LEVELS)``.
        baseline: Quantiles of the call's app and role in training, same shape.
    """

    apps: npt.NDArray[np.str_]
    roles: npt.NDArray[np.str_]
    steps: npt.NDArray[np.str_]
    truth: Floats
    stated: Floats
    baseline: Floats

    def where(self, rows: Which) -> "Calls":
        """Return some of the calls."""
        return Calls(
            self.apps[rows],
            self.roles[rows],
            self.steps[rows],
            self.truth[rows],
            self.stated[rows],
            self.baseline[rows],
        )


def evaluate(
    store: Store, rows: Rows, *, online: bool = False, seed: int = 0, progress: Progress
) -> Figures:
    """Measure a store.

    Args:
        store: What was trained.
        rows: Nothing of it was seen in training.
        online: Whether to measure once more while it learns.
        seed: Of random pairs, and of the order of workflows online.
        progress: Told what is done, and how much of it in 0…1.

    Returns:
        The report; docs/forecasts.md defines every key.

    Raises:
        InputError: There is nothing to measure, or the store lacks a part.
    """
    judge = judge_of(store) if rows.questions else None
    if rows.questions and judge is None:
        problem = "expected a success head to measure on questions, found none"
        raise InputError(str(store.folder), "", problem, "train it with --routing")
    if not rows.plans and not rows.questions:
        raise InputError(str(store.folder), "", "expected something to measure on, found nothing")
    report: Figures = {
        "seed": seed,
        "workflows": len(rows.plans),
        "calls": sum(len(plan.calls) for plan in rows.plans),
        "questions": len(rows.questions),
        "success": None,
        **dict.fromkeys(TARGETS),
        "online": None,
    }
    if rows.plans:
        baselines = _baselines(store)
        parts = {name: part for name, part in store.parts.items() if name != "success"}
        lengths = store._replace(parts=parts)
        calls = served(rows.plans, restore(lengths, adapt=False), baselines, progress, "frozen")
        report |= figures_of(calls, seed=seed)
        if online:
            shuffled = list(rows.plans)
            random.Random(seed).shuffle(shuffled)
            calls = served(shuffled, restore(lengths), baselines, progress, "online")
            report["online"] = online_figures(calls, seed=seed)
    if judge is not None:
        report["success"] = evaluate_success(rows.questions, judge, progress)
    return report


def _baselines(store: Store) -> Baselines:
    if "baselines" not in store.parts:
        problem = "expected the part baselines to measure skill against, found none"
        raise InputError(str(store.folder), "", problem, "train it again")
    return Baselines(store.parts["baselines"])


def served(
    plans: Sequence[WorkflowPlan],
    predictor: Predictor,
    baselines: Baselines,
    progress: Progress,
    what: str,
) -> Calls:
    """Replay workflows one after the other and gather what was forecast; at least one call."""
    rows: list[Served] = []
    for done, plan in enumerate(plans):
        progress(what, done / len(plans))
        rows += serve(plan, predictor)
    timed = timed_apps(plans)
    truth = np.array([[row.truth[target] for target in TARGETS] for row in rows])
    truth[[row.plan.app not in timed for row in rows], TARGETS.index("remaining_tool_s")] = np.nan
    return Calls(
        apps=np.array([row.plan.app for row in rows]),
        roles=np.array([f"{row.plan.app}/{row.call.role}" for row in rows]),
        steps=np.array([row.forecast.source for row in rows]),
        truth=truth,
        stated=np.array([_stated(row) for row in rows]),
        baseline=np.stack([baselines.of(row.plan.app, row.call.role) for row in rows]),
    )


def _stated(row: Served) -> list[list[float]]:
    """Return what was stated of each target, the output tokens on the model that answered."""
    forecast = row.forecast
    laws = [forecast.output_law(ModelName(row.call.model or NO_MODEL))]
    laws += [getattr(forecast, target) for target in TARGETS[1:]]
    return [_at_levels(law) for law in laws]


def _at_levels(law: Quantiles | None) -> list[float]:
    assert law is not None, "a trained predictor always answers"
    if law.levels == LEVELS:
        return list(law.values)  # interpolation would round, and lose a call at the very value
    return [law.at(level) for level in LEVELS]


def figures_of(calls: Calls, *, seed: int) -> Figures:
    """Return the figures of every target; ``None`` where nothing of it was recorded."""
    pairs = random_pairs(_numbered(calls.apps), partners=PARTNERS, seed=seed)
    return {
        target: _of_target(calls, at, pairs if target == "remaining_tokens" else None)
        for at, target in enumerate(TARGETS)
    }


def _numbered(names: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    return np.unique(names, return_inverse=True)[1]


def _of_target(calls: Calls, at: int, pairs: npt.NDArray[np.int64] | None) -> Figures | None:
    known = ~np.isnan(calls.truth[:, at])
    if not known.any():
        return None
    kept = calls.where(known)
    found = _figures(kept, at)
    found["by_app"] = {name: _figures(part, at) for name, part in _split(kept, kept.apps)}
    found["by_role"] = {name: _checked(part, at) for name, part in _split(kept, kept.roles)}
    found["by_step"] = {name: _figures(part, at) for name, part in _split(kept, kept.steps)}
    found["mean_over_apps"] = _mean(found["by_app"].values())
    found["coverage_flags"] = _flags(found["by_role"])
    if pairs is not None:
        _add_order(found, calls, at, pairs)
    return found


def _split(calls: Calls, names: npt.NDArray[np.str_]) -> Iterable[tuple[str, Calls]]:
    for name in np.unique(names):
        yield str(name), calls.where(names == name)


def _figures(calls: Calls, at: int) -> Figures:
    """Return the figures of one target over some calls, at least one."""
    truth, stated = calls.truth[:, at], calls.stated[:, at]
    losses = pinball(truth, stated, LEVELS)
    bases = pinball(truth, calls.baseline[:, at], LEVELS)
    loss, base = float(losses.mean()), float(bases.mean())
    return {
        "rows": len(truth),
        "pinball": loss,
        "pinball_baseline": base,
        "pinball_skill": skill(loss, base),
        "mae": float(np.abs(truth - stated[:, _MEDIAN]).mean()),
        "mae_baseline": float(np.abs(truth - calls.baseline[:, at, _MEDIAN]).mean()),
        "coverage": _coverage(truth, stated),
        "coverage_baseline": _coverage(truth, calls.baseline[:, at]),
        "pinball_by_level": _by_level(losses),
        "skill_by_level": {
            f"{level:g}": skill(float(losses[i]), float(bases[i])) for i, level in enumerate(LEVELS)
        },
    }


def _by_level(values: Floats) -> dict[str, float]:
    return {f"{level:g}": float(value) for level, value in zip(LEVELS, values, strict=True)}


def _coverage(truth: Floats, stated: Floats) -> dict[str, float]:
    shares = coverage(truth, stated[:, _AT]).tolist()
    return {f"{level:g}": share for level, share in zip(STATED, shares, strict=True)}


def _mean(groups: Iterable[Figures]) -> Figures:
    """Return plain means over groups, each group alike; ``None`` where none has the figure."""
    listed = list(groups)
    return {
        "groups": len(listed),
        **{key: _known_mean([one[key] for one in listed]) for key in ("pinball_skill",)},
        **{
            key: {
                level: _known_mean([one[key][level] for one in listed]) for level in listed[0][key]
            }
            for key in ("skill_by_level", "coverage", "coverage_baseline")
        },
    }


def _known_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _checked(calls: Calls, at: int) -> Figures:
    """Return the figures of a group, and the levels at which its coverage is off."""
    found = _figures(calls, at)
    enough = found["rows"] >= LEAST_ROWS
    found["coverage_off"] = (
        [
            level
            for level, share in found["coverage"].items()
            if abs(share - float(level)) > COVERAGE_TOLERANCE
        ]
        if enough
        else None
    )
    return found


def _flags(groups: dict[str, Figures]) -> Figures:
    checked = {name: one for name, one in groups.items() if one["coverage_off"] is not None}
    return {
        "least_rows": LEAST_ROWS,
        "tolerance": COVERAGE_TOLERANCE,
        "groups": len(checked),
        "off": [
            {"group": name, "level": level, "coverage": one["coverage"][level], "rows": one["rows"]}
            for name, one in checked.items()
            for level in one["coverage_off"]
        ],
    }


def _add_order(found: Figures, calls: Calls, at: int, pairs: npt.NDArray[np.int64]) -> None:
    """Add how often pairs of calls of one app are stated in the wrong order."""
    truth = calls.truth[:, at]
    for key, values in (("", calls.stated), ("_baseline", calls.baseline)):
        median = values[:, at, _MEDIAN]
        name = f"kendall_tau_distance{key}"
        found[name] = kendall_tau_distance(truth, median, pairs)
        for app, one in found["by_app"].items():
            own = pairs[calls.apps[pairs[:, 0]] == app]
            one[name] = kendall_tau_distance(truth, median, own)
        found["mean_over_apps"][name] = _known_mean([one[name] for one in found["by_app"].values()])


def online_figures(calls: Calls, *, seed: int) -> Figures:
    """Return the figures of every target, and the coverage of the first labels and after."""
    found = figures_of(calls, seed=seed)
    for at, target in enumerate(TARGETS):
        one = found[target]
        if one is not None:
            kept = calls.where(~np.isnan(calls.truth[:, at]))
            one |= _early_and_late(kept, at)
            for app, part in _split(kept, kept.apps):
                one["by_app"][app] |= _early_and_late(part, at)
    return found


def _early_and_late(calls: Calls, at: int) -> Figures:
    truth, stated = calls.truth[:, at], calls.stated[:, at]
    parts = {"first_labels": slice(FIRST_LABELS), "after": slice(FIRST_LABELS, None)}
    return {
        name: {"rows": len(truth[part]), "coverage": _coverage(truth[part], stated[part])}
        if len(truth[part])
        else None
        for name, part in parts.items()
    }
