"""Runs the cells of a study in processes, each cell once: what is finished is kept."""

import gc
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from concertmaster.core.errors import InputError
from concertmaster.parallel import parallel
from concertmaster.reproduce.fingerprint import fingerprint
from concertmaster.reproduce.ledger import FOLDER, Ledger, Measured
from concertmaster.reproduce.results import Cell, Figures, Results
from concertmaster.reproduce.study import Study

MOST_YOUNG = 100_000

Progress = Callable[[int], None]


class Done(NamedTuple):
    """A cell that was run, and the seconds it took."""

    figures: Measured
    wall_s: float


class Broken(NamedTuple):
    """A cell that raised, in a line."""

    problem: str


def ledger_of(study: Study, folder: Path = FOLDER) -> Ledger:
    """Return where a study's finished cells are kept."""
    return Ledger(folder / f"{study.name}.jsonl", fingerprint(study))


def run_study(
    study: Study,
    cells: Sequence[Cell],
    ledger: Ledger,
    *,
    jobs: int | None = None,
    progress: Progress = lambda _: None,
) -> Results:
    """Run the cells that are not in the ledger, and return the figures of all.

    Args:
        study: Whose cells these are.
        cells: In any order; results keep it.
        ledger: Read first, and written after each cell.
        jobs: Processes; ``None`` takes one a core, 1 runs in this process.
        progress: Told how many cells are finished.

    Raises:
        InputError: A cell failed; those that are finished stay in the ledger.
    """
    found = ledger.read()
    missing = [cell for cell in cells if cell not in found]
    finished = len(cells) - len(missing)
    progress(finished)
    for cell, result in _run_all(study, missing, jobs or os.cpu_count() or 1):
        if isinstance(result, Broken):
            raise _failed(study, str(cell), result.problem)
        ledger.append(cell, result.figures, result.wall_s)
        found[cell] = result.figures
        finished += 1
        progress(finished)
    return Results({cell: found[cell] for cell in cells})


def _failed(study: Study, where: str, problem: str) -> InputError:
    hint = "what is finished is kept, and the same command goes on from there"
    return InputError(f"reproduce {study.name}", where, problem, hint)


def _run_all(
    study: Study, cells: Sequence[Cell], jobs: int
) -> Iterator[tuple[Cell, Done | Broken]]:
    if jobs == 1 or len(cells) <= 1:
        for cell in cells:
            yield cell, attempt(study, cell)
        return
    with parallel(min(jobs, len(cells)), _begin, study) as pool:
        futures = {pool.submit(_attempt_here, cell): cell for cell in cells}
        failed = None
        for future in as_completed(futures):
            if future.cancelled():
                continue
            result = _result(study, future)
            if isinstance(result, Done):
                yield futures[future], result
            elif failed is None:  # what is being run is finished first, so that it is kept
                failed = futures[future], result
                for other in futures:
                    other.cancel()
    if failed is not None:
        yield failed


def _result(study: Study, future: "Future[Done | Broken]") -> Done | Broken:
    try:
        return future.result()
    except BrokenProcessPool:
        problem = "a process was killed, for want of memory perhaps: try fewer --jobs"
        raise _failed(study, "", problem) from None


_studies: list[Study] = []
"""In a process of the pool: the study whose cells it runs."""


def _begin(study: Study) -> None:
    """Set a process up; runs make few cycles among many objects, so these are seldom looked for."""
    gc.set_threshold(MOST_YOUNG)
    _studies[:] = [study]


def _attempt_here(cell: Cell) -> Done | Broken:
    return attempt(_studies[0], cell)


def attempt(study: Study, cell: Cell) -> Done | Broken:
    """Run one cell; whatever it raises becomes a line."""
    begun_s = time.perf_counter()
    try:
        figures = checked(study.run(cell))
    except InputError as error:
        return Broken(str(error))
    except Exception as error:  # noqa: BLE001  # it goes to the user, who is told the cell
        return Broken(_in_a_line(error))
    return Done(figures, time.perf_counter() - begun_s)


def _in_a_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    said = " ".join(str(error).split())
    return f"{type(error).__name__} in {place}" + (f": {said}" if said else "")


def checked(figures: Figures) -> Measured:
    """Return figures as they are kept.

    Raises:
        ValueError: One is not finite: what was not measured has to be left out.
    """
    kept: dict[str, float | list[float]] = {}
    for name, value in figures.items():
        numbers = [value] if isinstance(value, int | float) else [*value]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"figure {name} is not finite: leave it out if it was not measured")
        kept[name] = float(value) if isinstance(value, int | float) else numbers
    return kept
