"""A receipt: what was decided for a call and why, what came of it, and the regret.

Nothing of it is computed while the call is served: a ``Record`` holds what was known, and
``receipt_of`` reads it when somebody asks, or when it is written down.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from concertmaster.core.actions import Dispatch
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName
from concertmaster.core.service import Stand
from concertmaster.core.weighing import Candidate, Weighed
from concertmaster.gateway.exchange import Exchange

LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MOST_MODELS = 32
MOST_ASKED, MOST_NAME_CHARS = 8, 128
MOST_ID_CHARS = 256
"""Leading characters of a request's id that name its receipt."""

Fields = dict[str, Any]
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
        stretch: Seconds of the gateway's clock in one of the wall.
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
    stretch: float


def record_of(
    exchange: Exchange,
    attempts: Sequence[Attempt],
    *,
    policy: str,
    ended_s: float | None,
    arrived_unix_s: float,
    stretch: float,
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
        stretch,
    )


def receipt_of(record: Record, models: Sequence[ModelName]) -> Fields:
    """Return the receipt as people and programs read it.

    Args:
        record: What is known.
        models: Of the fleet.
    """
    arrived = datetime.fromtimestamp(record.arrived_unix_s, UTC)
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
        "forecast": _forecast(record, models),
        "attempts": [_attempt(record, attempt) for attempt in record.attempts],
        "outcome": None if record.ended_s is None else _outcome(record, record.ended_s),
        "regret": regret_of(record),
    }


def _forecast(record: Record, known: Sequence[ModelName]) -> Fields:
    forecast, most = record.forecast, record.max_output_tokens
    named = [model for model in known if model in record.asked] or known
    return {
        "source": forecast.source,
        "tool_call": forecast.tool_call,
        "remaining_calls": _summary(forecast.remaining_calls),
        "models": [
            {
                "model": model,
                "output_tokens": _summary(forecast.output_law(model), most=most),
                "success": forecast.success.get(model),
            }
            for model in named[:MOST_MODELS]
        ],
    }


def _summary(law: Quantiles | None, *, most: float = float("inf")) -> Fields | None:
    if law is None:
        return None
    return {name: min(law.at(level), most) for name, level in LEVELS.items()}


def _attempt(record: Record, attempt: Attempt) -> Fields:
    dispatch = attempt.dispatch
    weighed = attempt.weighed or _NOT_WEIGHED
    return {
        "attempt": dispatch.attempt,
        "decided_s": attempt.at_s - record.arrived_s,
        "queue_wait_s": dispatch.waited_s,
        "replica": dispatch.replica_id,
        "model": attempt.model,
        "cost_s": dispatch.cost_s,
        "with_room": dispatch.candidates,
        "pools": list(weighed.pools),
        "reserved_kv_tokens": weighed.kv_tokens or None,
        "candidates": [
            _candidate(record, weighed, one, chosen=one.replica_id == dispatch.replica_id)
            for one in weighed.candidates
        ],
    }


def _candidate(record: Record, weighed: Weighed, one: Candidate, *, chosen: bool) -> Fields:
    return {
        "replica": one.replica_id,
        "model": one.stand.pool.model.name,
        "chosen": chosen,
        "cost_s": one.cost_s,
        "costs_s": dict(weighed.costs_s(one)),
        "service_s": _service_s(record, one.stand),
    }


def _service_s(record: Record, stand: Stand) -> Fields | None:
    """Return the law of a call's seconds on a replica; it needs one of its output tokens."""
    law = record.forecast.output_law(stand.pool.model.name)
    tokens = _summary(law, most=record.max_output_tokens)
    if tokens is None:
        return None
    service = stand.service()
    return {name: service.first_s + service.token_s * count for name, count in tokens.items()}


def _outcome(record: Record, ended_s: float) -> Fields:
    return {
        "status": record.status,
        "reason": record.reason or None,
        "first_token_s": _since(record.first_token_s, record.arrived_s),
        "output_tokens": record.output_tokens,
        "duration_s": ended_s - record.arrived_s,
    }


def regret_of(record: Record) -> Fields | None:
    """Hold what came against what was forecast of the last dispatch, in seconds.

    Let s be the seconds from that dispatch to the last token, f the forecast's median of them
    on the chosen replica, and b the least such median of all candidates. Then the surprise is
    s - f, what was forgone f - b, and the regret s - b, the sum of both. What was forgone is never
    negative, and above 0 where the decision weighed more than the median.
    ``None`` unless the call was served and forecast.
    """
    if record.ended_s is None or record.status != 200 or not record.attempts:
        return None
    last = record.attempts[-1]
    medians = {} if last.weighed is None else _medians(record, last.weighed)
    chosen_s = medians.get(last.dispatch.replica_id)
    if chosen_s is None:
        return None
    best = min(medians, key=lambda one: medians[one])
    service_s = record.ended_s - last.at_s
    return {
        "service_s": service_s,
        "forecast_s": chosen_s,
        "best_forecast_s": medians[best],
        "best_replica": best,
        "surprise_s": service_s - chosen_s,
        "forgone_s": chosen_s - medians[best],
        "regret_s": service_s - medians[best],
    }


def _medians(record: Record, weighed: Weighed) -> dict[ReplicaId, float]:
    laws = ((one.replica_id, _service_s(record, one.stand)) for one in weighed.candidates)
    return {replica_id: law["p50"] for replica_id, law in laws if law is not None}


def _since(instant_s: float | None, from_s: float) -> float | None:
    return None if instant_s is None else instant_s - from_s
