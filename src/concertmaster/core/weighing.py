"""What was weighed at a dispatch, kept for a driver that asks; nothing is decided by it."""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from concertmaster.core.fleet import PoolId, Replica, ReplicaId
from concertmaster.core.policy import Scorer
from concertmaster.core.queue import Waiting
from concertmaster.core.request import RequestId
from concertmaster.core.service import Stand, stand_of

MOST_CANDIDATES = 5
"""Candidates that are kept of a dispatch: the chosen one, and the cheapest others."""

MOST_KEPT = 10_000
"""Dispatches that are kept at a time; the oldest go first."""

_MANY, _FEW = 30, MOST_CANDIDATES + 1

Row: TypeAlias = tuple[float, Sequence[float], Replica]
"""Cost of a replica, and its parts in the order of the scorers."""


class Candidate(NamedTuple):
    """A replica that was weighed.

    Attributes:
        parts_s: Seconds in the order of the scorers; empty if nothing was compared.
        stand: How it stood before the dispatch.
    """

    replica_id: ReplicaId
    parts_s: Sequence[float]
    stand: Stand

    @property
    def cost_s(self) -> float | None:
        """Seconds that it costs; ``None`` if nothing was compared."""
        return sum(self.parts_s) if self.parts_s else None


class Weighed(NamedTuple):
    """One dispatch.

    Attributes:
        pools: Where the router let the call go.
        scorers: Names of what was added up.
        candidates: The chosen one first, then the cheapest others; ties in the order of asking.
        kv_tokens: Room in the KV cache that the chosen one promised, in whole blocks; prefix
            chunks that it shares with other calls count.
    """

    pools: Sequence[PoolId]
    scorers: Sequence[str]
    candidates: Sequence[Candidate]
    kv_tokens: int

    def costs_s(self, candidate: Candidate) -> Mapping[str, float]:
        """Seconds by scorer."""
        return dict(zip(self.scorers, candidate.parts_s, strict=False))


class Weighing:
    """Notes what a picker asked for, so that no cost is computed a second time.

    A picker that compares nothing, or only some of the replicas with room, leaves the others out.

    Args:
        scorers: Of the policy.
    """

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._candidates: list[Candidate] = []
        self._kept: dict[RequestId, Weighed] = {}
        self.adopt(scorers)

    def adopt(self, scorers: Sequence[Scorer]) -> None:
        """Name the scorers of another policy from here on."""
        self._names = [scorer.name for scorer in scorers]

    def look(self, now_s: float, call: Waiting, chosen: Replica, rows: Sequence[Row]) -> None:
        """Take down how the candidates stand, before the ledgers of the chosen one change.

        Args:
            now_s: The instant.
            call: Whom they are for.
            chosen: Who gets it.
            rows: What was compared; a replica that was asked about twice is there twice, and the
                chosen one last.
        """
        own: Sequence[float] = rows[-1][1] if rows else ()
        parts_s = {chosen.replica_id: own}
        replicas = [chosen]
        for _, costs_s, replica in _cheapest(rows):
            if len(replicas) < MOST_CANDIDATES and replica.replica_id not in parts_s:
                replicas.append(replica)
                parts_s[replica.replica_id] = costs_s
        self._candidates = [
            Candidate(one.replica_id, parts_s[one.replica_id], stand_of(now_s, call, one))
            for one in replicas
        ]

    def keep(self, call: Waiting, chosen: Replica) -> None:
        """Keep it until it is asked for, now that the chosen one has promised its room."""
        request_id = call.request.request_id
        kv_tokens = chosen.kv.held_blocks(request_id) * chosen.kv.block_tokens
        self._kept[request_id] = Weighed(call.pools, self._names, self._candidates, kv_tokens)
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    def take(self, request_id: RequestId) -> Weighed | None:
        """Hand out what was weighed for the latest dispatch of a call, once."""
        return self._kept.pop(request_id, None)


def _cheapest(rows: Sequence[Row]) -> Sequence[Row]:
    """Return rows by cost, and of many only the first; ties in the order in which they came."""
    if len(rows) < _MANY:
        return sorted(rows, key=_total_s)
    limit_s = heapq.nsmallest(_FEW, [row[0] for row in rows])[-1]
    return sorted([row for row in rows if row[0] <= limit_s], key=_total_s)


def _total_s(row: Row) -> float:
    return row[0]
