"""What was weighed at a dispatch, kept for a driver that asks; nothing is decided by it."""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from concertmaster.core.fleet import PoolId, Replica, ReplicaId
from concertmaster.core.policy import Scorer
from concertmaster.core.queue import Waiting
from concertmaster.core.request import RequestId
from concertmaster.core.service import Service, service_on

MOST_CANDIDATES = 8
"""Candidates that are kept of a dispatch: the cheapest, and the chosen one."""

MOST_KEPT = 10_000
"""Dispatches that are kept at a time; the oldest go first."""


class Candidate(NamedTuple):
    """A replica that was weighed.

    Attributes:
        costs_s: Seconds by scorer; empty if nothing was compared.
        service: What the call would take there, as its batch stood before the dispatch.
    """

    replica_id: ReplicaId
    costs_s: Mapping[str, float]
    service: Service

    @property
    def cost_s(self) -> float | None:
        """Seconds that it costs; ``None`` if nothing was compared."""
        return sum(self.costs_s.values()) if self.costs_s else None


class Weighed(NamedTuple):
    """One dispatch.

    Attributes:
        pools: Where the router let the call go.
        candidates: Cheapest first, at most ``MOST_CANDIDATES``; ties in the order of the fleet.
        kv_tokens: Room in the KV cache that the chosen one promised, in whole blocks; prefix
            chunks that it shares with other calls count.
    """

    pools: Sequence[PoolId]
    candidates: Sequence[Candidate]
    kv_tokens: int


class Weighing:
    """Notes what a picker asks for, so that nothing is computed a second time.

    A picker that compares nothing, or only some of the replicas with room, leaves the others out.
    """

    def __init__(self) -> None:
        self._seen: dict[ReplicaId, tuple[float, Mapping[str, float], Replica]] = {}
        self._candidates: list[Candidate] = []
        self._kept: dict[RequestId, Weighed] = {}

    def begin(self) -> None:
        """Start with a call."""
        self._seen = {}

    def cost_s(
        self, now_s: float, call: Waiting, replica: Replica, scorers: Sequence[Scorer]
    ) -> float:
        """Add up what scorers say of a replica."""
        seen = self._seen.get(replica.replica_id)
        if seen is not None:
            return seen[0]
        costs_s = [scorer.cost_s(now_s, call, replica) for scorer in scorers]
        parts = {scorer.name: cost_s for scorer, cost_s in zip(scorers, costs_s, strict=True)}
        total_s = float(sum(costs_s))
        self._seen[replica.replica_id] = (total_s, parts, replica)
        return total_s

    def look(self, now_s: float, call: Waiting, chosen: Replica) -> None:
        """Take down how the candidates stand, before the ledgers of the chosen one change."""
        rows = list(self._seen.values())
        if len(rows) > MOST_CANDIDATES:
            rows = heapq.nsmallest(MOST_CANDIDATES, rows, key=_total_s)
        else:
            rows.sort(key=_total_s)
        if not any(row[2] is chosen for row in rows):
            rows[MOST_CANDIDATES - 1 :] = [self._seen.get(chosen.replica_id, (0.0, {}, chosen))]
        self._candidates = [
            Candidate(replica.replica_id, parts, service_on(now_s, call, replica))
            for _, parts, replica in rows
        ]

    def keep(self, call: Waiting, chosen: Replica) -> None:
        """Keep it until it is asked for, now that the chosen one has promised its room."""
        request_id = call.request.request_id
        kv_tokens = chosen.kv.held_blocks(request_id) * chosen.kv.block_tokens
        self._kept[request_id] = Weighed(call.pools, self._candidates, kv_tokens)
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    def take(self, request_id: RequestId) -> Weighed | None:
        """Hand out what was weighed for the latest dispatch of a call, once."""
        return self._kept.pop(request_id, None)


def _total_s(row: tuple[float, Mapping[str, float], Replica]) -> float:
    return row[0]
