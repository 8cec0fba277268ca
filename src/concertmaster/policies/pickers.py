"""Pickers: which of the open replicas gets the call."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from concertmaster.core.fleet import Replica
from concertmaster.core.queue import Waiting

SHORTLIST = 16
"""Replicas of one pool that are scored. They differ in their load, their pace and what they have
cached alone, so of a large pool the least loaded and those with the prefix will do."""


def _paced_tokens(replica: Replica) -> tuple[float, float, int, str]:
    """Tokens in flight, worth as much more as the replica is slower than its curve."""
    pace = replica.pace
    return (
        replica.decode_tokens * pace,
        replica.prefill_tokens * pace,
        replica.last_dispatch,
        replica.replica_id,
    )


def shortlist(
    call: Waiting, replicas: Sequence[Replica], *, most: int = SHORTLIST
) -> Sequence[Replica]:
    """Keep, of each pool, the least loaded replicas and some that hold the prompt's prefix."""
    if len(replicas) <= most:
        return replicas
    first_hash = call.request.prefix_hashes[:1]
    kept: list[Replica] = []
    for _, in_pool in groupby(replicas, key=attrgetter("pool.pool_id")):
        ranked = sorted(in_pool, key=_paced_tokens)
        kept += ranked[:most]
        if first_hash:
            holders = (r for r in ranked[most:] if r.prefixes.hit_tokens(first_hash))
            kept += [holder for holder, _ in zip(holders, range(most), strict=False)]
    return kept


@dataclass(frozen=True, slots=True)
class LeastCost:
    """The cheapest; among equals the one dispatched to longest ago, then the first by id."""

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Score a shortlist of each pool."""
        return min(
            shortlist(call, replicas), key=lambda r: (cost_s(r), r.last_dispatch, r.replica_id)
        )


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any, with equal chance."""

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Draw one."""
        return replicas[rng.randrange(len(replicas))]


@dataclass(frozen=True, slots=True)
class LeastRecent:
    """The one dispatched to longest ago: round robin, also while replicas come and go."""

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Compare serial numbers of the last dispatch."""
        return min(replicas, key=attrgetter("last_dispatch", "replica_id"))


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The cheaper of two drawn at random (Mitzenmacher 2001); ties go by the draw."""

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Draw two different ones where there are two."""
        first = rng.randrange(len(replicas))
        if len(replicas) == 1:
            return replicas[first]
        second = rng.randrange(len(replicas) - 1)
        second += second >= first
        one, other = replicas[first], replicas[second]
        return other if cost_s(other) < cost_s(one) else one
