"""Histograms that cost the hot path an append."""

from bisect import bisect_left
from collections.abc import Iterable

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
MICRO = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1)


class Histogram:
    """Counts by bucket; observing costs an append, counting is done in bulk."""

    __slots__ = ("_bounds", "_counts", "_fresh", "observe", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._fresh: list[float] = []
        self.observe = self._fresh.append
        self.total = 0.0

    def fold(self) -> None:
        """Count what was observed since the last time; call it now and then."""
        for value in self._fresh:
            self._counts[bisect_left(self._bounds, value)] += 1
            self.total += value
        self._fresh.clear()

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts as Prometheus wants them."""
        self.fold()
        running, out = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            running += count
            out.append((bound, float(running)))
        return out
