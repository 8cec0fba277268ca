"""Which replicas are in service: brought up and put away, watched, and waited for."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from concertmaster.core.events import (
    Event,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaReady,
    RequestArrived,
    RequestCancelled,
)
from concertmaster.core.fleet import Readiness, ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.control import ControlKind
from concertmaster.gateway.control import Engine, Feed, Standing
from concertmaster.gateway.engine_watch import EngineWatch
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.health import HealthWatch
from concertmaster.gateway.holding import LOOK_S, Holding
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.processes import controller


class Service:
    """The engines behind a gateway, and the calls that wait until one runs.

    Args:
        scheduler: The core.
        urls: Address of every replica.
        feed: Tells the core.
        exchanges: Calls without an outcome.
        clock: The core's.
        speedup: How much faster that clock runs than the wall's.
        commands: What to run for replicas that are processes of this machine.
        controls: How engines load and unload their model; as vLLM does for those left out.
        peers: What the engines are; vLLM those left out.
        health_interval_s: Between two probes of an engine.
        hold_s: Longest time for which a call is held while its model does not run.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        urls: Mapping[ReplicaId, str],
        feed: Feed,
        exchanges: Mapping[RequestId, Exchange],
        *,
        clock: Callable[[], float],
        speedup: float,
        commands: Mapping[ReplicaId, Sequence[str]],
        controls: Mapping[ReplicaId, ControlKind],
        peers: Mapping[ReplicaId, Peer],
        health_interval_s: float,
        hold_s: float,
    ) -> None:
        self._replicas = scheduler.replicas
        self._line = scheduler.line
        self._feed = feed
        self._exchanges = exchanges
        self._clock = clock
        self._speedup = speedup
        self._urls, self._peers = dict(urls), dict(peers)
        self._engines = {
            one: Engine(url, self._replicas[one].pool.model.name, controls.get(one, "vllm"))
            for one, url in urls.items()
        }
        self.control = controller(self._engines, commands, self._hear, self._standing)
        self.health = HealthWatch(
            self._urls,
            feed,
            self._is_alive,
            self.control,
            self._peers,
            interval_s=health_interval_s,
        )
        self.engines = EngineWatch(
            self._urls,
            self._peers,
            self._replicas,
            self.control.answers,
            interval_s=health_interval_s,
        )
        self.holding = Holding(
            scheduler, self.control.problem, self.health.pause_s, speedup=speedup, hold_s=hold_s
        )

    async def open(self) -> None:
        """Bring up the engines that are ours to run."""
        replicas = self._replicas.values()
        await self.control.open(
            [one.replica_id for one in replicas if one.readiness is Readiness.RUNNING]
        )

    def join(self, replica_id: ReplicaId, engine: Engine, peer: Peer) -> None:
        """Watch over one replica more; it takes calls once its engine has answered."""
        self._engines[replica_id], self._peers[replica_id] = engine, peer
        self._urls[replica_id] = engine.url
        self.holding.recount()

    def leave(self, replica_id: ReplicaId) -> None:
        """Watch no longer over a replica that was removed."""
        self._urls.pop(replica_id, None)
        self.engines.readings.pop(replica_id, None)

    def adopt(self, *, health_interval_s: float, hold_s: float) -> None:
        """Go by other times from here on."""
        self.health.interval_s = self.engines.interval_s = health_interval_s
        self.holding.hold_s = hold_s

    def wake(self, now_s: float, replica_id: ReplicaId) -> None:
        """Bring a replica into service."""
        self.holding.woken(now_s, replica_id)
        self.control.start(replica_id)

    async def hold(self, refuse: Callable[[Exchange], None]) -> None:
        """Tell those who wait for a model that does not run, and let nobody wait for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            for exchange in self.holding.look(self._clock(), self._exchanges):
                if exchange.request.request_id in self._line:  # else refused by the core meanwhile
                    refuse(exchange)
                    self._feed(RequestCancelled(exchange.request.request_id))

    def _hear(self, event: Event) -> None:
        """Take in what came of bringing a replica up or down.

        If it did not come up, and nobody else can take the calls that waited for it, they are
        routed anew: elsewhere, or the core refuses them.
        """
        assert isinstance(event, ReplicaReady | ReplicaDied | ReplicaDemoted)
        replica = self._replicas[event.replica_id]
        was_down = not replica.alive or replica.readiness is not Readiness.RUNNING
        self.holding.settled(event.replica_id)
        self._feed(event)
        if isinstance(event, ReplicaDied) and was_down:
            self._route_anew(self.holding.stranded())

    def _route_anew(self, stranded: Iterable[RequestId]) -> None:
        for request_id in stranded:
            if request_id in self._line:  # else refused by the core meanwhile
                exchange = self._exchanges[request_id]
                self._feed(RequestCancelled(request_id))
                self._feed(RequestArrived(exchange.request, exchange.forecast))

    def _standing(self, replica_id: ReplicaId) -> Standing:
        replica = self._replicas[replica_id]
        ready_s = replica.pool.ready_s.get(replica.readiness, 0.0) / self._speedup
        return Standing(replica.alive, replica.readiness, ready_s)

    def _is_alive(self, replica_id: ReplicaId) -> bool:
        return self._replicas[replica_id].alive
