"""Everything that the scheduler can ask for."""

from collections.abc import Mapping
from dataclasses import field
from typing import TypeAlias

from concertmaster.core.events import FailReason, RejectReason
from concertmaster.core.facts import fact
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.request import RequestId


@fact(frozen=True, slots=True)
class Dispatch:
    """Send this call to this replica now.

    Attributes:
        attempt: Counts from 1; every later event about the call carries it.
        priority: For engines that take one; lower goes first.
        waited_s: How long the call stood in line.
        candidates: Replicas that had room for it.
        cost_s: Seconds that the chosen one costs; ``None`` if nothing was compared.
        costs_s: Replica to scorer to seconds, for every candidate; empty unless the
            scheduler records candidates.
        hedge: Whether it goes out beside an earlier attempt that is late and goes on.
    """

    request_id: RequestId
    replica_id: ReplicaId
    attempt: int
    priority: int
    waited_s: float
    candidates: int
    cost_s: float | None = None
    costs_s: Mapping[ReplicaId, Mapping[str, float]] = field(default_factory=dict)
    hedge: bool = False


@fact(frozen=True, slots=True)
class Reject:
    """Tell the caller no.

    Attributes:
        retry_after_s: When it is worth trying again; ``None`` if never.
    """

    request_id: RequestId
    reason: RejectReason
    retry_after_s: float | None = None


@fact(frozen=True, slots=True)
class Fail:
    """Tell the caller that the call broke and cannot be tried again."""

    request_id: RequestId
    reason: FailReason


@fact(frozen=True, slots=True)
class Cancel:
    """Stop this call on this replica: its caller is gone, or it goes on at another alone.

    Attributes:
        overtaken: Whether a later attempt has begun to answer before this one.
    """

    request_id: RequestId
    replica_id: ReplicaId
    overtaken: bool = False


@fact(frozen=True, slots=True)
class Wake:
    """Bring this replica's weights back; report ``ReplicaReady`` or ``ReplicaDied``."""

    replica_id: ReplicaId


@fact(frozen=True, slots=True)
class Demote:
    """Move this idle replica's weights there; report ``ReplicaDemoted``, or ``ReplicaReady``.

    The latter says that it could not be stopped and serves on. On shared nodes one that does
    not run may be moved further away.
    """

    replica_id: ReplicaId
    readiness: Readiness


@fact(frozen=True, slots=True)
class Resize:
    """Let this replica's engine have so many KV blocks from now on.

    Asked for on shared nodes only, and carried out before the actions that follow it.
    """

    replica_id: ReplicaId
    kv_blocks: int


Action: TypeAlias = Dispatch | Reject | Fail | Cancel | Wake | Demote | Resize
