"""What arrives, as far as waiting calls must fear it: work that would go before them."""

from collections import deque

ARRIVALS = 128
"""Arrivals to remember."""

MOST_SHARE = 0.9
"""No wait is taken to be stretched by more than tenfold."""


class Traffic:
    """The latest arrivals: when, how urgent, how much work."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=ARRIVALS)

    def note(self, arrival_s: float, urgency_s: float, tokens: float) -> None:
        """Take in a call.

        Args:
            arrival_s: When it came.
            urgency_s: Its key without its age.
            tokens: Output tokens to expect of it.
        """
        self._latest.append((arrival_s, urgency_s, tokens))

    def stretch(self, now_s: float, lead_s: float, tokens_per_s: float) -> float:
        """Factor on a wait, at least 1, for calls that will arrive meanwhile and go first.

        Work that arrives at a share ``r`` of what is worked off leaves ``1 - r`` for those who
        wait, as in a priority queue.

        >>> traffic = Traffic()
        >>> for i in range(101):
        ...     traffic.note(float(i), 5.0, 50.0)
        >>> round(traffic.stretch(100.0, 6.0, 100.0), 2), traffic.stretch(100.0, 4.0, 100.0)
        (2.02, 1.0)

        Args:
            now_s: This instant.
            lead_s: Urgency below which a call that arrives at this instant goes first.
            tokens_per_s: What the fleet works off.
        """
        if not self._latest:
            return 1.0
        span_s = now_s - self._latest[0][0]
        if span_s <= 0.0:
            return 1.0
        sooner = sum(tokens for _, urgency_s, tokens in self._latest if urgency_s < lead_s)
        return 1.0 / (1.0 - min(MOST_SHARE, sooner / (span_s * tokens_per_s)))
