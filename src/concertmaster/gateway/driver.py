"""Driver two: real time. The same core as the simulator's, between two sets of sockets."""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from concertmaster.core.actions import Action, Cancel, Demote, Dispatch, Fail, Reject, Resize, Wake
from concertmaster.core.errors import CallerError
from concertmaster.core.events import (
    Event,
    ReplicaDemoted,
    ReplicaDied,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    TimerFired,
    TokensStreamed,
    WorkflowClosed,
)
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.control import ControlKind
from concertmaster.gateway import dispatching
from concertmaster.gateway.agent import PATIENCE, AgentConnection, Message, Patience, hurry, see_off
from concertmaster.gateway.alarm import Alarm
from concertmaster.gateway.apis.desk import served
from concertmaster.gateway.exchange import Caller, Exchange, Relay, progress
from concertmaster.gateway.guard import Guard
from concertmaster.gateway.idle import IDLE_S, IdleWatch
from concertmaster.gateway.intake import Intake
from concertmaster.gateway.learning import Forecaster
from concertmaster.gateway.limits import LIMITS, Limits
from concertmaster.gateway.metrics import GatewayMetrics
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.reading import Opened, Reader
from concertmaster.gateway.refusals import Refusals, tell_mistake
from concertmaster.gateway.service import Service
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.rates import PaceWatch

PROGRESS_S = 1.0
"""How often the core is told how far every stream has come; the simulator does the same."""

HOLD_S = 600.0
Clock = Callable[[], float]
Observer = Callable[[float, Event, list[Action]], None]
SideDoor = Callable[[AgentConnection, Message], None]


