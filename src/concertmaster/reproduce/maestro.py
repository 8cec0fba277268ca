"""Memory: KV by forecast, weights of many models on few GPUs, people before programs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from concertmaster.reproduce import maestro_world as world
from concertmaster.reproduce.data import data_folder
from concertmaster.reproduce.maestro_arms import (
    ALONE,
    ALONE_FCFS,
    FCFS,
    MORE_RIVALS,
    OURS,
    PAGED,
    RIVALS,
    TRAINED,
    WITHOUT,
    WORST,
)
from concertmaster.reproduce.maestro_measures import measures
from concertmaster.reproduce.maestro_summary import summary
from concertmaster.reproduce.maestro_world import (
    BRIEF,
    CONTENTION,
    EIGHT,
    SIXTEEN,
    THREE,
    TIGHT,
    TWENTY_FOUR,
    TWO,
)
from concertmaster.reproduce.study import Cell, Figures, Results, Summary

LOW, MEDIUM, HIGH = CONTENTION.values()
LARGER = ("32 GPUs", "64 GPUs")


@dataclass(frozen=True, slots=True)
class Maestro:
    """The recipe against its rivals, and without each of its parts."""

    name: str = "maestro"
    title: str = "Memory by price: KV reserved, promises kept, weights in service"
    modules: tuple[str, ...] = (
        "data",
        "maestro",
        "maestro_arms",
        "maestro_measures",
        "maestro_world",
    )

    @property
    def settings(self) -> Mapping[str, object]:
        """How long runs are, and from which data."""
        stages = data_folder() / world.STAGES
        size = stages.stat().st_size if stages.is_file() else 0
        return {
            "workflows": [world.HORIZON_S, world.WARM_UP, world.TEMPLATES],
            "data": [str(stages), size],
        }

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Rivals at each contention, the rest where claims need it; the full grid has all.

        One model a node is played on 8 GPUs with the first seed alone: what finds no replica
        waits for an hour, which takes a minute to simulate; so it goes first.
        """
        grid = dict.fromkeys([*_default(), *(_more() if full else ())])
        cells = [
            Cell(setting=setting, arm=arm, load=load, seed=seed)
            for seed, (setting, load, arm) in product(range(seeds), grid)
        ]
        return [*(Cell(setting=BRIEF, arm=arm, load=LOW, seed=0) for arm in (ALONE, OURS)), *cells]

    def run(self, cell: Cell) -> Figures:
        """Play one arm on a budget of GPUs."""
        run = world.play(cell.setting, cell.arm, load=cell.load, seed=cell.seed)
        return measures(world.fleet_of(cell.setting), run)

    def summarise(self, results: Results) -> Summary:
        """State the claims."""
        return summary(results)


def _default() -> Iterator[tuple[str, float, str]]:
    yield from product([EIGHT], CONTENTION.values(), RIVALS)
    yield from product([EIGHT], [HIGH], [TRAINED, *WITHOUT])
    yield from product([EIGHT, TIGHT], [MEDIUM], [OURS, WORST])
    yield EIGHT, MEDIUM, PAGED
    yield from product([SIXTEEN, TWO], [MEDIUM], [OURS])
    yield SIXTEEN, MEDIUM, ALONE


def _more() -> Iterator[tuple[str, float, str]]:
    arms = [*RIVALS, *MORE_RIVALS]
    yield from product([EIGHT, *LARGER], CONTENTION.values(), [*arms, *WITHOUT])
    yield from product([SIXTEEN, TWO], CONTENTION.values(), [*arms, ALONE, ALONE_FCFS])
    yield from product([THREE, TWENTY_FOUR], CONTENTION.values(), [FCFS, OURS])


STUDY = Maestro()
