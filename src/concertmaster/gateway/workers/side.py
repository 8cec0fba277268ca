"""All that a worker does not answer itself goes to the scheduler's process as HTTP, and back."""

import asyncio
from pathlib import Path
from typing import cast

import httptools

from concertmaster.core.request import Request, RequestId, WorkflowId
from concertmaster.gateway import openai_api
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.apis.anthropic_answer import worded_response
from concertmaster.gateway.exchange import Exchange

ELSEWHERE = Request(
    request_id=RequestId(""),
    workflow_id=WorkflowId(""),
    arrival_s=0.0,
    prompt_tokens=1,
    max_output_tokens=1,
)
"""Stands for a call that another process knows."""

_DROPPED = frozenset(
    {b"connection", b"content-length", b"expect", b"keep-alive", b"transfer-encoding", b"upgrade"}
)


class SideRelay:
    """Passes messages on to a socket.

    Args:
        path: The socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tasks: dict[asyncio.Task[None], None] = {}

    def __call__(self, agent: AgentConnection, message: Message) -> None:
        """Answer a message with what comes back."""
        task = asyncio.get_running_loop().create_task(self._pass_on(agent, message))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def _pass_on(self, agent: AgentConnection, message: Message) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, answer = await loop.create_unix_connection(
                lambda: _Answer(agent, message), str(self._path)
            )
        except OSError:
            _refuse(agent, message)
            return
        if agent.gone:
            answer.cancel()
        else:
            answer.ask()


class _Answer(asyncio.Protocol):
    """One answer on its way back, byte for byte."""

    def __init__(self, agent: AgentConnection, message: Message) -> None:
        self._agent = agent
        self._message = message
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._begun = self._done = self._bodiless = False
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def ask(self) -> None:
        """Send the message."""
        assert self._transport is not None
        exchange = Exchange(ELSEWHERE, self._agent, b"", b"", model_named="", streams=False)
        exchange.engine = self
        self._agent.exchange = exchange
        self._bodiless = self._message.method == b"HEAD"
        self._transport.write(_as_http(self._message))

    # httptools callbacks

    def on_headers_complete(self) -> None:
        """Note that an answer without a body is whole."""
        self._done = self._bodiless

    def on_message_complete(self) -> None:
        """Note that the answer is whole."""
        self._done = True

    # asyncio callbacks

    def data_received(self, data: bytes) -> None:
        """Pass bytes on."""
        self._begun = True
        self._agent.write(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._agent.abort()
        if self._done:
            self.cancel()
            self._agent.finished(keep_alive=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who asked that no more will come."""
        self._transport = None
        if self._done or self._agent.gone:
            return
        if self._begun:
            self._agent.abort()
        else:
            _refuse(self._agent, self._message)

    # EngineSide

    def cancel(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def give_up(self, problem: str) -> None:
        """Hang up."""
        self.cancel()

    def pause(self) -> None:
        """Stop reading: who asked is slow."""
        if self._transport is not None and not self.paused:
            self.paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and self.paused:
            self.paused = False
            self._transport.resume_reading()


def _refuse(agent: AgentConnection, message: Message) -> None:
    """Answer in the words of the API that was asked: there is no scheduler."""
    name, refusal = agent.name(message.headers), openai_api.starting_again()
    agent.answer(worded_response(message.target, name, *refusal, close=False))


def _as_http(message: Message) -> bytes:
    lines = [
        name + b": " + value for name, value in message.headers.items() if name not in _DROPPED
    ]
    lines.append(b"content-length: %d" % len(message.body))
    version = b"1.1" if message.takes_chunks else b"1.0"
    head = b"%b %b HTTP/%b\r\n" % (message.method, message.target, version)
    return head + b"\r\n".join(lines) + b"\r\n\r\n" + message.body
