"""The OpenAI protocol as far as the gateway looks into it: a few fields, error bodies, headers.

Everything else in a body is passed on as it came, byte for byte.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from concertmaster.core.errors import CallerError, InvalidRequestError
from concertmaster.core.events import FailReason, RejectReason
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName

BYTES_PER_TOKEN = 4
"""English text and JSON in common tokenizers; good enough to plan with."""

DEFAULT_MAX_OUTPUT_TOKENS = 4096
"""Cap that is planned with when a caller gives none."""

MAX_PREFIX_CHUNKS = 512
_MOST_OUTPUT_TOKENS = 2**31 - 1
AUTO = "auto"
_Fields = TypeVar("_Fields")


class CallBody(msgspec.Struct):
    """The fields of a chat or completion body that the gateway needs to decide.

    Those that only help are read if they can be, and never a reason to refuse a call.
    """

    model: str | list[str] | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    service_tier: object = None
    session_id: object = None
    program_id: object = None
    conversation: object = None
    prompt_cache_key: object = None
    session_params: msgspec.Raw = msgspec.Raw()
    metadata: msgspec.Raw = msgspec.Raw()
    vllm_xargs: msgspec.Raw = msgspec.Raw()
    nvext: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    reasoning_effort: object = None
    reasoning: msgspec.Raw = msgspec.Raw()
    thinking: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()

    def models(self) -> tuple[ModelName, ...]:
        """Models that may serve it; empty for ``auto``."""
        if not self.model:
            raise InvalidRequestError(
                'model: expected a model name, a list of names or "auto", found nothing',
                param="model",
            )
        names = [self.model] if isinstance(self.model, str) else self.model
        return () if AUTO in names else tuple(ModelName(name) for name in names)

    def text(self) -> memoryview:
        """Return the raw JSON of the prompt, at least its brackets."""
        return memoryview(self.messages if len(self.messages) else self.prompt)

    def max_output_tokens(self) -> int:
        """Return the caller's cap, or the default."""
        for field in ("max_completion_tokens", "max_tokens"):
            cap: int | None = getattr(self, field)
            if cap is not None:
                if cap < 1:
                    raise InvalidRequestError(
                        f"{field}: expected at least 1, found {cap}", param=field
                    )
                return min(cap, _MOST_OUTPUT_TOKENS)
        return DEFAULT_MAX_OUTPUT_TOKENS


_decode_call = msgspec.json.Decoder(CallBody).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse_call(body: bytes, *, chat: bool) -> CallBody:
    """Read what is needed of a body; what an engine must judge is left to the engine.

    Raises:
        InvalidRequestError: It is not JSON, or a field that matters here is missing or of
            the wrong type; the message says which.
    """
    call = read_fields(body, _decode_call)
    field = "messages" if chat else "prompt"
    raw = bytes(memoryview(call.messages if chat else call.prompt)[:5])
    if len(raw) < 3 or raw == b"null":
        raise InvalidRequestError(
            f"{field}: expected {'a list of messages' if chat else 'a prompt'}, found "
            f"{raw.decode() or 'nothing'}",
            param=field,
        )
    return call


def read_fields(body: bytes, decode: Callable[[bytes], _Fields]) -> _Fields:
    """Decode a body, and say in one line what is wrong with it.

    Raises:
        InvalidRequestError: It is not JSON in UTF-8, or a field is missing or of the wrong type.
    """
    try:
        if not body.isascii():
            body.decode()  # parts that are passed on unread are read by engines
        return decode(body)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `")
        param = path.rstrip("`").removeprefix("$").removeprefix(".") or None
        place = f"{param}: " if param else "body: "
        raise InvalidRequestError(
            place + problem[:1].lower() + problem[1:].replace("`", ""), param=param
        ) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"body: expected a JSON object, found {error}") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("body: expected a JSON object in UTF-8") from None
    except RecursionError:
        raise InvalidRequestError("body: expected JSON of less depth") from None


def with_model(body: bytes, model: str) -> bytes:
    """Return the body with its model replaced and every other value as it was, byte for byte.

    >>> with_model(b'{"model": "auto", "n":  1}', "small")
    b'{"model":"small","n":1}'
    """
    fields: dict[str, bytes | msgspec.Raw] = dict(_decode_fields(body))
    fields["model"] = msgspec.json.encode(model)
    return (
        b"{"
        + b",".join(msgspec.json.encode(key) + b":" + bytes(value) for key, value in fields.items())
        + b"}"
    )


