"""A gateway over emulated engines and scripted upstreams, all in one event loop on loopback."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import aiohttp
import openai
import uvloop

from builders import a_fleet, a_policy, a_pool
from concertmaster.config import GatewaySection
from concertmaster.core.actions import Action
from concertmaster.core.events import Event
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.policy import Policy
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.control import ControlKind
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.emulator_api import EmulatorServer, serve
from concertmaster.gateway.admin import AdminRoutes
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.server import running_gateway
from concertmaster.gateway.workers.hub import Hub
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.recent import RecentLengths
from concertmaster.sim.engines import engine_settings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PATIENCE_S = 5.0

_T = TypeVar("_T")


def play(main: Coroutine[Any, Any, _T], *, seconds: float = 30.0) -> _T:
    """Run a test on the event loop that the product runs on."""
    return uvloop.run(asyncio.wait_for(main, seconds))


def a_body(**fields: object) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Say it."}], **fields}


def exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True}


def a_message(
    method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """Serialise an HTTP request as a client would."""
    lines = [f"{method} {target} HTTP/1.1", "host: gateway", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def a_call(**fields: object) -> bytes:
    return a_message("POST", CHAT, json.dumps(a_body(**fields)).encode())


def an_answer(
    body: bytes, status: str = "200 OK", headers: Sequence[str] = ("content-type: text/plain",)
) -> bytes:
    """Serialise an HTTP response as an engine would."""
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def a_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def events(*payloads: object) -> bytes:
    """Frame payloads as server-sent events, in one chunk each; the stream ends."""
    frames = [b"data: " + json.dumps(one).encode() + b"\n\n" for one in payloads]
    return b"".join(map(a_chunk, [*frames, b"data: [DONE]\n\n"])) + b"0\r\n\r\n"


async def until(
    condition: Callable[[], object], what: str = "", *, seconds: float = PATIENCE_S
) -> None:
    """Wait until something is so."""
    for _ in range(int(seconds / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise TimeoutError(f"still not so: {what or condition}")


# Upstreams.


@dataclass
class Heard:
    """One request as an upstream got it."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401  # whatever was sent
        return json.loads(self.body)


Script = Callable[[Heard, asyncio.StreamWriter], Awaitable[None]]


async def says_hello(_: Heard, out: asyncio.StreamWriter) -> None:
    out.write(an_answer(b'{"usage":{"completion_tokens":1}}'))


