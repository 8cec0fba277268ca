"""OpenAI's Responses on their way in: a body of ``/v1/responses`` becomes one of chat."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from concertmaster.gateway.apis.chat_request import (
    STREAM_FIELDS,
    ChatRequest,
    Fields,
    chat_request,
    check_depth,
    function_call,
    function_tool,
    kind_of,
    object_at,
    text_field,
    wrong,
)
from concertmaster.gateway.openai_api import read_fields

_PARAGRAPH = "\n\n"
_TEXTS = frozenset({"input_text", "output_text", "text", "refusal"})
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_CHOICES = frozenset({"auto", "none", "required"})
_NOT_SERVED = ("background", "prompt")


class ResponseBody(msgspec.Struct):
    """A body of ``POST /v1/responses``; what is not named here has no meaning for an engine."""

    model: str
    input: str | list[Fields]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Fields] | None = None
    tool_choice: str | Fields | None = None
    parallel_tool_calls: bool | None = None
    text: Fields | None = None
    reasoning: object = None
    metadata: Fields | None = None
    user: str | None = None
    service_tier: object = None
    prompt_cache_key: object = None
    conversation: object = None
    session_id: object = None
    background: bool | None = None
    prompt: object = None


class Asked(NamedTuple):
    """A call for a response.

    Attributes:
        body: As the caller wrote it.
        messages: The conversation up to here, in chat's words, without instructions.
        chat: The same as a chat call.
    """

    body: ResponseBody
    messages: list[Fields]
    chat: ChatRequest

    @property
    def stores(self) -> bool:
        """Whether the answer is to be kept."""
        return self.body.store is not False

    @property
    def streams(self) -> bool:
        """Whether the answer streams."""
        return bool(self.body.stream)


_decode = msgspec.json.Decoder(ResponseBody).decode


def response_body(body: bytes) -> ResponseBody:
    """Read a body.

    Raises:
        InvalidRequestError: A field is missing, wrong, or asks for what no engine serves.
    """
    asked = read_fields(body, _decode)
    check_depth(msgspec.structs.replace(asked, input=""))
    for name in _NOT_SERVED:
        if value := getattr(asked, name):
            raise wrong(name, "none: the gateway does not serve it", value)
    cap = asked.max_output_tokens
    if cap is not None and cap < 1:
        raise wrong("max_output_tokens", "at least 1", cap)
    return asked


def response_request(
    asked: ResponseBody, earlier: Sequence[Fields] = (), workflow_id: str = ""
) -> Asked:
    """Return the chat call of a body.

    Args:
        asked: The body.
        earlier: What was said up to the response that it goes on from.
        workflow_id: The workflow of that response.

    Raises:
        InvalidRequestError: An item or a tool is of a kind that engines cannot serve.
    """
    messages = [*earlier, *_messages(asked.input)]
    if not messages:
        raise wrong("input", "at least one item", "none")
    tools, left_out = _tools(asked.tools or ())
    fields: Fields = {
        "model": asked.model,
        "messages": _led(asked.instructions, messages),
        "max_tokens": asked.max_output_tokens,
        "tools": tools or None,
        "tool_choice": _tool_choice(asked.tool_choice, tools),
        "parallel_tool_calls": asked.parallel_tool_calls if tools else None,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "response_format": _format(asked.text),
        **(STREAM_FIELDS if asked.stream else {}),
    }
    chat = chat_request(
        fields,
        left_out,
        metadata=asked.metadata,
        reasoning=asked.reasoning,
        service_tier=asked.service_tier,
        prompt_cache_key=asked.prompt_cache_key,
        conversation=asked.conversation or workflow_id or None,
        session_id=asked.session_id,
    )
    return Asked(asked, messages, chat)


def _led(instructions: str | None, messages: Sequence[Fields]) -> list[Fields]:
    """Put instructions first; templates take one system message, and only at the start."""
    texts = [instructions] if instructions else []
    at = 0
    while at < len(messages) and messages[at]["role"] == "system":
        texts.append(messages[at]["content"])
        at += 1
    led = [{"role": "system", "content": _PARAGRAPH.join(texts)}] if texts else []
    return [*led, *messages[at:]]


def _messages(items: str | Sequence[Fields]) -> list[Fields]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    found: list[Fields] = []
    for at, item in enumerate(items):
        where = f"input.{at}"
        match item.get("type") or "message":
            case "message":
                found.append(_message(item, where))
            case "function_call":
                _add_call(found, item, where)
            case "function_call_output":
                found.append(_output(item, where))
            case "reasoning":
                pass
            case kind:
                expected = "a message, function_call, function_call_output or reasoning"
                raise wrong(f"{where}.type", expected, kind)
    return found


def _message(item: Fields, where: str) -> Fields:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", "user, assistant, system or developer", role)
    return {"role": _ROLES[role], "content": _text(item.get("content"), f"{where}.content")}


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, "text or a list of parts", content)
    return _PARAGRAPH.join(_part(part, f"{where}.{at}") for at, part in enumerate(content))


def _part(part: Any, where: str) -> str:  # noqa: ANN401  # whatever was sent
    fields = object_at(part, where)
    kind = kind_of(fields)
    if kind not in _TEXTS:
        raise wrong(f"{where}.type", "text, as engines are given nothing else", kind)
    return text_field(fields, "refusal" if kind == "refusal" else "text", where)


def _add_call(found: list[Fields], item: Fields, where: str) -> None:
    """Add a call to the assistant's message before it, or to one of its own."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    call = function_call(
        text_field(item, "call_id", where),
        text_field(item, "name", where),
        text_field(item, "arguments", where),
    )
    found[-1].setdefault("tool_calls", []).append(call)


def _output(item: Fields, where: str) -> Fields:
    call_id = text_field(item, "call_id", where)
    return {
        "role": "tool",
        "tool_call_id": call_id,
        "content": _text(item.get("output"), f"{where}.output"),
    }


def _tools(tools: Sequence[Fields]) -> tuple[list[Fields], list[str]]:
    """Return the functions, and the kinds of those tools that are none."""
    found: list[Fields] = []
    left_out: list[str] = []
    for at, tool in enumerate(tools):
        if tool.get("type") != "function":
            left_out.append(kind_of(tool))
            continue
        name = text_field(tool, "name", f"tools.{at}")
        strict = tool.get("strict")
        found.append(
            function_tool(name, tool.get("description"), tool.get("parameters"), strict=strict)
        )
    return found, left_out


def _tool_choice(choice: str | Fields | None, tools: Sequence[Fields]) -> str | Fields | None:
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return choice if tools else None
    name = choice.get("name") if isinstance(choice, dict) else None
    if name is None or name not in [tool["function"]["name"] for tool in tools]:
        raise wrong("tool_choice", "auto, none, required or a function among the tools", choice)
    return {"type": "function", "function": {"name": name}}


def _format(text: Fields | None) -> Fields | None:
    wanted = (text or {}).get("format")
    if wanted is None:
        return None
    fields = object_at(wanted, "text.format")
    match fields.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            schema = {name: value for name, value in fields.items() if name != "type"}
            return {"type": "json_schema", "json_schema": schema}
        case kind:
            raise wrong("text.format.type", "text, json_object or json_schema", kind)
