"""Measures forecasts of success on questions that several models have answered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.request import ModelName
from concertmaster.learning.datasets import Question
from concertmaster.learning.success_metrics import (
    auc,
    average_precision,
    brier,
    ece,
    gap_recovered,
    reliability,
)

LEAST_COMMON = 100
"""Questions that both models of a pair must have answered."""

LEAST_GAP = 0.05
"""Share of questions that the big model must solve beyond the small one."""

Floats = npt.NDArray[np.float64]
Figures = dict[str, Any]
Success = Callable[[str, Sequence[ModelName]], dict[ModelName, float]]


class Answers(NamedTuple):
    """Every answer with its forecast, a row each.

    Attributes:
        questions: Number of the question.
        correct: Grade in 0…1.
        forecast: Probability in 0…1.
    """

    questions: npt.NDArray[np.int64]
    sources: npt.NDArray[np.str_]
    models: npt.NDArray[np.str_]
    correct: Floats
    forecast: Floats

    def where(self, rows: npt.NDArray[np.bool_]) -> "Answers":
        """Return some of the answers."""
        return Answers(
            self.questions[rows],
            self.sources[rows],
            self.models[rows],
            self.correct[rows],
            self.forecast[rows],
        )


def evaluate_success(
    questions: Sequence[Question], success: Success, progress: Callable[[str, float], None]
) -> Figures:
    """Return the figures of all answers whose model could be forecast.

    ``auc`` and ``map`` are means over pairs of a source and a model, so that no source and no
    model counts for its size; ``brier`` and ``ece`` are over all answers.
    """
    answers, missing = _asked(questions, success, progress)
    pairs = [one for _, part in _split(answers, "sources") for _, one in _split(part, "models")]
    found = _figures(answers) | {
        "auc": _mean([auc(one.correct, one.forecast) for one in pairs]),
        "map": _mean([average_precision(one.correct, one.forecast) for one in pairs]),
        "auc_pooled": auc(answers.correct, answers.forecast),
        "questions": len(questions),
        "not_forecast": missing,
        "per_model": {name: _of_model(part) for name, part in _split(answers, "models")},
        "by_source": {name: _of_source(part) for name, part in _split(answers, "sources")},
        "reliability": [asdict(row) for row in reliability(answers.correct, answers.forecast)]
        if len(answers.correct)
        else [],
    }
    found["gap_recovered"] = _gaps(answers)
    return found


def _asked(
    questions: Sequence[Question], success: Success, progress: Callable[[str, float], None]
) -> tuple[Answers, int]:
    rows: list[tuple[int, str, str, float, float]] = []
    missing = 0
    for number, question in enumerate(questions):
        progress("questions", number / len(questions))
        correct = question.labelled.correct
        forecasts = success(question.labelled.text, list(correct))
        for model, grade in correct.items():
            if model in forecasts:
                rows.append((number, question.source, model, grade, forecasts[model]))
            else:
                missing += 1
    numbers, sources, models, grades, chances = zip(*rows, strict=True) if rows else ((),) * 5
    return Answers(
        np.array(numbers, dtype=np.int64),
        np.array(sources, dtype=np.str_),
        np.array(models, dtype=np.str_),
        np.array(grades, dtype=np.float64),
        np.array(chances, dtype=np.float64),
    ), missing


def _split(answers: Answers, by: str) -> Iterable[tuple[str, Answers]]:
    names: npt.NDArray[np.str_] = getattr(answers, by)
    for name in np.unique(names):
        yield str(name), answers.where(names == name)


def _figures(answers: Answers) -> Figures:
    correct, forecast = answers.correct, answers.forecast
    if not len(correct):
        return {"answers": 0, "solved_ratio": None, "brier": None, "ece": None}
    return {
        "answers": len(correct),
        "solved_ratio": float(correct.mean()),
        "forecast_mean": float(forecast.mean()),
        "brier": brier(correct, forecast),
        "ece": ece(correct, forecast),
    }


def _of_model(answers: Answers) -> Figures:
    """Return the figures of one model; its ``auc`` is the mean over the sources it was asked."""
    parts = [part for _, part in _split(answers, "sources")]
    return _figures(answers) | {
        "auc": _mean([auc(one.correct, one.forecast) for one in parts]),
        "map": _mean([average_precision(one.correct, one.forecast) for one in parts]),
    }


def _of_source(answers: Answers) -> Figures:
    """Return the figures of one source; its ``auc`` is the mean over its models."""
    parts = [part for _, part in _split(answers, "models")]
    return _figures(answers) | {
        "questions": len(np.unique(answers.questions)),
        "models": len(parts),
        "auc": _mean([auc(one.correct, one.forecast) for one in parts]),
        "map": _mean([average_precision(one.correct, one.forecast) for one in parts]),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _gaps(answers: Answers) -> Figures:
    """Return what routing between two models by forecast recovers of what an oracle gains.

    Pairs are any two models of one source of which one solves clearly more.
    """
    table = [row for source, part in _split(answers, "sources") for row in _pairs(source, part)]
    sources = sorted({str(row["source"]) for row in table})
    return {
        "pairs": len(table),
        "ratio": _mean([row["ratio"] for row in table]),
        "by_source": {
            source: _mean([row["ratio"] for row in table if row["source"] == source])
            for source in sources
        },
        "table": table,
    }


def _pairs(source: str, answers: Answers) -> Iterable[Figures]:
    models, place = np.unique(answers.models, return_inverse=True)
    row_of = np.unique(answers.questions, return_inverse=True)[1]
    correct = np.full((row_of.max() + 1, len(models)), np.nan)
    forecast = correct.copy()
    correct[row_of, place] = answers.correct
    forecast[row_of, place] = answers.forecast
    for pair in combinations(range(len(models)), 2):
        both = ~np.isnan(correct[:, pair]).any(axis=1)
        solved = correct[both][:, pair].mean(axis=0) if both.sum() >= LEAST_COMMON else (0, 0)
        if abs(solved[1] - solved[0]) < LEAST_GAP:
            continue
        small, big = pair if solved[1] > solved[0] else pair[::-1]
        gain = forecast[both, big] - forecast[both, small]
        yield {
            "source": source,
            "small": str(models[small]),
            "big": str(models[big]),
            "questions": int(both.sum()),
            "solved_small": float(correct[both, small].mean()),
            "solved_big": float(correct[both, big].mean()),
            "ratio": gap_recovered(correct[both, small], correct[both, big], gain).ratio,
        }
