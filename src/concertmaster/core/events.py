"""Everything that can happen to the scheduler.

An event about a dispatched call names the attempt it belongs to, so that news of an attempt
that is over (cancelled, or lost with its replica) is known as stale and ignored.
"""

from typing import Literal, TypeAlias

from concertmaster.core.facts import fact
from concertmaster.core.fleet import Node, PoolId, Readiness, ReplicaId
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, RequestId, WorkflowId


@fact(frozen=True, slots=True)
class RequestArrived:
    """A caller is waiting; every call it depends on has finished."""

    request: Request
    forecast: Forecast = NO_FORECAST


@fact(frozen=True, slots=True)
class RequestCancelled:
    """The caller is gone, wherever its call is."""

    request_id: RequestId


@fact(frozen=True, slots=True)
class TokensStreamed:
    """Calls have produced tokens: (request, attempt, output tokens since its start)."""

    progress: tuple[tuple[RequestId, int, int], ...]


@fact(frozen=True, slots=True)
class RequestFinished:
    """The last token is out.

    Attributes:
        output_tokens: How many there were.
    """

    request_id: RequestId
    attempt: int
    output_tokens: int


@fact(frozen=True, slots=True)
class RequestFailed:
    """The engine refused or broke the call.

    Attributes:
        retriable: True if the caller has seen nothing of it, so that another replica may try.
    """

    request_id: RequestId
    attempt: int
    retriable: bool


@fact(frozen=True, slots=True)
class ReplicaDied:
    """A replica is gone with all it was doing; it may come back as ``ReplicaReady``."""

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class ReplicaReady:
    """A replica can serve: it was woken, or it came back."""

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class ReplicaDemoted:
    """A replica's weights were moved away while it was idle."""

    replica_id: ReplicaId
    readiness: Readiness


@fact(frozen=True, slots=True)
class ReplicaDraining:
    """A replica takes no further calls but finishes those it has."""

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class ReplicaJoined:
    """A pool has one replica more; it takes calls once it is reported ready.

    Attributes:
        replica_id: A name that no replica has, unless it was removed and has nothing in flight.
        node: What it stands on, alone.
    """

    replica_id: ReplicaId
    pool_id: PoolId
    node: Node


@fact(frozen=True, slots=True)
class ReplicaRemoved:
    """A replica takes no further calls, whatever is reported of it, but finishes those it has."""

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class ReplicaOnTrial:
    """A replica that was drained may take one call beside those it has, to show that it serves.

    ``ReplicaReady`` says that it did, ``ReplicaDraining`` that it did not.
    """

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class PaceObserved:
    """Completions show how far replicas are from their rate curves.

    Attributes:
        paces: Replica and its pace: 1.0 as the curve says, 1.3 takes 30 % longer; above 0.
    """

    paces: tuple[tuple[ReplicaId, float], ...]


@fact(frozen=True, slots=True)
class WorkflowClosed:
    """The caller says that no call of this workflow will follow."""

    workflow_id: WorkflowId


@fact(frozen=True, slots=True)
class TimerFired:
    """The instant asked for by ``next_wakeup_s`` has come."""


Event: TypeAlias = (
    RequestArrived
    | RequestCancelled
    | TokensStreamed
    | RequestFinished
    | RequestFailed
    | ReplicaDied
    | ReplicaReady
    | ReplicaDemoted
    | ReplicaDraining
    | ReplicaJoined
    | ReplicaRemoved
    | ReplicaOnTrial
    | PaceObserved
    | WorkflowClosed
    | TimerFired
)

RejectReason: TypeAlias = Literal[
    "model_not_found",
    "too_long",
    "queue_full",
    "waited_too_long",
    "no_replica",
    "too_late",
]
"""Why a call is refused; a metrics label, so the set stays small."""

FailReason: TypeAlias = Literal["replica_died", "engine_error"]
