"""What an engine model is told of the pool that it stands for."""

from concertmaster.core.fleet import Pool
from concertmaster.physics.batching import EngineSettings


def engine_settings(pool: Pool) -> EngineSettings:
    """Return a pool's settings as its engine models take them."""
    return EngineSettings(
        kv_blocks=pool.kv_blocks,
        max_batch_tokens=pool.max_batch_tokens,
        max_sequences=pool.max_sequences,
        block_tokens=pool.block_tokens,
        scheduling="priority" if pool.priority_scheduling else "fcfs",
        prefix_caching=pool.prefix_caching,
    )
