"""What a client asks of the emulated engine, and how long the answer will be."""

import math
import random
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, TypeVar

import msgspec

from concertmaster.core.errors import InvalidRequestError, ModelNotFoundError
from concertmaster.core.request import RequestId
from concertmaster.engines.emulator import Emulator, FinishReason
from concertmaster.physics.batching import EngineCall

_CHARACTERS_A_CHUNK = 1024
_BYTES_A_TOKEN = 4

Kind = Literal["chat.completion", "text_completion"]


class StreamOptions(msgspec.Struct):
    """How a stream ends."""

    include_usage: bool = False


class CompletionBody(msgspec.Struct):
    """What both kinds of completion take; other fields are accepted and ignored."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ChatBody(CompletionBody, kw_only=True):
    """A chat completion."""

    messages: list[dict[str, object]]
    tools: list[object] | None = None

    def text(self) -> str:
        """Flatten tools and messages, in the order in which a template puts them."""
        parts = [msgspec.json.encode(self.tools).decode()] if self.tools else []
        for message in self.messages:
            parts.append(f"{message.get('role')}\n{_plain(message.get('content'))}")
            if "tool_calls" in message:
                parts.append(msgspec.json.encode(message["tool_calls"]).decode())
        return "\n".join(parts)


class TextBody(CompletionBody, kw_only=True):
    """A text completion."""

    prompt: str | list[int | str]

    def text(self) -> str:
        """Give the one prompt."""
        match self.prompt:
            case str():
                return self.prompt
            case [str() as only]:
                return only
            case [int(), *_]:
                return "".join(f"{token:>{_BYTES_A_TOKEN}}" for token in self.prompt)
            case _:
                raise InvalidRequestError(
                    "prompt must be a string, a list of one string, or a list of token ids",
                    param="prompt",
                )


class TokenizeBody(msgspec.Struct):
    """Text or messages to count the tokens of."""

    prompt: str | None = None
    messages: list[dict[str, object]] | None = None

    def text(self) -> str:
        """Flatten what is given."""
        if self.messages is not None:
            return ChatBody(messages=self.messages).text()
        return self.prompt or ""


_AnyBody = TypeVar("_AnyBody", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A call, and the form in which its answer is wanted."""

    call: EngineCall
    finish_reason: FinishReason
    kind: Kind
    streams: bool
    include_usage: bool