def prompt_tokens(text: memoryview) -> int:
    """Estimate the tokens of a prompt from its bytes."""
    return max(1, len(text) // BYTES_PER_TOKEN)


def prefix_hashes(text: memoryview) -> tuple[int, ...]:
    """Chained checksums of the prompt's leading chunks; equal ones mean an equal start.

    >>> a, b = prefix_hashes(memoryview(b"x" * 2100)), prefix_hashes(memoryview(b"x" * 1100))
    >>> len(a), len(b), a[0] == b[0]
    (2, 1, True)
    """
    size = PREFIX_CHUNK_TOKENS * BYTES_PER_TOKEN
    hashes: list[int] = []
    checksum = 0
    for start in range(0, min(len(text) - size + 1, MAX_PREFIX_CHUNKS * size), size):
        checksum = zlib.crc32(text[start : start + size], checksum)
        hashes.append(checksum)
    return tuple(hashes)


_USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


def completion_tokens(tail: bytes) -> int | None:
    """Read the token count out of a response or the last frames of a stream, if it is there.

    >>> completion_tokens(b'{"usage":{"completion_tokens": 7}}')
    7
    """
    found = _USAGE.findall(tail)
    return int(found[-1]) if found else None


_TOOL_CALL = re.compile(rb'"id"\s*:\s*"([^"]{1,128})"')


def tool_call_ids(data: bytes) -> list[bytes]:
    """Read the ids of the tool calls that a piece of an answer asks for.

    >>> tool_call_ids(b'{"id":"chat-1","tool_calls": [{"index":0,"id":"call_7"}]}')
    [b'call_7']
    """
    return _TOOL_CALL.findall(data, data.find(b'"tool_calls"'))


# Answers of our own

GatewayReason: TypeAlias = Literal[
    "saturated", "tenant_full", "pool_full", "engines_failing", "timed_out"
]
"""Why the gateway itself refuses a call, which the core never hears of or hears cancelled."""

Reason: TypeAlias = RejectReason | FailReason | GatewayReason

_REJECTIONS: Mapping[Reason, tuple[int, str, str, str]] = {
    "model_not_found": (404, "not_found_error", "model_not_found", "no pool serves this model"),
    "too_long": (
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "the prompt is longer than the context of any model that may serve it",
    ),
    "queue_full": (429, "rate_limit_error", "rate_limit_exceeded", "the waiting line is full"),
    "waited_too_long": (
        503,
        "overloaded_error",
        "waited_too_long",
        "no replica had room within the longest allowed wait",
    ),
    "no_replica": (503, "overloaded_error", "no_replica", "no replica of this model is alive"),
    "too_late": (
        503,
        "overloaded_error",
        "too_late",
        "the workflow would not be done by its deadline",
    ),
    "replica_died": (502, "server_error", "replica_died", "the replica died while it answered"),
    "engine_error": (502, "server_error", "engine_error", "the engine failed to answer"),
    "saturated": (503, "overloaded_error", "saturated", "the gateway has too many open calls"),
    "tenant_full": (
        429,
        "rate_limit_error",
        "tenant_full",
        "too many calls of this tenant are open",
    ),
    "pool_full": (429, "rate_limit_error", "pool_full", "too many calls wait for this model"),
    "engines_failing": (
        503,
        "overloaded_error",
        "engines_failing",
        "every replica of this model keeps failing and rests",
    ),
    "timed_out": (504, "server_error", "timed_out", "the answer took too long"),
}


Refusal: TypeAlias = tuple[int, bytes, list[tuple[bytes, bytes]]]
SHUT_DOWN_RETRY_S = 1.0


_FINAL = frozenset({"replica_died", "engine_error"})
"""Reasons after which the gateway has tried what can be tried: SDKs shall not start over."""


def refusal(
    reason: Reason, *, detail: str, retry_after_s: float | None, tried: bool = False
) -> Refusal:
    """Status, body and headers of a call that was refused or broke.

    Args:
        reason: Why.
        detail: Ends the message.
        retry_after_s: When it is worth trying again.
        tried: Whether the gateway has tried again itself.
    """
    status, kind, code, text = _REJECTIONS[reason]
    message = f"{text}{detail}"
    headers = []
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(retry_after_s))))
        headers.append((b"retry-after-ms", b"%d" % max(1, round(retry_after_s * 1000))))
    if reason == "timed_out" or (tried and reason in _FINAL):
        headers.append((b"x-should-retry", b"false"))
    return status, error_body(message, kind, code=code), headers


def shut_down() -> Refusal:
    """Status, body and headers of a call that the gateway will not serve, as it ends."""
    message = "the gateway is shutting down: try another one"
    body = error_body(message, "overloaded_error", code="shutting_down")
    return 503, body, [(b"retry-after", b"1"), (b"retry-after-ms", b"1000")]


def starting_again() -> Refusal:
    """Status, body and headers of a call that comes while the scheduler is started again."""
    message = "the scheduler is being started again: try again in a second"
    body = error_body(message, "overloaded_error", code="starting_again")
    return 503, body, [(b"retry-after", b"1"), (b"retry-after-ms", b"1000")]


def internal_error() -> tuple[int, bytes]:
    """Status and body of a call that met a fault of ours."""
    body = error_body("internal error; the log says more", "server_error", code="internal")
    return 500, body


def caller_error(error: CallerError) -> tuple[int, bytes]:
    """Status and body of a mistake of the caller's."""
    return error.status, error_body(
        str(error), error.error_type, code=error.code, param=error.param
    )


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> bytes:
    """OpenAI's error object."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


def error_message(body: bytes) -> str:
    """Read what an error body says, whoever wrote it.

    >>> error_message(error_body("no", "server_error")), error_message(b"<html>")
    ('no', '<html>')
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        fields = None
    error = fields.get("error", fields) if isinstance(fields, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if isinstance(message, str):
        return message
    return body[:1000].decode(errors="replace") or "the engine gave no reason"


def phrase(status: int) -> bytes:
    """Return the words beside a status, also of one that HTTP does not name.

    >>> phrase(404), phrase(529)
    (b'Not Found', b'Overloaded')
    """
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"Overloaded" if status == 529 else b"Unknown"


def response(
    status: int,
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    content_type: bytes = b"application/json",
    close: bool = False,
) -> bytes:
    """Serialise a whole HTTP/1.1 response."""
    lines = [
        b"HTTP/1.1 %d %s" % (status, phrase(status)),
        b"content-type: " + content_type,
        b"content-length: %d" % len(body),
        *(name + b": " + value for name, value in headers),
    ]
    if close:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
