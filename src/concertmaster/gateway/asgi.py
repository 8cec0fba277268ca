"""A bridge from the gateway's connections to an ASGI app, for all that is off the hot path."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from concertmaster.gateway.agent import AgentConnection, Message

Scope = MutableMapping[str, Any]
App = Callable[
    [Scope, Callable[[], Awaitable[Scope]], Callable[[Scope], Awaitable[None]]], Awaitable[None]
]


class SideDoor:
    """Runs an app for each message, and stops it when the agent goes."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._tasks: dict[asyncio.Task[None], None] = {}

    def __call__(self, agent: AgentConnection, message: Message) -> None:
        """Answer a message in a task of its own."""
        task = asyncio.get_running_loop().create_task(self._answer(agent, message))
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def close(self) -> None:
        """Stop every answer under way (live pages never end by themselves)."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, agent: AgentConnection, message: Message) -> None:
        path, _, query = message.target.partition(b"?")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": message.method.decode("latin-1"),
            "scheme": "http",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "headers": list(message.headers.items()),
            "client": None,
            "server": None,
        }
        body: list[bytes] = [message.body]
        done = asyncio.Event()

        async def receive() -> Scope:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(part: Scope) -> None:
            if agent.gone:
                raise OSError("the agent is gone")
            _write(agent, part)

        try:
            await self._app(scope, receive, send)
        except OSError:
            agent.abort()
            return
        finally:
            done.set()
        agent.finished(keep_alive=True)


def _write(agent: AgentConnection, part: Scope) -> None:
    if part["type"] == "http.response.start":
        headers = dict(part["headers"])
        if b"content-length" not in headers:
            headers[b"transfer-encoding"] = b"chunked"
        status = part["status"]
        agent.chunked = b"content-length" not in headers
        agent.write(
            b"HTTP/1.1 %d %s\r\n" % (status, HTTPStatus(status).phrase.encode())
            + b"".join(b"%b: %b\r\n" % header for header in headers.items())
            + b"\r\n"
        )
        return
    data = part.get("body", b"")
    if agent.chunked:
        if data:
            agent.write(b"%x\r\n%b\r\n" % (len(data), data))
        if not part.get("more_body", False):
            agent.write(b"0\r\n\r\n")
    elif data:
        agent.write(data)
