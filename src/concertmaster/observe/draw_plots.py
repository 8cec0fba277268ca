"""Draws the plots of a study to files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from concertmaster.core.errors import InputError
from concertmaster.observe.plot_kinds import (
    CdfPlot,
    Frontier,
    FrontierPlot,
    Line,
    LinePlot,
    Mark,
    Plot,
    StatePlot,
    TimelinePlot,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = 4.5
_MOST_COLUMNS = 3


def draw_plots(plots: Mapping[str, Plot], folder: Path) -> list[Path]:
    """Draw each to ``NAME.png`` in a folder, which is made if need be; return the files.

    Raises:
        InputError: A file cannot be written.
    """
    written = []
    for name, plot in plots.items():
        path = folder / f"{name}.png"
        _save(plot, path)
        written.append(path)
    return written


def _save(plot: Plot, path: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  # an optional extra

    figure = Figure(layout="constrained")
    draw(figure, plot)
    figure.suptitle(plot.title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(str(path), "", f"cannot write: {error.strerror}") from None


def draw(figure: Any, plot: Plot) -> None:  # noqa: ANN401  # matplotlib's
    """Draw onto a figure, whose size it sets."""
    match plot:
        case LinePlot():
            _draw_lines(figure, plot)
        case FrontierPlot():
            _draw_frontiers(figure, plot)
        case CdfPlot():
            _draw_cdfs(figure, plot)
        case TimelinePlot():
            _draw_timeline(figure, plot)
        case StatePlot():
            _draw_states(figure, plot)
        case _:
            assert_never(plot)


def _panels(figure: Any, titles: Sequence[str]) -> "list[Axes]":  # noqa: ANN401
    columns = min(_MOST_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure.set_size_inches(max(7.0, _PANEL_INCHES * columns), 4.2 * rows)
    found = []
    for place, title in enumerate(titles, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(title, fontsize=9)
        axes.grid(visible=True, alpha=0.3)
        found.append(axes)
    return found


def _draw_lines(figure: Any, plot: LinePlot) -> None:  # noqa: ANN401
    for axes, lines in zip(_panels(figure, [*plot.panels]), plot.panels.values(), strict=True):
        for line in lines:
            _bars(axes, line)
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.set_yscale("log" if plot.log_y else "linear")
        axes.legend(fontsize=8)


def _bars(axes: "Axes", line: Line) -> None:
    halves = [half or 0.0 for half in line.half] or None
    axes.errorbar(
        line.x, line.y, yerr=halves, marker="o", markersize=4, capsize=3, label=line.label
    )


def _draw_frontiers(figure: Any, plot: FrontierPlot) -> None:  # noqa: ANN401
    for axes, one in zip(_panels(figure, [*plot.panels]), plot.panels.values(), strict=True):
        _draw_frontier(axes, one)
        if plot.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        axes.legend(fontsize=8)


def _draw_frontier(axes: "Axes", one: Frontier) -> None:
    xs, ys = [mark.x for mark in one.curve], [mark.y for mark in one.curve]
    axes.plot(xs, ys, "o-", markersize=4, label=one.label, zorder=3)
    for mark in one.curve:
        axes.annotate(
            mark.label, (mark.x, mark.y), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    for other in one.others:
        _point(axes, other)


def _point(axes: "Axes", mark: Mark) -> None:
    axes.errorbar(
        [mark.x],
        [mark.y],
        xerr=mark.x_half,
        yerr=mark.y_half,
        marker="D",
        markersize=5,
        linestyle="none",
        label=mark.label,
    )


def _draw_cdfs(figure: Any, plot: CdfPlot) -> None:  # noqa: ANN401
    for axes, arms in zip(_panels(figure, [*plot.panels]), plot.panels.values(), strict=True):
        for label, values in arms.items():
            ranked = sorted(values)
            shares = [100 * (i + 1) / len(ranked) for i in range(len(ranked))]
            axes.step(ranked, shares, where="post", label=label)
        axes.set_xscale("log" if plot.log_x else "linear")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel("share, %")
        axes.legend(loc="lower right", fontsize=8)


def _draw_timeline(figure: Any, plot: TimelinePlot) -> None:  # noqa: ANN401
    figure.set_size_inches(9, 1 + 1.8 * len(plot.bands))
    rows = figure.subplots(len(plot.bands), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(rows, plot.bands.items(), strict=True):
        for line in lines:
            axes.plot(line.x, line.y, label=line.label, linewidth=1)
        for instant_s in plot.events or {}:
            axes.axvline(instant_s, color="black", linewidth=0.8, linestyle="--")
        axes.set_ylabel(label, fontsize=8)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="upper right", fontsize=7)
    for instant_s, what in (plot.events or {}).items():
        rows[0].annotate(
            what, (instant_s, 1.0), xycoords=("data", "axes fraction"), fontsize=7, rotation=20
        )
    rows[-1].set_xlabel(plot.x_label)


def _draw_states(figure: Any, plot: StatePlot) -> None:  # noqa: ANN401
    figure.set_size_inches(9, 1.5 + 0.3 * len(plot.rows))
    axes: Axes = figure.add_subplot()
    for color, state in enumerate(plot.states):
        axes.barh(0, 0, color=f"C{color}", label=state)
        for row, spans in enumerate(plot.rows.values()):
            widths = [(s.start_s, s.end_s - s.start_s) for s in spans if s.state == state]
            axes.broken_barh(widths, (row - 0.4, 0.8), facecolors=f"C{color}")
    axes.set_yticks(range(len(plot.rows)), [*plot.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(plot.x_label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=6, fontsize=8)
