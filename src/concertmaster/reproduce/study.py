"""What a study is: cells to run, and claims, tables and plots made of their figures.

Plain data. A study knows neither processes nor files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from concertmaster.observe.compare import half_width, mean
from concertmaster.observe.console import number
from concertmaster.observe.plot_kinds import Plot
from concertmaster.reproduce.results import Cell, Figures, Results

__all__ = [
    "Cell",
    "Claim",
    "Direction",
    "Estimate",
    "Figures",
    "Results",
    "Study",
    "Summary",
    "Table",
    "TableCell",
    "cell_text",
    "interval",
]

Direction = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One number that was published, as it is stated, beside what is measured here.

    Attributes:
        id: Short and stable: ``las-mean``.
        statement: What is claimed, in a line.
        measured: Mean over seeds.
        ci95: Bounds of the 95 % interval over seeds; ``None`` for a single seed.
        direction: On which side of ``target`` the mean must lie; equal is met.
        target: In the unit of ``measured``.
        unit: Shown after numbers, ``s`` for example; "%" shows a ratio in percent.
        command: What repeats it; "" for the command that runs the study.
        note: Where or why it is missed; "" if there is nothing to say.
        by_interval: Whether it is missed only if the whole interval lies on the wrong side.
    """

    id: str
    statement: str
    measured: float
    ci95: tuple[float, float] | None
    direction: Direction
    target: float
    unit: str = ""
    command: str = ""
    note: str = ""
    by_interval: bool = False

    @classmethod
    def over_seeds(  # noqa: D417  # the others are those of the class
        cls,
        id: str,  # noqa: A002  # the name in the JSON
        statement: str,
        values: Sequence[float],
        direction: Direction,
        target: float,
        *,
        unit: str = "",
        command: str = "",
        note: str = "",
        by_interval: bool = False,
    ) -> Self:
        """Measure a claim by its mean and interval.

        Args:
            values: One a seed, as ``Results.per_seed`` and ``Results.ratios`` give them.
        """
        return cls(
            id=id,
            statement=statement,
            measured=mean(values),
            ci95=interval(values),
            direction=direction,
            target=target,
            unit=unit,
            command=command,
            note=note,
            by_interval=by_interval,
        )

    @property
    def met(self) -> bool:
        """Whether the measured mean, or an end of its interval, lies on the stated side."""
        low, high = self.ci95 if self.by_interval and self.ci95 else (self.measured,) * 2
        return high >= self.target if self.direction == "at least" else low <= self.target

    @property
    def measured_text(self) -> str:
        """Mean and half of the interval, with the unit."""
        half = None if self.ci95 is None else (self.ci95[1] - self.ci95[0]) / 2
        return self._shown(self.measured, half)

    @property
    def target_text(self) -> str:
        """Direction and target, with the unit."""
        beyond = ", beyond the interval" if self.by_interval else ""
        return f"{self.direction} {self._shown(self.target, None)}{beyond}"

    def _shown(self, value: float, half: float | None) -> str:
        scale = 100 if self.unit == "%" else 1
        parts = [number(scale * one) for one in (value, half) if one is not None]
        return " ".join([" ± ".join(parts), *([self.unit] if self.unit else [])])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bounds of the 95 % interval of the mean (Student); ``None`` for a single value.

    >>> interval([2.0]) is None
    True
    """
    half = half_width(values)
    return None if half is None else (mean(values) - half, mean(values) + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and half of its 95 % interval; ``None`` for a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up values, one a seed."""
        return cls(mean=mean(values), half=half_width(values))

    def __str__(self) -> str:
        """As tables show it."""
        return number(self.mean) + ("" if self.half is None else f" ± {number(self.half)}")


TableCell = str | float | Estimate | None


def cell_text(cell: TableCell) -> str:
    """Show a cell: three digits, ``mean ± half``, or a dash for what was not measured.

    >>> cell_text(1234.5), cell_text(Estimate(mean=0.5, half=0.1234)), cell_text(None)
    ('1,234', '0.5 ± 0.123', '–')
    """
    if isinstance(cell, str | Estimate):
        return str(cell)
    return number(cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text and numbers; numbers stay numbers until they are shown.

    Attributes:
        columns: Headings, with units.
        note: What a reader must know to read it; "" if nothing.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: expected {len(self.columns)} cells a row, "
                    f"found {len(row)}"
                )

    def texts(self) -> list[list[str]]:
        """Rows as they are shown."""
        return [[cell_text(cell) for cell in row] for row in self.rows]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, so that it is set flush right."""
        return any(not isinstance(row[column], str) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a study found.

    Attributes:
        plots: By the name of their file, without its suffix.
        notes: What holds for all of it, and where we lose.
    """

    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    plots: Mapping[str, Plot] | None = None
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        """Whether every claim is met."""
        return all(claim.met for claim in self.claims)


class Study(Protocol):
    """What was published, how to repeat it, and what counts as having repeated it."""

    @property
    def name(self) -> str:
        """As ``concertmaster reproduce`` calls it."""

    @property
    def title(self) -> str:
        """Above tables and pages."""

    @property
    def settings(self) -> Mapping[str, object]:
        """All that a run depends on besides its cell and code; JSON-able.

        Counts of workflows, fleets, and size and date of data files belong here: a change
        makes finished cells run again.
        """

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of this package with the code that runs cells, ``orders_runs`` for example.

        A change in them makes finished cells run again. What only sums up may be kept apart.
        """

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """List the runs; ``full`` may only add to the default grid.

        Args:
            seeds: Seeds 0, 1, … of each.
            full: The whole published grid rather than what runs in minutes.
        """

    def run(self, cell: Cell) -> Figures:
        """Simulate one cell. Called in processes of its own; the cell says all."""

    def summarise(self, results: Results) -> Summary:
        """Check the claims, once every cell is there."""
