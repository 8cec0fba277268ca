"""A message becomes a call: its prompt, whose workflow it belongs to, what it allows."""

from collections.abc import Container, Iterable, Mapping

from concertmaster.core.request import ModelName, Request, RequestId
from concertmaster.gateway import heads
from concertmaster.gateway.exchange import Exchange, Relay
from concertmaster.gateway.identity import Identity, Normalizer
from concertmaster.gateway.inference import WorkflowInference
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.naming import Names
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
        self._names = Names()

    def open(
        self,
        now_s: float,
        opened: Opened,
        relay: Relay | None = None,
    ) -> tuple[Exchange, Identity]:
        """Return the call of a message, and who sent it.

        Args:
            now_s: The instant.
            opened: The message, as it was read.
            relay: The process that moves its bytes; ``None`` for this one.

        Raises:
            QuotaError: Its tenant is at a limit.
        """
        caller, message, reading, _ = opened
        request_id = self.name(message.headers)
        while request_id in self._taken:
            request_id = self._names.fresh()
        identity = self._identity(now_s, request_id, opened)
        request = self._request(now_s, request_id, identity, opened)
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

    def _identity(self, now_s: float, request_id: str, opened: Opened) -> Identity:
        told, quota = opened.reading.identity, opened.message.quota
        if told.workflow_id:
            return self._normalizer.rooted(told)
        tenant = "" if quota is None else quota.tenant
        trail = opened.trail()
        found = self._inference.follow(trail, request_id=request_id, tenant=tenant, now_s=now_s)
        return _inferred(told, found)

    def _request(
        self, now_s: float, request_id: str, identity: Identity, opened: Opened
    ) -> Request:
        reading, quota = opened.reading, opened.message.quota
        return Request(
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
            tenant="" if quota is None else quota.tenant,
            tenant_weight=1.0 if quota is None else quota.weight,
            streams=reading.streams,
        )

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what a caller calls its message, else a name that is fresh."""
        return self._names.name(headers)

    def note_tool_calls(self, tool_call_ids: Iterable[bytes], request: Request) -> None:
        """Remember which call tools were asked for by: their results come without a name."""
        self._inference.note_tool_calls(
            tool_call_ids,
            request.workflow_id,
            request.stage or 0,
            request_id=request.request_id,
            tenant=request.tenant,
        )


def _inferred(told: Identity, found: Identity) -> Identity:
    """Place a call by inference, as far as its caller did not."""
    return told._replace(
        workflow_id=found.workflow_id,
        stage=found.stage if told.stage is None else told.stage,
        parents=told.parents or found.parents,
        confidence=found.confidence,
        dialect=found.dialect,
    )
