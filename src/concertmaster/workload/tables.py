"""Columns of a file, checked as they are asked for: every complaint names its row."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from concertmaster.core.errors import InputError, unknown_name

_MOST_CHARS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of one file that could be read.

    Attributes:
        unit: What the file is made of: "row" (Parquet, from 0) or "line" (from 1).
        numbers: Where each row stands in the file, counted in ``unit``.
        notes: What was cut or ignored.
        broken: Whether the file ends in half a row.
    """

    file: str
    columns: Mapping[str, Sequence[object]]
    numbers: Sequence[int]
    unit: str = "row"
    notes: tuple[str, ...] = ()
    broken: bool = False

    def __len__(self) -> int:
        """Count of rows."""
        return len(self.numbers)

    def __contains__(self, column: str) -> bool:
        """Tell whether the file has this column."""
        return column in self.columns

    def where(self, row: int, column: str = "") -> str:
        """Say where a value stands, for an error."""
        return f"{self.unit} {self.numbers[row]}" + (f", {column}" if column else "")

    def error(
        self, row: int, column: str, expected: str, remedy: str = "", *, part: object = None
    ) -> InputError:
        """Build the complaint about one value, or about a ``part`` of one."""
        found = self.columns[column][row] if column in self.columns else part
        remedy = remedy or f"mend or remove this {self.unit}"
        problem = f"expected {expected}, found {_shown(found)}"
        return InputError(self.file, self.where(row, column), problem, remedy)

    def require(self, names: Sequence[str], kind: str) -> None:
        """Raise unless all columns are there."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            found = ", ".join(sorted(self.columns)) or "none"
            problem = f"expected columns {', '.join(missing)} in {kind}, found {found}"
            raise InputError(
                self.file, "columns", problem, "add or rename them: see docs/workloads.md"
            )

    def select(self, column: str, name: str | None) -> "Table":
        """Keep the rows whose ``column`` says ``name``; all of them for ``None``."""
        if name is None:
            return self
        values = self.texts(column)
        rows = [row for row, value in enumerate(values) if value == name]
        if not rows:
            raise unknown_name(self.file, f"#{name}", column, name, set(values))
        return self.keep(rows)

    def keep(self, rows: Sequence[int]) -> "Table":
        """Keep some rows, in this order."""
        columns = {key: [cells[row] for row in rows] for key, cells in self.columns.items()}
        return replace(self, columns=columns, numbers=[self.numbers[row] for row in rows])

    def wholes(self, name: str, *, least: int = 0) -> list[int]:
        """Return a column of whole numbers, none of them missing or below ``least``."""
        values = self.columns[name]
        for row, value in enumerate(values):
            if type(value) is not int or value < least:
                raise self.error(row, name, f"a whole number >= {least}")
        return cast("list[int]", list(values))

    def wholes_or_none(self, name: str, *, least: int = 0) -> list[int | None]:
        """Return whole numbers or ``None``; all ``None`` if there is no such column."""
        values = self.columns.get(name)
        if values is None:
            return [None] * len(self)
        for row, value in enumerate(values):
            if value is not None and (type(value) is not int or value < least):
                raise self.error(row, name, f"a whole number >= {least} or nothing")
        return cast("list[int | None]", list(values))

    def numbers_or_none(
        self, name: str, *, least: float = 0.0, most: float = math.inf
    ) -> list[float | None]:
        """Return finite numbers or ``None``; all ``None`` if there is no such column."""
        values = self.columns.get(name)
        if values is None:
            return [None] * len(self)
        bound = f"a number >= {least:g}" if most == math.inf else f"a number in {least:g}…{most:g}"
        for row, value in enumerate(values):
            if value is None:
                continue
            if type(value) not in {int, float} or not _within(cast("float", value), least, most):
                raise self.error(row, name, f"{bound} or nothing")
        return [None if value is None else float(cast("float", value)) for value in values]

    def texts(self, name: str) -> list[str]:
        """Return texts; "" for a missing one or a missing column."""
        values = self.columns.get(name)
        if values is None:
            return [""] * len(self)
        for row, value in enumerate(values):
            if value is not None and type(value) is not str:
                raise self.error(row, name, "a text")
        return [cast("str", value) or "" for value in values]

    def names(self, name: str) -> list[str]:
        """Return texts, none of them missing or empty."""
        for row, value in enumerate(self.columns[name]):
            if type(value) is not str or not value:
                raise self.error(row, name, "a text that is not empty")
        return cast("list[str]", list(self.columns[name]))

    def lists(self, name: str, *, least: int | None = None) -> list[tuple[int, ...] | None]:
        """Return lists of whole numbers, ``None`` where there is none."""
        values = self.columns.get(name)
        if values is None:
            return [None] * len(self)
        return [
            None if value is None else self._list(row, name, value, least)
            for row, value in enumerate(values)
        ]

    def _list(self, row: int, name: str, value: object, least: int | None) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise self.error(row, name, "a list of whole numbers")
        for entry in value:
            if type(entry) is not int or (least is not None and entry < least):
                bound = "" if least is None else f" >= {least}"
                raise self.error(row, name, f"a list of whole numbers{bound}")
        return tuple(value)

    def text_lists(self, name: str) -> list[list[str] | None]:
        """Return lists of texts, none of them empty; ``None`` where there is no list."""
        values = self.columns.get(name)
        if values is None:
            return [None] * len(self)
        for row, value in enumerate(values):
            entries = [] if value is None else value
            if not isinstance(entries, list) or not all(
                type(entry) is str and entry for entry in entries
            ):
                raise self.error(row, name, "a list of names or nothing")
        return cast("list[list[str] | None]", list(values))


def _shown(found: object) -> str:
    """Show a value on one line, cut if it is long.

    >>> _shown(None), _shown("64"), _shown(list(range(99)))[-9:]
    ('nothing', '"64"', ', 13, 1 …')
    """
    if found is None:
        return "nothing"
    text = json.dumps(found, ensure_ascii=False) if isinstance(found, str) else str(found)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} …"


def _within(value: float, least: float, most: float) -> bool:
    """NaN and infinity are outside of everything."""
    return least <= value <= most and value != math.inf


def counted_note(table: Table, what: str, rows: Collection[int]) -> tuple[str, ...]:
    """Say once what was done to several rows, and where the first of them is."""
    if not rows:
        return ()
    return (f"{table.file}: {what}: {len(rows):,} times, first in {table.where(min(rows))}",)


def most_common(values: Sequence[str]) -> str:
    """Return the commonest value; among equals the one that sorts first.

    >>> most_common(["b", "a", "b", "a"])
    'a'
    """
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]))[0]
