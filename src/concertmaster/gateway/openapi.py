"""The gateway described for programs: an OpenAPI document, made from the types of its operations.

Fields that only engines understand are not listed; bodies may have any of them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from concertmaster import __version__
from concertmaster.core.request import ServiceClass
from concertmaster.gateway import answer_types as answers
from concertmaster.gateway.apis.anthropic_answer import OVERLOADED, speaks
from concertmaster.gateway.identity import MAX_DEADLINE_S, MAX_STAGE
from concertmaster.gateway.openai_api import phrase
from concertmaster.gateway.operations import ANY_JSON, EVENTS, OPERATIONS, Operation
from concertmaster.gateway.receipts import MOST_LISTED

_ANYBODYS = (400, 401, 403, 408, 413, 431)
"""What any request may be answered: it is no HTTP, has no good key, is too large or too slow."""

_JSON = "application/json"
_REF = "#/components/schemas/{name}"
_TEXT_TYPE = {"type": "string"}

Fields = dict[str, Any]
_Shown = Mapping[str, Mapping[str, Operation]]

_NAMED_MODEL = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": _TEXT_TYPE, "minItems": 1},
    ]
}
_CAP = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}
_CAPS = {"max_tokens": _CAP, "max_completion_tokens": _CAP}
_PROMPT = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]}
_CHAT = {"model": _NAMED_MODEL, "messages": {"type": "array", "minItems": 1}}
_REFINED: Mapping[str, tuple[Fields, tuple[str, ...]]] = {
    "ChatCall": ({**_CHAT, **_CAPS}, ("prompt",)),
    "TextCall": ({"model": _NAMED_MODEL, "prompt": _PROMPT, **_CAPS}, ("messages", "tools")),
    "EmbeddingsBody": ({"input": _PROMPT}, ()),
    "MessagesBody": ({"max_tokens": {"type": "integer", "minimum": 1}}, ()),
    "ResponseBody": ({"max_output_tokens": _CAP}, ()),
}
"""Fields whose types say less than is enforced, and those that have no meaning there."""

_DEMANDED: Mapping[str, tuple[str, ...]] = {
    "ChatCall": ("model", "messages"),
    "TextCall": ("model", "prompt"),
    "EmbeddingsBody": ("input",),
    "MessagesBody": (),
}

_CALL_HEADERS: Mapping[str, Fields] = {
    **{
        f"x-concertmaster-{name}": _TEXT_TYPE
        for name in ("workflow-id", "agent", "app", "template", "role", "step", "parent")
    },
    "x-concertmaster-stage": {"type": "integer", "minimum": 0, "maximum": MAX_STAGE},
    "x-concertmaster-deadline-ms": {
        "type": "integer",
        "minimum": 1,
        "maximum": int(1000 * MAX_DEADLINE_S),
    },
    "x-concertmaster-class": {"enum": [one.value for one in ServiceClass]},
    "x-request-id": _TEXT_TYPE,
}

_QUERIES: Mapping[str, Mapping[str, Fields]] = {
    "/v1/decisions": {
        "workflow": {"type": "string", "minLength": 1},
        "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED},
    }
}
_OPTIONAL = frozenset({"limit"})
_ANYTHING = (msgspec.Raw, object)


def document(paths: Collection[str] = tuple(OPERATIONS)) -> Fields:
    """Return the document of a door that has these paths."""
    shown = {path: OPERATIONS[path] for path in OPERATIONS if path in paths}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Concertmaster", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": {
            path: {method: _operation(path, one) for method, one in operations.items()}
            for path, operations in shown.items()
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(shown),
            "responses": _errors(),
            "parameters": {
                name: {"name": name, "in": "header", "schema": schema}
                for name, schema in _CALL_HEADERS.items()
            },
        },
    }


def _operation(path: str, one: Operation) -> Fields:
    found: Fields = {"tags": [one.tag], "summary": one.summary}
    if parameters := list(_parameters(path, one)):
        found["parameters"] = parameters
    if one.body is not None:
        found["requestBody"] = {"required": True, **_content(_JSON, one.body)}
    return {**found, "responses": _answers(path, one)}


def _parameters(path: str, one: Operation) -> Iterator[Fields]:
    for name in re.findall(r"{(\w+)}", path):
        schema = {**_TEXT_TYPE, "pattern": r"^[^\n]+$"}
        yield {"name": name, "in": "path", "required": True, "schema": schema}
    for name, schema in _QUERIES.get(path, {}).items():
        required = name not in _OPTIONAL
        yield {"name": name, "in": "query", "required": required, "schema": schema}
    if _goes_to_engine(one):
        yield from ({"$ref": f"#/components/parameters/{name}"} for name in _CALL_HEADERS)


def _goes_to_engine(one: Operation) -> bool:
    return 502 in one.errors


def _answers(path: str, one: Operation) -> Fields:
    found = {"200": _good(one)}
    is_anthropics = speaks(path.encode())
    for status in sorted({*_ANYBODYS, *one.errors}):
        told = OVERLOADED if is_anthropics and status == 503 else status
        found[str(told)] = {"$ref": f"#/components/responses/{_name(told, is_anthropics)}"}
    if _goes_to_engine(one):
        found["4XX"] = {"description": "What the engine says"}
    return found


def _errors() -> Fields:
    found: Fields = {}
    for status in (*_ANYBODYS, 404, 409, 429, 502, 503, 504, OVERLOADED):
        for is_anthropics, kind in ((False, answers.Error), (True, answers.MessagesError)):
            told = {"description": phrase(status).decode(), **_content(_JSON, kind)}
            found[_name(status, is_anthropics)] = told
    return found


def _name(status: int, is_anthropics: bool) -> str:  # noqa: FBT001  # which of two
    return f"{'Messages' if is_anthropics else 'Error'}{status}"


def _good(one: Operation) -> Fields:
    told = {"description": "OK"}
    if one.answer is None:
        return told
    if isinstance(one.answer, str):
        return {**told, **_content(one.answer, str)}
    found = _content(_JSON, one.answer)
    if one.streams:
        found["content"][EVENTS] = {}
    return {**told, **found}


def _content(media_type: str, kind: Any) -> Fields:  # noqa: ANN401  # a type, of whatever kind
    return {"content": {media_type: {"schema": _schema(kind)}}}


def _schema(kind: Any) -> Fields:  # noqa: ANN401
    if kind is str:
        return _TEXT_TYPE
    if kind == ANY_JSON:
        return {"type": "object"}
    return {"$ref": _REF.format(name=kind.__name__)}


def _schemas(shown: _Shown) -> Fields:
    """Describe every type that the operations name, and those within them."""
    every = [one for operations in shown.values() for one in operations.values()]
    kinds = [answers.Error, answers.MessagesError]
    for kind in [*(one.body for one in every), *(one.answer for one in every)]:
        if kind not in (None, ANY_JSON, *kinds) and not isinstance(kind, str):
            kinds.append(kind)
    _, found = msgspec.json.schema_components(map(_describable, kinds), ref_template=_REF)
    return {name: _refined(name, schema) for name, schema in sorted(found.items())}


def _describable(kind: Any) -> Any:  # noqa: ANN401
    """Return a type of the same fields, where some are passed on unread: these may be anything."""
    if not issubclass(kind, msgspec.Struct):
        return kind
    fields = [
        (one.name, Any, None)
        if one.type in _ANYTHING
        else ((one.name, one.type) if one.required else (one.name, one.type, one.default))
        for one in msgspec.structs.fields(kind)
    ]
    fields.sort(key=len)
    return msgspec.defstruct(kind.__name__, fields, namespace={"__doc__": kind.__doc__})


def _refined(name: str, schema: Fields) -> Fields:
    if name not in _REFINED:
        return schema
    fields, without = _REFINED[name]
    kept = {key: value for key, value in schema["properties"].items() if key not in without}
    required = [*schema.get("required", ()), *_DEMANDED.get(name, ())]
    return {**schema, "properties": {**kept, **fields}, "required": list(dict.fromkeys(required))}
