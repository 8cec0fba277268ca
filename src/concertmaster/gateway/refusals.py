"""Answers of the gateway itself: to calls that are refused, that break, or that come too late."""

from collections.abc import Callable

from concertmaster.core.errors import CallerError
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import openai_api, stream
from concertmaster.gateway.exchange import Caller, Exchange
from concertmaster.gateway.holding import Holding
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.shedding import Shedding

End = Callable[[Exchange, int], None]


class Refusals:
    """Writes errors in the form in which each caller can read them.

    Args:
        scheduler: Knows the models.
        holding: Knows when a model that does not run will.
        metrics: Told of every refusal.
        clock: Seconds that never go back.
        end: Ends an exchange with a status.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        holding: Holding,
        metrics: GatewayMetrics,
        *,
        clock: Callable[[], float],
        end: End,
    ) -> None:
        self._scheduler = scheduler
        self._holding = holding
        self._metrics = metrics
        self._clock = clock
        self._end = end

    def refuse(
        self,
        exchange: Exchange,
        reason: openai_api.Reason,
        retry_after_s: float | None = None,
    ) -> None:
        """Answer with an error, or cut an answer that had begun."""
        self._metrics.refused(reason)
        exchange.reason = reason
        if exchange.started:
            self._cut(exchange)
            return
        detail = f": {exchange.error_text}" if exchange.error_text else ""
        if reason == "model_not_found":
            known = sorted({pool.model.name for pool in self._scheduler.pools.values()})
            asked = ", ".join(exchange.request.models)
            detail = f': expected one of {", ".join(known)} or "auto", found "{asked}"'
        elif reason in ("waited_too_long", "no_replica"):
            prospect = self._holding.prospect(self._clock(), exchange.request)
            retry_after_s = prospect.retry_after_s or retry_after_s
            detail = prospect.why or detail
        refusal = openai_api.refusal(
            reason, detail=detail, retry_after_s=retry_after_s, tried=exchange.attempt > 1
        )
        self._answer(exchange, refusal, retry_after_s)

    def refuse_unread(self, caller: Caller, name: str, *, draining: bool, guard: Shedding) -> None:
        """Answer a call that is not even read: the gateway ends, or has too many of them."""
        if draining:
            reply(caller, name, openai_api.shut_down())
            return
        self._metrics.refused("saturated")
        retry_after_s = guard.retry_after_s()
        refusal = openai_api.refusal("saturated", detail="", retry_after_s=retry_after_s)
        self._metrics.answered(refusal[0], 0.0)
        reply(caller, name, refusal)

    def turn_away(self, exchange: Exchange) -> None:
        """Tell a caller that the gateway ends, or cut an answer that had begun."""
        if exchange.started:
            self._cut(exchange)
        else:
            self._answer(exchange, openai_api.shut_down(), openai_api.SHUT_DOWN_RETRY_S)

    def _cut(self, exchange: Exchange) -> None:
        self._end(exchange, 502)
        exchange.caller.abort()

    def _answer(
        self, exchange: Exchange, refusal: openai_api.Refusal, retry_after_s: float | None
    ) -> None:
        """Send an error: as an event where the stream has begun, which ends it."""
        status, body, _ = refusal
        self._end(exchange, status)
        if exchange.held:
            event = stream.error_event(body, retry_after_s=retry_after_s)
            exchange.caller.write(stream.chunk(event) + stream.END)
        else:
            reply(exchange.caller, exchange.request.request_id, refusal)
            return
        exchange.caller.finished(keep_alive=True)


def tell_mistake(
    caller: Caller, error: CallerError, name: str, count: Callable[[int, float], None]
) -> None:
    """Answer a call that cannot be taken because of how it was made."""
    status, body = openai_api.caller_error(error)
    count(status, 0.0)
    reply(caller, name, (status, body, list(error.headers)))


def reply(
    caller: Caller, name: str, refusal: openai_api.Refusal, *, keep_alive: bool = True
) -> None:
    """Send a whole error under the name of its request."""
    status, body, headers = refusal
    named = [*headers, (b"x-request-id", name.encode("latin-1"))]
    caller.write(openai_api.response(status, body, named, close=not keep_alive))
    caller.finished(keep_alive=keep_alive)
