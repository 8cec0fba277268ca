"""A study that costs nothing, for tests of what runs and shows studies."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.observe.plot_kinds import Line, LinePlot
from concertmaster.reproduce.results import Cell, Figures, Results
from concertmaster.reproduce.study import Claim, Estimate, Summary, Table


def a_cell(arm: str = "mine", *, setting: str = "s", load: float = 0.5, seed: int = 0) -> Cell:
    return Cell(setting=setting, arm=arm, load=load, seed=seed)


@dataclass(frozen=True)
class Toy:
    """Two arms; ``mine`` takes ``cost`` times what ``theirs`` takes.

    Attributes:
        calls: File to which the cells that are run are written, a line each.
        broken: Arm whose last seed raises.
        interrupted_at: Ctrl-C comes when so many cells were run.
        pause_s: Seconds of the wall that a cell takes, save with the first seed.
    """

    name: str = "toy"
    title: str = "A toy"
    cost: float = 0.5
    calls: Path | None = None
    broken: str = ""
    problem: Exception = field(default_factory=lambda: ZeroDivisionError("by\nzero"))
    interrupted_at: int | None = None
    target: float = 0.6
    pause_s: float = 0.0
    modules: tuple[str, ...] = ("orders",)

    @property
    def settings(self) -> Mapping[str, object]:
        return {"cost": self.cost}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        loads = (0.5, 1.0) if full else (0.5,)
        return [
            a_cell(arm, load=load, seed=seed)
            for seed in range(seeds)
            for load in loads
            for arm in ("mine", "theirs")
        ]

    def run(self, cell: Cell) -> Figures:
        if self.interrupted_at is not None and len(self.called()) >= self.interrupted_at:
            raise KeyboardInterrupt
        if self.calls is not None:
            with self.calls.open("a") as file:
                file.write(f"{cell}\n")
        if cell.arm == self.broken and cell.seed:
            raise self.problem
        time.sleep(self.pause_s * (cell.seed > 0))
        seconds = 10.0 * (1 + cell.seed)
        return {"s": seconds * (self.cost if cell.arm == "mine" else 1.0), "all_s": [1.0, 2.0]}

    def called(self) -> list[str]:
        if self.calls is None or not self.calls.exists():
            return []
        return self.calls.read_text().splitlines()

    def summarise(self, results: Results) -> Summary:
        ratios = results.ratios("s", "mine", "theirs", settings=["s"], loads=results.loads)
        spent = results.values("s", setting="s", arm="mine", load=0.5)
        line = Line(label="mine", x=[0.5], y=spent[:1], half=[None])
        return Summary(
            claims=(
                Claim.over_seeds("half", "mine | theirs", ratios, "at most", self.target),
                Claim.over_seeds("s", "seconds", spent, "at least", 1.0, unit="s"),
            ),
            tables=(
                Table(
                    title="Seconds",
                    columns=("arm", "s"),
                    rows=(("mine", Estimate.of(spent)), ("theirs", None)),
                    note="a note",
                ),
            ),
            plots={
                "toy-lines": LinePlot(
                    title="Lines", x_label="load", y_label="s", panels={"s": [line]}
                )
            },
            notes=("it is a toy",),
        )


def an_input_error() -> InputError:
    return InputError("fleet.toml", "pools", "no such pool")


TOY = Toy()
SLOW = Toy(name="slow", pause_s=60.0)
LOSER = Toy(name="loser", target=0.4)
