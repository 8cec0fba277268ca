"""A message becomes a call: its prompt, whose workflow it belongs to, what it allows."""

import itertools
from collections.abc import Callable, Container, Iterable

from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.gateway import heads
from concertmaster.gateway.exchange import Exchange, Relay
from concertmaster.gateway.identity import Identity, Normalizer
from concertmaster.gateway.inference import Trail, WorkflowInference
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.reading import Opened


class Intake:
    """Reads what agents send, in whatever dialect they name their workflow.

    Args:
        chat_models: Models that ``auto`` may mean; empty for all.
        metrics: Told of every call.
        taken: Names of calls without an outcome.
    """

    def __init__(
        self,
        chat_models: tuple[ModelName, ...],
        metrics: GatewayMetrics,
        taken: Container[RequestId],
    ) -> None:
        self._taken = taken
        self._chat_models = chat_models
        self._metrics = metrics
        self._normalizer = Normalizer()
        self._inference = WorkflowInference()
        self._numbers = itertools.count(1)

    def open(
        self,
        now_s: float,
        opened: Opened,
        trail: Callable[[], Trail],
        relay: Relay | None = None,
    ) -> tuple[Exchange, Identity]:
        """Return the call of a message, and who sent it.

        Args:
            now_s: The instant.
            opened: The message, as it was read.
            trail: Makes what is told of its prompt, where it names no workflow.
            relay: The process that moves its bytes; ``None`` for this one.

        Raises:
            QuotaError: Its tenant is at a limit.
        """
        caller, message, reading, _ = opened
        identity = self._identity(reading.identity, trail)
        request_id = message.headers.get(b"x-request-id", b"").decode("latin-1")
        while not request_id or request_id in self._taken:
            request_id = f"cm-{next(self._numbers)}"
        request = Request(
            request_id=RequestId(request_id),
            workflow_id=identity.workflow_id,
            arrival_s=now_s,
            prompt_tokens=reading.prompt_tokens,
            max_output_tokens=reading.max_output_tokens,
            models=reading.models or self._chat_models,
            role=identity.role,
            app=identity.app,
            template=identity.template,
            step=identity.step,
            stage=identity.stage,
            parents=identity.parents,
            service_class=identity.service_class,
            prefix_hashes=reading.prefix_hashes,
            deadline_s=None if identity.deadline_s is None else now_s + identity.deadline_s,
        )
        exchange = Exchange(
            request,
            caller,
            b"" if relay is not None else heads.engine_head(message, request_id),
            message.body,
            model_named=reading.model_named,
            streams=reading.streams,
        )
        exchange.relay, exchange.prompt, exchange.teaches = relay, reading.prompt, reading.teaches
        exchange.may_hold = reading.streams and message.takes_chunks
        exchange.response_headers = heads.identity_headers(request_id, identity)
        if message.quota is not None:
            exchange.response_headers += message.quota.begin(request.prompt_tokens)
            exchange.quota = message.quota
        self._metrics.opened(exchange, message)
        return exchange, identity

    def _identity(self, told: Identity, trail: Callable[[], Trail]) -> Identity:
        if told.workflow_id:
            return self._normalizer.rooted(told)
        inferred = self._inference.follow(trail())
        return told._replace(
            workflow_id=inferred.workflow_id,
            stage=inferred.stage if told.stage is None else told.stage,
            confidence=inferred.confidence,
            dialect=inferred.dialect,
        )

    def note_tool_calls(
        self, tool_call_ids: Iterable[bytes], workflow_id: WorkflowId, stage: int
    ) -> None:
        """Remember which workflow tools were asked for by: their results come without a name."""
        self._inference.note_tool_calls(tool_call_ids, workflow_id, stage)
