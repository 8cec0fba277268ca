"""What people see in the terminal: units in the heading, counts beside every ratio."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from concertmaster.core.actions import Cancel, Dispatch, Fail, Reject
from concertmaster.core.errors import InputError
from concertmaster.core.events import RequestArrived, RequestCancelled, RequestFinished
from concertmaster.core.forecast import Quantiles
from concertmaster.observe.report import Report
from concertmaster.observe.trace import Entry, TraceReader, as_line
from concertmaster.workload.records import RunRecords

WIDTH = 100


def console(*, stderr: bool = False) -> Console:
    """Return a console; where the width is not known, wide enough for our tables."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=WIDTH)


def say(out: Console, line: str) -> None:
    """Print a line as it is: paths and addresses in it are neither folded nor styled."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


class Bar:
    """A progress bar that is told how far things are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._task = progress.add_task("", total=total)

    def begin(self, what: str) -> None:
        """Start over for the next part."""
        self._progress.reset(self._task, total=self._total, description=what)

    def update(self, done: int) -> None:
        """Show a count."""
        self._progress.update(self._task, completed=done)


@contextmanager
def progress_bar(total: int) -> Iterator[Bar]:
    """Show progress on the terminal while the block runs; nothing where there is none."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    out = Console(stderr=True)
    silent = not out.is_terminal
    with Progress(*columns, console=out, transient=True, disable=silent) as progress:
        yield Bar(progress, total)


def write_json(content: object, path: Path) -> None:
    """Write a JSON document, its folder too if need be.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    except OSError as error:
        raise InputError(str(path), "", f"cannot write: {error.strerror}") from None


def show_report(out: Console, title: str, run: RunRecords, report: Report) -> None:
    """Print one run."""
    out.print(
        f"[bold]{title}[/]   seed {run.seed}   policy {run.policy}   "
        f"{run.duration_s:,.0f} s in {run.wall_s:.1f} s\n"
    )
    counts = Table("", "total", "completed", "rejected", "failed", box=None, pad_edge=False)
    for column in counts.columns[1:]:
        column.justify = "right"
    for kind in ("workflows", "requests"):
        counts.add_row(kind, *(f"{report[kind][key]:,}" for key in _COUNTS))
    out.print(counts)
    out.print()
    out.print(_seconds_table(report))
    out.print()
    _show_ratios(out, run, report)


_COUNTS = ("total", "completed", "rejected", "failed")
_FIGURES = (
    ("TTFT", "ttft_s"),
    ("TPOT", "tpot_s"),
    ("E2E", "e2e_s"),
    ("queue wait", "queue_wait_s"),
    ("makespan", "makespan_s"),
)


