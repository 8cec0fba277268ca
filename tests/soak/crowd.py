"""Agents at full speed: whole answers, streams, calls given up, calls that are wrong."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import httptools

from gateway_rig import CHAT, a_message

MODEL = "qwen2.5-7b-instruct"
LIVES = 400
"""Workflows under way at a time; each is succeeded by another after some forty calls."""


@dataclass
class Asked:
    """One call: its bytes, and how it is to end.

    Attributes:
        leaves_s: After how long its agent hangs up; ``None`` if it stays.
    """

    data: bytes
    kind: str
    leaves_s: float | None = None


class Line(asyncio.Protocol):
    """A kept connection that carries one call at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._whole: asyncio.Future[int] | None = None
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(0)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(self._parser.get_status_code())
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, asked: Asked) -> int:
        """Return the status once the answer is whole; 0 if it never was."""
        assert self._transport is not None
        self._whole, self.body = asyncio.get_running_loop().create_future(), b""
        self._transport.write(asked.data)
        if asked.leaves_s is not None:
            await asyncio.sleep(asked.leaves_s)
            self._transport.abort()
        return await self._whole

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


@dataclass
class Crowd:
    """All agents.

    Attributes:
        outcomes: How many calls of each kind came to which status.
    """

    port: int
    secret: str
    rng: random.Random
    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    _made: int = 0

    async def call(self, calls: int, connections: int = 32) -> None:
        """Make so many calls, as fast as they are answered."""
        target = self._made + calls
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(self._agent(target))

    async def _agent(self, target: int) -> None:
        line = await self._line()
        while self._made < target:
            self._made += 1
            asked = self._next()
            async with asyncio.timeout(30):
                status = await line.ask(asked)
            self.outcomes[asked.kind, status] += 1
            if not line.is_open:
                line = await self._line()
        line.close()

    async def _line(self) -> Line:
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(Line, "127.0.0.1", self.port)
        return line

    def _next(self) -> Asked:
        kind = self.rng.choices(("json", "stream", "left", "wrong"), (58, 30, 10, 2))[0]
        said = f"say {self.rng.randrange(10**9)} " + "hello agent " * self.rng.randrange(60)
        body = {
            "model": "nobody" if kind == "wrong" else MODEL,
            "stream": kind == "stream" or (kind == "left" and self.rng.random() < 0.5),
            "max_tokens": 64,
            "messages": [{"role": "user", "content": said}],
        }
        headers = {"x-api-key": self.secret}
        if self.rng.random() < 0.9:
            life = self._made // (LIVES * 40) * LIVES + self.rng.randrange(LIVES)
            headers["x-session-id"] = f"workflow-{life}"
        leaves_s = self.rng.uniform(0, 0.004) if kind == "left" else None
        return Asked(a_message("POST", CHAT, json.dumps(body).encode(), headers), kind, leaves_s)

    async def get(self, path: str) -> bytes:
        """Return the body of a page."""
        line = await self._line()
        reader = Asked(a_message("GET", path, headers={"x-api-key": self.secret}), "page")
        assert await line.ask(reader) == 200
        line.close()
        return line.body
