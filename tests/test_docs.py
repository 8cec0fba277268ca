"""Documentation is complete, its links and commands hold, and its examples run."""

import dataclasses
import random
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
import typer

from builders import a_fleet, chains
from concertmaster.cli import app
from concertmaster.compose import simulate
from concertmaster.config import (
    ClusterSection,
    EmulatorSection,
    EngineFile,
    FleetFile,
    GatewaySection,
    NodeSection,
    PoolSection,
    ScalingSection,
)
from concertmaster.core.actions import Action
from concertmaster.core.events import Event, FailReason, RejectReason
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.dialects import Reading
from concertmaster.engines.faults import Faults
from concertmaster.gateway.engine_watch import EngineWatch
from concertmaster.gateway.metrics import GatewayMetrics, exposition
from concertmaster.gateway.openai_api import GatewayReason, refusal
from concertmaster.gateway.tally import Tally
from concertmaster.observe.compare import PAIRED
from concertmaster.observe.report import build_report
from concertmaster.physics.hardware import GPUS
from concertmaster.physics.models import MODELS
from concertmaster.policies.catalog import NAMES, policy

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)

FILE_SECTIONS: dict[str, type[Any]] = {
    "Top level": FleetFile,
    "`[[pools]]`": PoolSection,
    "`[[clusters]]`": ClusterSection,
    "`[[nodes]]`": NodeSection,
    "`[gateway]`": GatewaySection,
    "`[emulator]`": EmulatorSection,
    "`[scaling]`": ScalingSection,
    "Engine file": EngineFile,
    "`[faults]`": Faults,
}
POLICY_HEADINGS = ["Decides", "Formula", "Needs", "Best form", "Wins and loses", "Source"]
DECISION_HEADINGS = ["Context", "Decision", "Consequences", "Alternatives"]


def headings(text: str, level: int = 2) -> list[str]:
    return re.findall(rf"^{'#' * level} (.+)$", without_blocks(text), re.MULTILINE)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """The text under a heading of level 2, up to the next one."""
    _, found, rest = text.partition(f"\n## {heading}\n")
    assert found, f"there is no heading {heading!r}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of every table row whose first cell is code."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def code(cell: str) -> str:
    return cell.strip().removeprefix("`").removesuffix("`")


def documented(text: str) -> list[str]:
    return [code(row[0]) for row in rows(text)]


