# ruff: noqa: INP001  # a script beside the file it writes, not a package
"""Writes the Grafana dashboard from a table of panels.

``python dashboards/generate.py`` rewrites; with ``--check`` it fails if the file is stale.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parent / "concertmaster.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
RANGE = "$__rate_interval"


class Panel(NamedTuple):
    """One graph.

    Attributes:
        says: What a reader learns from it.
        queries: Legend and expression of each line.
        unit: As Grafana names it.
    """

    title: str
    says: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"


def rate(metric: str, *by: str, match: str = "") -> str:
    """Return what comes a second, summed over all labels but some; of what matches, if told."""
    chosen = f"{{{match}}}" if match else ""
    return f"sum{_by(by)}(rate(concertmaster_{metric}{chosen}[{RANGE}]))"


def quantile(level: float, metric: str, *by: str) -> str:
    """Return a quantile of a histogram."""
    inner = f"sum{_by(('le', *by))}(rate(concertmaster_{metric}_bucket[{RANGE}]))"
    return f"histogram_quantile({level}, {inner})"


def gauge(metric: str, *by: str, of: str = "sum") -> str:
    """Return a gauge, summed up."""
    return f"{of}{_by(by)}(concertmaster_{metric})"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def levels(metric: str) -> tuple[tuple[str, str], ...]:
    """Return P50, P90 and P99 of a histogram."""
    return tuple((f"p{round(100 * one)}", quantile(one, metric)) for one in (0.5, 0.9, 0.99))


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Calls",
        (
            Panel(
                "Answers",
                "By HTTP status; 499 is a caller that left, 502 also an answer that broke.",
                (("{{code}}", rate("requests_total", "code")),),
                "reqps",
            ),
            Panel(
                "Refusals",
                "Why calls were rejected or failed.",
                (("{{reason}}", rate("refusals_total", "reason")),),
                "reqps",
            ),
            Panel(
                "Served by",
                "Asked for, and served by.",
                (
                    (
                        "{{model_name}} on {{target_model_name}}, {{outcome}}",
                        rate("calls_total", "model_name", "target_model_name", "outcome"),
                    ),
                ),
                "reqps",
            ),
            Panel(
                "Time to first token",
                "Queue wait included; streamed answers.",
                levels("time_to_first_token_seconds"),
                "s",
            ),
            Panel(
                "Time per output token",
                "One number a call.",
                levels("time_per_output_token_seconds"),
                "s",
            ),
            Panel(
                "Duration",
                "Arrival to the end of the answer.",
                levels("request_duration_seconds"),
                "s",
            ),
        ),
    ),
    (
        "Line and decisions",
        (
            Panel(
                "Calls in the line",
                "Waiting, and on replicas.",
                (
                    ("waiting", gauge("queue_size")),
                    ("on replicas", gauge("inflight_requests")),
                ),
            ),
            Panel(
                "Time in the line, P90",
                "Until the first dispatch, or until a call was given up.",
                (("{{outcome}}", quantile(0.9, "queue_duration_seconds", "outcome")),),
                "s",
            ),
            Panel(
                "Decisions",
                "Why calls went where they went, or did not.",
                (("{{reason}}", rate("decisions_total", "reason")),),
                "ops",
            ),
            Panel(
                "Overhead of the gateway",
                "Deciding and writing, a dispatch.",
                levels("gateway_overhead_seconds"),
                "s",
            ),
            Panel(
                "Queue wait",
                "Arrival to dispatch; a retried call counts again.",
                levels("queue_wait_seconds"),
                "s",
            ),
            Panel(
                "Receipts",
                "Dropped ones mean that their file cannot be written.",
                (("{{outcome}}", rate("receipts_total", "outcome")),),
                "ops",
            ),
        ),
    ),
    (
        "Late calls",
        (
            Panel(
                "Hedges",
                "Second attempts of late calls: sent, what came of them, and those that the "
                "budget held back. Nothing unless the policy hedges.",
                (
                    ("sent", rate("decisions_total", match='reason="hedged"')),
                    ("{{outcome}}", rate("hedges_total", "outcome")),
                    ("over budget", rate("hedges_over_budget_total")),
                ),
                "ops",
            ),
            Panel(
                "Retries",
                "Attempts after the first, of calls that failed.",
                (("retries", rate("retries_total")),),
                "ops",
            ),
            Panel(
                "Replicas that rest",
                "Kept failing, or were overtaken: they get no calls, or one on trial.",
                (("{{pool}}", gauge("replica_resting", "pool")),),
            ),
        ),
    ),
    (
        "Forecasts",
        (
            Panel(
                "Coverage",
                "Outcomes at or below a quantile; its own level is right.",
                (
                    (
                        "{{target}} p{{level}}",
                        gauge("forecast_coverage_ratio", "target", "level", of="avg"),
                    ),
                ),
                "percentunit",
            ),
            Panel(
                "Length over forecast",
                "1 is right; P90 of 2 means that a tenth is twice as long as forecast.",
                levels("output_tokens_forecast_ratio"),
            ),
            Panel(
                "Who forecast",
                "Steps of the fallback, and forecasts that were late or left out.",
                (
                    ("{{source}}", rate("forecasts_total", "source")),
                    ("{{outcome}}", rate("forecast_budget_total", "outcome")),
                ),
                "ops",
            ),
            Panel("Time to forecast", "On the wall's clock.", levels("forecast_seconds"), "s"),
            Panel(
                "Drift alarms",
                "Forecasts that hold no longer.",
                (("{{target}} {{kind}}", rate("drift_total", "target", "kind")),),
                "ops",
            ),
            Panel(
                "Learning",
                "Labels, trainings and verdicts.",
                (
                    ("labels {{outcome}}", rate("labels_total", "outcome")),
                    ("trainings {{outcome}}", rate("trainings_total", "outcome")),
                    ("challengers {{verdict}}", rate("challengers_total", "verdict")),
                ),
                "ops",
            ),
        ),
    ),
    (
        "Fleet",
        (
            Panel(
                "Replicas that serve",
                "Alive, by pool.",
                (("{{pool}}", gauge("replica_alive", "pool")),),
            ),
            Panel(
                "Calls on replicas",
                "As the gateway counts them.",
                (("{{replica}}", gauge("inflight_requests", "replica")),),
            ),
            Panel(
                "KV promised",
                "Above 1 once calls outgrow their promise.",
                (("{{replica}}", gauge("kv_reserved_ratio", "replica", of="max")),),
                "percentunit",
            ),
            Panel(
                "Pace",
                "Seconds taken over seconds by the rate curve.",
                (("{{replica}}", gauge("replica_pace", "replica", of="max")),),
            ),
            Panel(
                "Output tokens",
                "Of complete answers, a second.",
                (("tokens", rate("output_tokens_total")),),
            ),
            Panel(
                "What engines say",
                "Their own counts, calls that are not ours, and figures that they lack.",
                (
                    ("{{replica}} {{state}}", gauge("engine_requests", "replica", "state")),
                    ("{{replica}} foreign", gauge("engine_foreign_requests", "replica")),
                    ("{{replica}} missing", gauge("engine_missing_metrics", "replica")),
                ),
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "title": "Concertmaster",
        "uid": "concertmaster",
        "schemaVersion": 39,
        "tags": ["concertmaster"],
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    top = 0
    for title, panels in ROWS:
        grid = {"x": 0, "y": top, "w": COLUMNS * WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "gridPos": grid})
        top += 1
        for i, panel in enumerate(panels):
            line, column = divmod(i, COLUMNS)
            place = {"x": column * WIDTH, "y": top + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            found.append(_panel(len(found) + 1, panel, place))
        top += -(-len(panels) // COLUMNS) * HEIGHT
    return found


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries)
        ],
    }


def main(arguments: list[str]) -> int:
    """Rewrite the file, or only say whether it is stale."""
    if arguments not in ([], ["--check"]):
        sys.exit("usage: python dashboards/generate.py [--check]")
    wanted = json.dumps(dashboard(), indent=1) + "\n"
    if PATH.exists() and PATH.read_text() == wanted:
        return 0
    if arguments:
        sys.stderr.write(f"{PATH} is stale: run python dashboards/generate.py\n")
        return 1
    PATH.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
