"""Calls that take too long: to begin, between two pieces of their answer, or as a whole.

A sweep looks at all open calls now and then, which costs nothing while bytes flow: a
connection counts its reads, and a call is silent while that count stands still. A limit is
met late by two periods of the sweep at most: one until it is seen, one until it is missed.
"""

from collections.abc import Callable, Iterable

from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.limits import Limits

MOST_PERIOD_S = 0.5

GiveUp = Callable[[Exchange, str], None]


class Timeouts:
    """Finds the calls that are overdue.

    Args:
        limits: How long each phase may take.
        speedup: How much faster the clock of arrivals runs than the wall's.
        silent: Told of a call whose engine says nothing, and what was expected.
        too_long: Told of one that has taken too long as a whole.
    """

    def __init__(self, limits: Limits, *, speedup: float, silent: GiveUp, too_long: GiveUp) -> None:
        self._limits = limits
        self._total_s = limits.total_s * speedup
        self._silent = silent
        self._too_long = too_long
        shortest_s = min(limits.first_byte_s, limits.chunk_s, limits.total_s)
        self.period_s = min(MOST_PERIOD_S, shortest_s / 4)

    def sweep(self, wall_s: float, now_s: float, exchanges: Iterable[Exchange]) -> None:
        """Look at every open call.

        Args:
            wall_s: The instant on the wall's clock.
            now_s: The same on that of arrivals.
            exchanges: Calls without an outcome.
        """
        for exchange in list(exchanges):
            if exchange.over:
                continue
            if now_s - exchange.arrived_s > self._total_s:
                limit = f"the whole answer within {self._limits.total_s:g} s"
                self._too_long(exchange, f"expected {limit}")
            else:
                for attempt in (exchange, exchange.hedge):
                    if attempt is not None:
                        self._look(wall_s, attempt)

    def _look(self, wall_s: float, attempt: Exchange) -> None:
        if attempt.attempt and (expected := self._missing(wall_s, attempt)):
            self._silent(attempt, f"the engine was silent: expected {expected}")

    def _missing(self, wall_s: float, exchange: Exchange) -> str:
        """Say what should have come by now; empty if nothing should."""
        attempt, reads, since_s = exchange.mark
        begun = exchange.started or (not exchange.streams and exchange.reads > 0)
        moved = attempt != exchange.attempt or (begun and reads != exchange.reads)
        if moved or _waits_for_caller(exchange):
            exchange.mark = (exchange.attempt, exchange.reads, wall_s)
            return ""
        if begun:
            late = wall_s - since_s > self._limits.chunk_s
            return f"more within {self._limits.chunk_s:g} s" if late else ""
        late = exchange.streams and wall_s - since_s > self._limits.first_byte_s
        return f"a first byte within {self._limits.first_byte_s:g} s" if late else ""


def _waits_for_caller(exchange: Exchange) -> bool:
    return exchange.engine is not None and exchange.engine.paused