# Fleet and engine files.


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a file: its type and default, as the program has them."""

    type: object
    default: object
    required: bool


def keys_of(kind: type[Any]) -> dict[str, Key]:
    if dataclasses.is_dataclass(kind):
        return {f.name: Key(f.type, f.default, required=False) for f in dataclasses.fields(kind)}
    found = {}
    for field in msgspec.structs.fields(kind):
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        found[field.name] = Key(field.type, default, required=field.required)
    return found


every_section = pytest.mark.parametrize(("heading", "kind"), FILE_SECTIONS.items())


@every_section
def test_every_key_of_a_file_has_a_row_and_no_row_is_stale(heading: str, kind: type[Any]) -> None:
    page = (DOCS / "fleet.md").read_text()

    assert sorted(documented(section(page, heading))) == sorted(keys_of(kind))


@every_section
def test_the_default_in_the_row_is_the_default_of_the_program(
    heading: str, kind: type[Any]
) -> None:
    keys = keys_of(kind)
    for row in rows(section((DOCS / "fleet.md").read_text(), heading)):
        key, shown = keys[code(row[0])], row[3]
        if not shown.startswith("`"):
            simple = isinstance(key.default, bool | int | float | str)
            assert (shown == "required") == key.required, row
            assert not simple, f"{row[0]}: write {key.default!r} as its default"
            continue
        default = key.default.value if isinstance(key.default, Enum) else key.default
        assert tomllib.loads(f"x = {code(shown)}")["x"] == default, row


@every_section
def test_the_example_in_the_row_has_the_type_of_the_key(heading: str, kind: type[Any]) -> None:
    keys = keys_of(kind)
    for row in rows(section((DOCS / "fleet.md").read_text(), heading)):
        example = code(row[5].removesuffix(" |")) if len(row) > 5 else ""
        if example:
            value = tomllib.loads(f"x = {example}")["x"]
            msgspec.convert(value, keys[code(row[0])].type)


def test_every_section_of_a_file_is_checked() -> None:
    nested = {
        kind
        for top in (FleetFile, EngineFile)
        for field in msgspec.structs.fields(top)
        for kind in (field.type, *get_args(field.type))
        if isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or kind is Faults)
    }

    assert nested | {FleetFile, EngineFile} == set(FILE_SECTIONS.values())


@pytest.mark.parametrize(("heading", "known"), [("Known models", MODELS), ("Known GPUs", GPUS)])
def test_every_model_and_gpu_is_listed(heading: str, known: dict[str, object]) -> None:
    assert documented(section((DOCS / "fleet.md").read_text(), heading)) == list(known)


# Policies and decisions.


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_has_a_page_with_the_same_headings(name: str) -> None:
    text = (DOCS / "policies" / f"{name}.md").read_text()

    assert text.startswith(f"# `{name}`\n")
    assert headings(text) == POLICY_HEADINGS


def test_every_policy_page_is_in_the_index_and_belongs_to_a_policy() -> None:
    index = (DOCS / "policies" / "index.md").read_text()

    listed = re.findall(r"^\| \[`([\w-]+)`\]\(\1\.md\)", index, re.MULTILINE)

    assert sorted(listed) == sorted(NAMES)
    assert {page.stem for page in (DOCS / "policies").iterdir()} == {*NAMES, "index"}


def test_decisions_are_numbered_have_the_same_headings_and_are_in_the_index() -> None:
    pages = sorted((DOCS / "adr").glob("0*.md"))
    index = (DOCS / "adr" / "index.md").read_text()

    assert [page.name[:4] for page in pages] == [f"{i:04d}" for i in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text()
        title = text.partition("\n")[0].removeprefix("# ")
        assert headings(text) == DECISION_HEADINGS, page.name
        assert f"[{title}]({page.name})" in index


# Metrics.


def test_every_prometheus_metric_has_a_row() -> None:
    scheduler = Scheduler(a_fleet(), policy("random"), random.Random(0))
    metrics = GatewayMetrics()
    metrics.answered(200, 0.1)
    metrics.refused("queue_full")
    metrics.tally = Tally(scheduler)
    member = SimpleNamespace(calls=1, connections=1, cpu_s=1.0)
    metrics.workers = SimpleNamespace(lines={0: member})
    metrics.tally._calls["m", "m", "interactive", "served"] = 1
    engines = EngineWatch({}, {}, scheduler.replicas, lambda _: True, interval_s=1.0)
    engines.readings = {
        replica_id: Reading({"running": 1.0, "waiting": 0.0, "kv_ratio": 0.5}, ())
        for replica_id in scheduler.replicas
    }
    text = exposition(metrics, scheduler, engines).decode()
    kinds = dict(re.findall(r"^# TYPE (concertmaster_\w+) (\w+)$", text, re.MULTILINE))
    names = {name.removesuffix("_created"): kind for name, kind in kinds.items()}

    found = rows(section((DOCS / "metrics.md").read_text(), "Prometheus"))

    assert {code(row[0]): row[1] for row in found} == names
    for row in found:
        labels = set(re.findall(rf"^{code(row[0])}(?:_bucket)?\{{(.*?)\}} ", text, re.MULTILINE))
        used = {name for one in labels for name in re.findall(r"(\w+)=", one)} - {"le"}
        assert set(re.findall(r"`(\w+)`", row[2])) == used, row


def test_every_reason_has_a_row_with_the_status_that_callers_get() -> None:
    kinds = {"reject": RejectReason, "fail": FailReason, "gateway": GatewayReason}
    kind_of = {reason: kind for kind, union in kinds.items() for reason in get_args(union)}
    found = rows(section((DOCS / "metrics.md").read_text(), "Reasons"))

    assert [code(row[0]) for row in found] == list(kind_of)
    for row in found:
        status = refusal(code(row[0]), detail="", retry_after_s=None)[0]  # type: ignore[arg-type]
        assert row[1:3] == [kind_of[code(row[0])], str(status)]


def paths(report: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of a report as the page writes them: those of a summary are not repeated."""
    for key, value in report.items():
        if key in {"by_class", "workflows", "requests"}:
            yield key
            yield from next(iter(value.values())) if key == "by_class" else value
        elif isinstance(value, dict) and "mean" not in value:
            yield from paths(value, f"{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_of_a_report_is_defined() -> None:
    report = build_report(simulate(a_fleet(), chains(2, gap_s=1.0, seed=1), "random", seed=0))
    text = section((DOCS / "metrics.md").read_text(), "Report")

    in_prose = set(re.findall(r"`(workflows|requests|by_class)`", text))
    assert set(paths(report)) == {*documented(text), *in_prose}


def test_every_figure_of_a_pair_is_named() -> None:
    text = section((DOCS / "metrics.md").read_text(), "Comparison")

    assert all(f"`{group}.{figure}`" in text for group, figure in PAIRED)


# Architecture.


@pytest.mark.parametrize(("heading", "union"), [("Events", Event), ("Actions", Action)])
def test_every_event_and_action_has_a_row(heading: str, union: object) -> None:
    text = section((DOCS / "architecture.md").read_text(), heading)

    assert documented(text) == [kind.__name__ for kind in get_args(union)]


def test_the_layers_on_the_page_are_those_that_are_enforced() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    layers = "\n".join(contract["layers"]).replace("concertmaster.", "")

    text = section((DOCS / "architecture.md").read_text(), "Who may import whom")

    assert f"```text\n{layers}\n```" in text
    packages = set(re.findall(r"\w+", layers))
    named = set(re.findall(r"`(\w+)`", (DOCS / "architecture.md").read_text()))
    assert packages <= named


# Commands.


def generate(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "generate.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours


def test_generated_pages_are_up_to_date() -> None:
    done = generate(DOCS, "--check")

    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed_and_mended(tmp_path: Path) -> None:
    for name in ("generate.py", "cli.md"):
        content = (DOCS / name).read_text()
        (tmp_path / name).write_text(content.replace("Show the version.", "Show a version."))

    stale = generate(tmp_path, "--check")

    assert (stale.returncode, "is stale" in stale.stderr) == (1, True)
    assert generate(tmp_path).returncode == 0
    assert (tmp_path / "cli.md").read_text() == (DOCS / "cli.md").read_text()


def commands() -> list[str]:
    root: Any = typer.main.get_command(app)
    return list(root.commands)


@pytest.mark.parametrize("name", commands())
def test_every_command_has_a_heading_and_a_row(name: str) -> None:
    page = (DOCS / "cli.md").read_text()

    assert f"`concertmaster {name}`" in headings(page, level=3)
    assert name in documented(page)


def command_lines(text: str) -> Iterator[str]:
    """Commands as people would type them: in shell blocks, in help, in running text."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?concertmaster ", line):
                yield line.removeprefix("$ ")
    yield from re.findall(r"^ *Example: (concertmaster .+)$", text, re.MULTILINE)
    yield from re.findall(r"`(concertmaster [^`]+)`", without_blocks(text))
    yield from re.findall(r"^next: (concertmaster .+)$", text, re.MULTILINE)


def parse(line: str) -> None:
    """Let the command line read it, without running anything."""
    root: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line, comments=True)
    if name.startswith("-"):
        root.make_context("concertmaster", [name], resilient_parsing=True)
        return
    command = root.commands[name]
    if arguments:
        with root.make_context("concertmaster", [name]) as context:
            inner = getattr(command, "commands", {})
            if inner:
                command, arguments = inner[arguments[0]], arguments[1:]
            if arguments or not inner:
                command.make_context(name, arguments, parent=context)


@every_page
def test_every_command_that_a_page_quotes_can_be_read(page: Path) -> None:
    for line in command_lines(page.read_text()):
        try:
            parse(line)
        except Exception as problem:
            raise AssertionError(f"{line}: {problem!r}") from problem


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert list(command_lines("```sh\n$ concertmaster simulat -f x\n```\n"))
    unknown = ("concertmaster simulat -f x", "concertmaster keys creat --tenant x")
    for line in (*unknown, "concertmaster serve --config"):
        with pytest.raises(Exception, match=r"simulat|creat|argument"):
            parse(line)


# Proofs.


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", (DOCS / "security.md").read_text())
    assert len(named) > 30
    for module, name in named:
        assert f"def {name}(" in (ROOT / "tests" / f"{module}.py").read_text(), name


# Links and files.


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


@every_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}"


@every_page
def test_every_file_and_make_target_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    for name in re.findall(r"\bexamples/[\w./-]+\.toml", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\bpython ((?:docs|benchmarks|tests)/[\w./-]+\.py)", text):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"[`^]make ([a-z]+)", text)) <= targets


@every_page
def test_a_page_has_one_title_and_closes_its_blocks(page: Path) -> None:
    text = page.read_text()

    assert len(headings(text, level=1)) == 1
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0


def test_the_examples_for_contributors_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "contributing"}

    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)  # noqa: S102  # our own page

    assert len(blocks) == 4
