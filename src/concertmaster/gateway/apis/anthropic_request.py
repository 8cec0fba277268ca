"""Anthropic's Messages on their way in: a body of ``/v1/messages`` becomes one of chat."""

from collections.abc import Sequence
from typing import Any

import msgspec

from concertmaster.core.errors import InvalidRequestError
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
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_NOT_SERVED = ("container", "mcp_servers")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Turn(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[Fields]


class MessagesBody(msgspec.Struct):
    """A body of ``POST /v1/messages``; what is not named here has no meaning for an engine."""

    model: str
    messages: list[Turn]
    max_tokens: int | None = None
    system: str | list[Fields] | None = None
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[Fields] | None = None
    tool_choice: Fields | None = None
    metadata: object = None
    thinking: object = None
    output_config: Fields | None = None
    container: object = None
    mcp_servers: object = None


_decode = msgspec.json.Decoder(MessagesBody).decode


def messages_request(body: bytes, *, counts: bool = False) -> tuple[ChatRequest, bool]:
    """Return the chat call of a body, and whether its answer streams.

    Args:
        body: As it came.
        counts: Whether only the tokens of the prompt are asked for: then one is generated.

    Raises:
        InvalidRequestError: A field is missing, wrong, or of a kind that engines cannot serve.
    """
    asked = read_fields(body, _decode)
    check_depth(msgspec.structs.replace(asked, messages=[]))
    _refuse_what_is_not_served(asked)
    streams = asked.stream and not counts
    tools, left_out = _tools(asked.tools or ())
    fields: Fields = {
        "model": asked.model,
        "messages": _system(asked.system) + _messages(asked.messages),
        "max_tokens": 1 if counts else _max_tokens(asked),
        "tools": tools or None,
        **_tool_choice(asked.tool_choice, tools),
    }
    if not counts:
        fields |= _sampling(asked)
    if streams:
        fields |= STREAM_FIELDS
    naming = {"metadata": asked.metadata, "thinking": asked.thinking}
    return chat_request(fields, left_out, **naming), streams


def _refuse_what_is_not_served(asked: MessagesBody) -> None:
    for name in _NOT_SERVED:
        if value := getattr(asked, name):
            raise wrong(name, "none, as engines run no tools themselves", value)
    if not asked.messages:
        raise wrong("messages", "at least one message", "none")


def _max_tokens(asked: MessagesBody) -> int:
    if asked.max_tokens is None or asked.max_tokens < 1:
        found = "nothing" if asked.max_tokens is None else asked.max_tokens
        raise wrong("max_tokens", "at least 1", found)
    return asked.max_tokens


def _sampling(asked: MessagesBody) -> Fields:
    config = asked.output_config or {}
    return {
        "stop": asked.stop_sequences or None,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "response_format": _format(config.get("format")),
    }


def _format(wanted: object) -> Fields | None:
    if wanted is None:
        return None
    schema = object_at(wanted, "output_config.format").get("schema")
    if not isinstance(schema, dict):
        raise wrong("output_config.format", "a JSON schema", wanted)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _system(system: str | list[Fields] | None) -> list[Fields]:
    if not system:
        return []
    text = system if isinstance(system, str) else _join(system, "system")
    return [{"role": "system", "content": text}]


def _join(blocks: Sequence[Any], where: str) -> str:
    """Join the texts of blocks, none of which may be anything else."""
    return _PARAGRAPH.join(_text(block, f"{where}.{at}") for at, block in enumerate(blocks))


def _text(block: object, where: str) -> str:
    fields = object_at(block, where)
    if fields.get("type") != "text":
        raise _unserved(fields, where)
    return text_field(fields, "text", where)


def _unserved(block: Fields, where: str) -> InvalidRequestError:
    expected = "text, as engines are given nothing else here"
    return wrong(f"{where}.type", expected, kind_of(block))


def _messages(messages: Sequence[Turn]) -> list[Fields]:
    found: list[Fields] = []
    for at, message in enumerate(messages):
        where = f"messages.{at}"
        if message.role == "assistant":
            found.append(_assistant(message.content, f"{where}.content"))
        elif message.role == "user":
            found += _user(message.content, f"{where}.content")
        elif message.role == "system":
            found += _system(message.content)
        else:
            raise wrong(f"{where}.role", "user or assistant", message.role)
    return found


def _user(content: str | list[Fields], where: str) -> list[Fields]:
    """Split a user's message where results of tools stand between its texts."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    found: list[Fields] = []
    texts: list[str] = []
    for at, block in enumerate(content):
        if block.get("type") == "tool_result":
            found += _said(texts)
            texts = []
            found.append(_tool_result(block, f"{where}.{at}"))
        else:
            texts.append(_text(block, f"{where}.{at}"))
    return found + _said(texts)


def _said(texts: Sequence[str]) -> list[Fields]:
    return [{"role": "user", "content": _PARAGRAPH.join(texts)}] if texts else []


def _tool_result(block: Fields, where: str) -> Fields:
    call_id = text_field(block, "tool_use_id", where)
    content = block.get("content") or ""
    if isinstance(content, list):
        content = _join(content, f"{where}.content")
    elif not isinstance(content, str):
        raise wrong(f"{where}.content", "text or a list of blocks", content)
    text = f"Error: {content}" if block.get("is_error") else content
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _assistant(content: str | list[Fields], where: str) -> Fields:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    calls: list[Fields] = []
    for at, block in enumerate(content):
        if block.get("type") == "tool_use":
            calls.append(_tool_use(block, f"{where}.{at}"))
        elif kind_of(block) not in _THOUGHTS:
            texts.append(_text(block, f"{where}.{at}"))
    message: Fields = {"role": "assistant", "content": _PARAGRAPH.join(texts)}
    return {**message, "tool_calls": calls} if calls else message


def _tool_use(block: Fields, where: str) -> Fields:
    call_id, name = text_field(block, "id", where), text_field(block, "name", where)
    arguments = msgspec.json.encode(object_at(block.get("input", {}), f"{where}.input"))
    return function_call(call_id, name, arguments.decode())


def _tools(tools: Sequence[Fields]) -> tuple[list[Fields], list[str]]:
    """Return the tools that the caller runs, and the kinds of those that Anthropic would."""
    found: list[Fields] = []
    left_out: list[str] = []
    for at, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            left_out.append(kind_of(tool))
            continue
        where = f"tools.{at}"
        schema = object_at(tool.get("input_schema"), f"{where}.input_schema")
        name = text_field(tool, "name", where)
        found.append(function_tool(name, tool.get("description"), schema))
    return found, left_out


def _tool_choice(choice: Fields | None, tools: Sequence[Fields]) -> Fields:
    if not choice:
        return {}
    kind = kind_of(choice)
    one_by_one = bool(tools) and choice.get("disable_parallel_tool_use") is True
    chosen: Fields = {"parallel_tool_calls": False if one_by_one else None}
    if kind == "tool":
        name = text_field(choice, "name", "tool_choice")
        if name not in [tool["function"]["name"] for tool in tools]:
            raise wrong("tool_choice.name", "a tool with an input_schema", name)
        return {**chosen, "tool_choice": {"type": "function", "function": {"name": name}}}
    if kind not in _CHOICES:
        raise wrong("tool_choice.type", "auto, any, tool or none", kind)
    return {**chosen, "tool_choice": _CHOICES[kind] if tools else None}
