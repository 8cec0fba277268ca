"""A receipt: what was decided for a call and why, what came of it, and the regret.

Nothing of it is computed while the call is served: a ``Record`` holds what was known, and
``receipt_of`` reads it when somebody asks, or when it is written down.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

from concertmaster.core.actions import Dispatch
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName
from concertmaster.core.service import Stand
from concertmaster.core.weighing import Candidate, Weighed
from concertmaster.gateway.exchange import Exchange

LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
DIGITS = 6
MOST_NAMED = 32
MOST_ASKED, MOST_NAME_CHARS = 8, 128
MOST_ID_CHARS = 256
"""Leading characters of a request's id that name its receipt."""

Fields: TypeAlias = dict[str, Any]
Laws: TypeAlias = dict[ModelName, Fields | None]
_NOT_WEIGHED = Weighed((), (), (), 0)


class Attempt(NamedTuple):
    """One dispatch of a call.

    Attributes:
        weighed: ``None`` if nobody took down what was weighed.
    """

    at_s: float
    model: ModelName
    dispatch: Dispatch
    weighed: Weighed | None


class Record(NamedTuple):
    """What is known of a call, its parts of bounded size; instants on the gateway's clock.

    Attributes:
        request_id: Its first ``MOST_ID_CHARS`` characters.
        asked: Models that the call named, cut short; empty for any.
        ended_s: ``None`` while the call is under way.
        arrived_unix_s: When it arrived, in seconds since 1970.
        attempt: Number of the attempt that answered, or was the last; 0 if there was none.
    """

    request_id: str
    workflow_id: str
    policy: str
    app: str
    role: str
    stage: int | None
    service_class: str
    asked: tuple[str, ...]
    prompt_tokens: int
    max_output_tokens: int
    deadline_s: float | None
    streams: bool
    forecast: Forecast
    attempts: tuple[Attempt, ...]
    status: int
    reason: str
    output_tokens: int
    arrived_s: float
    first_token_s: float | None
    ended_s: float | None
    arrived_unix_s: float
    attempt: int


def record_of(
    exchange: Exchange,
    attempts: Sequence[Attempt],
    *,
    policy: str,
    ended_s: float | None,
    arrived_unix_s: float,
) -> Record:
    """Take down what is known of a call."""
    request = exchange.request
    return Record(
        request.request_id[:MOST_ID_CHARS],
        request.workflow_id,
        policy,
        request.app,
        request.role,
        request.stage,
        request.service_class.value,
        tuple(name[:MOST_NAME_CHARS] for name in request.models[:MOST_ASKED]),
        request.prompt_tokens,
        request.max_output_tokens,
        request.deadline_s,
        exchange.streams,
        exchange.forecast,
        tuple(attempts),
        exchange.status,
        exchange.reason,
        exchange.tokens,
        exchange.arrived_s,
        exchange.first_token_s,
        ended_s,
        arrived_unix_s,
        exchange.attempt,
    )


def receipt_of(record: Record, models: Sequence[ModelName]) -> Fields:
    """Return the receipt as people and programs read it.

    Args:
        record: What is known.
        models: Of the fleet.
    """
    arrived = datetime.fromtimestamp(record.arrived_unix_s, UTC)
    named = ([model for model in models if model in record.asked] or models)[:MOST_NAMED]
    laws = _laws(record, named)
    attempts = [_attempt(record, attempt, laws) for attempt in record.attempts]
    return {
        "id": record.request_id,
        "workflow_id": record.workflow_id,
        "arrived_at": arrived.isoformat(timespec="milliseconds"),
        "policy": record.policy,
        "app": record.app,
        "role": record.role,
        "stage": record.stage,
        "class": record.service_class,
        "models": list(record.asked),
        "streams": record.streams,
        "prompt_tokens": record.prompt_tokens,
        "max_output_tokens": record.max_output_tokens,
        "deadline_s": _since(record.deadline_s, record.arrived_s),
        "forecast": _forecast(record.forecast, named, laws),
        "attempts": attempts,
        "outcome": None if record.ended_s is None else _outcome(record, record.ended_s),
        "regret": _regret(record, attempts),
    }


