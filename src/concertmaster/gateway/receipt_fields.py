"""A receipt as people and programs read it: what was decided, why, what came of it, the regret."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

from concertmaster.core.request import ModelName
from concertmaster.gateway.receipt import Record
from concertmaster.gateway.receipt_sheet import (
    AttemptSheet,
    CandidateSheet,
    Law,
    Sheet,
    sheet_of,
    unpacked,
)

LEVELS = ("p50", "p90", "p99")
DIGITS = 6

Fields: TypeAlias = dict[str, Any]
Laws: TypeAlias = dict[str, Fields | None]


def receipt_of(record: Record, fleet_models: Sequence[ModelName]) -> Fields:
    """Return the receipt of what is known now, in a fleet of these models."""
    return fields_of(sheet_of(record, fleet_models))


def fields_in(body: bytes) -> Fields:
    """Return a receipt that was written down, by this version or as JSON by an earlier one."""
    if body.startswith(b"{"):
        return msgspec.json.decode(body, type=Fields)
    return fields_of(unpacked(body))


def fields_of(sheet: Sheet) -> Fields:
    """Return the receipt that a sheet is of."""
    arrived = datetime.fromtimestamp(sheet.arrived_unix_s, UTC)
    laws = {model: _named(law) for model, law in zip(sheet.models, sheet.laws, strict=True)}
    attempts = [_attempt(sheet, attempt, laws) for attempt in sheet.attempts]
    return {
        "id": sheet.request_id,
        "workflow_id": sheet.workflow_id,
        "arrived_at": arrived.isoformat(timespec="milliseconds"),
        "policy": sheet.policy,
        "app": sheet.app,
        "role": sheet.role,
        "stage": sheet.stage,
        "class": sheet.service_class,
        "models": list(sheet.asked),
        "streams": sheet.streams,
        "prompt_tokens": sheet.prompt_tokens,
        "max_output_tokens": sheet.max_output_tokens,
        "deadline_s": _since(sheet.deadline_s, sheet.arrived_s),
        "forecast": _forecast(sheet, laws),
        "attempts": attempts,
        "outcome": None if sheet.ended_s is None else _outcome(sheet, sheet.ended_s),
        "regret": _regret(sheet, attempts),
    }


def _named(law: Law | None) -> Fields | None:
    if law is None:
        return None
    return {name: round(value, DIGITS) for name, value in zip(LEVELS, law, strict=True)}


def _forecast(sheet: Sheet, laws: Laws) -> Fields:
    return {
        "source": sheet.source,
        "tool_call": sheet.tool_call,
        "remaining_calls": _named(sheet.remaining_calls),
        "models": [
            {"model": one, "output_tokens": laws[one], "success": success}
            for one, success in zip(sheet.models, sheet.successes, strict=False)
        ],
    }


def _attempt(sheet: Sheet, attempt: AttemptSheet, laws: Laws) -> Fields:
    return {
        "attempt": attempt.number,
        "hedge": attempt.hedge,
        "decided_s": _since(attempt.at_s, sheet.arrived_s),
        "queue_wait_s": round(attempt.waited_s, DIGITS),
        "replica": attempt.replica,
        "model": attempt.model,
        "cost_s": _rounded(attempt.cost_s),
        "with_room": attempt.with_room,
        "pools": list(attempt.pools),
        "reserved_kv_tokens": attempt.kv_tokens or None,
        "candidates": [_candidate(sheet, attempt, one, laws) for one in attempt.candidates],
    }


def _candidate(sheet: Sheet, attempt: AttemptSheet, one: CandidateSheet, laws: Laws) -> Fields:
    model = sheet.models[one.model]
    costs_s = zip(attempt.scorers, one.parts_s, strict=False)
    return {
        "replica": one.replica,
        "model": model,
        "chosen": one.replica == attempt.replica,
        "cost_s": round(sum(one.parts_s), DIGITS) if one.parts_s else None,
        "costs_s": {name: round(cost_s, DIGITS) for name, cost_s in costs_s},
        "service_s": _service_s(one, laws[model]),
    }


def _service_s(one: CandidateSheet, tokens: Fields | None) -> Fields | None:
    """Return the law of a call's seconds on a replica from that of its output tokens."""
    if tokens is None or one.first_s is None or one.token_s is None:
        return None
    first_s, token_s = one.first_s, one.token_s
    return {name: round(first_s + token_s * count, DIGITS) for name, count in tokens.items()}


def _outcome(sheet: Sheet, ended_s: float) -> Fields:
    return {
        "status": sheet.status,
        "reason": sheet.reason or None,
        "attempt": sheet.attempt,
        "first_token_s": _since(sheet.first_token_s, sheet.arrived_s),
        "output_tokens": sheet.output_tokens,
        "duration_s": _since(ended_s, sheet.arrived_s),
    }


def _regret(sheet: Sheet, attempts: Sequence[Fields]) -> Fields | None:
    """Hold what came against what was forecast of the dispatch that was answered, in seconds.

    Let s be the seconds from that dispatch to the last token, f the forecast's median of them
    on the chosen replica, and b the least such median of all candidates. Then the surprise is
    s - f, what was forgone f - b, and the regret s - b, the sum of both. What was forgone is never
    negative, and above 0 where the decision weighed more than the median.
    ``None`` unless the call was served and forecast.
    """
    numbers = [one["attempt"] for one in attempts]
    if sheet.ended_s is None or sheet.status != 200 or sheet.attempt not in numbers:
        return None
    answered = numbers.index(sheet.attempt)
    forecast = [one for one in attempts[answered]["candidates"] if one["service_s"] is not None]
    chosen_s = next((one["service_s"]["p50"] for one in forecast if one["chosen"]), None)
    if chosen_s is None:
        return None
    best = min(forecast, key=lambda one: one["service_s"]["p50"])
    best_s, service_s = best["service_s"]["p50"], sheet.ended_s - sheet.attempts[answered].at_s
    return {
        "service_s": round(service_s, DIGITS),
        "forecast_s": chosen_s,
        "best_forecast_s": best_s,
        "best_replica": best["replica"],
        "surprise_s": round(service_s - chosen_s, DIGITS),
        "forgone_s": round(chosen_s - best_s, DIGITS),
        "regret_s": round(service_s - best_s, DIGITS),
    }


def _since(instant_s: float | None, from_s: float) -> float | None:
    return None if instant_s is None else round(instant_s - from_s, DIGITS)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
