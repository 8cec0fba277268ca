"""The simple forecast to beat: what calls of the same app and role needed in training.

Empirical quantiles of each app and role, else of the app, else of everything.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from concertmaster.learning.rehearsal import remaining
from concertmaster.predictors.evidence import TARGETS
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.laws import SEPARATOR, Path, path_of
from concertmaster.workload.plan import WorkflowPlan

Floats = npt.NDArray[np.float64]


def timed_apps(plans: Iterable[WorkflowPlan]) -> frozenset[str]:
    """Return the apps whose time between calls was recorded: of others nobody knows it."""
    return frozenset(plan.app for plan in plans if any(call.tool_s for call in plan.calls))


def fit_baselines(plans: Sequence[WorkflowPlan]) -> dict[str, npt.NDArray[np.generic]]:
    """Return what ``Baselines`` needs: quantiles at ``LEVELS`` of every group.

    Apps without recorded tool time get the quantiles of all apps of it, or zeros.

    Raises:
        ValueError: There is no call at all.
    """
    groups: dict[Path, list[list[float]]] = {}
    timed = timed_apps(plans)
    for plan in plans:
        truth = remaining(plan)
        for call in plan.calls:
            row = [truth[call.stage][target] for target in TARGETS]
            if plan.app not in timed:
                row[TARGETS.index("remaining_tool_s")] = np.nan
            path = path_of(plan.app, call.role)
            for depth in range(len(path) + 1):
                groups.setdefault(path[:depth], []).append(row)
    if not groups:
        raise ValueError("baselines need at least one call")
    found: dict[Path, Floats] = {}
    for path in sorted(groups, key=lambda path: (len(path), path)):
        coarser = found[path[:-1]] if path else np.zeros((len(TARGETS), len(LEVELS)))
        found[path] = _quantiles(np.array(groups[path]), coarser)
    return {
        "paths": np.array([SEPARATOR.join(path) for path in found], dtype=np.str_),
        "depths": np.array([len(path) for path in found], dtype=np.int8),
        "quantiles": np.stack(list(found.values())),
    }


def _quantiles(rows: Floats, coarser: Floats) -> Floats:
    """Return quantiles by target and level, those of the coarser group where nothing is known."""
    quantiles = coarser.copy()
    for i, values in enumerate(rows.T):
        known = values[~np.isnan(values)]
        if known.size:
            quantiles[i] = np.quantile(known, LEVELS)
    return quantiles


class Baselines:
    """Looks up the baseline of a call.

    Args:
        arrays: What ``fit_baselines`` made.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        quantiles = np.asarray(arrays["quantiles"], dtype=np.float64)
        self._found: dict[Path, Floats] = {}
        for i, (joined, depth) in enumerate(zip(arrays["paths"], arrays["depths"], strict=True)):
            path = tuple(str(joined).split(SEPARATOR)) if depth else ()
            self._found[path] = quantiles[i]

    def of(self, app: str, role: str) -> Floats:
        """Return the quantiles of the finest group known, shape ``(targets, levels)``."""
        path = path_of(app, role)
        while path not in self._found:
            path = path[:-1]
        return self._found[path]
