"""The dashboard asks for metrics and labels that a live gateway has, and for no others."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gateway_rig import exactly, over_engines, play, until

FOLDER = Path(__file__).parents[1] / "dashboards"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "concertmaster.json").read_text())
TARGETS = [
    (panel["title"], target) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
]


def live() -> dict[str, dict[str, set[str]]]:
    """Samples that a gateway shows once it has served and refused, and their labels' values."""
    found: dict[str, dict[str, set[str]]] = {}

    async def main() -> None:
        async with over_engines(health_interval_s=0.05) as (rig, _):
            await rig.call({**exactly(4), "stream": True})
            await rig.call({"model": "unknown"})
            await until(lambda: rig.gateway.engines.readings)
            text = (await rig.ask("GET", "/metrics")).body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)

    play(main())
    return found


def test_every_metric_and_label_of_the_dashboard_is_on_a_live_gateway() -> None:
    known = live()
    assert len(TARGETS) > 20
    for title, target in TARGETS:
        names = re.findall(r"concertmaster_\w+", target["expr"])
        assert names, title
        grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
        labels = {one.strip() for group in grouped for one in group.split(",")}
        labels |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for name in names:
            assert name in known, f"{title}: {name}"
            assert labels <= set(known[name]), f"{title}: {name} has not all of {labels}"
        for name, label, value in re.findall(r"(\w+)\{(\w+)=\"(\w+)\"\}", target["expr"]):
            assert value in known[name][label], f"{title}: {name} has no {label} {value}"


def test_hedges_are_shown_with_those_that_were_not_sent() -> None:
    lines = {
        target["legendFormat"]: target["expr"] for title, target in TARGETS if title == "Hedges"
    }
    assert list(lines) == ["sent", "{{outcome}}", "over budget"]


def test_every_line_of_a_panel_can_be_told_from_the_others() -> None:
    for title, target in TARGETS:
        grouped = re.search(r" by \(([^)]*)\) \(", target["expr"].replace("le, ", ""))
        if grouped and grouped[1] != "le":
            for label in grouped[1].split(", "):
                assert f"{{{{{label}}}}}" in target["legendFormat"], title


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells


def test_the_file_is_what_its_generator_writes() -> None:
    command = [sys.executable, str(FOLDER / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
    assert done.returncode == 0, done.stderr
