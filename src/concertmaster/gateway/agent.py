"""Connections from agents: HTTP/1.1 in, an answer out, one exchange at a time on each."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, cast

import httptools

from concertmaster.core.errors import CallerError
from concertmaster.gateway.apis.anthropic_answer import worded_response
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.openai_api import caller_error, error_body, internal_error
from concertmaster.gateway.quotas import Quota

_log = logging.getLogger(__name__)

_MAX_PIPELINED = 16
_MAX_HEADER_BYTES = 65_536
_MAX_HEADERS = 128
_OFFER_HEADERS = frozenset({b"connection", b"http2-settings", b"upgrade"})
_LINGER_S = 1.0
"""How long a refused sender is read and ignored, so that it gets to see why."""


class Message(NamedTuple):
    """One HTTP request as it was read; header names are lower case.

    Attributes:
        takes_chunks: Whether its answer may come in chunks, as since HTTP/1.1.
        quota: The account of who sent it; ``None`` without keys.
    """

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool
    takes_chunks: bool = True
    quota: Quota | None = None


Judge = Callable[[bytes, dict[bytes, bytes]], Quota | None]
"""Told the target and headers of a message: returns whose account it is on, takes out what
proves that, and raises ``CallerError`` if it may not come in."""


class Patience(NamedTuple):
    """Wall seconds for the two parts of a message to come."""

    head_s: float
    body_s: float


PATIENCE = Patience(10.0, 60.0)


class Desk(Protocol):
    """Who takes the messages of agents."""

    max_body_bytes: int

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what to call a message: its sender's own name for it, else a fresh one."""

    def take(self, agent: "AgentConnection", message: Message) -> None:
        """Begin to answer; ``agent.finished`` ends it."""

    def opened(self, agent: "AgentConnection") -> None:
        """Note a connection."""

    def lost(self, agent: "AgentConnection") -> None:
        """Note that the agent is gone, perhaps in the middle of an exchange."""


