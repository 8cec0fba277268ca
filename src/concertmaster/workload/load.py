"""From what follows ``-w`` to a workload: which reader fits the file, and what it selects."""

import random
from collections.abc import Sequence
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.workload import columns as staged_columns
from concertmaster.workload import routing, servegen, staged, traces
from concertmaster.workload.arrivals import ArrivalSpec
from concertmaster.workload.files import read_table
from concertmaster.workload.generated import generate, is_generated
from concertmaster.workload.merge import Timing, merge
from concertmaster.workload.plan import Workload
from concertmaster.workload.sources import Source
from concertmaster.workload.tables import Table

SAMPLE = "sample"
SAMPLE_PATH = Path(__file__).parent / "sample" / "sample.jsonl"

_COLUMNS = frozenset(
    {*staged_columns.COLUMNS, *traces.COLUMNS, *servegen.COLUMNS}
    | {*routing.QUESTION_COLUMNS, *routing.OUTCOME_COLUMNS, "n_calls"}
)


def load_workloads(
    specs: Sequence[str],
    *,
    seed: int,
    arrivals: ArrivalSpec | None = None,
    rate_rps: float | None = None,
    rate_scale: float = 1.0,
    limit: int | None = None,
) -> Workload:
    """Read the parts that ``specs`` name and merge them into one workload.

    Args:
        specs: ``FILE``, ``FILE#NAME``, ``FOLDER#SOURCE:TEMPLATE``, ``sample``,
            ``sample#APP`` or a generator as in ``research:told=0.5``; see ``docs/workloads.md``.
        seed: Fixes drawn arrivals and lengths; equal seeds give equal workloads.
        arrivals: ``None`` replays the recorded arrivals.
        rate_rps: Mean workflows a second, all parts together.
        rate_scale: Divides every gap.
        limit: Most workflows to keep: the first to arrive.
    """
    timing = Timing(arrivals=arrivals, rate_rps=rate_rps, rate_scale=rate_scale, limit=limit)
    if not specs:
        problem = "expected at least one workload, found none"
        raise InputError("--workload", "", problem, "for example -w sample")
    sources = [load_source(spec, seed=seed) for spec in specs]
    rng = random.Random(f"{seed} arrivals")
    return Workload(
        name=" + ".join(source.name for source in sources),
        workflows=tuple(merge(sources, timing, rng)),
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
    )


def load_source(spec: str, *, seed: int) -> Source:
    """Read one part, its arrivals as recorded."""
    if is_generated(spec):
        return generate(spec, seed=seed)
    place, _, text = spec.partition("#")
    name = text or None
    if place == SAMPLE:
        return _from_table(read_table(SAMPLE_PATH, _COLUMNS), spec, name, seed=seed)
    path = Path(place)
    short = f"{path.name}#{text}" if text else path.name
    if path.is_dir() and (path / routing.QUESTIONS_FILE).is_file():
        return routing.read_routing(path, name, seed=seed)
    return _from_table(read_table(path, _COLUMNS), short, name, seed=seed)


def _from_table(table: Table, short: str, name: str | None, *, seed: int) -> Source:
    """Choose the reader by the columns that only its files have."""
    if "stage_index" in table:
        return staged.read_staged(table.select("app", name), short)
    if "window_start_s" in table:
        return servegen.read_servegen(table, short, name, seed=seed)
    if "question_id" in table:
        return routing.read_routing(Path(table.file).parent, name, seed=seed)
    if "input_tokens" in table:
        return traces.read_requests(table.select("source", name), short)
    raise _no_reader(table)


def _no_reader(table: Table) -> InputError:
    if "n_calls" in table:
        problem = "expected one row a call, found totals of whole workflows"
        remedy = "its calls are not in it: take workflow_stages.parquet"
        return InputError(table.file, "columns", problem, remedy)
    found = ", ".join(sorted(table.columns)) or "none that is known"
    needed = ", ".join(staged_columns.REQUIRED)
    problem = f"expected columns {needed} (workflows), found {found}"
    return InputError(table.file, "columns", problem, "see docs/workloads.md for every format")