class Gateway:
    """Takes calls from agents, asks the core, and moves bytes.

    Args:
        scheduler: The core.
        predictor: Makes the forecast that travels with each arrival.
        urls: Address of every replica.
        clock: Seconds that never go back.
        speedup: How much faster that clock runs than the wall's; 1.0 but for emulated fleets.
        side_door: Answers everything that is not a call to a model.
        observe: Told of every event and the actions it led to.
        limits: What is put up with, from engines and from callers.
        rng: Draws waits before retries.
        workflow_idle_s: Seconds without an open call after which a workflow is over.
        follow_pace: Whether the core is told how far replicas are from their rate curves.
        commands: What to run for replicas that are processes of this machine.
        controls: How engines load and unload their model; as vLLM does for those left out.
        hold_s: Longest time for which a call is held while its model does not run.
        patience: How long messages may take to come.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        predictor: Predictor,
        urls: Mapping[ReplicaId, str],
        *,
        clock: Clock,
        side_door: SideDoor,
        speedup: float = 1.0,
        observe: Observer | None = None,
        max_body_bytes: int = 20_000_000,
        limits: Limits = LIMITS,
        rng: random.Random | None = None,
        health_interval_s: float = 2.0,
        workflow_idle_s: float = IDLE_S,
        follow_pace: bool = True,
        commands: Mapping[ReplicaId, Sequence[str]] = {},
        controls: Mapping[ReplicaId, ControlKind] = {},
        peers: Mapping[ReplicaId, Peer] = {},
        hold_s: float = HOLD_S,
        patience: Patience = PATIENCE,
    ) -> None:
        self.scheduler = scheduler
        self.metrics = GatewayMetrics()
        self.max_body_bytes = max_body_bytes
        self._patience = patience
        self.draining = False
        self.forecaster = Forecaster(predictor, self.metrics)
        self.clock = clock
        self._speedup = speedup
        self._side_door = side_door
        self._observe = observe
        self.apis, chat_models = served(scheduler, peers)
        self._reader = Reader(self.apis)
        self._idle = IdleWatch(idle_s=workflow_idle_s)
        self._pace = PaceWatch(scheduler) if follow_pace else None
        self.links = dispatching.links(urls, self, peers, limits)
        self._exchanges: dict[RequestId, Exchange] = {}
        self._intake = Intake(chat_models, self.metrics, self._exchanges)
        self.service = Service(
            scheduler,
            urls,
            self.feed,
            self._exchanges,
            clock=clock,
            speedup=speedup,
            commands=commands,
            controls=controls,
            peers=peers,
            health_interval_s=health_interval_s,
            hold_s=hold_s,
        )
        self.engines = self.service.engines
        self._refusals = Refusals(
            scheduler, self.service.holding, self.metrics, clock=clock, end=self._end
        )
        self._guard = Guard(
            scheduler,
            self._exchanges,
            limits,
            feed=self.feed,
            refuse=self._refusals.refuse,
            clock=clock,
            speedup=speedup,
            rng=rng or random.Random(0),
        )
        self.metrics.guarded = self._guard
        self._agents: dict[AgentConnection, None] = {}
        self._alarm = Alarm(lambda: self.feed(TimerFired()), speedup=speedup)
        self._tasks: list[asyncio.Task[None]] = []

    # Life

    async def open(self) -> None:
        """Bring up the engines that are ours to run; call it before ``start``."""
        await self.service.open()

    def start(self) -> None:
        """Begin to watch engines and to tell the core of progress."""
        duties = (
            self._tick(),
            hurry(self._agents, self._patience),
            self.service.hold(lambda one: self._refusals.refuse(one, "waited_too_long")),
            self._guard.watch(),
            self.service.health.watch(),
            self.engines.watch(),
            self.forecaster.watch(),
        )
        self._tasks = [asyncio.create_task(duty) for duty in duties]
        if self.scheduler.policy.scaling is not None:
            self.feed(TimerFired())  # its clock starts with the first event

    async def stop(self, *, drain_s: float) -> None:
        """Take nothing new, let calls end for a while, answer those that have not begun, close."""
        self.draining = True
        deadline_s = self.clock() + drain_s * self._speedup
        while self._exchanges and self.clock() < deadline_s:  # noqa: ASYNC110  # polled once a life
            await asyncio.sleep(0.02)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._turn_all_away()
        self._alarm.cancel()
        await see_off(self._agents)
        for link in self.links.values():
            link.close()
        await self.service.control.close()
        await self.forecaster.stop()

    def _turn_all_away(self) -> None:
        """Answer what is open; those that wait first, so that nobody gets their room."""
        waiting_first = sorted(self._exchanges.values(), key=lambda one: one.engine is not None)
        for exchange in waiting_first:
            if not exchange.over:  # else refused by the core meanwhile
                self._refusals.turn_away(exchange)
                self.feed(RequestCancelled(exchange.request.request_id))

    @property
    def open_exchanges(self) -> int:
        """Calls without an outcome."""
        return len(self._exchanges)

    # Desk: messages of agents

    def opened(self, agent: AgentConnection) -> None:
        """Note a connection."""
        self._agents[agent] = None

    def lost(self, agent: AgentConnection) -> None:
        """Cancel what a vanished agent was waiting for."""
        self._agents.pop(agent, None)
        if agent.exchange is not None:
            self.abandon(agent.exchange)

    def abandon(self, exchange: Exchange) -> None:
        """Cancel a call for which nobody waits any more."""
        if not exchange.over:
            self._end(exchange, 499)
            self.feed(RequestCancelled(exchange.request.request_id))

    def cut(self, exchange: Exchange) -> None:
        """End a call whose answer comes from a replica that is dead to the core."""
        self._guard.turn_away(exchange, "replica_died")

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what to call a message that becomes no call."""
        return self._intake.name(headers)

    def take(self, agent: AgentConnection, message: Message) -> None:
        """Answer a message: a call goes to the core, all else through the side door."""
        if not self._reader.is_call(message):
            self._side_door(agent, message)
            return
        caller = self._reader.caller(agent, message)
        if self.refuses_unread(caller, message.headers):
            return
        now_s, reads_prompts = self.clock(), self.forecaster.reads_prompts
        try:
            opened = self._reader.read(agent, message, reads_prompts=reads_prompts)
            caller = opened.caller
            exchange = self.admit(now_s, opened)
        except CallerError as error:
            tell_mistake(caller, error, self.name(message.headers), self.metrics.answered)
            return
        agent.exchange = exchange
        self.consider(exchange)

    def refuses_unread(self, caller: Caller, headers: Mapping[bytes, bytes]) -> bool:
        """Refuse a call if no call is taken at all."""
        shedding = self._guard.shedding
        refuses = self.draining or shedding.refuses_all()
        if refuses:
            name = self.name(headers)
            self._refusals.refuse_unread(caller, name, draining=self.draining, guard=shedding)
        return refuses

    def admit(self, now_s: float, opened: Opened, relay: Relay | None = None) -> Exchange:
        """Take a call in; raises ``CallerError`` if its tenant is at a limit."""
        exchange, identity = self._intake.open(now_s, opened, relay)
        self._exchanges[exchange.request.request_id] = exchange
        self._idle.begin(now_s, exchange.request.workflow_id, is_final=identity.is_final)
        return exchange

    def consider(self, exchange: Exchange) -> None:
        """Refuse a call that is one too many, or ask the core."""
        if self._guard.refuses(exchange):
            return
        forecast = self.forecaster.predict(exchange)
        self._feed(exchange.arrived_s, RequestArrived(exchange.request, forecast))

    # The core

    def feed(self, event: Event) -> None:
        """Give the core an event that happens now."""
        if isinstance(event, ReplicaDied | ReplicaDemoted):
            dispatching.hang_up(self._exchanges.values(), event.replica_id, self.links)
        self._feed(self.clock(), event)

    def _feed(self, now_s: float, event: Event) -> None:
        if self._pace is not None:
            self._pace.note(now_s, event)
        actions = self.scheduler.handle(now_s, event)
        if self._observe is not None:
            self._observe(now_s, event, actions)
        for action in actions:
            self._perform(now_s, action)
        wakeup_s = self.scheduler.next_wakeup_s()
        if wakeup_s is not None:
            self._alarm.set(now_s, wakeup_s)

    def grade(self, workflow_id: WorkflowId, success: float | None) -> None:
        """Take in that a workflow is over, which may be known already, and its grade in 0…1."""
        self.metrics.grades += 1
        self.forecaster.close(workflow_id, success)
        if self._idle.end(workflow_id):
            self.feed(WorkflowClosed(workflow_id))

    def _perform(self, now_s: float, action: Action) -> None:
        match action:
            case Dispatch():
                self._dispatch(now_s, action)
            case Reject(request_id, reason, retry_after_s):
                self._refusals.refuse(self._exchanges[request_id], reason, retry_after_s)
            case Fail(request_id, reason):
                self._refusals.refuse(self._exchanges[request_id], reason)
            case Cancel(request_id, replica_id, overtaken):
                dispatching.stop(self._exchanges.get(request_id), replica_id)
                if overtaken:
                    self._guard.breakers.failed(replica_id)
            case Wake(replica_id):
                self.service.wake(now_s, replica_id)
            case Demote(replica_id, readiness):
                self.service.control.stop(replica_id, readiness)
            case Resize():
                pass  # engines keep the KV that they were started with
            case _:
                assert_never(action)

    def _dispatch(self, now_s: float, action: Dispatch) -> None:
        exchange = self._exchanges[action.request_id]
        replica = self.scheduler.replicas[action.replica_id]
        if self._pace is not None and not exchange.streams:
            self._pace.unheard(now_s, action.request_id, action.attempt)
        if action.hedge:
            dispatching.send(exchange.beside(), action, replica, self.links)
            return
        if exchange.dispatched_s is None:
            exchange.dispatched_s = now_s
        dispatching.tell_decision(exchange, self.scheduler.policy.name, replica, action)
        dispatching.send(exchange, action, replica, self.links)
        self._guard.sent(action.attempt)
        self.metrics.dispatched(now_s - exchange.arrived_s, self.clock() - now_s)

    # Outcomes: news from engines

    def first_token(self, exchange: Exchange) -> None:
        """Tell the core that an answer has begun."""
        now_s = self.clock()
        exchange.first_token_s = now_s
        exchange.told_tokens = 1
        self._feed(now_s, TokensStreamed(((exchange.request.request_id, exchange.attempt, 1),)))

    def began(self, exchange: Exchange) -> None:
        """Tell the core that an answer has begun: it is not tried again elsewhere."""
        self.feed(TokensStreamed(((exchange.request.request_id, exchange.attempt, 1),)))

    def finished(self, exchange: Exchange, output_tokens: int) -> None:
        """Tell the core and the predictor that an answer is complete."""
        now_s, request = self.clock(), exchange.request
        exchange.tokens = output_tokens
        self._end(exchange, exchange.status)
        self.metrics.finished(now_s, exchange, output_tokens)
        self._feed(now_s, RequestFinished(request.request_id, exchange.attempt, output_tokens))
        self._guard.served(ReplicaId(exchange.replica_id))
        if exchange.tool_call_ids:
            self._intake.note_tool_calls(exchange.tool_call_ids, request)
        if exchange.status == 200:
            replica = self.scheduler.replicas[ReplicaId(exchange.replica_id)]
            self.forecaster.served(now_s, exchange, replica.pool)

    def broke(self, exchange: Exchange, problem: str, *, alive: bool) -> None:
        """Tell the core that an attempt failed, and that its replica is gone if it is."""
        call, attempt, replica_id = exchange.call, exchange.attempt, ReplicaId(exchange.replica_id)
        call.error_text = problem
        if call is not exchange:
            call.drop_hedge()
        if alive:
            self._guard.breakers.failed(replica_id)
        else:
            self.feed(ReplicaDied(replica_id))
        if not call.over and self.scheduler.in_flight(call.request.request_id, attempt) is not None:
            self._guard.failed(call, attempt)

    def _end(self, exchange: Exchange, status: int) -> None:
        exchange.over = True
        exchange.status = status
        now_s, request = self.clock(), exchange.request
        self._exchanges.pop(request.request_id, None)
        self._guard.shedding.ended += 1
        self._idle.settle(now_s, request.workflow_id)
        self.metrics.ended(now_s, exchange)
        if exchange.quota is not None:
            exchange.quota.end(exchange.tokens, (now_s - exchange.arrived_s) / self._speedup)
        if status != 200:
            self.forecaster.failed(request.request_id)
        if exchange.engine is not None:
            exchange.engine.cancel()
        exchange.drop_hedge()

    async def _tick(self) -> None:
        """Tell the core how far every stream has come."""
        while True:
            await asyncio.sleep(PROGRESS_S / self._speedup)
            if (news := progress(self._exchanges.values())) is not None:
                self.feed(news)
            now_s = self.clock()
            if self._pace is not None and (paces := self._pace.due(now_s)) is not None:
                self._feed(now_s, paces)
            self._close_workflows(now_s)
            self.metrics.fold()

    def _close_workflows(self, now_s: float) -> None:
        """Tell the predictor and the core which workflows are over."""
        for workflow_id in self._idle.over(now_s):
            self.forecaster.close(workflow_id)
            self._feed(now_s, WorkflowClosed(workflow_id))
