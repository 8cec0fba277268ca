"""Reading a message of an agent as a call: what is asked, and by which workflow."""

import itertools
from collections.abc import Container
from typing import NamedTuple

from concertmaster.core.request import Request, RequestId
from concertmaster.gateway import heads, openai_api
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.identity import Normalizer, with_hints
from concertmaster.gateway.inference import WorkflowInference
from concertmaster.gateway.prompts import read_prompt


class Received(NamedTuple):
    """A call that was read, and whether its workflow ends with it."""

    exchange: Exchange
    is_final: bool


class Reception:
    """Makes an exchange of a message, and remembers what tells workflows apart.

    Args:
        reads_prompts: Whether prompts are kept for the predictor.
    """

    def __init__(self, *, reads_prompts: bool) -> None:
        self._reads_prompts = reads_prompts
        self._normalizer = Normalizer()
        self._inference = WorkflowInference()
        self._numbers = itertools.count(1)

    def read(
        self,
        now_s: float,
        agent: AgentConnection,
        message: Message,
        *,
        chat: bool,
        taken: Container[RequestId],
    ) -> Received:
        """Read a call.

        Args:
            now_s: When it came.
            agent: Who asks.
            message: What was sent.
            chat: Whether it is a chat call or a text one.
            taken: Ids of calls that are open; a call gets another one.

        Raises:
            CallerError: It cannot be served as it is.
        """
        headers = message.headers
        call = openai_api.parse_call(message.body, chat=chat)
        text = call.text()
        hashes = openai_api.prefix_hashes(text)
        identity = self._normalizer.identify(headers, call) or self._inference.infer(text)
        identity = with_hints(headers, call, identity)
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        while not request_id or request_id in taken:
            request_id = f"cm-{next(self._numbers)}"
        models = call.models()
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
        )
        exchange = Exchange(
            request,
            agent,
            heads.engine_head(message, request_id),
            message.body,
            model_named=models[0] if len(models) == 1 else "",
            streams=bool(call.stream),
        )
        exchange.response_headers = heads.identity_headers(request_id, identity)
        exchange.may_hold = exchange.streams and message.takes_chunks
        if self._reads_prompts:
            exchange.prompt = read_prompt(call)
        return Received(exchange, identity.is_final)

    def note_tool_calls(self, exchange: Exchange) -> None:
        """Take in that an answer asked for tools; a later call may answer them."""
        request = exchange.request
        self._inference.note_tool_calls(
            exchange.tool_call_ids, request.workflow_id, request.stage or 0
        )