def parse(data: bytes, kind: type[_AnyBody]) -> _AnyBody:
    """Read a JSON body.

    Raises:
        InvalidRequestError: It is not JSON, or a field has the wrong type.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"request body: {error}") from None


def tokens_in(text: str) -> int:
    """Count tokens as if each were four bytes; at least one.

    >>> tokens_in("How long is this?")
    5
    """
    return max(1, math.ceil(len(text.encode()) / _BYTES_A_TOKEN))


def prefix_hashes(text: str) -> tuple[int, ...]:
    """Hash each whole chunk of text together with all that is before it.

    >>> a, b = prefix_hashes("x" * 2048), prefix_hashes("x" * 1024 + "y" * 1024)
    >>> (a[0] == b[0], a[1] == b[1])
    (True, False)
    """
    hashes, digest = [], b""
    for start in range(0, len(text) - _CHARACTERS_A_CHUNK + 1, _CHARACTERS_A_CHUNK):
        chunk = text[start : start + _CHARACTERS_A_CHUNK]
        digest = blake2b(chunk.encode(), key=digest, digest_size=8).digest()
        hashes.append(int.from_bytes(digest))
    return tuple(hashes)


def read_ask(
    emulator: Emulator, request_id: str, kind: Kind, headers: dict[str, str], data: bytes
) -> Ask:
    """Turn a request into a call of known length.

    Raises:
        CallerError: vLLM would refuse it too, or an ``x-emulator-`` header is no number.
    """
    body: ChatBody | TextBody = (
        parse(data, ChatBody) if kind == "chat.completion" else parse(data, TextBody)
    )
    priority = body.priority or _header_priority(headers)
    _check(emulator, body, priority)
    text = body.text()
    prompt_tokens = _header_int(headers, "x-emulator-prompt-tokens") or tokens_in(text)
    most_tokens = _most_output_tokens(emulator, body, prompt_tokens)
    natural_tokens = _natural_output_tokens(emulator, body, headers, text)
    call = EngineCall(
        request_id=RequestId(request_id),
        prompt_tokens=prompt_tokens,
        output_tokens=min(natural_tokens, most_tokens),
        prefix_hashes=_header_hashes(headers) or prefix_hashes(text),
        priority=priority,
    )
    ran_to_cap = natural_tokens > most_tokens or (body.ignore_eos and natural_tokens == most_tokens)
    return Ask(
        call=call,
        finish_reason="length" if ran_to_cap else "stop",
        kind=kind,
        streams=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _check(emulator: Emulator, body: CompletionBody, priority: int) -> None:
    if body.model is not None and body.model != emulator.model_name:
        raise ModelNotFoundError(f"The model `{body.model}` does not exist.", param="model")
    if body.n not in {None, 1}:
        raise InvalidRequestError(f"n must be 1: one answer a request, got {body.n}.", param="n")
    if priority and emulator.settings.scheduling == "fcfs":
        raise InvalidRequestError(
            f"Got priority {priority} but Priority scheduling is not enabled.",
            param="priority",
        )


def _most_output_tokens(emulator: Emulator, body: CompletionBody, prompt_tokens: int) -> int:
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if asked is not None and asked < 1:
        raise InvalidRequestError(
            f"max_tokens must be at least 1, got {asked}.", param="max_tokens"
        )
    if asked is not None and body.min_tokens > asked:
        raise InvalidRequestError(
            f"min_tokens must be less than or equal to max_tokens={asked}, got {body.min_tokens}.",
            param="min_tokens",
        )
    room_tokens = emulator.max_model_tokens - prompt_tokens
    if room_tokens < (asked or 1):
        raise InvalidRequestError(
            f"This model's maximum context length is {emulator.max_model_tokens} tokens. However, "
            f"you requested {asked or 1} output tokens and your prompt contains {prompt_tokens} "
            f"input tokens. Please reduce the length of the input prompt or the number of "
            f"requested output tokens.",
            param="input_tokens",
        )
    return asked or room_tokens


def _natural_output_tokens(
    emulator: Emulator, body: CompletionBody, headers: dict[str, str], text: str
) -> int:
    """Decide how many tokens the model would generate if nothing stopped it."""
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if body.ignore_eos and asked is not None:
        return asked
    named = _named_output_tokens(headers, emulator.model_name)
    if named is None:
        digest = blake2b(text.encode(), key=b"%d" % emulator.seed, digest_size=8).digest()
        drawn = random.Random(int.from_bytes(digest)).lognormvariate(0.0, emulator.output_sigma)
        named = max(1, round(emulator.median_output_tokens * drawn))
    return max(named, body.min_tokens)


def _named_output_tokens(headers: dict[str, str], model: str) -> int | None:
    """Read ``x-emulator-output-tokens``: ``120`` or ``120;MODEL=98;…``, the model's own first."""
    name = "x-emulator-output-tokens"
    value = headers.get(name)
    if value is None:
        return None
    shared, *own = value.split(";")
    by_model = dict(part.split("=", 1) for part in own if "=" in part)
    return _header_int({name: by_model.get(model, shared)}, name)


def _header_priority(headers: dict[str, str]) -> int:
    name = "x-vllm-priority"
    try:
        return int(headers.get(name, "0"))
    except ValueError:
        raise InvalidRequestError(
            f"{name}: expected an integer, got {headers[name]!r}", param="priority"
        ) from None


def _header_int(headers: dict[str, str], name: str) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InvalidRequestError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


def _header_hashes(headers: dict[str, str]) -> tuple[int, ...]:
    name = "x-emulator-prefix"
    try:
        return tuple(int(part) for part in headers.get(name, "").split(",") if part.strip())
    except ValueError:
        raise InvalidRequestError(
            f"{name}: expected integers with commas between them, got {headers[name]!r}"
        ) from None


def _plain(content: object) -> str:
    """Flatten a message's content: text, or parts of which some are text."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return "".join(_plain(part) for part in content)
        case {"text": str() as text}:
            return text
        case _:
            return msgspec.json.encode(content).decode()
