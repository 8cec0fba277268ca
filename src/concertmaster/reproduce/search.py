"""The highest rate at which a fleet still does what was promised, by bisection."""

from collections.abc import Callable

MOST_STEPS = 16
"""Steps away from the start after which a search gives up."""


def highest(
    meets: Callable[[float], bool], *, start: float, step: float = 1.4, tolerance: float = 0.03
) -> float:
    """Return the highest rate that meets a condition, to a share of ``tolerance``.

    The condition is taken to hold below some rate and to fail above it.

    Args:
        meets: Tries one rate.
        start: First rate to try, above 0.
        step: Factor between rates until one side of the limit and the other are found.
        tolerance: Largest share by which a rate that fails may lie above the result.

    >>> 0.97 <= highest(lambda rate: rate <= 1.0, start=0.3) <= 1.0
    True
    """
    low, high = _bracket(meets, start, step)
    while high > low * (1 + tolerance):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def _bracket(meets: Callable[[float], bool], start: float, step: float) -> tuple[float, float]:
    """Find a rate that meets the condition and one a step higher that does not."""
    upwards = meets(start)
    rate = start
    for _ in range(MOST_STEPS):
        other = rate * step if upwards else rate / step
        if meets(other) != upwards:
            return (rate, other) if upwards else (other, rate)
        rate = other
    return rate, rate