def _laws(record: Record, named: Sequence[ModelName]) -> Laws:
    """Summarise the output tokens on each model that is named or was weighed."""
    weighed = (attempt.weighed for attempt in record.attempts if attempt.weighed)
    candidates = (one.stand.pool.model.name for each in weighed for one in each.candidates)
    forecast, most = record.forecast, record.max_output_tokens
    return {
        model: _summary(forecast.output_law(model), most=most)
        for model in dict.fromkeys((*named, *candidates))
    }


def _forecast(forecast: Forecast, named: Sequence[ModelName], laws: Laws) -> Fields:
    return {
        "source": forecast.source,
        "tool_call": forecast.tool_call,
        "remaining_calls": _summary(forecast.remaining_calls),
        "models": [
            {"model": one, "output_tokens": laws[one], "success": forecast.success.get(one)}
            for one in named
        ],
    }


def _summary(law: Quantiles | None, *, most: float = float("inf")) -> Fields | None:
    if law is None:
        return None
    return {name: round(min(law.at(level), most), DIGITS) for name, level in LEVELS.items()}


def _attempt(record: Record, attempt: Attempt, laws: Laws) -> Fields:
    dispatch = attempt.dispatch
    weighed = attempt.weighed or _NOT_WEIGHED
    return {
        "attempt": dispatch.attempt,
        "hedge": dispatch.hedge,
        "decided_s": _since(attempt.at_s, record.arrived_s),
        "queue_wait_s": round(dispatch.waited_s, DIGITS),
        "replica": dispatch.replica_id,
        "model": attempt.model,
        "cost_s": _rounded(dispatch.cost_s),
        "with_room": dispatch.candidates,
        "pools": list(weighed.pools[:MOST_NAMED]),
        "reserved_kv_tokens": weighed.kv_tokens or None,
        "candidates": [
            _candidate(weighed, one, laws, chosen=one.replica_id == dispatch.replica_id)
            for one in weighed.candidates
        ],
    }


def _candidate(weighed: Weighed, one: Candidate, laws: Laws, *, chosen: bool) -> Fields:
    model = one.stand.pool.model.name
    costs_s = weighed.costs_s(one).items()
    return {
        "replica": one.replica_id,
        "model": model,
        "chosen": chosen,
        "cost_s": _rounded(one.cost_s),
        "costs_s": {name: round(cost_s, DIGITS) for name, cost_s in costs_s},
        "service_s": _service_s(one.stand, laws[model]),
    }


def _service_s(stand: Stand, tokens: Fields | None) -> Fields | None:
    """Return the law of a call's seconds on a replica from that of its output tokens."""
    if tokens is None:
        return None
    first_s, token_s = stand.service()
    return {name: round(first_s + token_s * count, DIGITS) for name, count in tokens.items()}


def _outcome(record: Record, ended_s: float) -> Fields:
    return {
        "status": record.status,
        "reason": record.reason or None,
        "attempt": record.attempt,
        "first_token_s": _since(record.first_token_s, record.arrived_s),
        "output_tokens": record.output_tokens,
        "duration_s": _since(ended_s, record.arrived_s),
    }


def _regret(record: Record, attempts: Sequence[Fields]) -> Fields | None:
    """Hold what came against what was forecast of the dispatch that was answered, in seconds.

    Let s be the seconds from that dispatch to the last token, f the forecast's median of them
    on the chosen replica, and b the least such median of all candidates. Then the surprise is
    s - f, what was forgone f - b, and the regret s - b, the sum of both. What was forgone is never
    negative, and above 0 where the decision weighed more than the median.
    ``None`` unless the call was served and forecast.
    """
    numbers = [one["attempt"] for one in attempts]
    if record.ended_s is None or record.status != 200 or record.attempt not in numbers:
        return None
    answered = numbers.index(record.attempt)
    forecast = [one for one in attempts[answered]["candidates"] if one["service_s"] is not None]
    chosen_s = next((one["service_s"]["p50"] for one in forecast if one["chosen"]), None)
    if chosen_s is None:
        return None
    best = min(forecast, key=lambda one: one["service_s"]["p50"])
    best_s, service_s = best["service_s"]["p50"], record.ended_s - record.attempts[answered].at_s
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
