"""Which share of its time a replica spends on prefill, lately."""

import math

PREFILL_MEMORY_S = 30.0
"""Prefill of so long ago counts for a third."""


class PrefillShare:
    """Seconds of prefill that were handed over, forgotten by and by.

    Attributes:
        latest_ratio: The share as of the latest call; above 1 if the replica fell behind.
    """

    __slots__ = ("_since_s", "latest_ratio")

    def __init__(self) -> None:
        self.latest_ratio = self._since_s = 0.0

    def add(self, now_s: float, seconds: float) -> None:
        """Take in prefill of so many seconds."""
        self.latest_ratio = self.ratio(now_s) + seconds / PREFILL_MEMORY_S
        self._since_s = now_s

    def ratio(self, now_s: float) -> float:
        """Share of the time that prefill takes now; calls that decode stand still for it."""
        return self.latest_ratio * math.exp((self._since_s - now_s) / PREFILL_MEMORY_S)
