"""A receipt as it is written down: the figures of a record that no fleet is needed to read.

Nothing of it is computed while a call is served. A ``Record`` keeps what was known, with the laws
of a forecast and the state of replicas; a ``Sheet`` has three quantiles of each law and two
seconds of each replica, so that it is small and outlives the fleet. ``receipt_fields`` makes of
it what people and programs read.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from concertmaster.core.forecast import Quantiles
from concertmaster.core.request import ModelName
from concertmaster.core.weighing import Candidate, Weighed
from concertmaster.gateway.receipt import Attempt, Record

LEVELS = (0.5, 0.9, 0.99)
MOST_NAMED = 32
_NOT_WEIGHED = Weighed((), (), (), 0)

Law: TypeAlias = tuple[float, float, float]
"""Values at ``LEVELS``."""


class CandidateSheet(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A replica that was weighed.

    Attributes:
        model: Its place among those of the sheet.
        parts_s: In the order of the scorers.
        first_s: Until the first token of an answer, and ...
        token_s: ... for each further one; both ``None`` where no length is forecast.
    """

    replica: str
    model: int
    parts_s: tuple[float, ...]
    first_s: float | None
    token_s: float | None


class AttemptSheet(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One dispatch."""

    number: int
    hedge: bool
    at_s: float
    waited_s: float
    replica: str
    model: str
    cost_s: float | None
    with_room: int
    pools: Sequence[str]
    scorers: Sequence[str]
    kv_tokens: int
    candidates: Sequence[CandidateSheet]


class Sheet(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One call; fields that are not told of here are those of ``Record``.

    Attributes:
        models: Those that may serve it, then others that were weighed.
        laws: Output tokens on each.
        successes: Probabilities on those that may serve it, and on no others.
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
    status: int
    reason: str
    output_tokens: int
    arrived_s: float
    first_token_s: float | None
    ended_s: float | None
    arrived_unix_s: float
    attempt: int
    source: str
    tool_call: float | None
    remaining_calls: Law | None
    models: Sequence[str]
    laws: Sequence[Law | None]
    successes: Sequence[float | None]
    attempts: Sequence[AttemptSheet]


def sheet_of(record: Record, fleet_models: Sequence[ModelName]) -> Sheet:
    """Reduce a record to its figures.

    Args:
        record: What is known.
        fleet_models: Which models there are.
    """
    forecast, asked = record.forecast, record.asked
    may = ([model for model in fleet_models if model in asked] or fleet_models)[:MOST_NAMED]
    models = {model: place for place, model in enumerate(may)}
    for attempt in record.attempts:
        for one in (attempt.weighed or _NOT_WEIGHED).candidates:
            models.setdefault(one.stand.pool.model.name, len(models))
    laws = [_law(forecast.output_law(model), record.max_output_tokens) for model in models]
    return Sheet(
        record.request_id,
        record.workflow_id,
        record.policy,
        record.app,
        record.role,
        record.stage,
        record.service_class,
        asked,
        record.prompt_tokens,
        record.max_output_tokens,
        record.deadline_s,
        record.streams,
        record.status,
        record.reason,
        record.output_tokens,
        record.arrived_s,
        record.first_token_s,
        record.ended_s,
        record.arrived_unix_s,
        record.attempt,
        forecast.source,
        forecast.tool_call,
        _law(forecast.remaining_calls),
        list(models),
        laws,
        [forecast.success.get(model) for model in may],
        [_attempt(attempt, models, laws) for attempt in record.attempts],
    )


def _law(law: Quantiles | None, most: float = float("inf")) -> Law | None:
    if law is None:
        return None
    median, high, highest = LEVELS
    return min(law.at(median), most), min(law.at(high), most), min(law.at(highest), most)


def _attempt(
    attempt: Attempt, models: dict[ModelName, int], laws: Sequence[Law | None]
) -> AttemptSheet:
    dispatch, weighed = attempt.dispatch, attempt.weighed or _NOT_WEIGHED
    return AttemptSheet(
        dispatch.attempt,
        dispatch.hedge,
        attempt.at_s,
        dispatch.waited_s,
        dispatch.replica_id,
        attempt.model,
        dispatch.cost_s,
        dispatch.candidates,
        weighed.pools[:MOST_NAMED],
        weighed.scorers,
        weighed.kv_tokens,
        [_candidate(one, models, laws) for one in weighed.candidates],
    )


def _candidate(
    one: Candidate, models: dict[ModelName, int], laws: Sequence[Law | None]
) -> CandidateSheet:
    model = models[one.stand.pool.model.name]
    service = (None, None) if laws[model] is None else one.stand.service()
    return CandidateSheet(one.replica_id, model, tuple(one.parts_s), *service)


packed = msgspec.msgpack.Encoder().encode
"""Make bytes of a sheet."""

unpacked = msgspec.msgpack.Decoder(Sheet).decode
"""Make a sheet of its bytes."""
