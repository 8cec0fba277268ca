"""A bridge from the gateway's connections to an ASGI app, for all that is off the hot path."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from concertmaster.gateway.agent import AgentConnection, Message

_log = logging.getLogger(__name__)

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

        @cache
        def name() -> str:
            return agent.name(message.headers)

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
            "message": message,
            "name": name,
        }
        body: list[bytes] = [message.body]
        done = asyncio.Event()
        reply = _Reply(agent, name, bodiless=message.method == b"HEAD")

        async def receive() -> Scope:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await done.wait()
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, receive, reply.send)
        except _GoneError:
            return
        except Exception:  # noqa: BLE001  # one message must not stop the gateway
            _log.exception("%r %r failed", message.method, message.target)
            if not reply.complete:
                agent.abort()
                return
        finally:
            done.set()
        agent.finished(keep_alive=True)


class _GoneError(OSError):
    """The agent left before its answer was complete."""


class _Reply:
    """Writes what the app sends as HTTP/1.1."""

    def __init__(self, agent: AgentConnection, name: Callable[[], str], *, bodiless: bool) -> None:
        self._agent = agent
        self._name = name
        self._bodiless = bodiless
        self._chunked = False
        self.complete = False

    async def send(self, part: Scope) -> None:
        """Pass one part on."""
        if self._agent.gone:
            raise _GoneError
        if part["type"] == "http.response.start":
            self._start(part)
            return
        self.complete = not part.get("more_body", False)
        data = part.get("body", b"")
        if self._bodiless:
            return
        if not self._chunked:
            self._agent.write(data)
            return
        frame = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        self._agent.write(frame + (b"0\r\n\r\n" if self.complete else b""))

    def _start(self, part: Scope) -> None:
        headers = list(part["headers"])
        self._chunked = not any(name == b"content-length" for name, _ in headers)
        if self._chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        status = part["status"]
        if status >= HTTPStatus.BAD_REQUEST:
            headers.append((b"x-request-id", self._name().encode("latin-1")))
        self._agent.write(
            b"HTTP/1.1 %d %s\r\n" % (status, HTTPStatus(status).phrase.encode())
            + b"".join(b"%b: %b\r\n" % header for header in headers)
            + b"\r\n"
        )
