"""Connections to engines: kept alive, bytes passed through, the parser only finds the ends."""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from concertmaster.engines.address import Address
from concertmaster.gateway import stream
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.openai_api import completion_tokens, tool_call_ids
from concertmaster.gateway.peers import VLLM, Peer

_MAX_ERROR_BYTES = 65_536
_RETRIED_STATUS = 429
_TAIL_BYTES = 4096
_FRAMED = re.compile(rb"\r\n(content-length|transfer-encoding):")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked")
_OURS = re.compile(rb"\r\n(?:x-request-id:|x-concertmaster-)[^\r]*", re.IGNORECASE)
_OURS_WITH_LIMITS = re.compile(
    rb"\r\n(?:x-request-id:|x-concertmaster-|x-ratelimit-)[^\r]*", re.IGNORECASE
)
_END_OF_FRAME = b"\n\r\n"
"""Last bytes of a chunk that ends a frame: here a frame of our own could follow."""


class Outcomes(Protocol):
    """Who wants to know how exchanges fare."""

    def first_token(self, exchange: Exchange) -> None:
        """Note that the first bytes of a stream are out."""

    def began(self, exchange: Exchange) -> None:
        """Note that the first bytes of an answer that is no stream are out, and more will come."""

    def finished(self, exchange: Exchange, output_tokens: int) -> None:
        """Note that the answer is complete."""

    def broke(self, exchange: Exchange, problem: str, *, alive: bool) -> None:
        """Note a failed attempt; ``alive`` says whether the engine still takes connections."""


