"""How forecasts fare on an app that training never saw, one app after the other.

    python benchmarks/forecast_unseen.py [--data FOLDER] [--app NAME …] [--json OUT]

Each app is left out of training in turn, with a smaller effort than the shipped store; then
its workflows come in random order, and each call is forecast before it is learnt. The
simple forecasts beside it: the quantiles of all training calls, which is all that a table by
app and role has for a new app, and the same table when it learns along.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.learning.baselines import Baselines, fit_baselines
from concertmaster.learning.datasets import read_rows
from concertmaster.learning.rehearsal import serve
from concertmaster.learning.trainer import Effort, train_workflows
from concertmaster.observe.console import console, progress_bar, say
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.workload.plan import WorkflowPlan

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "public"
FILES = ("workflow_stages.parquet", "workflow_stages_codingagent.parquet")
TARGETS = ("output_tokens", "remaining_tokens")
EFFORT = Effort(most_calls=4000, cold_calls=1000, rounds=60)
FIRST_LABELS = 300
MOST_CALLS = 4000
STATED = (0.5, 0.9, 0.95, 0.99)

Floats = npt.NDArray[np.float64]


class Told(NamedTuple):
    """One call of the new app: what came, and what each forecast had said; ``LEVELS`` wide."""

    truth: float
    ours: Sequence[float]
    simple: Sequence[float]
    learning: Sequence[float]


def main() -> int:
    """Run the experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the public data")
    parser.add_argument("--app", action="append", help="leave out this app only; may repeat")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    try:
        plans = read_rows([str(asked.data / name) for name in FILES], [], seed=0).plans
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    apps = asked.app or sorted({plan.app for plan in plans})
    figures = {}
    with progress_bar(len(apps)) as bar:
        bar.begin("leaving out")
        for i, app in enumerate(apps):
            figures[app] = left_out(plans, app, seed=asked.seed)
            show(app, figures[app])
            bar.update(i + 1)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1))
    return 0


def left_out(plans: Sequence[WorkflowPlan], app: str, *, seed: int) -> dict[str, object]:
    """Train without an app, serve it, and measure each target."""
    others = [plan for plan in plans if plan.app != app]
    fitted = train_workflows(others, seed=seed, progress=lambda _step, _share: None, effort=EFFORT)
    baselines = Baselines(fit_baselines(others))
    predictor = LearnedPredictor(*fitted)
    mine = [plan for plan in plans if plan.app == app]
    random.Random(seed).shuffle(mine)
    told: dict[str, list[Told]] = {target: [] for target in TARGETS}
    for target, one in served(mine, predictor, baselines):
        told[target].append(one)
    return {target: measured(rows) for target, rows in told.items()}


def served(
    plans: Sequence[WorkflowPlan], predictor: LearnedPredictor, baselines: Baselines
) -> Iterator[tuple[str, Told]]:
    """Forecast each call before it is learnt, up to a number of calls."""
    seen: dict[tuple[str, str], list[float]] = {}
    calls = 0
    for plan in plans:
        if calls >= MOST_CALLS:
            return
        over = []
        for one in serve(plan, predictor):
            calls += 1
            simple = baselines.of(plan.app, one.call.role)
            for i, target in enumerate(TARGETS):
                law = getattr(one.forecast, target)
                if target == "output_tokens" and one.call.model:
                    law = one.forecast.output_tokens_on[one.call.model]
                labels = seen.get((target, one.call.role)) or seen.get((target, ""), [])
                static = simple[i].tolist()
                learning = np.quantile(labels, LEVELS).tolist() if labels else static
                yield target, Told(one.truth[target], law.values, static, learning)
                over.append((target, one.call.role, one.truth[target]))
        for target, role, truth in over:
            seen.setdefault((target, role), []).append(truth)
            seen.setdefault((target, ""), []).append(truth)


def measured(rows: Sequence[Told]) -> dict[str, object]:
    """Return skill against both simple forecasts, and coverage early and late."""
    truth = np.array([row.truth for row in rows])
    ours, simple, learning = (
        np.array([getattr(row, name) for row in rows]) for name in ("ours", "simple", "learning")
    )
    early, late = slice(0, FIRST_LABELS), slice(FIRST_LABELS, None)
    return {
        "calls": len(rows),
        "skill": skill(truth, ours, simple),
        "skill_first": skill(truth[early], ours[early], simple[early]),
        "skill_over_learning": skill(truth, ours, learning),
        "skill_over_learning_first": skill(truth[early], ours[early], learning[early]),
        "coverage_first": coverage(truth[early], ours[early]),
        "coverage_after": coverage(truth[late], ours[late]),
    }


def skill(truth: Floats, ours: Floats, other: Floats) -> float:
    """Return one minus the ratio of the pinball losses."""
    return float(1 - pinball(truth, ours) / pinball(truth, other)) if len(truth) else float("nan")


def pinball(truth: Floats, stated: Floats) -> float:
    """Return the mean pinball loss over calls and levels."""
    levels = np.array(LEVELS)
    errors = truth[:, None] - stated
    return float(np.maximum(levels * errors, (levels - 1) * errors).mean())


def coverage(truth: Floats, stated: Floats) -> dict[str, float]:
    """Return the share of truths at or below each stated quantile."""
    if not len(truth):
        return {}
    return {
        str(level): round(float((truth <= stated[:, LEVELS.index(level)]).mean()), 3)
        for level in STATED
    }


def show(app: str, figures: dict[str, object]) -> None:
    """Print one app's figures."""
    for target, found in figures.items():
        say(console(), f"{app:<24}{target:<18}{json.dumps(found)}")


if __name__ == "__main__":
    sys.exit(main())
