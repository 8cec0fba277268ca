"""What is known of a call when it ends, taken down in no time; see ``receipt_sheet`` for more."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from concertmaster.core.actions import Dispatch
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName
from concertmaster.core.weighing import Weighed
from concertmaster.gateway.exchange import Exchange
from concertmaster.predictors.chances import Chances

MOST_ASKED, MOST_NAME_CHARS = 8, 128
MOST_ID_CHARS = 256
"""Leading characters of a request's id that name its receipt."""


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
        forecast: Without chances of success that nobody has asked for: they would be worked out
            for this alone, and hold the prompt until then.
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
        _settled(exchange.forecast),
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


def _settled(forecast: Forecast) -> Forecast:
    success = forecast.success
    if isinstance(success, Chances) and not success.read:
        return replace(forecast, success={})
    return forecast
