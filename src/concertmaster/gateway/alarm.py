"""One timer for all that the core wants to be woken for."""

import asyncio
from collections.abc import Callable


class Alarm:
    """Rings at the earliest of the instants that it was told.

    Args:
        ring: What to do then.
        speedup: How much faster the clock of these instants runs than the wall's.
    """

    def __init__(self, ring: Callable[[], None], *, speedup: float) -> None:
        self._ring = ring
        self._speedup = speedup
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0

    def set(self, now_s: float, due_s: float) -> None:
        """Ring at that instant, unless it rings before."""
        if self._timer is not None:
            if self._due_s <= due_s:
                return
            self._timer.cancel()
        self._due_s = due_s
        wait_s = max(0.0, due_s - now_s) / self._speedup
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._fire)

    def cancel(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self._timer = None
        self._ring()
