"""Another attempt: before the first byte only, under a budget, and not at once."""

import random

BURST = 20.0
"""Retries that a quiet gateway has in hand."""

BACKOFF_S = 0.05
MOST_BACKOFF_S = 1.0


class RetryBudget:
    """Retries that calls have earned: engines that fail are not met with several times the load.

    Args:
        ratio: What each call adds, in retries.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self.spent = 0
        self._level = BURST if ratio else 0.0

    def earn(self) -> None:
        """Count a call."""
        self._level = min(BURST, self._level + self._ratio)

    def take(self) -> bool:
        """Spend a retry; return whether there was one."""
        if self._level < 1:
            return False
        self._level -= 1
        self.spent += 1
        return True


def backoff_s(attempt: int, rng: random.Random) -> float:
    """Wall seconds before the attempt after this one: full jitter, twice as long each time."""
    return rng.uniform(0, min(MOST_BACKOFF_S, BACKOFF_S * 2**attempt))
