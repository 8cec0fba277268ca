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
        """Compare blocks with blocks; a prefix that calls in flight hold there is free."""
        blocks = -(-call.kv_tokens(pool.model.name) // pool.block_tokens)
        room = pool.kv_blocks - blocks
        hashes = pool.cacheable(call.request)
        if not hashes:
            return [r for r in replicas if r.kv.reserved_blocks <= room or not r.in_flight]
        return [
            r
            for r in replicas
            if not r.in_flight or r.kv.reserved_blocks <= room + r.kv.shared_blocks(hashes)
        ]
