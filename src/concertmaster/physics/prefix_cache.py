"""KV blocks of one engine, and the prefix chunks that live in those that nobody holds.

A chunk is ``PREFIX_CHUNK_TOKENS`` leading prompt tokens, named by a chained hash. Sequences
that compute or hit it share one copy, counted by references. A chunk that nobody refers to
stays, idle, until its blocks are needed; the least recently released goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from concertmaster.core.request import PREFIX_CHUNK_TOKENS
from concertmaster.physics.batching import EngineSettings


class BlockPool:
    """Which blocks are held, and which chunks are cached?

    Attributes:
        held_blocks: Blocks of running sequences, shared chunks counted once.
        room_blocks: Blocks that can be taken, idle chunks evicted if need be.
        version: Changes whenever a call that did not fit might fit.
    """

    __slots__ = (
        "_chunk_blocks",
        "_idle",
        "_kv_blocks",
        "_references",
        "held_blocks",
        "room_blocks",
        "version",
    )

    def __init__(self, settings: EngineSettings) -> None:
        self._kv_blocks = settings.kv_blocks
        self._chunk_blocks = PREFIX_CHUNK_TOKENS // settings.block_tokens
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Free all blocks and forget all chunks."""
        self.held_blocks = 0
        self.room_blocks = self._kv_blocks
        self.version += 1
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def resize(self, kv_blocks: int) -> None:
        """Have so many blocks from now on; room is negative while more are held."""
        self.room_blocks += kv_blocks - self._kv_blocks
        self._kv_blocks = kv_blocks
        self.version += 1

    @property
    def cached_chunks(self) -> int:
        """Chunks that a call could hit, idle or not."""
        return len(self._references)

    def leading_hits(self, hashes: Sequence[int]) -> int:
        """Count the leading chunks that are here."""
        hits = 0
        for chunk in hashes:
            if chunk not in self._references:
                break
            hits += 1
        return hits

    def blocks_to_admit(self, blocks: int, hits: Sequence[int]) -> int:
        """Count the blocks of room that a sequence of ``blocks`` takes, given its hits.

        A hit that others hold costs nothing; an idle one leaves the room.
        """
        references = self._references
        shared = sum(1 for chunk in hits if references[chunk])
        return blocks - shared * self._chunk_blocks

    def take(self, blocks: int) -> None:
        """Hold ``blocks`` more; at most ``room_blocks``."""
        assert blocks <= self.room_blocks, "more blocks taken than there is room"
        self._hold(blocks)
        self.evict()

    def evict(self) -> None:
        """Drop idle chunks that have no room."""
        while self._idle and len(self._idle) * self._chunk_blocks > self.room_blocks:
            chunk, _ = self._idle.popitem(last=False)
            del self._references[chunk]

    def refer(self, chunks: Sequence[int]) -> None:
        """Hold cached chunks."""
        for chunk in chunks:
            if not self._references[chunk]:
                del self._idle[chunk]
                self._hold(self._chunk_blocks)
            self._references[chunk] += 1

    def share(self, chunk: int) -> bool:
        """Let others hit a chunk just computed; False if there is another copy of it.

        Its blocks are held already; they belong to the chunk from here on.
        """
        if chunk in self._references:
            return False
        self._references[chunk] = 1
        self.version += 1
        return True

    def release(self, own_blocks: int, chunks: Sequence[int]) -> None:
        """Give back a sequence's own blocks and its references, the tail to be evicted first."""
        self._hold(-own_blocks)
        for chunk in reversed(chunks):
            self._references[chunk] -= 1
            if not self._references[chunk]:
                self._idle[chunk] = None
                self._hold(-self._chunk_blocks)
        self.version += 1

    def _hold(self, blocks: int) -> None:
        self.held_blocks += blocks
        self.room_blocks -= blocks
