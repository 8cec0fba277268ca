"""Events of note, for the log: engines that come and go, refusals in sums, calls if wanted."""

import asyncio
import logging
from collections import Counter

from concertmaster.core.actions import Action
from concertmaster.core.events import Event, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.tally import outcome_of

REFUSALS_S = 10.0
"""Between two lines that sum refusals up."""

_ID_CHARS = 128
_log = logging.getLogger(__name__)


class Journal:
    """A witness that writes one line an event.

    Args:
        calls: Whether each call gets a line.
    """

    def __init__(self, *, calls: bool = False) -> None:
        self._calls = calls
        self._serves = False
        self._down: dict[ReplicaId, None] = {}

    def opened(self, exchange: Exchange, message: Message) -> None:
        """Wait until it is over."""

    def noticed(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Tell of engines that are lost, and that are back."""
        if isinstance(event, ReplicaDied):
            if event.replica_id not in self._down:
                self._down[event.replica_id] = None
                _say(logging.WARNING, "engine_down", replica=event.replica_id)
        elif isinstance(event, ReplicaReady):
            self._down.pop(event.replica_id, None)
            _say(logging.INFO, "engine_up", replica=event.replica_id)

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """Tell of a call."""
        if self._calls:
            _say(
                logging.INFO,
                "call",
                request=exchange.request.request_id[:_ID_CHARS],
                status=exchange.status,
                outcome=outcome_of(exchange),
                reason=exchange.reason,
                replica=exchange.replica_id,
                output_tokens=exchange.tokens,
                duration_s=round(now_s - exchange.arrived_s, 6),
            )

    def started(self, host: str, port: int, policy: str, replicas: int) -> None:
        """Tell that calls are taken from now on."""
        self._serves = True
        _say(logging.INFO, "started", host=host, port=port, policy=policy, replicas=replicas)

    def stopped(self, answered: int) -> None:
        """Tell that no call is taken any more, if any ever was."""
        if self._serves:
            _say(logging.INFO, "stopped", answered=answered)

    async def sum_up(self, metrics: GatewayMetrics) -> None:
        """Tell of refusals since the last time, for ever."""
        before: Counter[str] = Counter(metrics.refusals)
        while True:
            await asyncio.sleep(REFUSALS_S)
            before = self.tell_refusals(before, metrics.refusals)

    def tell_refusals(self, before: Counter[str], after: Counter[str]) -> Counter[str]:
        """Tell of what came on top, if anything; return the counts."""
        fresh = after - before
        if fresh:
            _say(logging.WARNING, "refusals", refused=fresh.total(), reasons=dict(fresh))
        return Counter(after)


def _say(level: int, event: str, **facts: object) -> None:
    said = " ".join(f"{name}={value}" for name, value in facts.items())
    _log.log(level, "%s %s", event, said, extra={"event": event, **facts})
