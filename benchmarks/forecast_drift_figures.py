"""What is reported of a simulated week: coverage, labels until it is back, a table, a plot."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.fleet import PoolId

Hits = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

LEVEL, BAND = 0.95, 0.03
BACK_LABELS, WINDOW = 500, 250
SLOWED = PoolId("l40s")

ARMS = {"on": 0, "off from the first change": 1, "off from the second change": 2}
"""Adaptation, and the change from which it is off; 0 if from none."""

MEASURES = ("tokens", "seconds", "seconds, slowed pool")
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds

HEAD = (
    f"\n{'change, P95 of':<24}{'adaptation':<27}{'labels till back':>14}{'first 500':>15}"
    f"{'after them':>16}{'watch speaks':>16}"
)


class Plan(NamedTuple):
    """What to play.

    Attributes:
        calls: Of each third, about.
        models: Folder of a store, "default", or "none" for laws that begin empty.
    """

    calls: int
    week_s: float
    models: str

    @property
    def changes_s(self) -> tuple[float, float]:
        """When other apps take over, and when the pool becomes slow."""
        return self.week_s / 3, 2 * self.week_s / 3


class Label(NamedTuple):
    """One call that was served, and whether it stayed within what was stated."""

    finished_s: float
    arrived_s: float
    pool: str
    tokens_in: bool
    seconds_in: bool


@dataclass
class Played:
    """Labels of a run in the order of finishing.

    Attributes:
        alarms: "tokens 1": labels from the first change until the watch spoke of tokens.
    """

    seed: int
    arm: str
    labels: list[Label] = field(default_factory=list)
    alarms: dict[str, int] = field(default_factory=dict)


def labels_until_back(hits: Hits) -> int | None:
    """Count labels until the next 500 are covered as stated, within 3 points; ``None``: never."""
    below = np.concatenate(([0], np.cumsum(hits)))
    shares = (below[BACK_LABELS:] - below[:-BACK_LABELS]) / BACK_LABELS
    back = np.flatnonzero(np.abs(shares - LEVEL) <= BAND + 1e-9)
    return int(back[0]) if len(back) else None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and half of its 95 % interval, by Student's t; nan where it takes more values.

    >>> [round(figure, 2) for figure in interval([1.0, 2.0, 3.0])]
    [2.0, 2.48]
    """
    count = len(values)
    if count < 2 or any(map(math.isnan, values)):
        return (statistics.fmean(values) if values else math.nan), math.nan
    t95 = _T95[min(count - 2, len(_T95) - 1)]
    return statistics.fmean(values), t95 * statistics.stdev(values) / math.sqrt(count)


def hits_of(played: Played, measure: str, span: tuple[float, float]) -> Hits:
    """Return whether calls that arrived in a span stayed within what was stated."""
    low_s, high_s = span
    return np.array(
        [
            label.tokens_in if measure == "tokens" else label.seconds_in
            for label in played.labels
            if low_s <= label.arrived_s < high_s
            and (measure != MEASURES[2] or label.pool == SLOWED)
        ],
        dtype=np.bool_,
    )


def figures(runs: Sequence[Played], plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield a row for each arm, measure and third: how many labels, and what they were worth."""
    edges = (0.0, *plan.changes_s, math.inf)
    for arm in ARMS:
        mine = [played for played in runs if played.arm == arm]
        for measure in MEASURES:
            for third in range(3):
                hits = [hits_of(one, measure, (edges[third], edges[third + 1])) for one in mine]
                watch = f"{measure.partition(',')[0]} {third}"
                yield {
                    "adaptation": arm,
                    "of": measure,
                    "third": third,
                    "labels": [len(one) for one in hits],
                    "until_back": [labels_until_back(one) for one in hits],
                    "first_500": [_mean(one[:BACK_LABELS]) for one in hits],
                    "rest": [_mean(one[BACK_LABELS:]) for one in hits],
                    "alarm": [one.alarms.get(watch) for one in mine],
                }


def _mean(hits: Hits) -> float:
    return float(hits.mean()) if len(hits) else math.nan


def show(row: dict[str, Any]) -> str:
    """Write a row as a line of the table."""
    back, alarms = row["until_back"], [one for one in row["alarm"] if one is not None]
    never = f"{back.count(None)} of {len(back)} never"
    until = never if None in back else "{:.0f} ± {:.0f}".format(*interval(back))
    first, rest = ("{:.3f} ± {:.3f}".format(*interval(row[key])) for key in ("first_500", "rest"))
    alarm = f"{statistics.median(alarms):.0f} ({len(alarms)} of {len(back)})" if alarms else "–"
    name = f"{row['third']} {row['of']:<21} {row['adaptation']:<27}"
    return f"{name}{until:>14}{first:>16}{rest:>16}{alarm:>16}"


def draw(runs: Sequence[Played], plan: Plan, path: Path) -> None:
    """Draw coverage over the latest 250 labels against time: means over seeds, and their range."""
    from matplotlib.figure import Figure  # noqa: PLC0415  # an optional extra

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    rows = figure.subplots(2, 1, sharex=True)
    grid_s = np.linspace(0, plan.week_s, 500)
    for axes, measure in zip(rows, (MEASURES[0], MEASURES[2]), strict=True):
        for arm in ARMS:
            lines = [coverage(one, measure, grid_s) for one in runs if one.arm == arm]
            (line,) = axes.plot(grid_s / 86_400, np.mean(lines, axis=0), label=f"adaptation {arm}")
            span = np.min(lines, axis=0), np.max(lines, axis=0)
            axes.fill_between(grid_s / 86_400, *span, color=line.get_color(), alpha=0.15)
        axes.axhspan(LEVEL - BAND, LEVEL + BAND, color="black", alpha=0.08)
        for change_s in plan.changes_s:
            axes.axvline(change_s / 86_400, color="black", linestyle=":")
        axes.set(ylabel="share within stated P95", title=f"P95 of {measure}", ylim=(0, 1.02))
    rows[0].legend(loc="lower left")
    rows[1].set_xlabel("days; dotted: other apps take over, one pool becomes 30 % slower")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def coverage(played: Played, measure: str, grid_s: Floats) -> Floats:
    """Return the share covered of the latest 250 labels at some instants; nan before them."""
    labels = [one for one in played.labels if measure != MEASURES[2] or one.pool == SLOWED]
    hits = [one.tokens_in if measure == "tokens" else one.seconds_in for one in labels]
    below = np.concatenate(([0], np.cumsum(hits)))
    ends = np.searchsorted([one.finished_s for one in labels], grid_s, side="right")
    begins = np.maximum(ends - WINDOW, 0)
    shares = (below[ends] - below[begins]) / np.maximum(ends - begins, 1)
    found: Floats = np.where(ends - begins == WINDOW, shares, np.nan)
    return found
