"""A small HTTP/1.1 server on httptools: whole requests in, bytes or a chunked stream out.

A handler is a plain function that is called with an ``HttpExchange`` once the request's body
is there. It answers at once, or keeps the exchange and answers later, from any callback of
the same event loop. Requests that a client pipelines are handled one after the other.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from http import HTTPStatus
from typing import Self, cast
from urllib.parse import parse_qsl

import httptools
import msgspec

Handler = Callable[["HttpExchange"], None]
Headers = Iterable[tuple[str, str]]

_JSON = "application/json"
_LINGER_S = 1.0
_MOST_PIPELINED = 16


class HttpExchange:
    """One request, and the means to answer it.

    Whatever is sent after the client went away, or after the end, is dropped.

    Attributes:
        method: In capitals.
        path: Without the query.
        headers: Names in lower case; of equal names the last.
        on_disconnect: Called once if the client goes away before the answer is complete.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_keep_alive",
        "_query",
        "body",
        "done",
        "headers",
        "method",
        "on_disconnect",
        "path",
        "started",
    )

    def __init__(
        self,
        connection: "_Connection",
        method: str,
        target: str,
        headers: dict[str, str],
        body: bytes,
        *,
        keep_alive: bool,
        chunked: bool,
    ) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        self._chunked = chunked
        self.method = method
        self.path, _, self._query = target.partition("?")
        self.headers = headers
        self.body = body
        self.on_disconnect: Callable[[], None] | None = None
        self.started = False
        self.done = False

    @property
    def query(self) -> dict[str, str]:
        """Parameters after the question mark; of equal names the last."""
        return dict(parse_qsl(self._query, keep_blank_values=True))

    @property
    def congested(self) -> bool:
        """Whether the client reads more slowly than it is sent to."""
        return self._connection.congested

    def respond(
        self, status: int, body: bytes = b"", content_type: str = _JSON, headers: Headers = ()
    ) -> None:
        """Send a whole answer."""
        if self.done or self.started:
            return
        length = (("content-length", str(len(body))),)
        kind = (("content-type", content_type),) if body else ()
        head = self._head(status, (*kind, *length, *headers))
        self._finish(head if self.method == "HEAD" else head + body)

    def start(self, status: int, headers: Headers) -> None:
        """Begin a streamed answer; ``write`` and ``end`` follow."""
        if self.done or self.started:
            return
        self.started = True
        framing = (("transfer-encoding", "chunked"),) if self._chunked else ()
        self._connection.write(self._head(status, (*headers, *framing)))

    def write(self, data: bytes) -> None:
        """Send a piece of a streamed answer."""
        if data and self.started and not self.done:
            self._connection.write(self._frame(data))

    def end(self, data: bytes = b"") -> None:
        """Send the last piece of a streamed answer."""
        if self.started and not self.done:
            tail = b"0\r\n\r\n" if self._chunked else b""
            self._finish((self._frame(data) if data else b"") + tail)

    def abort(self) -> None:
        """Cut the connection, so that the answer does not look complete."""
        self.done = True
        self._connection.abort()

    def lost(self) -> None:
        """Note that the client is gone; the connection calls it."""
        if not self.done:
            self.done = True
            if self.on_disconnect is not None:
                self.on_disconnect()

    def _head(self, status: int, headers: Headers) -> bytes:
        lines = [_status_line(status), *(f"{name}: {value}\r\n" for name, value in headers)]
        if not self._keep_alive:
            lines.append("connection: close\r\n")
        return ("".join(lines) + "\r\n").encode("latin-1")

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _finish(self, data: bytes) -> None:
        self.done = True
        self._connection.write(data)
        self._connection.finished(keep_alive=self._keep_alive)


class HttpServer:
    """Listens, and calls the handler for each request.

    Use it as an async context manager, or ``close`` and ``wait_closed`` it.
    """

    def __init__(self, handler: Handler, *, max_body_bytes: int = 32 * 2**20) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self._connections: set[_Connection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, port, backlog=2048)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server is not None, "the server has not started"
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening and cut all connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()

    async def wait_closed(self) -> None:
        """Wait until the last connection is gone."""
        await self._empty.wait()
        if self._server is not None:
            await self._server.wait_closed()

    def joined(self, connection: "_Connection") -> None:
        """Note a client; its connection calls it."""
        self._connections.add(connection)
        self._empty.clear()

    def left(self, connection: "_Connection") -> None:
        """Note that a client is gone; its connection calls it."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await self.wait_closed()


class _Connection(asyncio.Protocol):
    """One client. httptools calls the ``on_`` methods while it is fed."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._pending: deque[HttpExchange] = deque()
        self._current: HttpExchange | None = None
        self._refused = False
        self.congested = False
        self.on_message_begin()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._server.joined(self)
        link = transport.get_extra_info("socket")
        if link is not None:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.left(self)
        self._transport = None
        exchanges = [self._current, *self._pending]
        self._current = None
        self._pending.clear()
        for exchange in exchanges:
            if exchange is not None:
                exchange.lost()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is spoken here: the request is answered as it stands
        except httptools.HttpParserError as error:
            self._refuse(400, f"not an HTTP request: {error}")

    def pause_writing(self) -> None:
        self.congested = True

    def resume_writing(self) -> None:
        self.congested = False

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower().decode("latin-1")] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        length = self._headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._server.max_body_bytes:
            self._refuse_body()
        elif self._headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._server.max_body_bytes:
            self._refuse_body()
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        exchange = HttpExchange(
            self,
            self._parser.get_method().decode("latin-1"),
            self._target.decode("latin-1"),
            self._headers,
            b"".join(self._body),
            keep_alive=self._parser.should_keep_alive() and not self._parser.should_upgrade(),
            chunked=self._parser.get_http_version() != "1.0",
        )
        if self._current is None and not self._pending:
            self._handle(exchange)
        else:
            self._pending.append(exchange)
            if len(self._pending) >= _MOST_PIPELINED and self._transport is not None:
                self._transport.pause_reading()

    # What exchanges call.

    def write(self, data: bytes) -> None:
        """Send, if the client is there."""
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Cut the connection; nothing that waits is sent."""
        if self._transport is not None:
            self._transport.abort()

    def finished(self, *, keep_alive: bool) -> None:
        """Go on to the next request, or close."""
        self._current = None
        if self._transport is None:
            return
        if not keep_alive:
            self._transport.close()
        elif self._pending:
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._handle_pending)

    def _handle_pending(self) -> None:
        if self._current is None and self._pending:
            self._handle(self._pending.popleft())

    def _handle(self, exchange: HttpExchange) -> None:
        self._current = exchange
        try:
            self._server.handler(exchange)
        except Exception as error:  # noqa: BLE001  one bad request must not stop the server
            _report(error, exchange)
            if exchange.started:
                exchange.abort()
            else:
                exchange.respond(500, _error_body(500, "internal error; the log says more"))

    def _refuse_body(self) -> None:
        self._refuse(413, f"the body is larger than {self._server.max_body_bytes} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read, and let the client finish sending before it is cut off."""
        if self._refused or self._transport is None:
            return
        self._refused = True
        body = _error_body(status, message)
        head = f"content-type: {_JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.write((_status_line(status) + head).encode() + body)
        asyncio.get_running_loop().call_later(_LINGER_S, self.abort)


@cache
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


def _error_body(status: int, message: str) -> bytes:
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}
    )


def _report(error: Exception, exchange: HttpExchange) -> None:
    message = f"{exchange.method} {exchange.path} failed"
    asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
