"""One call on its way through the gateway."""

from collections.abc import Iterable
from typing import Protocol

from concertmaster.core.actions import Dispatch
from concertmaster.core.events import TokensStreamed
from concertmaster.core.fleet import Replica
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request
from concertmaster.gateway.quotas import Quota
from concertmaster.predictors.interface import NO_PROMPT, Prompt


class Caller(Protocol):
    """The side of an exchange that asked."""

    def write(self, data: bytes) -> None:
        """Send bytes on, as they are."""

    def finished(self, *, keep_alive: bool) -> None:
        """Note that the answer is complete."""

    def abort(self) -> None:
        """Cut the connection: the answer broke and must not look finished."""


class Relay(Protocol):
    """Another process, which moves the bytes of a call."""

    def send(self, exchange: "Exchange", action: Dispatch, replica: Replica) -> None:
        """Begin an attempt."""


class Exchange:
    """A call, who asked, what to send, and how far its answer has come.

    Attributes:
        head: Request head for the engine, without content-length and model.
        attempt: Current attempt, as the core counts; 0 before the first dispatch.
        tokens: Output tokens seen in the stream of this attempt.
        reads: How often its engines were heard, and ``mark`` what a sweep last saw of it: the
            attempt, its reads, and since when.
        number: Its number where several processes speak of it.
        relay: The process that moves its bytes; ``None`` for this one.
        quota: The account of its tenant, which its end is told to.
        prompt: What the predictor may read of it, until it has learnt what came of the call.
        forecast: What was predicted of it.
        started: True once the caller has been sent any byte of an answer.
        held: True once the caller of a stream was sent its head and comments while it waits.
        hedge: A second attempt beside this one, as an exchange of its own; it has no outcome.
        lead: What it is an attempt of, if it is such a one.
        spoken_s: When it was last told anything while it waits.
        may_hold: Whether its caller can be sent comments.
        error_text: What the last engine that refused it said.
        reason: Why it was refused, or broke; "" unless it did.
        teaches: Whether there is anything to forecast of its answer, or to learn from it.
        tool_call_ids: Tool calls that the answer asks for; a later call may answer them.
    """

    __slots__ = (
        "arrived_s",
        "attempt",
        "body",
        "caller",
        "dispatched_s",
        "engine",
        "error_text",
        "first_token_s",
        "forecast",
        "head",
        "hedge",
        "held",
        "lead",
        "mark",
        "may_hold",
        "model_named",
        "number",
        "over",
        "prompt",
        "quota",
        "reads",
        "reason",
        "relay",
        "replica_id",
        "request",
        "response_headers",
        "spoken_s",
        "started",
        "status",
        "streams",
        "teaches",
        "tokens",
        "told_tokens",
        "tool_call_ids",
    )

    def __init__(
        self,
        request: Request,
        caller: Caller,
        head: bytes,
        body: bytes,
        *,
        model_named: str,
        streams: bool,
    ) -> None:
        self.request = request
        self.caller = caller
        self.head = head
        self.body = body
        self.model_named = model_named
        self.streams = streams
        self.prompt: Prompt = NO_PROMPT
        self.number = 0
        self.relay: Relay | None = None
        self.quota: Quota | None = None
        self.forecast: Forecast = NO_FORECAST
        self.arrived_s = request.arrival_s
        self.dispatched_s: float | None = None
        self.first_token_s: float | None = None
        self.attempt = 0
        self.replica_id = ""
        self.engine: EngineSide | None = None
        self.response_headers = b""
        self.tokens = 0
        self.told_tokens = 0
        self.reads = 0
        self.mark = (0, 0, 0.0)
        self.started = False
        self.hedge: Exchange | None = None
        self.lead: Exchange | None = None
        self.held = False
        self.may_hold = False
        self.teaches = True
        self.spoken_s = 0.0
        self.over = False
        self.status = 0
        self.error_text = ""
        self.reason = ""
        self.tool_call_ids: list[bytes] = []

    # Attempts beside each other

    @property
    def call(self) -> "Exchange":
        """The exchange that has the outcome: this one, or the one that it is an attempt of."""
        return self.lead or self

    def beside(self) -> "Exchange":
        """Return a second attempt, of which the caller hears nothing unless it is first."""
        other = Exchange(
            self.request,
            self.caller,
            self.head,
            self.body,
            model_named=self.model_named,
            streams=self.streams,
        )
        other.arrived_s, other.lead, other.relay = self.arrived_s, self, self.relay
        self.hedge = other
        return other

    def at(self, attempt: int) -> "Exchange | None":
        """Return what is at an attempt: the call, or the one beside it; ``None`` if neither is."""
        if self.hedge is not None and self.hedge.attempt == attempt:
            return self.hedge
        return self if self.attempt == attempt else None

    def first(self) -> "Exchange":
        """Let this attempt answer, and drop the one that it overtakes; return the call's own."""
        call = self.lead
        if call is None:
            return self
        if call.engine is not None:
            call.engine.cancel()
        call.hedge = None
        call.attempt, call.replica_id, call.engine = self.attempt, self.replica_id, self.engine
        call.status, call.reads, call.mark = self.status, self.reads, self.mark
        call.tokens = call.told_tokens = 0
        self.over = True
        return call

    def lose(self, attempt: int) -> bool:
        """Stop one of two attempts, and return whether the other goes on; one alone stays.

        Where the first is lost the call takes on the number of the second, which stands for both.
        """
        hedge = self.hedge
        if hedge is None:
            return False
        if hedge.attempt == attempt:
            self.drop_hedge()
            return self.attempt != attempt
        if self.engine is not None:
            self.engine.cancel()
            self.engine = None
        self.attempt, self.replica_id = hedge.attempt, hedge.replica_id
        return True

    def drop_hedge(self) -> None:
        """Stop a second attempt, wherever it is."""
        hedge, self.hedge = self.hedge, None
        if hedge is not None:
            hedge.over = True
            if hedge.engine is not None:
                hedge.engine.cancel()


class EngineSide(Protocol):
    """The connection that an exchange is on."""

    def cancel(self) -> None:
        """Drop the connection, so that the engine stops working for nobody."""

    def give_up(self, problem: str) -> None:
        """Drop it too, and end the attempt: where an answer has begun, with an error."""

    @property
    def paused(self) -> bool:
        """Whether it is the caller who is waited for."""

    def pause(self) -> None:
        """Stop reading: the caller is slow."""

    def resume(self) -> None:
        """Read on."""


def progress(exchanges: Iterable[Exchange]) -> TokensStreamed | None:
    """Return what the core is to be told of streams that have gone on since the last time."""
    told = []
    for exchange in exchanges:
        if exchange.tokens > exchange.told_tokens:
            exchange.told_tokens = exchange.tokens
            told.append((exchange.request.request_id, exchange.attempt, exchange.tokens))
    return TokensStreamed(tuple(told)) if told else None