async def hangs(_: Heard, __: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def cuts(_: Heard, out: asyncio.StreamWriter) -> None:
    out.transport.abort()


class Upstream:
    """A server that answers calls as a script says and counts what it sees.

    Attributes:
        heard: Calls, in order; health checks are not among them.
        connections: Connections that brought a call.
        lost: Calls whose caller left before their script had ended.
        healthy: What health checks are told; ``None`` lets them wait.
    """

    def __init__(self, script: Script = says_hello) -> None:
        self.script = script
        self.heard: list[Heard] = []
        self.connections = 0
        self.lost = 0
        self.healthy: bool | None = True
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def hang_up(self) -> None:
        """Cut every connection, and refuse others."""
        assert self._server is not None
        self._server.close()
        self._server = None
        self.cut_connections()

    def cut_connections(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self.hang_up()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        mine = False
        try:
            while True:
                heard = await _hear(reader)
                if self.healthy is None and "/health" in heard.line:
                    await asyncio.sleep(60)
                if not ("POST" in heard.line and "/v1/" in heard.line):
                    writer.write(self._control(heard))
                    continue
                self.connections += not mine
                mine = True
                self.heard.append(heard)
                await self._answer(heard, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    def _control(self, heard: Heard) -> bytes:
        if "is_sleeping" in heard.line:
            return an_answer(b'{"is_sleeping":false}')
        return an_answer(b"", "200 OK" if self.healthy else "503 Service Unavailable")

    async def _answer(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Play the script, and stop when the caller hangs up."""
        script = asyncio.ensure_future(self.script(heard, writer))
        gone = asyncio.ensure_future(_hung_up(reader))
        try:
            await asyncio.wait((script, gone), return_when=asyncio.FIRST_COMPLETED)
            if not script.done():
                self.lost += 1
                raise ConnectionResetError
            await script
        finally:
            script.cancel()
            gone.cancel()
            await asyncio.gather(script, gone, return_exceptions=True)


async def _hear(reader: asyncio.StreamReader) -> Heard:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *rest = head.removesuffix("\r\n\r\n").split("\r\n")
    headers = dict(part.split(": ", 1) for part in rest)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Heard(line, headers, body)


async def _hung_up(reader: asyncio.StreamReader) -> None:
    await until(lambda: reader.at_eof() or reader.exception() is not None, seconds=60)


# The rig.


class Wire:
    """A bare connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[int, bytes]:
        """Read one response of known length: its status and body."""
        head = (await self.head()).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        async with asyncio.timeout(PATIENCE_S):
            return int(head.split()[1]), await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Read until the gateway closes."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


@dataclass
class Reply:
    """What an HTTP client got."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401  # whatever was answered
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error


@dataclass
class Rig:
    """A gateway, and the means to call it.

    Attributes:
        history: Every event that the core was told.
    """

    gateway: Gateway
    port: int
    http: aiohttp.ClientSession
    history: list[Event] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        """Make a request; underscores in header names become dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.request(method, path, data=body, headers=named) as response:
            return Reply(response.status, response.headers, await response.read())

    async def call(self, fields: Mapping[str, object] | None = None, **headers: str) -> Reply:
        """Make a chat call."""
        return await self.ask(
            "POST", CHAT, json.dumps(a_body(**(fields or {}))).encode(), **headers
        )

    async def wire(self) -> Wire:
        streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        self.wires.append(Wire(*streams))
        return self.wires[-1]

    def sdk(self, **settings: Any) -> openai.AsyncOpenAI:  # noqa: ANN401
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="x", **{"max_retries": 0, "timeout": 5, **settings}
        )

    def replica(self, name: str = "p-0") -> Any:  # noqa: ANN401
        return self.gateway.scheduler.replicas[ReplicaId(name)]

    async def metric(self, sample: str) -> float:
        """Return the value of one line of /metrics."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        return next(
            float(v) for n, _, v in (x.rpartition(" ") for x in text.split("\n")) if n == sample
        )

    async def idle(self) -> None:
        """Wait until the gateway has nothing in flight, and check that its ledgers agree."""
        scheduler = self.gateway.scheduler
        await until(lambda: not self.gateway.open_exchanges, "no open exchange")
        await until(lambda: not any(r.in_flight for r in scheduler.replicas.values()), "idle")
        assert len(scheduler.line) == 0
        scheduler.validate()
        for replica in scheduler.replicas.values():
            assert (replica.kv.reserved_blocks, replica.decode_tokens) == (0, 0)


@asynccontextmanager
async def a_rig(
    urls: Mapping[str, str],
    *,
    fleet: Fleet | None = None,
    policy: Policy | None = None,
    predictor: Predictor | None = None,
    speedup: float = 1.0,
    drain_s: float = 0.0,
    may_log: bool = False,
    commands: Mapping[ReplicaId, Sequence[str]] | None = None,
    controls: Mapping[ReplicaId, ControlKind] | None = None,
    peers: Mapping[ReplicaId, Peer] | None = None,
    admin_routes: AdminRoutes | None = None,
    environ: Mapping[str, str] | None = None,
    hub: Hub | None = None,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[Rig]:
    """Start a gateway; whatever goes wrong unseen in its event loop fails the test."""
    problems: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(
        lambda _, context: problems.append(f"{context['message']}: {context.get('exception')!r}")
    )
    listener = _Errors(problems)
    logging.getLogger("concertmaster").addHandler(listener)
    fleet = fleet or a_fleet(replicas=len(urls))
    scheduler = Scheduler(
        fleet, policy or a_policy(), random.Random(0), record_candidates=True, weighs=True
    )
    history: list[Event] = []

    def observe(_: float, event: Event, __: list[Action]) -> None:
        history.append(event)

    section = GatewaySection(**{"port": 0, "health_interval_s": 60.0, **settings})
    try:
        async with (
            running_gateway(
                scheduler,
                predictor or RecentLengths(),
                {ReplicaId(name): url for name, url in urls.items()},
                section,
                speedup=speedup,
                observe=observe,
                drain_s=drain_s,
                commands=commands,
                controls=controls,
                peers=peers,
                admin=admin_routes,
                environ=environ or {},
                hub=hub,
            ) as (gateway, port),
            aiohttp.ClientSession(
                f"http://127.0.0.1:{port}", timeout=aiohttp.ClientTimeout(total=10)
            ) as http,
        ):
            rig = Rig(gateway, port, http, history)
            try:
                yield rig
            finally:
                for wire in rig.wires:
                    await wire.close()
        await asyncio.sleep(0)
    finally:
        logging.getLogger("concertmaster").removeHandler(listener)
    assert may_log or not problems, problems


class _Errors(logging.Handler):
    """Notes every logged error."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        self._problems.append(record.getMessage())


@asynccontextmanager
async def over_upstreams(*scripts: Script, **settings: Any) -> AsyncIterator[tuple[Rig, Any]]:  # noqa: ANN401
    """Start a gateway over one scripted upstream a script; yields one, or a list of them."""
    async with AsyncExitStack() as stack:
        upstreams = [
            await stack.enter_async_context(Upstream(script)) for script in scripts or (says_hello,)
        ]
        urls = {f"p-{i}": one.url for i, one in enumerate(upstreams)}
        rig = await stack.enter_async_context(a_rig(urls, **settings))
        yield rig, upstreams[0] if len(upstreams) == 1 else upstreams


@asynccontextmanager
async def over_engines(
    replicas: int = 1,
    *,
    fleet: Fleet | None = None,
    speedup: float = 20.0,
    engine: Mapping[str, Any] | None = None,
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[tuple[Rig, list[Emulator]]]:
    """Start a gateway over emulated engines, one for each replica of the fleet."""
    fleet = fleet or a_fleet(a_pool(max_sequences=64), replicas=replicas)
    async with AsyncExitStack() as stack:
        emulators: list[Emulator] = []
        urls: dict[str, str] = {}
        for replica_id, (pool, _, _) in fleet.replicas.items():
            emulator = Emulator(
                model_name=pool.model.name,
                curve=pool.curve,
                settings=engine_settings(pool),
                speedup=speedup,
                **(engine or {}),
            )
            server: EmulatorServer = await serve(emulator, "127.0.0.1", 0)
            await stack.enter_async_context(server)
            emulators.append(emulator)
            urls[replica_id] = f"http://127.0.0.1:{server.port}"
        rig = await stack.enter_async_context(a_rig(urls, fleet=fleet, speedup=speedup, **settings))
        yield rig, emulators
