"""What came of a study, for people: on the terminal and as GitHub Markdown."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from concertmaster.core.errors import InputError
from concertmaster.observe.console import say
from concertmaster.reproduce.report import Finding
from concertmaster.reproduce.study import Claim, Table

CLAIM_COLUMNS = ("claim", "measured", "target", "met")
INTERVAL_NOTE = "mean ± 95 % interval over seeds"


def claim_texts(claim: Claim) -> list[str]:
    """One row of the table of claims."""
    met = "yes" if claim.met else "no"
    return [claim.statement, claim.measured_text, claim.target_text, met]


def missed_notes(claims: Sequence[Claim]) -> list[str]:
    """Say of each claim that is missed by how much, and why if that is known."""
    return [
        f"missed: {claim.statement}: {claim.measured_text}, {claim.target_text}"
        + (f"; {claim.note}" if claim.note else "")
        for claim in claims
        if not claim.met
    ]


def show_finding(out: Console, finding: Finding) -> None:
    """Print claims, tables, and where we lose."""
    summary = finding.summary
    out.print(
        f"[bold]{finding.study.title}[/]   {_runs(finding)}, {INTERVAL_NOTE}\n", highlight=False
    )
    rows = [claim_texts(claim) for claim in summary.claims]
    out.print(_grid(CLAIM_COLUMNS, rows, numeric={1, 2}))
    for table in summary.tables:
        numeric = {i for i in range(len(table.columns)) if table.is_numeric(i)}
        out.print(f"\n[bold]{table.title}[/]\n", highlight=False)
        out.print(_grid(table.columns, table.texts(), numeric))
        if table.note:
            say(out, table.note)
    notes = [*missed_notes(summary.claims), *summary.notes]
    if notes:
        say(out, "")
    for note in notes:
        say(out, note)


def _runs(finding: Finding) -> str:
    plural = "s" * (finding.seeds > 1)
    return f"{finding.seeds} seed{plural}, {finding.grid} grid, {finding.cells:,} runs"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD if len(rows) > 12 else None, pad_edge=False)
    for at, heading in enumerate(columns):
        grid.add_column(heading, justify="right" if at in numeric else "left")
    for row in rows:
        grid.add_row(*row)
    return grid


def markdown(finding: Finding, plots: Mapping[str, str]) -> str:
    """Return claims, tables and links to plots as a page.

    Args:
        finding: What was found.
        plots: Title to the link of each plot, relative to the page.
    """
    summary = finding.summary
    parts = [
        f"# {finding.study.title}",
        f"```sh\n{finding.command}\n```",
        f"{_runs(finding)}; {INTERVAL_NOTE}.",
        "## Claims",
        _markdown_table(CLAIM_COLUMNS, map(claim_texts, summary.claims), numeric={1, 2}),
        "\n".join(f"- {_escaped(note)}" for note in missed_notes(summary.claims)),
        *(part for table in summary.tables for part in _table_parts(table)),
        *(f"![{title}]({link})" for title, link in plots.items()),
    ]
    if summary.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in summary.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table_parts(table: Table) -> list[str]:
    numeric = {i for i in range(len(table.columns)) if table.is_numeric(i)}
    return [
        f"## {table.title}",
        _markdown_table(table.columns, table.texts(), numeric),
        table.note,
    ]


def _markdown_table(
    columns: Sequence[str], rows: "Sequence[Sequence[str]] | map[list[str]]", numeric: set[int]
) -> str:
    rule = ["---:" if at in numeric else "---" for at in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_markdown(finding: Finding, plots: Mapping[str, Path], path: Path) -> None:
    """Write the page, with links to plots that hold from where it lies.

    Raises:
        InputError: The file cannot be written.
    """
    links = {
        title: Path(os.path.relpath(plot, path.parent)).as_posix() for title, plot in plots.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(finding, links), encoding="utf-8")
    except OSError as error:
        raise InputError(str(path), "", f"cannot write: {error.strerror}") from None
