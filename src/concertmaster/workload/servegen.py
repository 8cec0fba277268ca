"""ServeGen tables to arrivals: a rate, a burstiness and length quantiles a client and window."""

import math
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.core.request import WorkflowId
from concertmaster.workload.arrivals import MAX_CV, window_arrivals_s
from concertmaster.workload.files import read_table
from concertmaster.workload.plan import Call, WorkflowPlan, cap_tokens
from concertmaster.workload.sources import Source
from concertmaster.workload.tables import Table

REQUIRED = ("workload", "client_id", "window_start_s", "rate_rps", "cv")
COLUMNS = REQUIRED
LENGTHS_FILE = "servegen_lengths.parquet"
WINDOW_S = 600
LENGTH_WINDOW_S = 21600
DEFAULT_START_S, DEFAULT_DURATION_S = 36000, 3600
MOST_REQUESTS = 50_000
"""Without a factor, rates are scaled down until no more than these are expected."""

_LEVELS = (0.0, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
_QUANTILES = ("q01", "q01", "q05", "q10", "q25", "q50", "q75", "q90", "q95", "q99", "qmax")
_LENGTH_COLUMNS = ("workload", "client_id", "window_start_s", "field", *_QUANTILES[1:])
_SLICE = re.compile(r"(?P<name>[^@*]*)(?:@(?P<start>\d+)\+(?P<duration>\d+))?(?:\*(?P<factor>.+))?")

Quantiles = tuple[int, ...]
ClientLengths = Mapping[int, Mapping[str, Quantiles]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Which hours of which workload, and at which share of its rate.

    Attributes:
        factor: What client rates are multiplied by; ``None`` keeps the requests few.
    """

    workload: str | None
    start_s: int = DEFAULT_START_S
    duration_s: int = DEFAULT_DURATION_S
    factor: float | None = None

    @classmethod
    def parse(cls, file: str, text: str | None) -> "Slice":
        """Read ``WORKLOAD@START_S+DURATION_S*FACTOR``, whose parts may be left out.

        >>> part = Slice.parse("a.parquet", "language/m-large@0+7200*0.05")
        >>> part.workload, part.start_s, part.duration_s, part.factor
        ('language/m-large', 0, 7200, 0.05)
        """
        match = _SLICE.fullmatch(text or "")
        try:
            factor = float(match["factor"]) if match and match["factor"] else None
        except ValueError:
            match = None
        if match is None or (factor is not None and not 0.0 < factor < math.inf):
            problem = f'expected WORKLOAD@START_S+DURATION_S*FACTOR, found "{text}"'
            raise InputError(file, "#", problem, "for example #language/m-large@36000+3600*0.1")
        return cls(
            workload=match["name"] or None,
            start_s=int(match["start"] or DEFAULT_START_S),
            duration_s=int(match["duration"] or DEFAULT_DURATION_S),
            factor=factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """One client's arrivals for ten minutes."""

    workload: str
    client_id: int
    start_s: int
    rate_rps: float
    cv: float


def read_servegen(table: Table, name: str, text: str | None, *, seed: int) -> Source:
    """Draw the arrivals and lengths of the selected hours."""
    table.require(REQUIRED, "a ServeGen arrival table")
    part = Slice.parse(table.file, text)
    windows = _windows(table.select("workload", part.workload), part)
    if not windows:
        end_s = part.start_s + part.duration_s
        problem = f"expected windows in {part.start_s}…{end_s} s, found none"
        raise InputError(table.file, f"#{text}", problem, f"windows are {WINDOW_S} s long from 0")
    lengths = _lengths(Path(table.file).with_name(LENGTHS_FILE), {w.workload for w in windows})
    factor, notes = _factor(table.file, windows, part)
    plans: list[WorkflowPlan] = []
    for workload, by_client in sorted(lengths.items()):
        own = [window for window in windows if window.workload == workload]
        shared, without_ratio = _shared_lengths(by_client, own)
        for window in own:
            plans += _window_plans(window, shared, part.start_s, factor, seed)
        if without_ratio:
            note = f"{workload}: {without_ratio:.0%} of the rate is of clients without lengths"
            notes += (f"{note}: they borrow those of the others, drawn by rate",)
    if not plans:
        problem = f"expected arrivals, found none at a factor of {factor:g}"
        raise InputError(table.file, f"#{text}", problem, "take a larger factor or more hours")
    return Source(name=name, plans=plans, timed=True, notes=table.notes + notes)


def _windows(table: Table, part: Slice) -> list[_Window]:
    workloads, clients = table.names("workload"), table.wholes("client_id")
    starts_s = table.wholes("window_start_s")
    rates_rps, cvs = table.numbers_or_none("rate_rps"), table.numbers_or_none("cv")
    end_s = part.start_s + part.duration_s
    return [
        _Window(
            workload=workloads[row],
            client_id=clients[row],
            start_s=start_s,
            rate_rps=rates_rps[row] or 0.0,
            cv=min(cvs[row] or 0.0, MAX_CV),
        )
        for row, start_s in enumerate(starts_s)
        if part.start_s <= start_s < end_s and rates_rps[row]
    ]


def _factor(file: str, windows: Sequence[_Window], part: Slice) -> tuple[float, tuple[str, ...]]:
    if part.factor is not None:
        return part.factor, ()
    expected = sum(window.rate_rps for window in windows) * WINDOW_S
    if expected <= MOST_REQUESTS:
        return 1.0, ()
    factor = MOST_REQUESTS / expected
    note = f"{file}: rates times {factor:.3g}, for {MOST_REQUESTS:,} of {expected:,.0f} requests"
    return factor, (f"{note} (write #WORKLOAD*1 for all)",)


def _lengths(path: Path, workloads: set[str]) -> dict[str, dict[int, ClientLengths]]:
    """Read quantiles by workload, client, window and field."""
    table = read_table(path, _LENGTH_COLUMNS)
    table.require(_LENGTH_COLUMNS, "a ServeGen length table")
    names, clients = table.names("workload"), table.wholes("client_id")
    starts_s, fields = table.wholes("window_start_s"), table.names("field")
    quantiles = list(zip(*(table.wholes(level) for level in _QUANTILES), strict=True))
    lengths: dict[str, dict[int, dict[int, dict[str, Quantiles]]]] = {}
    for row, name in enumerate(names):
        if name in workloads:
            by_window = lengths.setdefault(name, {}).setdefault(clients[row], {})
            by_window.setdefault(starts_s[row], {})[fields[row]] = quantiles[row]
    for name in sorted(workloads - lengths.keys()):
        problem = f'expected lengths of the workload "{name}", found none'
        raise InputError(str(path), "workload", problem, "it belongs to the arrival table")
    return {name: dict(by_client) for name, by_client in lengths.items()}


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The length quantiles of one workload, and whose to borrow where a client has none."""

    by_client: Mapping[int, ClientLengths]
    lenders: Sequence[int]
    weights: Sequence[float]

    def of(self, client_id: int, start_s: int, rng: random.Random) -> Mapping[str, Quantiles]:
        """Return quantiles near ``start_s``, of the client or of one drawn by its rate."""
        if client_id not in self.by_client:
            (client_id,) = rng.choices(self.lenders, self.weights)
        by_window = self.by_client[client_id]
        own_s = start_s // LENGTH_WINDOW_S * LENGTH_WINDOW_S
        return by_window[min(by_window, key=lambda known_s: (abs(known_s - own_s), known_s))]


def _shared_lengths(
    by_client: Mapping[int, ClientLengths], windows: Sequence[_Window]
) -> tuple[_Lengths, float]:
    """Weigh the clients with lengths by their rate; tell the share of the rate without any."""
    rates_rps: dict[int, float] = {}
    for window in windows:
        rates_rps[window.client_id] = rates_rps.get(window.client_id, 0.0) + window.rate_rps
    lenders = sorted(rates_rps.keys() & by_client.keys())
    known_rps = sum(rates_rps[client_id] for client_id in lenders)
    without_ratio = 1.0 - known_rps / sum(rates_rps.values())
    if not lenders:
        everyone = sorted(by_client)
        return _Lengths(by_client, everyone, [1.0] * len(everyone)), without_ratio
    weights = [rates_rps[client_id] for client_id in lenders]
    return _Lengths(by_client, lenders, weights), without_ratio


def _window_plans(
    window: _Window, lengths: _Lengths, start_s: int, factor: float, seed: int
) -> Iterator[WorkflowPlan]:
    key = f"{window.workload} {window.client_id} {window.start_s}"
    rng = random.Random(f"{seed} {key}")
    instants_s = window_arrivals_s(
        window.start_s - start_s, WINDOW_S, window.rate_rps * factor, window.cv, rng
    )
    for count, arrival_s in enumerate(instants_s):
        fields = lengths.of(window.client_id, window.start_s, rng)
        yield WorkflowPlan(
            workflow_id=WorkflowId(
                f"{window.workload}:{window.client_id}:{window.start_s}:{count:05d}"
            ),
            app=window.workload,
            arrival_s=arrival_s,
            calls=(_call(fields, rng),),
        )


def _call(fields: Mapping[str, Quantiles], rng: random.Random) -> Call:
    """Draw lengths; an image prompt is its text and each of its images."""
    output_tokens = max(1, _draw(fields["output_tokens"], rng))
    if "input_tokens" in fields:
        prompt_tokens = _draw(fields["input_tokens"], rng)
    else:
        images = _draw(fields["image_count"], rng)
        per_image_tokens = _draw(fields["image_tokens"], rng)
        prompt_tokens = _draw(fields["text_tokens"], rng) + images * per_image_tokens
    return Call(
        stage=0,
        prompt_tokens=max(1, prompt_tokens),
        output_tokens=output_tokens,
        max_output_tokens=cap_tokens(output_tokens),
    )


def _draw(quantiles: Quantiles, rng: random.Random) -> int:
    """Draw from the distribution that is straight between the known quantiles."""
    level = rng.uniform(0.0, 1.0)
    low = min(bisect_right(_LEVELS, level), len(_LEVELS) - 1) - 1
    share = (level - _LEVELS[low]) / (_LEVELS[low + 1] - _LEVELS[low])
    return round(quantiles[low] + share * (quantiles[low + 1] - quantiles[low]))
