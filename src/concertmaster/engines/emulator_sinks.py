"""Answers of the emulated engine in the form in which vLLM sends them."""

from datetime import UTC, datetime

import msgspec

from concertmaster.engines.emulator import FinishReason
from concertmaster.engines.emulator_calls import Ask
from concertmaster.engines.http_server import HttpExchange

_WORDS = (
    *(" the", " plan", " is", " to", " read", " each", " file", " and", " then", " run"),
    *(" tests", " until", " all", " of", " them", " pass"),
)
_SSE_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)


class WholeAnswer:
    """Sends one JSON body when the answer is complete."""

    streams = False
    congested = False

    def __init__(self, exchange: HttpExchange, ask: Ask, answer_id: str, model_name: str) -> None:
        self._exchange = exchange
        self._ask = ask
        self._head = {"id": answer_id, "created": _created(), "model": model_name}

    def deliver(self, tokens: int, finish_reason: FinishReason | None) -> None:
        """Wait for the last time, then send."""
        if finish_reason is None:
            return
        text = "".join(_WORDS[token % len(_WORDS)] for token in range(tokens))
        choice: dict[str, object] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
        }
        if self._ask.kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text, "tool_calls": []}
        else:
            choice["text"] = text
        body = {
            **self._head,
            "object": self._ask.kind,
            "choices": [choice],
            "usage": _usage(self._ask, tokens),
        }
        self._exchange.respond(200, msgspec.json.encode(body))

    def cut(self) -> None:
        """Close the connection without an answer."""
        self._exchange.abort()


class StreamedAnswer:
    """Sends one server-sent event a token; those due at once go in one write."""

    streams = True

    def __init__(self, exchange: HttpExchange, ask: Ask, answer_id: str, model_name: str) -> None:
        self._exchange = exchange
        self._ask = ask
        self._sent = 0
        chat = ask.kind == "chat.completion"
        kind = "chat.completion.chunk" if chat else ask.kind
        head = {"id": answer_id, "object": kind, "created": _created(), "model": model_name}
        self._head = b"data: " + msgspec.json.encode(head)[:-1]
        opening, closing = (b'"delta":{"content":"', b'"}') if chat else (b'"text":"', b'"')
        start = self._head + b',"choices":[{"index":0,'
        rest = closing + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._events = [start + opening + word.encode() + rest for word in _WORDS]
        self._opening = b""
        if chat:
            self._opening = (
                start + b'"delta":{"role":"assistant","content":""},'
                b'"logprobs":null,"finish_reason":null}]}\n\n'
            )
        exchange.start(200, _SSE_HEADERS)

    @property
    def congested(self) -> bool:
        """Whether the client reads too slowly."""
        return self._exchange.congested

    def deliver(self, tokens: int, finish_reason: FinishReason | None) -> None:
        """Send the events that are new."""
        events = self._events
        parts = [events[token % len(events)] for token in range(self._sent, tokens)]
        if not self._sent and parts:
            parts.insert(0, self._opening)
        self._sent = tokens
        if finish_reason is None:
            self._exchange.write(b"".join(parts))
        else:
            self._close(parts, finish_reason)

    def cut(self) -> None:
        """Close the connection in the middle of the stream."""
        self._exchange.abort()

    def _close(self, parts: list[bytes], finish_reason: FinishReason) -> None:
        """Put the reason into the last token's event; then usage, if wanted, and the end."""
        if not parts:
            parts.append(self._events[0].replace(_WORDS[0].encode(), b""))
        reason = b'"finish_reason":"%b","stop_reason":null' % finish_reason.encode()
        parts[-1] = parts[-1].replace(b'"finish_reason":null', reason)
        if self._ask.include_usage:
            usage = msgspec.json.encode(_usage(self._ask, self._sent))
            parts.append(self._head + b',"choices":[],"usage":' + usage + b"}\n\n")
        parts.append(b"data: [DONE]\n\n")
        self._exchange.end(b"".join(parts))


def _usage(ask: Ask, tokens: int) -> dict[str, object]:
    prompt_tokens = ask.call.prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + tokens,
        "completion_tokens": tokens,
        "prompt_tokens_details": None,
    }


def _created() -> int:
    return int(datetime.now(tz=UTC).timestamp())
