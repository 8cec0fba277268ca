"""What an engine takes of GPUs that it shares with others."""

import math

from concertmaster.core.hbm import Footprint
from concertmaster.physics.models import ModelCard
from concertmaster.physics.step_time import RESERVE_BYTES

ASLEEP_BYTES = 500_000_000
"""GPU memory that a sleeping engine keeps on each GPU: graphs, compiled kernels, the runtime.

Source: notes of Maestro's first author, about 0.5 GB.
"""

LEAST_KV_TOKENS = 4096
"""KV room that an engine runs with at the least."""


def footprint(card: ModelCard, tensor_parallel: int, block_tokens: int) -> Footprint:
    """Return what one replica takes over all its GPUs; past one KV head each, they hold copies."""
    copies = max(1, tensor_parallel // card.kv_heads)
    return Footprint(
        weights_bytes=card.weights_bytes,
        runtime_bytes=RESERVE_BYTES * tensor_parallel,
        asleep_bytes=ASLEEP_BYTES * tensor_parallel,
        kv_block_bytes=math.ceil(block_tokens * card.kv_bytes_per_token) * copies,
        least_kv_blocks=-(-LEAST_KV_TOKENS // block_tokens),
    )


def most_kv_blocks(one: Footprint, hbm_bytes: int) -> int:
    """KV blocks that a replica could have if nothing else lay on its node; below 1 if none."""
    free_bytes = hbm_bytes - one.weights_bytes - one.runtime_bytes
    return free_bytes // one.kv_block_bytes