def _seconds_table(report: Report) -> Table:
    table = Table("seconds", "mean", "p50", "p90", "p95", "p99", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key in _FIGURES:
        table.add_row(
            f"  {label}",
            *(number(report[key][name]) for name in ("mean", "p50", "p90", "p95", "p99")),
        )
    return table


def _show_ratios(out: Console, run: RunRecords, report: Report) -> None:
    met = sum(call.met for call in run.calls)
    out.print(
        f"SLO attainment    {percent(report['slo_attainment_ratio'])}   {met:,} of "
        f"{len(run.calls):,}; rejected requests count as missed"
    )
    out.print(f"goodput           {number(report['goodput_rps'])} requests/s")
    if report["success_ratio"] is not None:
        out.print(f"success           {percent(report['success_ratio'])} of graded workflows")
    reasons = Counter(call.reason for call in run.calls if call.reason)
    if reasons:
        lost = "   ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        out.print(f"not served        {lost}")


def show_comparison(out: Console, title: str, comparison: Report, seeds: int) -> None:
    """Print several policies side by side."""
    out.print(f"[bold]{title}[/]   {seeds} seed{'s' * (seeds > 1)}, mean ± 95 % interval\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading in (
        "makespan mean, s",
        "P50, s",
        "P95, s",
        "TTFT P50, s",
        "SLO",
        "success",
        "lost",
    ):
        table.add_column(heading, justify="right")
    for name, both in comparison["policies"].items():
        mean, ci = both["mean"], both["ci95"]
        lost = mean["workflows"]["total"] - mean["workflows"]["completed"]
        table.add_row(
            name,
            *(
                _with_interval(mean[g][f], ci[g][f])
                for g, f in (
                    ("makespan_s", "mean"),
                    ("makespan_s", "p50"),
                    ("makespan_s", "p95"),
                    ("ttft_s", "p50"),
                )
            ),
            percent(mean["slo_attainment_ratio"]),
            percent(mean["success_ratio"]),
            f"{lost:,.0f}",
        )
    out.print(table)
    for pair, figures in comparison["pairs"].items():
        ratio = figures["makespan_s.mean"]
        out.print(f"{pair}: makespan × {_with_interval(ratio['mean'], ratio['ci95'])}")


def number(value: float | None) -> str:
    """Three significant digits, or a dash.

    >>> number(0.01234), number(12345.6), number(None)
    ('0.0123', '12,346', '–')
    """
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _with_interval(value: float | None, half: float | None) -> str:
    return number(value) + (f" ± {number(half)}" if half is not None else "")


def explain(out: Console, reader: TraceReader, request_id: str) -> None:
    """Print why a call went where it went.

    Raises:
        InputError: The trace holds no such call.
    """
    entries = [entry for entry in reader.entries() if _concerns(entry, request_id)]
    arrivals = [
        e
        for e in entries
        if isinstance(e.event, RequestArrived) and e.event.request.request_id == request_id
    ]
    if not arrivals:
        raise InputError("REQUEST", request_id, "the trace holds no such call", _known(reader))
    _show_arrival(out, arrivals[0])
    for entry in entries:
        for action in entry.actions:
            if getattr(action, "request_id", None) == request_id:
                _show_action(out, entry.now_s, action)
        _show_end(out, entry, request_id)
    if reader.broken_at is not None:
        out.print(f"the trace breaks off at line {reader.broken_at}; what follows is not known")


def story(reader: TraceReader, request_id: str) -> list[dict[str, object]]:
    """Return every event that concerns a call, with its actions, as a trace writes them."""
    return [
        as_line(entry.now_s, entry.event, entry.actions)
        for entry in reader.entries()
        if _concerns(entry, request_id)
    ]


def _concerns(entry: Entry, request_id: str) -> bool:
    event = entry.event
    named = getattr(event, "request_id", None)
    if isinstance(event, RequestArrived):
        named = event.request.request_id
    return named == request_id or any(
        getattr(action, "request_id", None) == request_id for action in entry.actions
    )


def _known(reader: TraceReader) -> str:
    for entry in reader.entries():
        if isinstance(entry.event, RequestArrived):
            return f"the first one is {entry.event.request.request_id}"
    return "it holds none at all"


def _show_arrival(out: Console, entry: Entry) -> None:
    assert isinstance(entry.event, RequestArrived)
    request, forecast = entry.event.request, entry.event.forecast
    stage = "" if request.stage is None else f", stage {request.stage}"
    out.print(
        f"[bold]{request.request_id}[/]   workflow {request.workflow_id}{stage}   "
        f"role {request.role or '–'}   class {request.service_class.value}"
    )
    out.print(
        f"arrived {entry.now_s:,.3f} s   prompt {request.prompt_tokens:,} tokens   "
        f"forecast {_law(forecast.output_tokens)} (by {forecast.source})"
    )


def _law(law: Quantiles | None) -> str:
    if law is None:
        return "none"
    return f"p50 {law.at(0.5):,.0f}, p90 {law.at(0.9):,.0f} tokens"


def _show_action(out: Console, now_s: float, action: object) -> None:
    match action:
        case Dispatch(_, replica_id, attempt, hedge=True):
            out.print(
                f"hedged {now_s:,.3f} s on {replica_id}   attempt {attempt}, beside the one before"
            )
        case Cancel(_, replica_id, overtaken):
            why = ": another began to answer first" if overtaken else ""
            out.print(f"stopped {now_s:,.3f} s on {replica_id}{why}")
        case Dispatch(_, replica_id, attempt, _, waited_s, _, _, costs_s):
            out.print(
                f"dispatched {now_s:,.3f} s to {replica_id}   waited {waited_s:.3f} s   "
                f"attempt {attempt}\n"
            )
            out.print(_costs_table(costs_s, replica_id))
        case Reject(_, reason, retry_after_s):
            again = "" if retry_after_s is None else f"   try again in {retry_after_s:.0f} s"
            out.print(f"rejected {now_s:,.3f} s: {reason}{again}")
        case Fail(_, reason):
            out.print(f"failed {now_s:,.3f} s: {reason}")
        case _:
            pass


def _costs_table(costs_s: Mapping[Any, Mapping[str, float]], chosen: str) -> Table:
    names: Sequence[str] = list(next(iter(costs_s.values()), {}))
    table = Table("cost, seconds", *names, "total", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for replica_id, parts in sorted(costs_s.items(), key=lambda row: sum(row[1].values())):
        mark = " *" if replica_id == chosen else ""
        cells = (f"{parts[name]:.3f}" for name in names)
        table.add_row(f"  {replica_id}{mark}", *cells, f"{sum(parts.values()):.3f}")
    return table


def _show_end(out: Console, entry: Entry, request_id: str) -> None:
    match entry.event:
        case RequestFinished(named, _, output_tokens) if named == request_id:
            out.print(f"\noutcome   served {entry.now_s:,.3f} s   {output_tokens:,} tokens")
        case RequestCancelled(named) if named == request_id:
            out.print(f"\noutcome   cancelled by its caller {entry.now_s:,.3f} s")
        case _:
            pass
