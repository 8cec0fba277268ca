"""Promises of memory: KV blocks held for calls, and which prefixes a replica still has."""

from collections import OrderedDict
from collections.abc import Sequence

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId


class KvLedger:
    """KV blocks promised to the calls of one replica.

    A promise is made in tokens and kept in whole blocks, as engines allocate them. Prefix
    chunks that several calls in flight begin with are held once, as engines share them.
    Growth may pass the capacity: the engine then preempts, and the ledger shows it.

    Attributes:
        end_variance: Of what calls will hold at their ends, as far as anybody expects it.
    """

    def __init__(self, *, capacity_blocks: int, block_tokens: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.block_tokens = block_tokens
        self.reserved_blocks = 0
        self._chunk_blocks = PREFIX_CHUNK_TOKENS // block_tokens
        self._own_blocks: dict[RequestId, int] = {}
        self._prefixes: dict[RequestId, Sequence[int]] = {}
        self._holders: dict[int, int] = {}
        self._ends: dict[RequestId, tuple[int, int]] = {}
        self._end_tokens = 0
        self.end_variance = 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens.

        >>> KvLedger(capacity_blocks=10, block_tokens=16).blocks_for(17)
        2
        """
        return -(-tokens // self.block_tokens)

    def held_blocks(self, request_id: RequestId) -> int:
        """Blocks promised to a call, those of shared prefix chunks included; 0 if none are."""
        own = self._own_blocks.get(request_id, 0)
        return own + len(self._prefixes.get(request_id, ())) * self._chunk_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks not promised to anyone; 0 while growth has passed the capacity."""
        return max(0, self.capacity_blocks - self.reserved_blocks)

    @property
    def end_tokens(self) -> int:
        """Tokens that the calls with an expected end will hold then; what they share, once."""
        return self._end_tokens + len(self._holders) * PREFIX_CHUNK_TOKENS

    def shared_blocks(self, prefix_hashes: Sequence[int]) -> int:
        """Blocks of a prompt's leading chunks that calls in flight hold already.

        >>> ledger = KvLedger(capacity_blocks=100, block_tokens=16)
        >>> ledger.reserve(RequestId("r"), 600, prefix_hashes=(7, 8))
        >>> ledger.shared_blocks((7, 9)), ledger.reserved_blocks
        (16, 38)
        """
        shared = 0
        for prefix_hash in prefix_hashes:
            if prefix_hash not in self._holders:
                break
            shared += 1
        return shared * self._chunk_blocks

    def reserve(
        self, request_id: RequestId, tokens: int, prefix_hashes: Sequence[int] = ()
    ) -> None:
        """Promise room for a call that holds none yet.

        Args:
            request_id: The call.
            tokens: Its prompt and the answer to make room for.
            prefix_hashes: Leading chunks of its prompt, fewer tokens than the whole.
        """
        assert request_id not in self._own_blocks, f"{request_id} already holds a promise"
        own_blocks = self.blocks_for(tokens) - len(prefix_hashes) * self._chunk_blocks
        assert own_blocks > 0, f"{request_id} has a prefix longer than itself"
        self._own_blocks[request_id] = own_blocks
        self.reserved_blocks += own_blocks
        if prefix_hashes:
            self._prefixes[request_id] = prefix_hashes
            for prefix_hash in prefix_hashes:
                holders = self._holders.get(prefix_hash, 0)
                self._holders[prefix_hash] = holders + 1
                self.reserved_blocks += 0 if holders else self._chunk_blocks

    def expect(self, request_id: RequestId, tokens: int, variance: int) -> None:
        """Note what a call that holds a promise will hold at its end."""
        self._forget_end(request_id)
        own_tokens = tokens - len(self._prefixes.get(request_id, ())) * PREFIX_CHUNK_TOKENS
        self._ends[request_id] = (own_tokens, variance)
        self._end_tokens += own_tokens
        self.end_variance += variance

    def _forget_end(self, request_id: RequestId) -> None:
        tokens, variance = self._ends.pop(request_id, (0, 0))
        self._end_tokens -= tokens
        self.end_variance -= variance

    def grow(self, request_id: RequestId, tokens: int) -> None:
        """Raise a promise to at least ``tokens`` tokens, and its end with it."""
        chunks = len(self._prefixes.get(request_id, ()))
        if self._ends:
            self._put_off(request_id, tokens, chunks)
        more = self.blocks_for(tokens) - chunks * self._chunk_blocks - self._own_blocks[request_id]
        if more > 0:
            self._own_blocks[request_id] += more
            self.reserved_blocks += more

    def _put_off(self, request_id: RequestId, tokens: int, chunks: int) -> None:
        """Let a call that has outgrown its expected end be at its end now."""
        end = self._ends.get(request_id)
        if end is not None and end[0] < tokens - chunks * PREFIX_CHUNK_TOKENS:
            self.expect(request_id, tokens, end[1])

    def release(self, request_id: RequestId) -> None:
        """Take a promise back."""
        self._forget_end(request_id)
        self.reserved_blocks -= self._own_blocks.pop(request_id)
        for prefix_hash in self._prefixes.pop(request_id, ()):
            holders = self._holders.pop(prefix_hash) - 1
            if holders:
                self._holders[prefix_hash] = holders
            else:
                self.reserved_blocks -= self._chunk_blocks

    def validate(self) -> None:
        """Check that the total is the sum of its parts."""
        chunk_blocks = len(self._holders) * self._chunk_blocks
        total = sum(self._own_blocks.values()) + chunk_blocks
        assert self.reserved_blocks == total, "KV ledger does not add up"
        assert all(blocks > 0 for blocks in self._own_blocks.values()), "an empty KV promise"
        ends = self._ends.values()
        assert self._ends.keys() <= self._own_blocks.keys(), "an end without a promise"
        assert self._end_tokens == sum(tokens for tokens, _ in ends), "ends do not add up"
        assert self.end_variance == sum(variance for _, variance in ends), "variances do not"
        held = sum(len(hashes) for hashes in self._prefixes.values())
        assert sum(self._holders.values()) == held, "a shared chunk has lost a holder"


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

    def __len__(self) -> int:
        return len(self._chunks)

    def resize(self, capacity_chunks: int) -> None:
        """Change how many it can hold; the least recently used are forgotten."""
        self._capacity_chunks = capacity_chunks
        while len(self._chunks) > capacity_chunks:
            self._chunks.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the engine restarted or slept."""
        self._chunks.clear()
