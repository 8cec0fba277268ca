"""The scheduler's side of several workers: their calls go to the one gateway, its words to them."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from concertmaster.config import GatewaySection
from concertmaster.core.errors import CallerError, UnauthorizedError
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway import openai_api
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.keyring import TENANT_HEADER, Keyring
from concertmaster.gateway.quotas import Quota
from concertmaster.gateway.reading import Opened
from concertmaster.gateway.refusals import reply, tell_mistake
from concertmaster.gateway.workers.frames import (
    Began,
    Broke,
    Called,
    Engine,
    Finished,
    FirstToken,
    Frame,
    FromWorker,
    Gone,
    Hello,
    Progress,
    Rules,
    ToldTrail,
)
from concertmaster.gateway.workers.relayed import RelayedCall
from concertmaster.gateway.workers.wire import Wire

if TYPE_CHECKING:
    from concertmaster.gateway.driver import Gateway

SOCKET, SIDE_SOCKET = "calls.sock", "side.sock"
"""Where workers bring calls, and all that is no call, as HTTP."""

LOOK_S = 0.25
_log = logging.getLogger(__name__)


class Hub:
    """Listens for workers on a socket in a folder that nobody else can enter.

    Args:
        folder: Has the sockets.
        port: Where workers listen.

    Attributes:
        lines: Those that are there.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.lines: dict[int, WorkerLine] = {}
        self._gateway: Gateway | None = None
        self._keyring: Keyring | None = None
        self._rules: Callable[[], Rules] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def open(
        self,
        gateway: "Gateway",
        keyring: Keyring | None,
        settings: GatewaySection,
        *,
        speedup: float,
    ) -> list[asyncio.Server]:
        """Take workers from here on; both sockets are closed by who opened them."""
        self._gateway, self._keyring = gateway, keyring
        self._rules = lambda: _rules(gateway, settings, self.port, speedup)
        gateway.metrics.workers = self
        judge = None if keyring is None else SideCheck(keyring)
        self._watching = asyncio.get_running_loop().create_task(self._watch())
        return [
            await self._listen(SIDE_SOCKET, lambda: AgentConnection(gateway, judge)),
            await self._listen(
                SOCKET, lambda: Wire[FromWorker](list[FromWorker], self._hear, self._lost)
            ),
        ]

    async def _listen(self, name: str, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Server:
        path = self.folder / name
        path.unlink(missing_ok=True)
        return await asyncio.get_running_loop().create_unix_server(protocol, path)

    async def _watch(self) -> None:
        """Tell workers when the rules have changed, for ever."""
        assert self._rules is not None, "nobody is served yet"
        told = self._rules()
        while True:
            await asyncio.sleep(LOOK_S)
            rules = self._rules()
            if rules != told:
                told = rules
                for line in self.lines.values():
                    line.tell(rules)

    def _hear(self, wire: Wire[FromWorker], frame: FromWorker) -> None:
        assert isinstance(frame, Hello), "a worker says its name first"
        assert self._gateway is not None
        assert self._rules is not None
        line = WorkerLine(frame, wire, self._gateway, self._keyring)
        wire.hear, wire.lost = line.hear, self._lost_line(line)
        self.lines[frame.worker] = line
        line.tell(self._rules())

    def _lost(self, wire: Wire[FromWorker]) -> None:
        """Nobody had said a name."""

    def _lost_line(self, line: "WorkerLine") -> Callable[[Wire[FromWorker]], None]:
        def lost(_: Wire[FromWorker]) -> None:
            if self.lines.get(line.worker) is line:
                del self.lines[line.worker]
            line.lose()

        return lost

    def close(self) -> None:
        """Hang up once what was told is out."""
        if self._watching is not None:
            self._watching.cancel()
        for line in list(self.lines.values()):
            line.close()


class WorkerLine:
    """One worker, and its calls.

    Args:
        hello: Its name.
        wire: The way to it.
        gateway: Decides.
        keyring: Knows the accounts of tenants; ``None`` without keys.

    Attributes:
        calls: How many it has brought.
        connections: Of agents to it, as it last told.
        cpu_s: What its process has used, as it last told.
    """

    def __init__(
        self,
        hello: Hello,
        wire: Wire[FromWorker],
        gateway: "Gateway",
        keyring: Keyring | None,
    ) -> None:
        self.worker, self.pid = hello.worker, hello.pid
        self.calls = self.connections = 0
        self.cpu_s = 0.0
        self._wire = wire
        self._gateway = gateway
        self._keyring = keyring
        self._calls: dict[int, RelayedCall] = {}
        self._engines: dict[str, None] = {}

    # Line

    def tell(self, frame: Frame) -> None:
        """Send a frame."""
        self._wire.tell(frame)

    def introduce(self, replica_id: str) -> None:
        """Tell the worker of a replica, once."""
        if replica_id not in self._engines:
            self._engines[replica_id] = None
            url, peer = self._gateway.links.places[ReplicaId(replica_id)]
            self.tell(Engine(replica_id, url, peer.kind, peer.api_key))

    def forget(self, number: int) -> None:
        """Drop a call that has its answer."""
        self._calls.pop(number, None)

    def lose(self) -> None:
        """Cancel all that the worker had: it is gone."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call.exchange is not None:
                self._gateway.abandon(call.exchange)
        if calls:
            _log.warning("worker %d is gone with %d calls", self.worker, len(calls))

    def close(self) -> None:
        """Hang up once what was told is out."""
        self._wire.close()

    # News

    def hear(self, _: Wire[FromWorker], frame: FromWorker) -> None:
        """Take in what the worker tells."""
        match frame:
            case Called():
                self._called(frame)
            case FirstToken() | Began() | Finished() | Broke():
                self._fared(frame)
            case Gone(number):
                call = self._calls.pop(number, None)
                if call is not None and call.exchange is not None:
                    self._gateway.abandon(call.exchange)
            case Progress():
                self._progressed(frame)
            case Hello():
                raise AssertionError("a worker has one name")
            case _:
                assert_never(frame)

    def _called(self, frame: Called) -> None:
        self.calls += 1
        call = self._calls[frame.number] = RelayedCall(self, frame.number)
        try:
            self._open(call, frame)
        except Exception:  # noqa: BLE001  # one call must not stop the others
            _log.exception("a call of worker %d failed", self.worker)
            name = self._gateway.name(frame.headers)
            reply(call, name, (*openai_api.internal_error(), []), keep_alive=False)
            if call.exchange is not None:
                self._gateway.abandon(call.exchange)

    def _open(self, call: RelayedCall, frame: Called) -> None:
        gateway = self._gateway
        if gateway.refuses_unread(call, frame.headers):
            return
        try:
            message = self._message(frame)
            opened = Opened(call, message, frame.reading, lambda: _trail(frame.trail))
            exchange = gateway.admit(gateway.clock(), opened, call)
        except CallerError as error:
            tell_mistake(call, error, gateway.name(frame.headers), gateway.metrics.answered)
            return
        call.exchange = exchange
        gateway.consider(exchange)

    def _message(self, frame: Called) -> Message:
        return Message(
            b"POST",
            frame.target,
            frame.headers,
            b"",
            keep_alive=True,
            takes_chunks=frame.takes_chunks,
            quota=self._quota(frame.headers),
        )

    def _quota(self, headers: dict[bytes, bytes]) -> Quota | None:
        """Return the account of a tenant: there is one for all workers."""
        if self._keyring is None:
            return None
        return account(self._keyring, headers.get(TENANT_HEADER, b""))

    def _fared(self, frame: FirstToken | Began | Finished | Broke) -> None:
        call = self._calls.get(frame.number)
        exchange = None if call is None else call.exchange
        if exchange is None or exchange.over:
            return
        attempt = exchange.at(frame.attempt)
        seen = not isinstance(frame, Broke) or frame.started
        if seen and not self._is_on(exchange, frame.attempt):
            self._cut(exchange, frame)
        elif attempt is None:
            return
        elif isinstance(frame, Broke):
            attempt.engine, attempt.status = None, frame.status
            attempt.started = frame.started
            self._gateway.broke(attempt, frame.problem, alive=frame.alive)
        else:
            self._answers(attempt.first(), frame)

    def _is_on(self, exchange: Exchange, attempt: int) -> bool:
        """Whether the core still has an attempt of a call."""
        scheduler = self._gateway.scheduler
        return scheduler.in_flight(exchange.request.request_id, attempt) is not None

    def _cut(self, exchange: Exchange, frame: FirstToken | Began | Finished | Broke) -> None:
        """End a call whose caller has seen an answer that was given up, here, a moment before."""
        exchange.started = True
        if isinstance(frame, Finished):
            exchange.tokens = frame.output_tokens
        self._gateway.cut(exchange)

    def _answers(self, exchange: Exchange, frame: FirstToken | Began | Finished) -> None:
        match frame:
            case FirstToken():
                exchange.started, exchange.status = True, 200
                self._gateway.first_token(exchange)
            case Began():
                exchange.started = True
                self._gateway.began(exchange)
            case Finished():
                del self._calls[frame.number]
                exchange.engine, exchange.status = None, frame.status
                exchange.tool_call_ids = frame.tool_call_ids
                self._gateway.finished(exchange, frame.output_tokens)
            case _:
                assert_never(frame)

    def _progressed(self, frame: Progress) -> None:
        self.connections, self.cpu_s = frame.connections, frame.cpu_s
        for status in frame.answered:
            self._gateway.metrics.answered(status, 0.0)
        for number, attempt, tokens in frame.tokens:
            call = self._calls.get(number)
            if call is not None and call.exchange and call.exchange.attempt == attempt:
                call.exchange.tokens = tokens


class SideCheck:
    """Lets in what workers pass on: they have judged it, and named its tenant.

    Args:
        keyring: Knows the accounts.
    """

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def __call__(self, _: bytes, headers: dict[bytes, bytes]) -> Quota | None:
        """Return whose account a message is on; nobody's if it needed no key."""
        tenant = headers.get(TENANT_HEADER)
        return None if tenant is None else account(self._keyring, tenant)


def account(keyring: Keyring, tenant: bytes) -> Quota:
    """Return the account of a tenant that a worker has let in.

    Raises:
        UnauthorizedError: It is gone.
    """
    name = tenant.decode()
    quota = keyring.quota(name)
    if quota is None:
        keyring.refresh()  # the worker may have read the file a moment later
        quota = keyring.quota(name)
    if quota is None:
        raise UnauthorizedError("expected a good API key")
    return quota


def _trail(told: ToldTrail | None) -> ToldTrail:
    assert told is not None, "a call that names no workflow leaves a trail"
    return told


def _rules(gateway: "Gateway", settings: GatewaySection, port: int, speedup: float) -> Rules:
    embeds = list(gateway.apis.embedding_models)
    return Rules(
        settings,
        port,
        speedup,
        gateway.max_body_bytes,
        gateway.forecaster.reads_prompts,
        embeds,
    )
