"""What came of a study, as JSON."""

import shlex
from dataclasses import dataclass
from typing import Any

from concertmaster.reproduce.study import Claim, Estimate, Study, Summary, Table, TableCell


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A study that was run.

    Attributes:
        cells: How many runs it is made of.
    """

    study: Study
    summary: Summary
    seeds: int
    full: bool
    cells: int

    @property
    def grid(self) -> str:
        """Which cells: ``default`` or ``full``."""
        return "full" if self.full else "default"

    @property
    def command(self) -> str:
        """What repeats it."""
        return shlex.join(
            ["concertmaster", "reproduce", self.study.name, "--seeds", str(self.seeds)]
            + ["--full"] * self.full
        )


def as_json(finding: Finding) -> dict[str, Any]:
    """Return the JSON document; keys as in docs/reproduce.md."""
    summary = finding.summary
    return {
        "system": finding.study.name,
        "title": finding.study.title,
        "seeds": finding.seeds,
        "grid": finding.grid,
        "cells": finding.cells,
        "command": finding.command,
        "met": summary.met,
        "claims": [_claim(claim, finding.command) for claim in summary.claims],
        "tables": [_table(table) for table in summary.tables],
        "notes": list(summary.notes),
    }


def _claim(claim: Claim, command: str) -> dict[str, Any]:
    return {
        "id": claim.id,
        "statement": claim.statement,
        "measured": claim.measured,
        "ci95": None if claim.ci95 is None else list(claim.ci95),
        "direction": claim.direction,
        "target": claim.target,
        "met": claim.met,
        "command": claim.command or command,
        "note": claim.note,
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": list(table.columns),
        "rows": [[_cell(cell) for cell in row] for row in table.rows],
        "note": table.note,
    }


def _cell(cell: TableCell) -> object:
    return {"mean": cell.mean, "ci95": cell.half} if isinstance(cell, Estimate) else cell
