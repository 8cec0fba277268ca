"""The gateway's clock: as fast as asked for, and never backwards."""

import time
from collections.abc import Callable

Clock = Callable[[], float]


def scaled_clock(speedup: float) -> Clock:
    """Return a clock that runs ``speedup`` times as fast as the wall's."""
    started_s = time.monotonic()
    if speedup == 1.0:
        return lambda: time.monotonic() - started_s
    return lambda: (time.monotonic() - started_s) * speedup


def steady(clock: Clock) -> Clock:
    """Return a clock that goes on from where it stood when another jumps backwards.

    All timeouts, waits and pauses hang on one clock: stood it still until the jump is made up
    for, calls would wait for so long.

    >>> read = steady(iter([5.0, 7.0, 1.0, 2.5]).__next__)
    >>> [read(), read(), read(), read()]
    [5.0, 7.0, 7.0, 8.5]
    """
    behind_s, latest_s = 0.0, float("-inf")

    def read() -> float:
        nonlocal behind_s, latest_s
        told_s = clock()
        if told_s + behind_s < latest_s:
            behind_s = latest_s - told_s
        latest_s = told_s + behind_s
        return latest_s

    return read
