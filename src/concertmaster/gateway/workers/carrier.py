"""The desk of a worker: it reads calls, asks the scheduler where they go, and moves their bytes."""

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping
from typing import NamedTuple, assert_never

from concertmaster.core.errors import CallerError
from concertmaster.gateway import dispatching, heads, openai_api, stream
from concertmaster.gateway.agent import AgentConnection, Message
from concertmaster.gateway.apis.desk import RESPONSES, ApiDesk
from concertmaster.gateway.exchange import Caller, Exchange
from concertmaster.gateway.keyring import LIVE_PATHS
from concertmaster.gateway.limits import limits_of
from concertmaster.gateway.naming import Names
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.reading import Reader
from concertmaster.gateway.refusals import reply, tell_mistake
from concertmaster.gateway.timeouts import Timeouts
from concertmaster.gateway.upstream import EngineLink
from concertmaster.gateway.workers.frames import (
    Began,
    Broke,
    Called,
    Cut,
    Drop,
    End,
    Engine,
    Finished,
    FirstToken,
    FromScheduler,
    GiveUp,
    Gone,
    Progress,
    Rules,
    Say,
    Send,
)
from concertmaster.gateway.workers.opening import called, carried
from concertmaster.gateway.workers.side import SideRelay
from concertmaster.gateway.workers.wire import Wire

PROGRESS_S = 0.25
"""How often a worker tells how its streams have gone on."""

SPARE_S = 2.0
"""How much longer than the scheduler a worker waits for a call to end."""

_log = logging.getLogger(__name__)

WireToScheduler = Wire[FromScheduler]


class _Carried(NamedTuple):
    exchange: Exchange
    message: Message
    name: str


