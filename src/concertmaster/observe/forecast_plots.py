"""Pictures of an evaluation: how calibrated, how sharp, and where it errs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concertmaster.core.errors import InputError
from concertmaster.observe.forecast_tables import LABELS
from concertmaster.observe.plots import check_plot_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STATED = ("0.5", "0.9", "0.95", "0.99")
_MOST_ROLES = 30

Figures = dict[str, Any]


def check_plot_folder(folder: Path, *, option: str = "--plot") -> None:
    """Refuse pictures that could not be written, before any long work.

    Raises:
        InputError: A file is in that place, or matplotlib is not there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(option, "", f'expected a folder, found the file "{folder}"')
    check_plot_path(folder / "one.png", option=option)


def plot_evaluation(report: Figures, folder: Path) -> list[Path]:
    """Draw what the report holds; return the files.

    Args:
        report: Of ``evaluate``.
        folder: Made if it is not there.

    Raises:
        InputError: A file cannot be written.
    """
    pictures: dict[str, Callable[[Any, Figures], None]] = {}
    if report["workflows"]:
        pictures |= {
            "pinball": _draw_pinball,
            "coverage": _draw_coverage,
            "error_by_role": _draw_errors,
        }
    if report["success"] is not None:
        pictures["reliability"] = _draw_reliability
    written = []
    for name, draw in pictures.items():
        path = folder / f"{name}.png"
        _save(report, draw, path)
        written.append(path)
    return written


def _save(report: Figures, draw: Callable[[Any, Figures], None], path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  # an optional extra

    figure = Figure(figsize=(9, 5), layout="constrained")
    draw(figure, report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(str(path), "", f"cannot write: {error.strerror}") from None


def _known(report: Figures) -> Mapping[str, Figures]:
    return {label: report[key] for key, label in LABELS.items() if report[key] is not None}


def _draw_pinball(figure: Any, report: Figures) -> None:  # noqa: ANN401  # matplotlib's
    """Skill at each level, one line a target."""
    axes: Axes = figure.add_subplot()
    for label, one in _known(report).items():
        levels = [float(level) for level in one["skill_by_level"]]
        shares = [_in_percent(value) for value in one["skill_by_level"].values()]
        axes.plot(levels, shares, marker="o", label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("level of the quantile")
    axes.set_ylabel("pinball saved, %")
    axes.set_title("against quantiles of app and role")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()


def _in_percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def _draw_coverage(figure: Any, report: Figures) -> None:  # noqa: ANN401
    """Share covered beyond what was stated, a point a group and level."""
    known = _known(report)
    for place, (label, one) in enumerate(known.items(), start=1):
        axes: Axes = figure.add_subplot(1, len(known), place)
        for group in one["by_role"].values():
            off = [100 * (group["coverage"][level] - float(level)) for level in _STATED]
            checked = group["coverage_off"] is not None
            color = "tab:blue" if checked else "lightgrey"
            axes.plot(_STATED, off, ".-", color=color, alpha=0.7, zorder=1 + checked)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(label, fontsize=9)
        axes.set_xlabel("stated")
        axes.set_ylabel("covered − stated, points" if place == 1 else "")
    figure.suptitle("app and role; grey: fewer calls than are judged")


def _draw_errors(figure: Any, report: Figures) -> None:  # noqa: ANN401
    """Mean absolute error of the median by app and role, beside the baseline's."""
    groups = report["output_tokens"]["by_role"]
    largest = sorted(groups, key=lambda name: (-groups[name]["rows"], name))[:_MOST_ROLES]
    axes: Axes = figure.add_subplot()
    places = range(len(largest))
    axes.barh(places, [groups[name]["mae"] for name in largest], label="forecast")
    axes.plot([groups[name]["mae_baseline"] for name in largest], places, "k|", label="baseline")
    axes.set_yticks(places, largest, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("mean error of the median, output tokens")
    axes.legend()


def _draw_reliability(figure: Any, report: Figures) -> None:  # noqa: ANN401
    """Share solved against what was forecast."""
    table = report["success"]["reliability"]
    axes: Axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.plot([row["forecast"] for row in table], [row["solved_ratio"] for row in table], "o-")
    axes.set_xlabel("probability of success, forecast")
    axes.set_ylabel("share solved")
    axes.grid(visible=True, alpha=0.3)
