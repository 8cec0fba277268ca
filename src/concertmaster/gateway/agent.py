"""Connections from agents: HTTP/1.1 in, an answer out, one exchange at a time on each."""

import asyncio
from collections import deque
from typing import NamedTuple, Protocol, cast

import httptools

from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.openai_api import error_body, response

_MAX_PIPELINED = 16
_MAX_HEADER_BYTES = 65_536
_LINGER_S = 1.0
"""How long a refused sender is read and ignored, so that it gets to see why."""


class Message(NamedTuple):
    """One HTTP request as it was read; header names are lower case."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool


class Desk(Protocol):
    """Who takes the messages of agents."""

    max_body_bytes: int

    def take(self, agent: "AgentConnection", message: Message) -> None:
        """Begin to answer; ``agent.finished`` ends it."""

    def opened(self, agent: "AgentConnection") -> None:
        """Note a connection."""

    def lost(self, agent: "AgentConnection") -> None:
        """Note that the agent is gone, perhaps in the middle of an exchange."""


class AgentConnection(asyncio.Protocol):
    """One connection from an agent."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[Message] = deque()
        self._transport: asyncio.Transport | None = None
        self._keep_alive = True
        self._closing = False
        self.busy = False
        self.chunked = False
        self.exchange: Exchange | None = None
        self.on_message_begin()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; asyncio and uvloop set TCP_NODELAY themselves."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._desk.opened(self)

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Start a request."""
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Collect the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; of a repeated one the values are joined, as HTTP allows."""
        name = name.lower()
        self._header_bytes += len(name) + len(value)
        known = self._headers.get(name)
        self._headers[name] = value if known is None else known + b", " + value

    def on_headers_complete(self) -> None:
        """Refuse what is too large before its body is read."""
        length = self._headers.get(b"content-length", b"0")
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse(431, f"headers: expected at most {_MAX_HEADER_BYTES} bytes")
        elif length.isdigit() and int(length) > self._desk.max_body_bytes:
            self._refuse_body(int(length))
        elif self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        """Collect the body up to the limit."""
        self._body_bytes += len(part)
        if self._body_bytes > self._desk.max_body_bytes:
            self._refuse_body(self._body_bytes)
        elif not self._closing:
            self._body.append(part)

    def on_message_complete(self) -> None:
        """Hand the message over, in turn."""
        if self._closing:
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._ready.append(
            Message(
                self._parser.get_method(),
                self._target,
                self._headers,
                body,
                self._parser.should_keep_alive(),
            )
        )
        if len(self._ready) > _MAX_PIPELINED:
            self.abort()

    # asyncio callbacks

    def data_received(self, data: bytes) -> None:
        """Read on, and begin with the next message if none is being answered."""
        if self._closing:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "upgrade: expected plain HTTP/1.1")
        except httptools.HttpParserError as error:
            self._refuse(400, f"request: expected HTTP/1.1, found {error}")
        if self._ready and not self.busy:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the desk, which cancels what is under way."""
        self._closing = True
        self._desk.lost(self)

    def pause_writing(self) -> None:
        """Slow the engine down: the agent does not keep up."""
        if self.exchange is not None and self.exchange.engine is not None:
            self.exchange.engine.pause()

    def resume_writing(self) -> None:
        """Let the engine go on."""
        if self.exchange is not None and self.exchange.engine is not None:
            self.exchange.engine.resume()

    # Answers

    @property
    def gone(self) -> bool:
        """True once nothing more can be sent."""
        return self._closing

    def _next(self) -> None:
        message = self._ready.popleft()
        self.busy = True
        self._keep_alive = message.keep_alive
        self._desk.take(self, message)

    def write(self, data: bytes) -> None:
        """Send bytes on, as they are."""
        if self._transport is not None and not self._closing:
            self._transport.write(data)

    def answer(self, data: bytes) -> None:
        """Send a whole response of our own."""
        self.write(data)
        self.finished(keep_alive=True)

    def finished(self, *, keep_alive: bool) -> None:
        """End the exchange and take the next message, or close."""
        self.busy = False
        self.exchange = None
        if self._transport is None or self._closing:
            return
        if not (keep_alive and self._keep_alive):
            self._closing = True
            self._transport.close()
        elif self._ready:
            self._next()

    def abort(self) -> None:
        """Cut the connection: the answer broke and must not look finished."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close once what was written is out."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def _refuse_body(self, found_bytes: int) -> None:
        limit = self._desk.max_body_bytes
        self._refuse(
            413, f"body: expected at most {limit} bytes, found {found_bytes}", "request_too_large"
        )

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        if self._closing:
            return
        body = error_body(message, "invalid_request_error", code=code)
        self.write(response(status, body, close=True))
        self._closing = True
        asyncio.get_running_loop().call_later(_LINGER_S, self.close)
