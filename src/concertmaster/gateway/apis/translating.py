"""Between an exchange and its agent: what an engine sends is translated before it goes out.

To the exchange this is a caller like any other, so scheduling, retries, held calls and errors
work as they do for chat.
"""

from collections.abc import Mapping
from typing import Protocol

import httptools

from concertmaster.gateway import stream
from concertmaster.gateway.apis.chat_answer import DONE, BrokenAnswerError
from concertmaster.gateway.apis.events import EventReader
from concertmaster.gateway.exchange import Caller
from concertmaster.gateway.openai_api import error_body, response

_BROKE = "the engine broke off its answer"
_EVENT_STREAM = "text/event-stream"
_KEPT_HEADERS = ("x-", "retry-after")
"""Beginnings of the headers that are passed on; the others belong to the engine's body."""

_STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)


class Translation(Protocol):
    """How one answer is worded; ``BrokenAnswerError`` says that an engine's makes no sense."""

    def meet(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """Take in the head of the answer; return what is to be added to it."""

    def whole(self, body: bytes) -> bytes:
        """Translate a whole completion."""

    def event(self, payload: bytes) -> bytes:
        """Translate a chunk."""

    def end(self) -> bytes:
        """Write the end of a stream."""

    def broken(self, problem: str) -> bytes:
        """Write the event that ends a stream that broke."""

    def refused(self, status: int, body: bytes) -> tuple[int, bytes]:
        """Word an error that comes instead of an answer; ``body`` is OpenAI's, or an engine's."""


class TranslatingCaller:
    """Passes an answer on in the words of another API.

    Args:
        agent: Who waits for it.
        translation: Words it.
        streams: Whether it is to be a stream.
        takes_chunks: Whether the agent takes bodies in chunks.
        left_out: Kinds of tools of which the engine was not told.
    """

    def __init__(
        self,
        agent: Caller,
        translation: Translation,
        *,
        streams: bool,
        takes_chunks: bool,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self._agent = agent
        self._translation = translation
        self._streams = streams
        self._takes_chunks = takes_chunks
        self._left_out = ", ".join(left_out)
        self._parser = httptools.HttpResponseParser(self)
        self._reader = EventReader()
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._status = 0
        self._begun = self._over = False

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the status."""
        self._status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        """Collect the body."""
        self._body.append(part)

    # Caller

    def write(self, data: bytes) -> None:
        """Translate what came of an answer; what is no stream is held back until it is whole."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(f"the engine sent no HTTP: {error}")
        if self._status == 200 and _EVENT_STREAM in self._headers.get("content-type", ""):
            self._begin()
            pieces, self._body = self._body, []
            for piece in pieces:
                self._pass_on(piece)

    def finished(self, *, keep_alive: bool) -> None:
        """End the answer."""
        if not self._over:
            self._conclude()
        if self._begun and self._takes_chunks:
            self._agent.write(stream.END)
        self._agent.finished(keep_alive=keep_alive and self._takes_chunks)

    def abort(self) -> None:
        """End an answer that broke: with the API's own error, whole or as an event."""
        if not self._over:
            self._break(_BROKE)
        self.finished(keep_alive=False)

    def _conclude(self) -> None:
        """Write what is left once the engine is done."""
        try:
            if self._begun:
                self._send(self._translation.end())
            elif self._status == 200 and self._streams:
                self._conclude_stream(b"".join(self._body))
            elif self._status == 200:
                self._conclude_whole(b"".join(self._body))
            else:
                self._refuse(self._status, b"".join(self._body))
        except (BrokenAnswerError, RecursionError) as error:
            self._break(str(error))
        self._over = True

    def _conclude_stream(self, body: bytes) -> None:
        """Make a stream of the answer of an engine that does not stream."""
        events = self._translation.event(body) + self._translation.end()
        self._begin()
        self._send(events)

    def _conclude_whole(self, body: bytes) -> None:
        headers = self._kept_headers()
        translated = self._translation.whole(body)
        self._agent.write(response(200, translated, _as_bytes(headers)))

    def _begin(self) -> None:
        if self._begun or self._over:
            return
        self._begun = True
        headers = [*_STREAM_HEADERS, *self._kept_headers()]
        framing = (
            ("transfer-encoding", "chunked") if self._takes_chunks else ("connection", "close")
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in [*headers, framing])
        self._agent.write(b"HTTP/1.1 200 OK\r\n" + lines.encode("latin-1") + b"\r\n")

    def _pass_on(self, piece: bytes) -> None:
        for event in self._reader.feed(piece):
            if self._over:
                return
            if event.aside:
                self._send(event.aside)
                continue
            try:
                self._say(event.payload)
            except BrokenAnswerError as error:
                self._break(str(error))

    def _say(self, payload: bytes) -> None:
        if payload == DONE:
            self._send(self._translation.end())
            self._over = True
        else:
            self._send(self._translation.event(payload))

    def _break(self, problem: str) -> None:
        if self._begun:
            self._send(self._translation.broken(problem))
        else:
            self._refuse(502, error_body(problem, "server_error", code="engine_error"))
        self._over = True

    def _refuse(self, status: int, body: bytes) -> None:
        headers = self._kept_headers()
        status, body = self._translation.refused(status, body)
        self._agent.write(response(status, body, _as_bytes(headers)))

    def _send(self, events: bytes) -> None:
        self._agent.write(stream.chunk(events) if self._takes_chunks else events)

    def _kept_headers(self) -> list[tuple[str, str]]:
        own = {name for name, _ in _STREAM_HEADERS}
        kept = [
            (name, value)
            for name, value in self._headers.items()
            if name.startswith(_KEPT_HEADERS) and name not in own
        ]
        if self._left_out:
            kept.append(("x-concertmaster-left-out", self._left_out))
        return kept + self._translation.meet(self._headers)


def _as_bytes(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
