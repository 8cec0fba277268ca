"""Memory of a node that several models share: an exact ledger of GPU memory and of RAM, in bytes.

A node here is the GPUs that one engine spans, and every model on it spans all of them, so bytes
are counted over the node rather than by GPU. What will be needed is entered before it is used:
a load reserves its bytes when it is asked for, so the ledger is never behind the hardware.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Holding(NamedTuple):
    """Bytes that one replica holds.

    Attributes:
        weights_bytes: Weights in GPU memory.
        resident_bytes: Else in GPU memory, KV apart: activations and the runtime while it
            runs, graphs and the runtime while it sleeps.
        kv_bytes: KV granted to it.
        host_bytes: Weights in RAM.
    """

    weights_bytes: int = 0
    resident_bytes: int = 0
    kv_bytes: int = 0
    host_bytes: int = 0

    @property
    def hbm_bytes(self) -> int:
        """All that it holds of the GPUs."""
        return self.weights_bytes + self.resident_bytes + self.kv_bytes


NOTHING = Holding()


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one replica takes on a node that it shares, over all GPUs.

    Attributes:
        weights_bytes: Its weights.
        runtime_bytes: Activations and the runtime while it runs.
        asleep_bytes: What a sleeping engine keeps on the GPUs.
        kv_block_bytes: One KV block.
        least_kv_blocks: KV that it runs with at the least.
    """

    weights_bytes: int
    runtime_bytes: int
    asleep_bytes: int
    kv_block_bytes: int
    least_kv_blocks: int

    def at(self, state: str, kv_blocks: int = 0) -> Holding:
        """Return what it holds in a state of readiness.

        >>> one = Footprint(weights_bytes=8, runtime_bytes=3, asleep_bytes=1, kv_block_bytes=2,
        ...                 least_kv_blocks=4)
        >>> one.at("running", 5).hbm_bytes, one.at("sleeping"), one.at("disk") == NOTHING
        (21, Holding(weights_bytes=0, resident_bytes=1, kv_bytes=0, host_bytes=8), True)
        """
        if state == "running":
            kv_bytes = kv_blocks * self.kv_block_bytes
            return Holding(self.weights_bytes, self.runtime_bytes, kv_bytes)
        if state == "sleeping":
            return Holding(resident_bytes=self.asleep_bytes, host_bytes=self.weights_bytes)
        return Holding(host_bytes=self.weights_bytes) if state == "host" else NOTHING


def both(one: Holding, other: Holding) -> Holding:
    """Return what covers a replica on its way from one holding to another."""
    return Holding(*map(max, one, other))


class NodeMemory:
    """Who holds what of one node.

    Args:
        hbm_bytes: What engines may use of all its GPUs.
        host_bytes: RAM for weights.
    """

    def __init__(self, *, hbm_bytes: int, host_bytes: int) -> None:
        self.hbm_bytes = hbm_bytes
        self.host_bytes = host_bytes
        self.free_hbm_bytes = hbm_bytes
        self.free_host_bytes = host_bytes
        self._held: dict[str, Holding] = {}

    def held(self, name: str) -> Holding:
        """Return what a replica holds."""
        return self._held.get(name, NOTHING)

    def lacks(self, name: str, holding: Holding) -> tuple[int, int]:
        """Bytes of GPU memory and of RAM to be freed before a replica could hold this instead."""
        held = self.held(name)
        hbm_bytes = holding.hbm_bytes - held.hbm_bytes - self.free_hbm_bytes
        host_bytes = holding.host_bytes - held.host_bytes - self.free_host_bytes
        return max(0, hbm_bytes), max(0, host_bytes)

    def fits(self, name: str, holding: Holding) -> bool:
        """Whether a replica could hold this instead of what it holds."""
        return self.lacks(name, holding) == (0, 0)

    def hold(self, name: str, holding: Holding) -> None:
        """Let a replica hold this instead; it must fit."""
        assert self.fits(name, holding), f"{name} would exceed the memory of its node"
        held = self.held(name)
        self.free_hbm_bytes += held.hbm_bytes - holding.hbm_bytes
        self.free_host_bytes += held.host_bytes - holding.host_bytes
        self._held[name] = holding

    def validate(self) -> None:
        """Check that the ledger adds up and nothing is exceeded."""
        held = self._held.values()
        assert all(part >= 0 for one in held for part in one), "a negative holding"
        hbm_bytes = sum(one.hbm_bytes for one in held)
        host_bytes = sum(one.host_bytes for one in held)
        assert self.free_hbm_bytes == self.hbm_bytes - hbm_bytes >= 0, "GPU memory is exceeded"
        assert self.free_host_bytes == self.host_bytes - host_bytes >= 0, "RAM is exceeded"