class EngineConnection(asyncio.Protocol):
    """One HTTP/1.1 connection to an engine, used by one exchange at a time."""

    def __init__(self, link: "EngineLink") -> None:
        self._link = link
        self._exchange: Exchange | None = None
        self._transport: asyncio.Transport | None = None
        self._reused = False
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    @property
    def is_open(self) -> bool:
        """Whether a request can be written."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange, data: bytes, *, reused: bool) -> None:
        """Write a request and pass its answer on."""
        assert self._transport is not None
        self._exchange = exchange
        self._reused = reused
        self._sent = data
        self._parser = httptools.HttpResponseParser(self)
        self._head = b""
        self._last = b""
        self._interim = 0
        self._ends_with_connection = self._wraps = False
        self._headers_done = self._done = self._refused = self._keep_alive = False
        exchange.engine = self
        self._transport.write(data)

    # httptools callbacks

    def on_headers_complete(self) -> None:
        """Note that the head is whole."""
        self._headers_done = True

    def on_message_complete(self) -> None:
        """Note that the answer is whole, and whether the engine keeps the connection."""
        if self._parser.get_status_code() < 200:  # an interim answer: the real one follows
            self._interim += 1
            self._headers_done = False
            return
        self._done = True
        self._keep_alive = self._parser.should_keep_alive()

    # asyncio callbacks

    def data_received(self, data: bytes) -> None:
        """Pass an engine's bytes on."""
        exchange = self._exchange
        if exchange is None:
            self._close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the engine sent no HTTP: {error}", alive=True)
            return
        exchange.reads += 1
        if exchange.started:
            exchange.caller.write(stream.chunk(data) if self._wraps else data)
        else:
            begun = self._begin_answer(exchange, data)
            if begun is None:
                return
            exchange = begun
        if exchange.streams:
            exchange.tokens += data.count(b"data: ")
        if b'"tool_calls"' in data:
            exchange.tool_call_ids += tool_call_ids(data)
        if self._done:
            self._finish(exchange, data)
        else:
            self._last = data

    def _begin_answer(self, exchange: Exchange, data: bytes) -> Exchange | None:
        """Hold the head back until it is whole and known to be no retriable error.

        Returns:
            Whose answer has begun, if it has: of two attempts at a call, only the first begins.
        """
        self._head += data
        while self._interim:
            self._head = self._head.partition(b"\r\n\r\n")[2]
            self._interim -= 1
        if not self._headers_done:
            return None
        if not self._refused:
            exchange.status = self._parser.get_status_code()
            self._refused = _is_refusal(exchange)
        if self._refused:
            if self._done:
                self._refuse(exchange)
            return None
        end = self._head.find(b"\r\n\r\n") + 2
        if exchange.streams and not self._done and len(self._head) == end + 2:
            return None  # engines answer 200 before they begin: until a token is out, retry
        exchange = self._exchange = exchange.first()
        head = self._head[:end].lower()
        self._ends_with_connection = not _FRAMED.search(head)
        if exchange.held:
            begun = self._follow(exchange, head, self._head[end + 2 :])
            return exchange if begun else None
        ours = _OURS if exchange.quota is None else _OURS_WITH_LIMITS
        if exchange.response_headers and ours.search(head):
            self._head = ours.sub(b"", self._head[:end]) + self._head[end:]
            end = self._head.find(b"\r\n\r\n") + 2
        exchange.caller.write(self._head[:end] + exchange.response_headers + self._head[end:])
        exchange.started = True
        self._tell_begun(exchange)
        return exchange

    def _tell_begun(self, exchange: Exchange) -> None:
        """Tell of an answer's first bytes; not where they are the last as well."""
        if exchange.streams and exchange.status == 200:
            self._link.outcomes.first_token(exchange)
        elif not self._done:
            self._link.outcomes.began(exchange)

    def _follow(self, exchange: Exchange, head: bytes, body: bytes) -> bool:
        """Let an answer follow the head that the caller got while it was held.

        One that is no stream is held back until it is whole, and becomes an event.
        """
        framed = _CHUNKED.search(head) is not None
        if exchange.status != 200 and not self._done:
            return False
        self._wraps = not framed or exchange.status != 200
        if exchange.status != 200:
            body = stream.error_event(stream.unchunked(body) if framed else body)
        exchange.caller.write(stream.chunk(body) if self._wraps else body)
        exchange.started = True
        if exchange.status == 200:
            self._link.outcomes.first_token(exchange)
        return True

    def _finish(self, exchange: Exchange, last: bytes) -> None:
        if self._wraps:
            exchange.caller.write(stream.END)
        keep_alive = self._keep_alive or exchange.held
        self._exchange = exchange.engine = None
        tokens = completion_tokens((self._last + last)[-_TAIL_BYTES:])
        if tokens is None:
            tokens = max(1, exchange.tokens - 2) if exchange.streams else 1
        if self._keep_alive:
            self.resume()
            self._link.give_back(self)
        else:
            self._close()
        try:
            self._link.outcomes.finished(exchange, tokens)
        finally:
            exchange.caller.finished(keep_alive=keep_alive)

    def _refuse(self, exchange: Exchange) -> None:
        body = self._head.partition(b"\r\n\r\n")[2][:_MAX_ERROR_BYTES]
        self._exchange = exchange.engine = None
        if self._keep_alive:
            self._link.give_back(self)
        else:
            self._close()
        problem = f"HTTP {exchange.status}: {body[:300].decode(errors='replace')}"
        self._link.outcomes.broke(exchange, problem, alive=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report a cut answer; a kept connection that was already dead is replaced in silence."""
        self._link.forget(self)
        exchange = self._exchange
        if exchange is None:
            return
        if self._reused and not self._head and not exchange.started:
            self._exchange = exchange.engine = None
            self._link.send_fresh(exchange, self._sent)
            return
        if exc is None and exchange.started and self._ends_with_connection:
            self._keep_alive = False
            self._finish(exchange, b"")
            return
        self._fail("the engine closed the connection", alive=True)

    def _fail(self, problem: str, *, alive: bool) -> None:
        exchange = self._exchange
        self._exchange = None
        self._close()
        if exchange is not None:
            exchange.engine = None
            if exchange.started and exchange.streams and self._last.endswith(_END_OF_FRAME):
                frame = self._link.error_frame(problem)
                exchange.caller.write(b"%x\r\n" % len(frame) + frame + b"\r\n")
            self._link.outcomes.broke(exchange, problem, alive=alive)

    # EngineSide

    def cancel(self) -> None:
        """Drop the connection, so that the engine stops working for nobody."""
        if self._exchange is not None:
            self._exchange.engine = None
            self._exchange = None
        self._close()

    def give_up(self, problem: str) -> None:
        """Drop it too, and end the attempt: where an answer has begun, with an error."""
        self._fail(problem, alive=True)

    @property
    def paused(self) -> bool:
        """Whether it is the caller who is waited for."""
        return self._paused

    def pause(self) -> None:
        """Stop reading: the caller is slow."""
        if self._transport is not None and self.is_open:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused and self._transport is not None and self.is_open:
            self._paused = False
            self._transport.resume_reading()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_refusal(exchange: Exchange) -> bool:
    """Whether another attempt may follow: of a hedge, whatever is no answer is dropped."""
    status = exchange.status
    is_error = status >= 500 or status == _RETRIED_STATUS
    return is_error or (exchange.lead is not None and status >= 300)


class EngineLink:
    """All connections to one replica."""

    def __init__(
        self,
        url: str,
        outcomes: Outcomes,
        error_frame: Callable[[str], bytes],
        *,
        peer: Peer = VLLM,
        connect_timeout_s: float,
        most_connections: int = 1024,
    ) -> None:
        self._address = Address.of(url)
        self.authority = self._address.authority.encode()
        self.prefix = self._address.prefix.encode()
        self.api_key = peer.api_key.encode()
        self.dialect = peer.dialect
        self.outcomes = outcomes
        self.error_frame = error_frame
        self._connect_timeout_s = connect_timeout_s
        self._most_connections = most_connections
        self._idle: deque[EngineConnection] = deque()
        self._all: dict[EngineConnection, None] = {}
        self._connecting: dict[asyncio.Task[None], None] = {}
        self._held: deque[tuple[Exchange, int, bytes]] = deque()

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Write a request on a kept connection, or on a fresh one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                connection.send(exchange, data, reused=True)
                return
        if self._may_connect():
            self.send_fresh(exchange, data)
        else:
            self._held.append((exchange, exchange.attempt, data))

    def _may_connect(self) -> bool:
        return len(self._all) + len(self._connecting) < self._most_connections

    def send_fresh(self, exchange: Exchange, data: bytes) -> None:
        """Connect, then write."""
        connecting = self._connect(exchange, data, exchange.attempt)
        task = asyncio.get_running_loop().create_task(connecting)
        self._connecting[task] = None
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.pop(task, None)
        self._send_held()

    async def _connect(self, exchange: Exchange, data: bytes, attempt: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                host, port, _, tls = self._address
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(self), host, port, ssl=tls
                )
        except (OSError, TimeoutError) as error:
            if not exchange.over and exchange.attempt == attempt:
                self.outcomes.broke(exchange, f"cannot connect: {error}", alive=False)
            return
        self._all[connection] = None
        if exchange.over or exchange.attempt != attempt:
            self.give_back(connection)
        else:
            connection.send(exchange, data, reused=False)

    def give_back(self, connection: EngineConnection) -> None:
        """Keep a connection for the next exchange."""
        self._idle.append(connection)
        self._send_held()

    def forget(self, connection: EngineConnection) -> None:
        """Drop a connection that is gone."""
        self._all.pop(connection, None)
        self._send_held()

    def _send_held(self) -> None:
        """Send the next call that waits for a connection, if it is still to be sent."""
        while self._held and (self._idle or self._may_connect()):
            exchange, attempt, data = self._held.popleft()
            if not exchange.over and exchange.attempt == attempt:
                self.send(exchange, data)

    def close(self) -> None:
        """Drop everything, until something is sent again."""
        self._held.clear()
        for task in list(self._connecting):
            task.cancel()
        for connection in list(self._all):
            connection.cancel()
