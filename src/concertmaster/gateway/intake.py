"""A message becomes a call: its prompt, whose workflow it belongs to, what it allows."""

import itertools
from collections.abc import Container, Iterable, Mapping

from concertmaster.core.request import ModelName, Request, RequestId
from concertmaster.gateway import heads, openai_api
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Caller, Exchange
from concertmaster.gateway.identity import MAX_ID_CHARS, Identity, Normalizer, with_hints
from concertmaster.gateway.inference import WorkflowInference
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.openai_api import CallBody
from concertmaster.gateway.prompts import read_prompt


class Intake:
    """Reads what agents send, in whatever dialect they name their workflow.

    Args:
        chat_models: Models that ``auto`` may mean; empty for all.
        metrics: Told of every call.
    """

    def __init__(self, chat_models: tuple[ModelName, ...], metrics: GatewayMetrics) -> None:
        self._chat_models = chat_models
        self._metrics = metrics
        self._normalizer = Normalizer()
        self._inference = WorkflowInference()
        self._numbers = itertools.count(1)

    def open(
        self,
        now_s: float,
        caller: Caller,
        message: Message,
        call: CallBody,
        *,
        taken: Container[RequestId],
        reads_prompts: bool,
    ) -> tuple[Exchange, Identity]:
        """Return the call of a message, and who sent it.

        Args:
            now_s: The instant.
            caller: Who waits for the answer.
            message: What the engine is to be sent.
            call: What its body says.
            taken: Names of calls without an outcome.
            reads_prompts: Whether the predictor wants to see the prompt.

        Raises:
            CallerError: A header of ours, or the model, is wrong, or its tenant is at a limit.
        """
        headers = message.headers
        text = call.text()
        hashes = openai_api.prefix_hashes(text)
        quota = message.quota
        tenant = "" if quota is None else quota.tenant
        request_id = self.name(headers)
        while request_id in taken:
            request_id = self.name({})
        identity = self._normalizer.identify(headers, call) or self._inference.infer(
            text, request_id=request_id, tenant=tenant, now_s=now_s
        )
        identity = with_hints(headers, call, identity)
        models = call.models() or self._chat_models
        request = Request(
            request_id=RequestId(request_id),
            workflow_id=identity.workflow_id,
            arrival_s=now_s,
            prompt_tokens=openai_api.prompt_tokens(text),
            max_output_tokens=call.max_output_tokens(),
            models=models,
            role=identity.role,
            app=identity.app,
            template=identity.template,
            step=identity.step,
            stage=identity.stage,
            parents=identity.parents,
            service_class=identity.service_class,
            prefix_hashes=hashes,
            deadline_s=None if identity.deadline_s is None else now_s + identity.deadline_s,
            tenant=tenant,
            tenant_weight=1.0 if quota is None else quota.weight,
        )
        exchange = Exchange(
            request,
            caller,
            heads.engine_head(message, request_id),
            message.body,
            model_named=call.model if isinstance(call.model, str) else "",
            streams=bool(call.stream),
        )
        exchange.response_headers = heads.identity_headers(request_id, identity)
        if reads_prompts:
            exchange.prompt = read_prompt(call)
        if quota is not None:
            exchange.response_headers += quota.begin(request.prompt_tokens)
            exchange.quota = quota
        self._metrics.opened(exchange, message)
        return exchange, identity

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what a caller calls its message, else a name that is fresh."""
        given = headers.get(b"x-request-id", b"")[:MAX_ID_CHARS].decode("latin-1")
        return given or f"cm-{next(self._numbers)}"

    def note_tool_calls(self, tool_call_ids: Iterable[bytes], request: Request) -> None:
        """Remember which call tools were asked for by: their results come without a name."""
        self._inference.note_tool_calls(
            tool_call_ids,
            request.workflow_id,
            request.stage or 0,
            request_id=request.request_id,
            tenant=request.tenant,
        )
