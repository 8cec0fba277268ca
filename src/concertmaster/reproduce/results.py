"""Figures of all cells, and the means that claims are made of.

Comparisons are paired: two arms are compared where setting, load and seed are equal. What
averages over settings and loads does so seed by seed, so that an interval is over seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter, sub, truediv
from typing import Any

from concertmaster.observe.compare import mean


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One simulated run.

    Attributes:
        setting: Fleet and workload, ``contended/sample`` for example.
        arm: What is compared: a policy, or a variant of one.
        load: Offered load, a share of the setting's capacity; 0.0 where there is none.
    """

    setting: str
    arm: str
    load: float
    seed: int

    def __str__(self) -> str:
        """As messages name it.

        >>> print(Cell(setting="contended/sample", arm="las", load=0.8, seed=2))
        contended/sample, las, load 0.8, seed 2
        """
        load = f", load {self.load:g}" if self.load else ""
        return f"{self.setting}, {self.arm}{load}, seed {self.seed}"


Figures = Mapping[str, float | Sequence[float]]
"""What one run measured: numbers, and series of numbers for plots. What it did not is absent."""


@dataclass(frozen=True, slots=True)
class Results:
    """The figures of every cell of a study."""

    figures: Mapping[Cell, Figures]

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings in the order of the cells."""
        return self._each("setting")

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order of the cells."""
        return self._each("arm")

    @property
    def loads(self) -> tuple[float, ...]:
        """Loads, ascending."""
        return tuple(sorted(self._each("load")))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, ascending."""
        return tuple(sorted(self._each("seed")))

    def _each(self, field: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(map(attrgetter(field), self.figures)))

    def has(self, *, setting: str, arm: str, load: float) -> bool:
        """Whether this was run, with every seed."""
        return all(
            Cell(setting=setting, arm=arm, load=load, seed=seed) in self.figures
            for seed in self.seeds
        )

    def value(self, figure: str, cell: Cell) -> float:
        """Return one number.

        Raises:
            LookupError: The cell was not run, or did not measure it.
        """
        found = self._found(figure, cell)
        assert isinstance(found, int | float), f"{figure} of {cell} is a series"
        return found

    def _found(self, figure: str, cell: Cell) -> float | Sequence[float]:
        if cell not in self.figures:
            raise LookupError(f"{cell}: not among the cells of this study")
        if figure not in self.figures[cell]:
            known = ", ".join(self.figures[cell])
            raise LookupError(f"{cell}: has no figure {figure!r}; it has {known}")
        return self.figures[cell][figure]

    def values(self, figure: str, *, setting: str, arm: str, load: float) -> list[float]:
        """Return a figure in the order of seeds."""
        return [
            self.value(figure, Cell(setting=setting, arm=arm, load=load, seed=seed))
            for seed in self.seeds
        ]

    def series(self, figure: str, *, setting: str, arm: str, load: float) -> list[list[float]]:
        """Return a series of each seed, in the order of seeds."""
        cells = (Cell(setting=setting, arm=arm, load=load, seed=seed) for seed in self.seeds)
        found = [self._found(figure, cell) for cell in cells]
        return [list(one) for one in found if not isinstance(one, int | float)]

    def per_seed(
        self, figure: str, arm: str, *, settings: Iterable[str], loads: Iterable[float]
    ) -> list[float]:
        """Mean of a figure across settings and loads, one number a seed."""
        return self._across(
            settings, loads, lambda s, load: self.values(figure, setting=s, arm=arm, load=load)
        )

    def ratios(
        self,
        figure: str,
        mine: str,
        theirs: str,
        *,
        settings: Iterable[str],
        loads: Iterable[float],
    ) -> list[float]:
        """One arm's figure over another's, paired; its mean across settings and loads, by seed."""
        return self._paired(truediv, figure, mine, theirs, settings=settings, loads=loads)

    def differences(
        self,
        figure: str,
        mine: str,
        theirs: str,
        *,
        settings: Iterable[str],
        loads: Iterable[float],
    ) -> list[float]:
        """One arm's figure less another's, paired; its mean across settings and loads, by seed."""
        return self._paired(sub, figure, mine, theirs, settings=settings, loads=loads)

    def _paired(
        self,
        join: Callable[[float, float], float],
        figure: str,
        mine: str,
        theirs: str,
        *,
        settings: Iterable[str],
        loads: Iterable[float],
    ) -> list[float]:
        def pairs(setting: str, load: float) -> list[float]:
            ours = self.values(figure, setting=setting, arm=mine, load=load)
            others = self.values(figure, setting=setting, arm=theirs, load=load)
            return [join(a, b) for a, b in zip(ours, others, strict=True)]

        return self._across(settings, loads, pairs)

    def _across(
        self,
        settings: Iterable[str],
        loads: Iterable[float],
        values: Callable[[str, float], list[float]],
    ) -> list[float]:
        columns = [values(setting, load) for setting, load in product(settings, loads)]
        return [mean(column) for column in zip(*columns, strict=True)]
