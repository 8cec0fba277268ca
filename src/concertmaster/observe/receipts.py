"""One receipt, for a person."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from concertmaster.observe.console import number

Fields = Mapping[str, Any]


def show_receipt(out: Console, receipt: Fields) -> None:
    """Print what was decided for a call and why, what came of it, and the regret."""
    for line in (_head(receipt), _facts(receipt), *_forecasts(receipt["forecast"])):
        out.print(line, markup=False, highlight=False)
    for attempt in receipt["attempts"]:
        out.print(_decision(attempt), markup=False, highlight=False)
        if attempt["candidates"]:
            out.print(_candidates(attempt))
    out.print(_outcome(receipt["outcome"]), markup=False, highlight=False)
    if receipt["regret"] is not None:
        out.print(_regret(receipt["regret"]), markup=False, highlight=False)


def _head(receipt: Fields) -> str:
    stage = "" if receipt["stage"] is None else f", stage {receipt['stage']}"
    role = _plain(receipt["role"]) or "–"
    return (
        f"{_plain(receipt['id'])}   workflow {_plain(receipt['workflow_id'])}{stage}   "
        f"role {role}   class {receipt['class']}   policy {receipt['policy']}"
    )


def _plain(text: str) -> str:
    """Leave out what a terminal would obey: the text is a caller's."""
    return "".join(filter(str.isprintable, text))


def _facts(receipt: Fields) -> str:
    asked = _plain(", ".join(receipt["models"])) or "any model"
    return (
        f"arrived {receipt['arrived_at']}   prompt {receipt['prompt_tokens']:,} tokens   "
        f"asked for {asked}   deadline {number(receipt['deadline_s'])} s"
    )


def _forecasts(forecast: Fields) -> list[str]:
    return [
        f"forecast {one['model']}   {_law(one['output_tokens'], 'tokens')}   "
        f"success {number(one['success'])}   (by {forecast['source']})"
        for one in forecast["models"]
    ]


def _law(law: Fields | None, unit: str) -> str:
    if law is None:
        return f"{unit} unknown"
    return ", ".join(f"{name} {number(value)}" for name, value in law.items()) + f" {unit}"


def _decision(attempt: Fields) -> str:
    beside = ", beside the one before" if attempt.get("hedge") else ""  # old receipts know none
    return (
        f"\ndispatched after {attempt['decided_s']:.3f} s to {attempt['replica']} "
        f"({attempt['model']})   waited {attempt['queue_wait_s']:.3f} s   "
        f"attempt {attempt['attempt']}{beside}   {attempt['with_room']} with room   "
        f"KV promised {number(attempt['reserved_kv_tokens'])} tokens"
    )


def _candidates(attempt: Fields) -> Table:
    scorers = sorted({name for one in attempt["candidates"] for name in one["costs_s"]})
    table = Table(
        "cost, seconds", *scorers, "total", "service p50", "p90", box=None, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for one in attempt["candidates"]:
        service_s = one["service_s"] or {}
        table.add_row(
            f"  {escape(one['replica'])}{' *' if one['chosen'] else ''}",
            *(number(one["costs_s"].get(name)) for name in scorers),
            number(one["cost_s"]),
            number(service_s.get("p50")),
            number(service_s.get("p90")),
        )
    return table


def _outcome(outcome: Fields | None) -> str:
    if outcome is None:
        return "\noutcome   under way"
    reason = f"   {outcome['reason']}" if outcome["reason"] else ""
    return (
        f"\noutcome   HTTP {outcome['status']}{reason}   {outcome['output_tokens']:,} tokens   "
        f"first token {number(outcome['first_token_s'])} s   "
        f"duration {number(outcome['duration_s'])} s"
    )


def _regret(regret: Fields) -> str:
    return (
        f"regret    {number(regret['regret_s'])} s = surprise {number(regret['surprise_s'])} s "
        f"+ forgone {number(regret['forgone_s'])} s   "
        f"(took {number(regret['service_s'])} s, forecast {number(regret['forecast_s'])} s, "
        f"best {regret['best_replica']} {number(regret['best_forecast_s'])} s)"
    )
