"""What the gateway can be asked over HTTP: every operation, with the types it reads and writes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from concertmaster.gateway import answer_types as answers
from concertmaster.gateway.apis.anthropic_request import MessagesBody
from concertmaster.gateway.apis.embeddings import EmbeddingsBody
from concertmaster.gateway.apis.responses_request import ResponseBody
from concertmaster.gateway.openai_api import CallBody

OPENAPI = "/openapi.json"
ANY_JSON = dict[str, Any]
TEXT, HTML, EVENTS = "text/plain", "text/html", "text/event-stream"


class Operation(NamedTuple):
    """One method of one path.

    Attributes:
        tag: Whom it is for.
        summary: What it does.
        answer: Type of the JSON that answers it; a media type where it is none, ``None`` where
            there is nothing.
        body: Type of the body that it takes.
        errors: Statuses of errors beside those that any request may get.
        streams: Whether the answer may be a stream.
    """

    tag: str
    summary: str
    answer: Any
    body: Any = None
    errors: tuple[int, ...] = ()
    streams: bool = False


class ChatCall(CallBody):
    """A chat; what is not listed goes on to the engine as it came."""


class TextCall(CallBody):
    """A text to complete; what is not listed goes on to the engine as it came."""


SCHEDULED = (404, 429, 502, 503, 504)
"""Errors of whatever goes to an engine."""


def _call(summary: str, body: object, *, streams: bool = True) -> dict[str, Operation]:
    return {"post": Operation("calls", summary, ANY_JSON, body, SCHEDULED, streams)}


def _get(tag: str, summary: str, answer: object, *errors: int) -> dict[str, Operation]:
    return {"get": Operation(tag, summary, answer, errors=errors)}


def _post(tag: str, summary: str, answer: object, *errors: int) -> dict[str, Operation]:
    return {"post": Operation(tag, summary, answer, errors=errors)}


_KEPT = "/v1/responses/{response_id}"
_GRADE = "/v1/workflows/{workflow_id}/grade"
_LIVE = ("/livez", "/health/live", "/liveness", "/healthz", "/health")
_READY = ("/readyz", "/health/ready", "/readiness")

OPERATIONS: Mapping[str, Mapping[str, Operation]] = {
    "/v1/chat/completions": _call("Chat, in OpenAI's words", ChatCall),
    "/v1/completions": _call("Complete a text, in OpenAI's words", TextCall),
    "/v1/messages": _call("Chat, in Anthropic's words", MessagesBody),
    "/v1/messages/count_tokens": _call("Count the tokens of a chat", MessagesBody, streams=False),
    "/v1/responses": _call("Chat, in the words of OpenAI's Responses", ResponseBody),
    "/v1/embeddings": _call("Embed texts, in OpenAI's words", EmbeddingsBody, streams=False),
    _KEPT: {
        **_get("calls", "Read a response that was kept", ANY_JSON, 404),
        "delete": Operation("calls", "Forget it", answers.ForgottenResponse, errors=(404,)),
    },
    "/v1/models": _get("calls", "List the models", answers.Models),
    _GRADE: {
        "post": Operation("calls", "Grade a workflow", answers.Graded, answers.Grade, (404,)),
    },
    "/v1/decisions": _get("calls", "List receipts of a workflow", answers.ReceiptList),
    "/v1/decisions/{request_id}": _get("calls", "Read the receipt of a call", answers.Receipt, 404),
    OPENAPI: _get("calls", "Read this document", ANY_JSON),
    **{path: _get("health", "Ask whether the process runs", None) for path in _LIVE},
    **{path: _get("health", "Ask whether calls are taken", None, 503) for path in _READY},
    "/version": _get("fleet", "Read the version", answers.Version),
    "/metrics": _get("fleet", "Read metrics, for Prometheus", TEXT),
    "/state": _get("fleet", "Read what every replica has in flight", answers.State),
    "/events": _get("fleet", "Follow the state, twice a second, for ever", EVENTS),
    "/": _get("fleet", "Show the fleet at work", HTML),
    "/admin/reload": _post("admin", "Read the fleet file again", answers.Reloaded, 409),
    "/admin/drain": _post("admin", "Take no new call", answers.Draining),
    "/admin/resume": _post("admin", "Take calls again", answers.Draining, 409),
}