class AgentConnection(asyncio.Protocol):
    """One connection from an agent.

    Args:
        desk: Takes its messages.
        judge: Asked of each before its body is read; ``None`` lets all in.
    """

    def __init__(self, desk: Desk, judge: Judge | None = None) -> None:
        self._desk = desk
        self._judge = judge
        self._quota: Quota | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[Message] = deque()
        self._transport: asyncio.Transport | None = None
        self._keep_alive = True
        self._closing = self._paused = self._spoken = False
        self._refusal: bytes | None = None
        self.busy = False
        self.exchange: Exchange | None = None
        self._since_s = 0.0
        self.on_message_begin()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; asyncio and uvloop set TCP_NODELAY themselves."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._since_s = asyncio.get_running_loop().time()
        self._desk.opened(self)

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Start a request."""
        self._in_head = self._begun = True
        self._head_bytes = self._unended_bytes = self._fields = 0
        self._whole = False
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Collect the target."""
        self._target += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header; of a repeated one the values are joined, as HTTP allows."""
        name = name.lower()
        self._head_bytes += len(name) + len(value)
        self._fields += 1
        known = self._headers.get(name)
        self._headers[name] = value if known is None else known + b", " + value

    def on_headers_complete(self) -> None:
        """Refuse what is too large before its body is read."""
        self._in_head = False
        self._since_s = 0.0
        length = self._headers.get(b"content-length", b"0")
        if self._head_bytes > _MAX_HEADER_BYTES:
            self._refuse_head()
        elif self._fields > _MAX_HEADERS:
            self._refuse(431, f"headers: expected at most {_MAX_HEADERS}, found {self._fields}")
        elif self._judge is not None and not self._lets_in(self._judge):
            pass
        elif length.isdigit() and int(length) > self._desk.max_body_bytes:
            self._refuse_body(int(length))
        elif self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _lets_in(self, judge: Judge) -> bool:
        try:
            self._quota = judge(self._target, self._headers)
        except CallerError as error:
            if self._refusal is None:
                name = self.name(self._headers)
                answer = caller_error(error)
                self._refusal = worded_response(self._target, name, *answer, error.headers)
            return False
        return True

    def on_body(self, part: bytes) -> None:
        """Collect the body up to the limit."""
        self._body_bytes += len(part)
        if self._body_bytes > self._desk.max_body_bytes:
            self._refuse_body(self._body_bytes)
        elif self._refusal is None:
            self._body.append(part)

    def on_message_complete(self) -> None:
        """Hand the message over, in turn."""
        self._whole = True
        self._since_s = 0.0
        if self._refusal is not None:
            return
        parser = self._parser
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        keep_alive, takes_chunks = parser.should_keep_alive(), parser.get_http_version() != "1.0"
        self._ready.append(
            Message(
                parser.get_method(),
                self._target,
                self._headers,
                body,
                keep_alive,
                takes_chunks,
                self._quota,
            )
        )
        transport = self._transport
        if len(self._ready) >= _MAX_PIPELINED and transport and not transport.is_closing():
            self._paused = True
            transport.pause_reading()

    # asyncio callbacks

    def data_received(self, data: bytes) -> None:
        """Read on, and begin with the next message if none is being answered."""
        if self._closing or self._refusal is not None:
            return
        self._begun = False
        self._spoken = True
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(400, f"request: expected HTTP/1.1, found {error}")
        if self._in_head and not self._begun:
            self._unended_bytes += len(data)
            if self._unended_bytes > _MAX_HEADER_BYTES:
                self._refuse_head()
        if not self._whole and not self._since_s:
            self._since_s = asyncio.get_running_loop().time()
        self._go_on()

    def _feed(self, data: bytes) -> None:
        """Parse; an offer of another protocol is taken out, as the parser would stop there."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self._refusal is not None:
                return
            message = self._ready.pop()
            if b"upgrade" not in message.headers:
                raise httptools.HttpParserError("a request to connect elsewhere") from None
            kept = {k: v for k, v in message.headers.items() if k not in _OFFER_HEADERS}
            lines = b"".join(b"%b: %b\r\n" % header for header in kept.items())
            head = b"%b %b HTTP/1.1\r\n%b\r\n" % (message.method, message.target, lines)
            self._parser = httptools.HttpRequestParser(self)
            judge, self._judge = self._judge, None  # it has been let in, and its proof taken out
            try:
                self._feed(head)
            finally:
                self._judge = judge
            self._feed(data[offer.args[0] :])

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the desk, which cancels what is under way."""
        self._closing = True
        self._desk.lost(self)

    def hurry(self, now_s: float, patience: Patience) -> None:
        """Refuse a message that has been coming for too long; close where none ever came.

        While an answer is under way, or reading is paused, its time does not begin.
        """
        if not self._since_s or self._closing:
            return
        if self.busy or self._paused:
            self._since_s = now_s
            return
        limit_s = patience.head_s if self._in_head else patience.body_s
        if now_s - self._since_s <= limit_s:
            return
        if not self._spoken:
            self.close()
            return
        part = "headers" if self._in_head else "body"
        self._refuse(408, f"{part}: expected within {limit_s:g} s", "request_timeout")
        self._go_on()

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

    def _go_on(self) -> None:
        """Take the next message if none is being answered; then refuse what cannot be read."""
        if self.busy or self._closing:
            return
        if self._ready:
            self._next(self._ready.popleft())
        elif self._refusal is not None:
            self.write(self._refusal)
            self._closing = True
            asyncio.get_running_loop().call_later(_LINGER_S, self.close)

    def _next(self, message: Message) -> None:
        transport = self._transport
        if self._paused and len(self._ready) < _MAX_PIPELINED:
            self._paused = False
            if transport and not transport.is_closing():
                transport.resume_reading()
        self.busy = True
        self._keep_alive = message.keep_alive
        try:
            self._desk.take(self, message)
        except Exception:  # noqa: BLE001  # one call must not stop the gateway
            _log.exception("%r %r failed", message.method, message.target)
            self.fail(message)

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what a message is called in an answer that no call stands behind."""
        return self._desk.name(headers)

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
        else:
            self._go_on()

    def fail(self, message: Message) -> None:
        """Answer 500 for a fault of our own and close: nothing is known of the call's state."""
        if self.exchange is not None and (self.exchange.started or self.exchange.held):
            self.abort()
            return
        name = self.name(message.headers)
        self.write(worded_response(message.target, name, *internal_error()))
        self.close()

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

    def _refuse_head(self) -> None:
        self._refuse(431, f"headers: expected at most {_MAX_HEADER_BYTES} bytes")

    def _refuse_body(self, found_bytes: int) -> None:
        limit = self._desk.max_body_bytes
        self._refuse(
            413, f"body: expected at most {limit} bytes, found {found_bytes}", "request_too_large"
        )

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        """Read no further; what was read before is still answered, in turn."""
        self._body = []
        if self._refusal is None:
            body = error_body(message, "invalid_request_error", code=code)
            name = self.name(self._headers)
            self._refusal = worded_response(self._target, name, status, body)


async def hurry(agents: Mapping[AgentConnection, None], patience: Patience) -> None:
    """Look at all connections now and then, for ever: cheaper than a timer for each message."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(1.0, *patience) / 2)
        for agent in list(agents):
            agent.hurry(loop.time(), patience)


async def see_off(agents: Mapping[AgentConnection, None]) -> None:
    """Close all connections once their agents have read their answers, or soon after."""
    for agent in list(agents):
        agent.close()
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _LINGER_S
    while agents and loop.time() < deadline_s:  # noqa: ASYNC110  # polled once a life
        await asyncio.sleep(0.01)
    for agent in list(agents):
        agent.abort()
