"""Late calls and a second attempt beside the first: the rule, its budget, and what is late.

After Dean and Barroso, The Tail at Scale (CACM 56(2), 2013), "hedged requests": a second
attempt is sent once the first has been out for longer than a high quantile of what is
expected, which bounds the load that it adds. The budget on top is ours, as is asking whether
the second attempt would end first.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

from concertmaster.core.fleet import PoolId

BURST = 4.0
"""Hedges that a quiet fleet has in hand."""

MEMORY_CALLS, LEAST_CALLS = 128, 20
"""Latest calls that tell what is late, and how many must have been seen before they do."""

UNKNOWN_FACTOR = 2.0
"""How many times as long as expected is late until enough calls were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedging:
    """When a call may be sent to a second replica beside the first.

    Attributes:
        level: A call is late once it has taken longer than this share of calls does.
        share: Hedges that dispatches may cause, as a share of them.
        floor_s: No call is late before this, in seconds; above 0.
    """

    level: float = 0.95
    share: float = 0.05
    floor_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.share < 0 or self.floor_s <= 0:
            raise ValueError(f"hedging needs 0 < level < 1, share >= 0, floor_s > 0: {self}")


class Budget:
    """Hedges that dispatches have earned.

    >>> budget = Budget(0.5)
    >>> [budget.take() for _ in range(5)]
    [True, True, True, True, False]
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._level = BURST if share else 0.0

    def earn(self) -> None:
        """Count a dispatch."""
        self._level = min(BURST, self._level + self._share)

    @property
    def is_empty(self) -> bool:
        """Whether no hedge is left."""
        return self._level < 1

    def take(self) -> bool:
        """Spend a hedge; return whether there was one."""
        if self.is_empty:
            return False
        self._level -= 1
        return True


class Tail:
    """How many times as long as expected calls have taken to be heard of, lately.

    Rate curves say how long a prompt takes, and no forecast says by how much that may be
    wrong; the calls themselves do. So what is late follows from a quantile of these.

    Args:
        level: The quantile.
    """

    def __init__(self, level: float) -> None:
        self._level = level
        self._latest: deque[float] = deque()
        self._ranked: list[float] = []

    def note(self, ratio: float) -> None:
        """Take in that a call was heard of after so many times what was expected."""
        self._latest.append(ratio)
        insort(self._ranked, ratio)
        if len(self._latest) > MEMORY_CALLS:
            del self._ranked[bisect_left(self._ranked, self._latest.popleft())]

    @property
    def factor(self) -> float:
        """How many times as long as expected is late, at least 1.

        >>> tail = Tail(0.9)
        >>> for tenths in range(1, 41):
        ...     tail.note(tenths / 10)
        >>> tail.factor
        3.7
        """
        count = len(self._ranked)
        if count < LEAST_CALLS:
            return UNKNOWN_FACTOR
        return max(1.0, self._ranked[min(count - 1, int(self._level * count))])


class Tails:
    """The tail of each pool, for streams and for whole answers apart."""

    def __init__(self, level: float) -> None:
        self._level = level
        self._tails: dict[tuple[PoolId, bool], Tail] = {}

    def of(self, pool_id: PoolId, *, streams: bool) -> Tail:
        """Return the tail of a pool's streams, up to their first token, or of whole answers."""
        tail = self._tails.get((pool_id, streams))
        if tail is None:
            tail = self._tails[pool_id, streams] = Tail(self._level)
        return tail
