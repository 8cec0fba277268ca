"""What the two translations to a chat body share: the parts of it, and complaints about theirs."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from concertmaster.core.errors import InvalidRequestError
from concertmaster.gateway.openai_api import CallBody

Fields = dict[str, Any]
_DEPTH_TO_SPARE = 100
"""Levels that an answer and the stack it is written on may add."""

_UNFIT_FOR_HEADERS = re.compile(r"[^a-zA-Z0-9_. -]")
STREAM_FIELDS: Mapping[str, object] = {"stream": True, "stream_options": {"include_usage": True}}


class ChatRequest(NamedTuple):
    """A call as the engine gets it, and as the gateway decides on it.

    Attributes:
        body: Holds only what engines know.
        call: The same with what names the caller's workflow.
        left_out: Kinds of tools that no engine behind a chat API can run.
    """

    body: bytes
    call: CallBody
    left_out: tuple[str, ...] = ()


def chat_request(fields: Fields, left_out: Iterable[str] = (), **naming: object) -> ChatRequest:
    """Serialise a chat body; ``naming`` is for the gateway alone.

    Args:
        fields: Those that are ``None`` are left out.
        left_out: Kinds of tools that were.
        naming: Fields of ``CallBody``; ``None`` for those not given.
    """
    body = msgspec.json.encode({name: value for name, value in fields.items() if value is not None})
    call = msgspec.json.decode(body, type=CallBody)
    for name, value in naming.items():
        if value is not None:
            is_raw = isinstance(getattr(call, name), msgspec.Raw)
            setattr(call, name, msgspec.Raw(msgspec.json.encode(value)) if is_raw else value)
    kinds = dict.fromkeys(_UNFIT_FOR_HEADERS.sub("", kind)[:64] for kind in left_out)
    return ChatRequest(body, call, tuple(kinds))


def check_depth(asked: object) -> None:
    """Refuse what is nested so deeply that an answer could not repeat it.

    Raises:
        InvalidRequestError: It is.
    """
    buried = asked
    for _ in range(_DEPTH_TO_SPARE):
        buried = [buried]
    try:
        msgspec.json.encode(buried)
    except RecursionError:
        raise InvalidRequestError("body: expected JSON of less depth") from None


def wrong(where: str, expected: str, found: object) -> InvalidRequestError:
    """Build the complaint about a field: where, what was expected, what was found."""
    shown = found if isinstance(found, str) else msgspec.json.encode(found).decode()
    return InvalidRequestError(f"{where}: expected {expected}, found {shown[:100]}", param=where)


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return the type that an object says it has.

    >>> kind_of({"type": "text"}), kind_of({"type": ["text"]})
    ('text', 'no type')
    """
    kind = fields.get("type")
    return kind if isinstance(kind, str) else "no type"


def text_field(fields: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be text.

    Raises:
        InvalidRequestError: It is missing, or something else.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}", "text", "nothing" if value is None else value)
    return value


def object_at(value: object, where: str) -> Fields:
    """Return a value that must be an object.

    Raises:
        InvalidRequestError: It is something else.
    """
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    return value


def function_tool(name: str, description: object, parameters: object, **more: object) -> Fields:
    """Describe a function as chat does."""
    function = {"name": name, "description": description, "parameters": parameters, **more}
    kept = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": kept}


def function_call(call_id: str, name: str, arguments: str) -> Fields:
    """Describe a call of a function as chat does."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
