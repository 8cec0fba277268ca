"""Promises of memory: KV blocks held for calls, and which prefixes a replica still has."""

from collections import OrderedDict
from collections.abc import Sequence

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId


class KvLedger:
    """KV blocks promised to the calls of one replica.

    A promise is made in tokens and kept in whole blocks, as engines allocate them.
    Growth may pass the capacity: the engine then preempts, and the ledger shows it.
    """

    def __init__(self, *, capacity_blocks: int, block_tokens: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.block_tokens = block_tokens
        self.reserved_blocks = 0
        self._held: dict[RequestId, int] = {}

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens.

        >>> KvLedger(capacity_blocks=10, block_tokens=16).blocks_for(17)
        2
        """
        return -(-tokens // self.block_tokens)

    @property
    def free_blocks(self) -> int:
        """Blocks not promised to anyone; 0 while growth has passed the capacity."""
        return max(0, self.capacity_blocks - self.reserved_blocks)

    def reserve(self, request_id: RequestId, tokens: int) -> None:
        """Promise room for a call that holds none yet."""
        assert request_id not in self._held, f"{request_id} already holds a promise"
        blocks = self.blocks_for(tokens)
        self._held[request_id] = blocks
        self.reserved_blocks += blocks

    def grow(self, request_id: RequestId, tokens: int) -> None:
        """Raise a promise to at least ``tokens`` tokens."""
        more = self.blocks_for(tokens) - self._held[request_id]
        if more > 0:
            self._held[request_id] += more
            self.reserved_blocks += more

    def release(self, request_id: RequestId) -> None:
        """Take a promise back."""
        self.reserved_blocks -= self._held.pop(request_id)

    def validate(self) -> None:
        """Check that the total is the sum of its parts."""
        assert self.reserved_blocks == sum(self._held.values()), "KV ledger does not add up"
        assert all(blocks > 0 for blocks in self._held.values()), "an empty KV promise"


class PrefixIndex:
    """Which prefix chunks a replica has likely kept, least recently used forgotten first."""

    def __init__(self, *, capacity_chunks: int) -> None:
        self._capacity_chunks = capacity_chunks
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def hit_tokens(self, prefix_hashes: Sequence[int]) -> int:
        """Leading tokens of a prompt that need no prefill here."""
        chunks = self._chunks
        hits = 0
        for prefix_hash in prefix_hashes:
            if prefix_hash not in chunks:
                break
            hits += 1
        return hits * PREFIX_CHUNK_TOKENS

    def touch(self, prefix_hashes: Sequence[int]) -> None:
        """Note that these chunks were just computed or read."""
        if not prefix_hashes:
            return
        chunks = self._chunks
        for prefix_hash in reversed(prefix_hashes):  # a chunk outlives those that build on it
            chunks[prefix_hash] = None
            chunks.move_to_end(prefix_hash)
        while len(chunks) > self._capacity_chunks:
            chunks.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the engine restarted or slept."""
        self._chunks.clear()
