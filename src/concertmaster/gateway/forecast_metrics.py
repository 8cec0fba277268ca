"""How forecasts do, for Prometheus; every label that may come is there from the start."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import nan

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from concertmaster.learning.figures import (
    BUDGET,
    COVERED,
    DRIFTING,
    KINDS,
    LABELS,
    TARGETS,
    TRAININGS,
    VERDICTS,
    LoopFigures,
)

SOURCES = ("none", "global", "model", "app", "role", "other")
"""Steps of the fallback that answer; "other" are those of predictors of one's own."""


def families(sources: Counter[str], figures: LoopFigures) -> Iterator[Metric]:
    """Yield the families of what was forecast and learnt."""
    named = {source: sources[source] for source in SOURCES}
    named["other"] = sources.total() - sum(sources[source] for source in SOURCES[:-1])
    counters: tuple[tuple[str, str, str, Sequence[str], Mapping[str, int]], ...] = (
        ("forecasts", "Forecasts by step of the fallback.", "source", SOURCES, named),
        ("forecast_budget", "How calls were answered.", "outcome", BUDGET, figures.budget),
        ("labels", "What became of outcomes.", "outcome", LABELS, figures.labels),
        ("trainings", "Trainings that ended.", "outcome", TRAININGS, figures.trainings),
        ("challengers", "Verdicts on challengers.", "verdict", VERDICTS, figures.challengers),
    )
    for name, text, label, values, counts in counters:
        family = CounterMetricFamily(f"concertmaster_{name}", text, labels=[label])
        for value in values:
            family.add_metric([value], counts.get(value, 0))
        yield family
    yield CounterMetricFamily(
        "concertmaster_label_flush_failures",
        "Times that labels could not be written.",
        value=figures.failed_flushes,
    )
    yield _drift(figures)
    yield _coverage(figures)


def _drift(figures: LoopFigures) -> Metric:
    family = CounterMetricFamily(
        "concertmaster_drift", "Alarms that forecasts hold no longer.", labels=["target", "kind"]
    )
    for target in DRIFTING:
        for kind in KINDS:
            family.add_metric([target, kind], figures.drift.get((target, kind), 0))
    return family


def _coverage(figures: LoopFigures) -> Metric:
    family = GaugeMetricFamily(
        "concertmaster_forecast_coverage_ratio",
        "Share of the latest outcomes at or below a level.",
        labels=["target", "level"],
    )
    for target in TARGETS:
        for level in COVERED:
            family.add_metric([target, str(level)], figures.coverage.get((target, level), nan))
    return family
