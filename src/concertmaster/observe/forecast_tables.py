"""What ``concertmaster evaluate`` shows in the terminal; docs/forecasts.md explains the figures."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from concertmaster.observe.console import number, percent, say

LABELS = {
    "output_tokens": "output tokens",
    "remaining_tokens": "remaining tokens",
    "remaining_calls": "remaining calls",
    "remaining_tool_s": "remaining tool time, s",
}
"""How each target is called where people read."""

_LEVELS = ("0.5", "0.9", "0.95", "0.99")
_MOST_FLAGS = 5

Figures = dict[str, Any]


def show_evaluation(out: Console, title: str, report: Figures) -> None:
    """Print a report of ``evaluate``."""
    out.print(
        f"[bold]{title}[/]   {report['workflows']:,} workflows, {report['calls']:,} calls   "
        f"{report['questions']:,} questions\n"
    )
    if report["workflows"]:
        _show_targets(out, report)
    if report["online"] is not None:
        out.print("[bold]online[/]   each call is forecast before it is learnt\n")
        _show_targets(out, report["online"])
        _show_early(out, report["online"])
    if report["success"] is not None:
        _show_success(out, report["success"])


def _table(heading: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(heading, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _known(report: Figures) -> list[tuple[str, Figures]]:
    return [(label, report[key]) for key, label in LABELS.items() if report[key] is not None]


def _show_targets(out: Console, report: Figures) -> None:
    stated = [f"≤ P{float(level) * 100:.0f}" for level in _LEVELS]
    table = _table("forecast", "calls", "pinball", "skill", "of apps", "MAE", *stated)
    for label, one in _known(report):
        table.add_row(
            label,
            f"{one['rows']:,}",
            number(one["pinball"]),
            percent(one["pinball_skill"]),
            percent(one["mean_over_apps"]["pinball_skill"]),
            number(one["mae"]),
            *(percent(one["coverage"][level]) for level in _LEVELS),
        )
    out.print(table)
    say(out, "skill: pinball saved against quantiles of app and role; of apps: their plain mean\n")
    out.print(_apps(report))
    out.print()
    for label, one in _known(report):
        _show_flags(out, label, one["coverage_flags"])
    distance = report["remaining_tokens"]["kendall_tau_distance"]
    beaten = report["remaining_tokens"]["kendall_tau_distance_baseline"]
    say(out, f"wrong order       {percent(distance)} of pairs of one app by remaining tokens; "
             f"{percent(beaten)} by quantiles of app and role\n")  # fmt: skip


def _apps(report: Figures) -> Table:
    known = [one for label, one in _known(report) if label != LABELS["remaining_tool_s"]]
    heads = ("tokens", "rem. tokens", "rem. calls")
    table = _table(
        "app",
        "calls",
        *(f"skill {head}" for head in heads),
        *(f"≤ P90 {head}" for head in heads),
        "wrong order",
    )
    for app, first in known[0]["by_app"].items():
        parts = [one["by_app"][app] for one in known]
        table.add_row(
            app or "–",
            f"{first['rows']:,}",
            *(percent(part["pinball_skill"]) for part in parts),
            *(percent(part["coverage"]["0.9"]) for part in parts),
            percent(parts[1]["kendall_tau_distance"]),
        )
    return table


def _show_flags(out: Console, label: str, flags: Figures) -> None:
    off: Sequence[Figures] = flags["off"]
    if not flags["groups"]:
        return
    worst = sorted(off, key=lambda one: -abs(one["coverage"] - float(one["level"])))[:_MOST_FLAGS]
    shown = ", ".join(
        f"{one['group']} {percent(one['coverage'])} at {float(one['level']) * 100:.0f} %"
        for one in worst
    )
    good = flags["groups"] - len({one["group"] for one in off})
    line = (
        f"{label}: coverage within {flags['tolerance'] * 100:.0f} points in {good} of "
        f"{flags['groups']} groups of {flags['least_rows']} calls or more"
    )
    say(out, line + (f"; farthest off: {shown}" if shown else ""))


def _show_early(out: Console, report: Figures) -> None:
    table = _table("covered at P90", "first labels", "after")
    for label, one in _known(report):
        parts = [one["first_labels"], one["after"]]
        table.add_row(
            label,
            *(percent(part["coverage"]["0.9"] if part else None) for part in parts),
        )
    out.print(table)
    out.print()


def _show_success(out: Console, success: Figures) -> None:
    columns = ("questions", "models", "solved", "AUC", "MAP", "Brier", "ECE", "gap recovered")
    table = _table("success", *columns)
    gaps = success["gap_recovered"]
    for source, one in success["by_source"].items():
        table.add_row(
            source or "–",
            f"{one['questions']:,}",
            f"{one['models']:,}",
            percent(one["solved_ratio"]),
            *(number(one[key]) for key in ("auc", "map", "brier", "ece")),
            percent(gaps["by_source"].get(source)),
        )
    table.add_row(
        "all",
        f"{success['questions']:,}",
        f"{len(success['per_model']):,}",
        percent(success["solved_ratio"]),
        *(number(success[key]) for key in ("auc", "map", "brier", "ece")),
        percent(gaps["ratio"]),
    )
    out.print(table)
    if success["not_forecast"]:
        say(out, f"{success['not_forecast']:,} answers of models without a forecast left out")
