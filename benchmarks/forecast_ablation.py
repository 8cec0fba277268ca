"""What each part of the forecasts is worth: each removed in turn from a store.

    python benchmarks/forecast_ablation.py [--models FOLDER] [--data FOLDER] [--json OUT]

A part is removed at serving, without a new fit. Figures are skills over the quantiles of app
and role, as means over the apps that were recorded in stages, and for the coding sessions.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from concertmaster.core.errors import InputError
from concertmaster.learning.baselines import Baselines
from concertmaster.learning.datasets import Rows, read_rows
from concertmaster.learning.evaluate import Calls, figures_of, served
from concertmaster.observe.console import console, progress_bar, say
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.store import DEFAULT, Store, read_store, restore, unpack_laws

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "public"
FILES = ("workflow_stages.parquet", "workflow_stages_codingagent.parquet")
TARGETS = ("output_tokens", "remaining_tokens", "remaining_calls")
CODING = "codingagent"


def whole(store: Store) -> LearnedPredictor:
    """Everything, as it is served but for the success head."""
    return restore(lengths_only(store), adapt=False)


def without_calibration(store: Store) -> LearnedPredictor:
    """Heads at their word: no offsets, and no law beside them."""
    predictor = whole(store)
    predictor.calibration = Trusting(LEVELS)
    return predictor


def without_words(store: Store) -> LearnedPredictor:
    """No text is read."""
    heads = dict(store.parts["heads"])
    heads["words.weights"] = np.zeros_like(heads["words.weights"])
    return restore(lengths_only(store, heads=heads), adapt=False)


def without_tool_call(store: Store) -> LearnedPredictor:
    """Let the first phase always say one half."""
    heads = dict(store.parts["heads"])
    heads["tool_call.leaves"] = np.zeros_like(heads["tool_call.leaves"])
    return restore(lengths_only(store, heads=heads), adapt=False)


def without_heads(store: Store) -> LearnedPredictor:
    """Laws of groups alone."""
    return LearnedPredictor(unpack_laws(store.parts["laws"]), None, adapt=False)


class Trusting(Calibration):
    """A calibration that believes the heads."""

    def trust(self, target: str, path: tuple[str, ...]) -> float:
        """Return 1."""
        return 1.0


def lengths_only(store: Store, **changed: Mapping[str, Any]) -> Store:
    """Leave the success head out, which no figure here needs."""
    parts = {name: part for name, part in store.parts.items() if name != "success"}
    return store._replace(parts={**parts, **changed})  # type: ignore[dict-item]


REMOVED: dict[str, Callable[[Store], Predictor]] = {
    "nothing": whole,
    "calibration": without_calibration,
    "words": without_words,
    "tool-call head": without_tool_call,
    "heads": without_heads,
}


def measured(store: Store, rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Serve the rows once for each part removed."""
    baselines = Baselines(store.parts["baselines"])
    found = {}
    with progress_bar(len(REMOVED)) as bar:
        bar.begin("removing parts")
        for i, (name, make) in enumerate(REMOVED.items()):
            calls = served(rows.plans, make(store), baselines, lambda _step, _share: None, name)
            found[name] = skills(calls)
            bar.update(i + 1)
    return found


def skills(calls: Calls) -> dict[str, dict[str, float]]:
    """Return skill and coverage of each target, staged apps and coding apart."""
    figures: dict[str, Any] = figures_of(calls, seed=0)
    found = {}
    for target in TARGETS:
        by_app = figures[target]["by_app"]
        staged = [one["pinball_skill"] for app, one in by_app.items() if app != CODING]
        found[target] = {
            "staged": float(np.mean(staged)) if staged else float("nan"),
            "coding": by_app.get(CODING, {}).get("pinball_skill", float("nan")),
            "covered_at_0.9": figures[target]["coverage"]["0.9"],
        }
    return found


def show(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print the table."""
    out = console()
    for target in TARGETS:
        say(out, f"\n{target:<18}{'staged':>9}{'coding':>9}{'<= P90':>9}")
        for name, figures in found.items():
            row = "".join(f"{value:>9.3f}" for value in figures[target].values())
            say(out, f"{name:<18}{row}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=DEFAULT, help="folder of a store")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the public data")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    try:
        store = read_store(asked.models)
        rows = read_rows([str(asked.data / name) for name in FILES], [], seed=0)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    found = measured(store, rows.keep(held_out_ones=True))
    show(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
