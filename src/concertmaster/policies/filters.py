"""Filters: may this replica serve this call at all?"""

from collections.abc import Iterable
from dataclasses import dataclass

from concertmaster.core.fleet import Pool, Replica
from concertmaster.core.queue import Waiting


@dataclass(frozen=True, slots=True)
class FitsKvCache:
    """Refuse a replica whose free KV does not hold the prompt and a long answer.

    An idle replica is never refused: what does not fit there fits nowhere, and the engine
    will preempt or cut it.
    """

    name: str = "fits_kv_cache"

    def keep(self, call: Waiting, pool: Pool, replicas: Iterable[Replica]) -> list[Replica]:
        """Compare blocks with blocks."""
        blocks = -(-call.kv_tokens(pool.model.name) // pool.block_tokens)
        most_reserved = pool.kv_blocks - blocks
        return [r for r in replicas if r.kv.reserved_blocks <= most_reserved or not r.in_flight]
