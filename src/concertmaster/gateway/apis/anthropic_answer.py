"""Anthropic's Messages on their way out: a chat answer becomes a message, or its events."""

from collections.abc import Mapping, Sequence

import msgspec

from concertmaster.gateway.apis.chat_answer import BrokenAnswerError, ChatAnswer, Part, Step
from concertmaster.gateway.apis.chat_request import Fields
from concertmaster.gateway.apis.events import named_event
from concertmaster.gateway.openai_api import error_message, response

MESSAGES = "/v1/messages"
OVERLOADED = 529
_STOPPED: Mapping[str, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_KINDS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def error_of(status: int, message: str, request_id: str = "") -> tuple[int, bytes]:
    """Return status and body of an error as Anthropic would word it.

    >>> error_of(503, "the line is full")
    (529, b'{"type":"error","error":{"type":"overloaded_error","message":"the line is full"}}')
    """
    status = OVERLOADED if status == 503 else status
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    fields: Fields = {"type": "error", "error": {"type": kind, "message": message}}
    if request_id:
        fields["request_id"] = request_id
    return status, msgspec.json.encode(fields)


def worded(target: bytes, status: int, body: bytes, request_id: str = "") -> tuple[int, bytes]:
    """Return status and body of an error as the API of a target words it.

    >>> body = b'{"error":{"message":"too large"}}'
    >>> worded(b"/v1/chat/completions", 413, body) == (413, body)
    True
    >>> worded(b"/v1/messages?beta=true", 413, body)[1]
    b'{"type":"error","error":{"type":"request_too_large","message":"too large"}}'
    """
    return error_of(status, error_message(body), request_id) if speaks(target) else (status, body)


def worded_response(
    target: bytes,
    request_id: str,
    status: int,
    body: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    close: bool = True,
) -> bytes:
    """Serialise an error under the name of its request.

    Args:
        target: What was asked for; its API words the error.
        request_id: The name, which clients show beside the error.
        status: As OpenAI's API has it.
        body: Likewise.
        headers: What goes with it.
        close: Whether the connection closes after it.
    """
    status, body = worded(target, status, body, request_id)
    name = request_id.encode("latin-1")
    named = [*headers, (b"x-request-id", name)]
    if speaks(target):
        named.append((b"request-id", name))
    return response(status, body, named, close=close)


def speaks(target: bytes) -> bool:
    """Whether a target is one of Anthropic's API.

    >>> speaks(b"/v1/messages/count_tokens"), speaks(b"/v1/messages2")
    (True, False)
    """
    path = target.partition(b"?")[0]
    return path == MESSAGES.encode() or path.startswith(MESSAGES.encode() + b"/")


class MessageAnswer:
    """Writes one answer as Anthropic's API does."""

    def __init__(self) -> None:
        self._answer = ChatAnswer()
        self._request_id = ""
        self._begun = False

    def meet(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """Take in the head of the answer; return what is to be added to it."""
        self._request_id = headers.get("x-request-id", self._request_id)
        return [("request-id", self._request_id)] if self._request_id else []

    def whole(self, body: bytes) -> bytes:
        """Translate a whole completion.

        Raises:
            BrokenAnswerError: It is none.
        """
        self._answer.feed(body)
        self._answer.end()
        return msgspec.json.encode(self._message())

    def event(self, payload: bytes) -> bytes:
        """Translate a chunk.

        Raises:
            BrokenAnswerError: It is an error, or no chunk.
        """
        steps = self._answer.feed(payload)
        return self._opening() + b"".join(map(_render, steps))

    def end(self) -> bytes:
        """Write the end of a stream.

        Raises:
            BrokenAnswerError: The engine gave no reason for its end.
        """
        closing = b"".join(map(_render, self._answer.end()))
        delta: Fields = {
            "type": "message_delta",
            "delta": {
                "stop_reason": self._stop_reason(),
                "stop_sequence": self._answer.stopped_by,
            },
            "usage": self._usage(),
        }
        return closing + named_event(delta) + named_event({"type": "message_stop"})

    def broken(self, problem: str) -> bytes:
        """Write the event that ends a stream that broke."""
        body = error_of(502, problem, self._request_id)[1]
        return b"event: error\ndata: %b\n\n" % body

    def refused(self, status: int, body: bytes) -> tuple[int, bytes]:
        """Word an error that comes instead of an answer."""
        return error_of(status, error_message(body), self._request_id)

    def _opening(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None}
        return named_event({"type": "message_start", "message": message})

    def _message(self) -> Fields:
        return {
            "id": f"msg_{self._request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._answer.model,
            "content": [_block(part) for part in self._answer.parts],
            "stop_reason": self._stop_reason(),
            "stop_sequence": self._answer.stopped_by,
            "usage": self._usage(),
        }

    def _stop_reason(self) -> str:
        answer = self._answer
        if answer.finish_reason == "stop":
            if answer.asks_for_tools:
                return "tool_use"
            return "stop_sequence" if answer.stopped_by else "end_turn"
        return _STOPPED.get(answer.finish_reason, "end_turn")

    def _usage(self) -> Fields:
        usage = self._answer.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


class TokenCount(MessageAnswer):
    """Writes what ``count_tokens`` answers: the tokens of the prompt as the engine counted them."""

    def whole(self, body: bytes) -> bytes:
        """Translate a whole completion.

        Raises:
            BrokenAnswerError: It is none, or it counts nothing.
        """
        self._answer.feed(body)
        tokens = self._answer.usage.prompt_tokens
        if not tokens:
            raise BrokenAnswerError("the engine did not count the tokens of the prompt")
        return msgspec.json.encode({"input_tokens": tokens})


def _render(step: Step) -> bytes:
    index = step.part.position
    match step.act:
        case "open":
            block = _block(step.part.emptied())
            return named_event(
                {"type": "content_block_start", "index": index, "content_block": block}
            )
        case "grow":
            delta = _delta(step.part, step.text)
            return named_event({"type": "content_block_delta", "index": index, "delta": delta})
        case "close":
            return named_event({"type": "content_block_stop", "index": index})


def _delta(part: Part, text: str) -> Fields:
    match part.kind:
        case "text":
            return {"type": "text_delta", "text": text}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "tool":
            return {"type": "input_json_delta", "partial_json": text}


def _block(part: Part) -> Fields:
    match part.kind:
        case "text":
            return {"type": "text", "text": part.text}
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        case "tool":
            arguments = _input(part.text)
            return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": arguments}


def _input(text: str) -> Fields:
    """Read arguments; those that are no object, perhaps cut off, are handed on as text."""
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=Fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {"INVALID_JSON": text}