class Carrier:
    """Takes the messages of agents; what it hears of engines, it tells the scheduler.

    Args:
        rules: How to serve.
        side: Answers what is no call.
        number: The worker's name.

    Attributes:
        agents: Connections.
        max_body_bytes: Largest body.
    """

    def __init__(self, rules: Rules, side: SideRelay, number: int) -> None:
        limits = limits_of(rules.settings)
        self._limits = limits._replace(total_s=limits.total_s + SPARE_S)
        self._reader = Reader(ApiDesk(rules.embedding_models))
        self._side = side
        self._links: dict[str, EngineLink] = {}
        self._places: dict[str, Engine] = {}
        self._names = Names(f"cm-{number}-")
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Carried] = {}
        self._asking: dict[int, None] = {}
        self._orphans: dict[int, None] = {}
        self._answered: list[int] = []
        self._wire: WireToScheduler | None = None
        self._timeouts = Timeouts(
            self._limits, speedup=1.0, silent=_give_up, too_long=self._end_too_long
        )
        self.agents: dict[AgentConnection, None] = {}
        self.adopt(rules)

    def adopt(self, rules: Rules) -> None:
        """Go by other rules from here on."""
        self.max_body_bytes = rules.max_body_bytes
        self._reads_prompts = rules.reads_prompts
        self._period_s = PROGRESS_S / rules.speedup

    @property
    def open_calls(self) -> int:
        """Calls without an answer."""
        return len(self._calls)

    # Desk

    def opened(self, agent: AgentConnection) -> None:
        """Note a connection."""
        self.agents[agent] = None

    def lost(self, agent: AgentConnection) -> None:
        """Cancel what a vanished agent was waiting for."""
        self.agents.pop(agent, None)
        exchange = agent.exchange
        if exchange is None:
            return
        self._end(exchange)
        if exchange.number:
            self._tell(Gone(exchange.number))

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what to call a message that the scheduler does not hear of."""
        return self._names.name(headers)

    def take(self, agent: AgentConnection, message: Message) -> None:
        """Answer a message."""
        path = message.target.partition(b"?")[0]
        if path in LIVE_PATHS and message.method == b"GET":
            agent.answer(openai_api.response(200, b""))
        elif path == RESPONSES.encode() or not self._reader.is_call(message):
            self._side(agent, message)
        elif self._wire is None:
            self._refuse_unread(self._reader.caller(agent, message), self.name(message.headers))
        else:
            self._ask(agent, message)

    def _refuse_unread(self, caller: Caller, name: str) -> None:
        refusal = openai_api.starting_again()
        self.count(refusal[0])
        reply(caller, name, refusal)

    def _ask(self, agent: AgentConnection, message: Message) -> None:
        caller = self._reader.caller(agent, message)
        try:
            opened = self._reader.read(agent, message, reads_prompts=self._reads_prompts)
        except CallerError as error:
            tell_mistake(caller, error, self.name(message.headers), self.count)
            return
        number = next(self._numbers)
        exchange = agent.exchange = carried(opened, number)
        self._calls[number] = _Carried(exchange, opened.message, "")
        self._asking[number] = None
        self._tell(called(number, opened))

    def count(self, status: int, _: float = 0.0) -> None:
        """Count an answer of the worker's own."""
        self._answered.append(status)

    # What the scheduler says

    def connected(self, wire: WireToScheduler) -> None:
        """Ask here from now on."""
        self._wire = wire

    def orphaned(self) -> None:
        """Refuse who waits for a word of the scheduler, which is gone; let the others end."""
        self._wire = None
        for number in list(self._asking):
            self._refuse(self._calls[number].exchange, openai_api.starting_again())
        self._orphans.update(dict.fromkeys(self._calls))

    def hear(self, _: WireToScheduler, frame: FromScheduler) -> None:
        """Do as the scheduler says."""
        match frame:
            case Rules():
                self.adopt(frame)
            case Engine():
                self._meet(frame)
            case Send() | Say() | End() | Cut() | Drop() | GiveUp():
                call = self._calls.get(frame.number)
                if call is not None and frame.number not in self._orphans:
                    self._obey(call, frame)
            case _:
                assert_never(frame)

    def _meet(self, engine: Engine) -> None:
        if self._places.get(engine.replica_id) == engine:
            return
        self._places[engine.replica_id] = engine
        self._links[engine.replica_id] = EngineLink(
            engine.url,
            self,
            heads.error_frame,
            peer=Peer(engine.kind, engine.api_key),
            connect_timeout_s=self._limits.connect_s,
            most_connections=self._limits.most_connections,
        )

    def _obey(self, call: _Carried, frame: Send | Say | End | Cut | Drop | GiveUp) -> None:
        exchange = call.exchange
        match frame:
            case Send():
                self._send(call, frame)
            case Say(_, held, data):
                self._say(exchange, data, held=held)
            case End(_, keep_alive):
                self._conclude(exchange, keep_alive=keep_alive)
            case Cut():
                self._cut(exchange)
            case Drop(_, attempt):
                self._drop(exchange, attempt)
            case GiveUp(_, problem):
                _give_up(exchange, problem)
            case _:
                assert_never(frame)

    def _send(self, call: _Carried, frame: Send) -> None:
        """Begin an attempt; not where an answer has begun, of which the scheduler will hear."""
        exchange = call.exchange
        if exchange.started:
            return
        if frame.hedge:
            exchange = self._beside(exchange, frame)
        else:
            self._calls[frame.number] = call._replace(name=frame.request_id)
            exchange.response_headers = frame.headers
        if not exchange.head:
            head = heads.engine_head(call.message, frame.request_id)
            exchange.head = heads.traced(head, frame.traced) if frame.traced else head
        self._asking.pop(frame.number, None)
        exchange.attempt, exchange.replica_id = frame.attempt, frame.replica_id
        exchange.tokens = exchange.told_tokens = 0
        dispatching.begin(exchange, frame.model, frame.priority, self._links[frame.replica_id])

    def _beside(self, call: Exchange, frame: Send) -> Exchange:
        """Return a second attempt; it is the only one if the first broke while it was decided."""
        if frame.number in self._asking:
            call.attempt, call.replica_id = frame.attempt, frame.replica_id
        return call.beside()

    def _drop(self, exchange: Exchange, attempt: int) -> None:
        """Stop an attempt; a call that is left with none waits for the scheduler's word."""
        if exchange.at(attempt) is None:
            return
        if exchange.lose(attempt):
            return
        self._asking[exchange.number] = None
        if exchange.attempt == attempt:
            exchange.attempt = 0  # it may still be connecting
            if exchange.engine is not None:
                exchange.engine.cancel()

    def _say(self, exchange: Exchange, data: bytes, *, held: bool) -> None:
        """Pass on words of the scheduler; an answer that began meanwhile is cut instead."""
        if exchange.started:
            self._cut(exchange)
            return
        exchange.held = exchange.held or held
        exchange.caller.write(data)

    def _conclude(self, exchange: Exchange, *, keep_alive: bool) -> None:
        if exchange.started:
            self._cut(exchange)
        else:
            self._end(exchange)
            exchange.caller.finished(keep_alive=keep_alive)

    def _cut(self, exchange: Exchange) -> None:
        self._end(exchange)
        exchange.caller.abort()

    # Outcomes: news from engines

    def first_token(self, exchange: Exchange) -> None:
        """Tell that a stream has begun."""
        exchange.drop_hedge()
        exchange.told_tokens = 1
        self._tell(FirstToken(exchange.number, exchange.attempt))

    def began(self, exchange: Exchange) -> None:
        """Tell that an answer has begun."""
        exchange.drop_hedge()
        self._tell(Began(exchange.number, exchange.attempt))

    def finished(self, exchange: Exchange, output_tokens: int) -> None:
        """Tell that an answer is complete."""
        self._end(exchange)
        self._tell(
            Finished(
                exchange.number,
                exchange.attempt,
                exchange.status,
                output_tokens,
                exchange.tool_call_ids,
            )
        )

    def broke(self, exchange: Exchange, problem: str, *, alive: bool) -> None:
        """Tell that an attempt failed; the call waits for a word unless another goes on."""
        call, attempt = exchange.call, exchange.attempt
        number, goes_on = call.number, call.lose(attempt)
        if not goes_on:
            if number in self._orphans:
                detail = f": {problem}"
                refusal = openai_api.refusal("engine_error", detail=detail, retry_after_s=None)
                self._refuse(call, refusal)
                return
            self._asking[number] = None
        self._tell(Broke(number, attempt, exchange.status, problem, alive, exchange.started))

    # Ends

    def _end(self, exchange: Exchange) -> None:
        number = exchange.number
        exchange.over = True
        self._calls.pop(number, None)
        self._asking.pop(number, None)
        self._orphans.pop(number, None)
        if exchange.engine is not None:
            exchange.engine.cancel()
        exchange.drop_hedge()

    def _refuse(self, exchange: Exchange, refusal: openai_api.Refusal) -> None:
        """Answer a call without the scheduler."""
        status, body, _ = refusal
        self.count(status)
        if exchange.started:
            self._cut(exchange)
            return
        _, message, name = self._calls[exchange.number]
        self._end(exchange)
        if exchange.held:
            exchange.caller.write(stream.chunk(stream.error_event(body)) + stream.END)
            exchange.caller.finished(keep_alive=True)
        else:
            reply(exchange.caller, name or self.name(message.headers), refusal)

    def _end_too_long(self, exchange: Exchange, problem: str) -> None:
        if exchange.started and exchange.engine is not None:
            exchange.engine.give_up(problem)
            return
        detail = f": {problem}"
        self._refuse(exchange, openai_api.refusal("timed_out", detail=detail, retry_after_s=None))
        self._tell(Gone(exchange.number))

    # Now and then

    async def watch(self) -> None:
        """Tell how streams go on, for ever."""
        while True:
            await asyncio.sleep(self._period_s)
            self._tell_progress()

    async def sweep(self) -> None:
        """End calls whose engines are silent, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._timeouts.period_s)
            now_s = loop.time()
            open_calls = [call.exchange for call in self._calls.values()]
            self._timeouts.sweep(now_s, now_s, open_calls)

    def _tell_progress(self) -> None:
        if self._wire is None:
            return
        tokens = []
        for number, (exchange, _, _) in self._calls.items():
            if exchange.tokens > exchange.told_tokens:
                exchange.told_tokens = exchange.tokens
                tokens.append((number, exchange.attempt, exchange.tokens))
        answered, self._answered = self._answered, []
        self._tell(Progress(tokens, answered, len(self.agents), time.process_time()))

    def _tell(
        self, frame: Called | Gone | FirstToken | Began | Finished | Broke | Progress
    ) -> None:
        if self._wire is not None:
            self._wire.tell(frame)

    def close(self) -> None:
        """Drop all connections to engines."""
        for link in self._links.values():
            link.close()


def _give_up(exchange: Exchange, problem: str) -> None:
    if exchange.engine is not None:
        exchange.engine.give_up(problem)
