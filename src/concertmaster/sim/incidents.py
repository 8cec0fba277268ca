"""What befalls a simulated fleet from outside: deaths, recoveries, replicas that turn slow.

The core is told of deaths and recoveries, as a gateway would be by its probes. Nobody tells it
that a replica is slow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Fleet, ReplicaId

Kind = Literal["dies", "recovers", "slows"]


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that happens to one replica.

    Attributes:
        at_s: When, in seconds of the workload's clock.
        kind: ``dies`` loses its calls and its cache, ``recovers`` serves again, ``slows``
            takes ``factor`` times as long for each step from then on; 1.0 is as before.
    """

    at_s: float
    kind: Kind
    replica_id: ReplicaId
    factor: float = 1.0

    @property
    def event(self) -> Event | None:
        """What the core is told; ``None`` if nothing."""
        match self.kind:
            case "dies":
                return ReplicaDied(self.replica_id)
            case "recovers":
                return ReplicaReady(self.replica_id)
            case "slows":
                return None
            case _:
                assert_never(self.kind)


def loss(fleet: Fleet, share: float, *, at_s: float) -> list[Incident]:
    """Let a share of each pool's replicas die at once; at least one of each pool stays."""
    return [
        Incident(at_s, "dies", replica_id)
        for pool in fleet.pools
        for replica_id in _all_but(replicas_of(fleet, pool.pool_id), 1 - share)
    ]


def slowing(replicas: Iterable[ReplicaId], factor: float, *, at_s: float) -> list[Incident]:
    """Let replicas take ``factor`` times as long from an instant on."""
    return [Incident(at_s, "slows", replica_id, factor) for replica_id in replicas]


def replicas_of(fleet: Fleet, pool_id: str) -> list[ReplicaId]:
    """Return the replicas of a pool, in the order of the fleet file."""
    return [name for name, (pool, _, _) in fleet.replicas.items() if pool.pool_id == pool_id]


def _all_but(replicas: Sequence[ReplicaId], share: float) -> Sequence[ReplicaId]:
    return replicas[max(1, round(len(replicas) * share)) :]
