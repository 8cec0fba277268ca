"""OpenAI's Responses on their way out: a chat answer becomes a response, or its events."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec

from concertmaster.core.errors import InvalidRequestError
from concertmaster.gateway.apis.chat_answer import ChatAnswer, Part, Step
from concertmaster.gateway.apis.chat_request import Fields, function_call
from concertmaster.gateway.apis.events import named_event
from concertmaster.gateway.apis.responses_request import Asked

Keep: TypeAlias = Callable[[Fields, list[Fields], str], None]
"""Told of a response, of the conversation with its answer, and of its workflow."""

_CUT_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}
_PREFIXES = {"text": "msg", "reasoning": "rs", "tool": "fc"}


def not_found(response_id: str) -> InvalidRequestError:
    """Build the complaint about a response that is not kept."""
    error = InvalidRequestError(
        f"previous_response_id: expected a response that is kept, found {response_id[:100]}",
        param="previous_response_id",
    )
    error.code = "previous_response_not_found"
    return error


class ResponseAnswer:
    """Writes one answer as OpenAI's Responses API does.

    Args:
        asked: What was asked for.
        response_id: Under which it may be kept.
        keep: Told of the whole answer once it is there.
    """

    def __init__(self, asked: Asked, response_id: str, keep: Keep) -> None:
        self._asked = asked
        self._response_id = response_id
        self._keep = keep
        self._answer = ChatAnswer()
        self._workflow_id = ""
        self._sequence = 0

    def meet(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """Take in the head of the answer; return what is to be added to it."""
        self._workflow_id = headers.get("x-concertmaster-workflow-id", "")
        return []

    def whole(self, body: bytes) -> bytes:
        """Translate a whole completion.

        Raises:
            BrokenAnswerError: It is none.
        """
        self._answer.feed(body)
        self._answer.end()
        return msgspec.json.encode(self._kept())

    def event(self, payload: bytes) -> bytes:
        """Translate a chunk.

        Raises:
            BrokenAnswerError: It is an error, or no chunk.
        """
        steps = self._answer.feed(payload)
        return self._opening() + b"".join(map(self._render, steps))

    def end(self) -> bytes:
        """Write the end of a stream.

        Raises:
            BrokenAnswerError: The engine gave no reason for its end.
        """
        closing = b"".join(map(self._render, self._answer.end()))
        return closing + self._event(f"response.{self._status()}", response=self._kept())

    def broken(self, problem: str) -> bytes:
        """Write the event that ends a stream that broke."""
        error = {"code": "server_error", "message": problem}
        failed = {**self._response("failed"), "error": error}
        return self._opening() + self._event("response.failed", response=failed)

    def refused(self, status: int, body: bytes) -> tuple[int, bytes]:
        """Word an error that comes instead of an answer: chat's errors are the same."""
        return status, body

    def _opening(self) -> bytes:
        if self._sequence:
            return b""
        begun = {**self._response("in_progress"), "output": [], "usage": None}
        return self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )

    def _event(self, kind: str, **fields: object) -> bytes:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return named_event(event)

    def _kept(self) -> Fields:
        """Return the response; hand it over first if it is to be kept."""
        response = self._response(self._status())
        if self._asked.stores:
            said = [*self._asked.messages, _chat_message(self._answer)]
            self._keep(response, said, self._workflow_id)
        return response

    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason in _CUT_SHORT else "completed"

    def _response(self, status: str) -> Fields:
        asked, answer = self._asked.body, self._answer
        reason = _CUT_SHORT.get(answer.finish_reason)
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": answer.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": answer.model or asked.model,
            "output": [self._item(part, "completed") for part in answer.parts],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": asked.reasoning,
            "store": self._asked.stores,
            "temperature": asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": _usage(answer),
            "user": asked.user,
        }

    def _render(self, step: Step) -> bytes:
        match step.act:
            case "open":
                return self._open(step.part.emptied())
            case "grow":
                return self._grow(step.part, step.text)
            case "close":
                return self._close(step.part)

    def _open(self, part: Part) -> bytes:
        item = self._item(part, "in_progress")
        if part.kind != "tool":
            item["content"] = []
        added = self._event("response.output_item.added", output_index=part.position, item=item)
        if part.kind != "text":
            return added
        return added + self._of_text(part, "response.content_part.added", part=_content(part))

    def _grow(self, part: Part, text: str) -> bytes:
        match part.kind:
            case "text":
                return self._of_text(part, "response.output_text.delta", delta=text, logprobs=[])
            case "reasoning":
                return self._of_text(part, "response.reasoning_text.delta", delta=text)
            case "tool":
                return self._of_item(part, "response.function_call_arguments.delta", delta=text)

    def _close(self, part: Part) -> bytes:
        match part.kind:
            case "text":
                done = self._of_text(
                    part, "response.output_text.done", text=part.text, logprobs=[]
                ) + self._of_text(part, "response.content_part.done", part=_content(part))
            case "reasoning":
                done = self._of_text(part, "response.reasoning_text.done", text=part.text)
            case "tool":
                done = self._of_item(
                    part,
                    "response.function_call_arguments.done",
                    name=part.name,
                    arguments=part.text,
                )
        item = self._item(part, "completed")
        return done + self._event(
            "response.output_item.done", output_index=part.position, item=item
        )

    def _of_item(self, item: Part, kind: str, **fields: object) -> bytes:
        item_id = self._item_id(item)
        return self._event(kind, item_id=item_id, output_index=item.position, **fields)

    def _of_text(self, item: Part, kind: str, **fields: object) -> bytes:
        return self._of_item(item, kind, content_index=0, **fields)

    def _item_id(self, part: Part) -> str:
        number = self._response_id.removeprefix("resp_")
        return f"{_PREFIXES[part.kind]}_{number}_{part.position}"

    def _item(self, part: Part, status: str) -> Fields:
        item: Fields = {"id": self._item_id(part), "status": status}
        match part.kind:
            case "text":
                content = [_content(part)]
                return {**item, "type": "message", "role": "assistant", "content": content}
            case "reasoning":
                return {**item, "type": "reasoning", "summary": [], "content": [_content(part)]}
            case "tool":
                return {
                    **item,
                    "type": "function_call",
                    "call_id": part.call_id,
                    "name": part.name,
                    "arguments": part.text,
                }


def _content(part: Part) -> Fields:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}


def _usage(answer: ChatAnswer) -> Fields:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _chat_message(answer: ChatAnswer) -> Fields:
    """Return an answer as the assistant's message of a later call."""
    text = "".join(part.text for part in answer.parts if part.kind == "text")
    calls = [
        function_call(part.call_id, part.name, part.text)
        for part in answer.parts
        if part.kind == "tool"
    ]
    message: Fields = {"role": "assistant", "content": text}
    return {**message, "tool_calls": calls} if calls else message
