"""Which replicas a running gateway has: taken in and out while calls are in flight."""

from concertmaster.core.events import ReplicaJoined, ReplicaRemoved
from concertmaster.core.fleet import Node, PoolId, Replica, ReplicaId
from concertmaster.gateway.control import Engine
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.peers import Peer


class Roster:
    """The replicas of a gateway by the addresses of their engines.

    A replica that was removed stays in the books, so that its figures do; if its address comes
    back, it takes up its name again.
    """

    def __init__(self, gateway: Gateway, urls: dict[ReplicaId, str]) -> None:
        self._gateway = gateway
        self._urls = urls

    def serving(self, pool_id: PoolId) -> dict[ReplicaId, str]:
        """Addresses of the replicas of a pool that were not removed, in their order."""
        return {
            replica_id: url
            for replica_id, url in self._urls.items()
            if (replica := self._replica(replica_id)).pool.pool_id == pool_id
            and not replica.removed
        }

    def join(self, pool_id: PoolId, node: Node, engine: Engine, peer: Peer) -> ReplicaId:
        """Take in an engine; it gets calls once it has answered that it is healthy."""
        replica_id = self._name(pool_id, engine.url)
        self._urls[replica_id] = engine.url
        if replica_id not in self._gateway.links:
            self._gateway.links.add(replica_id, engine.url, peer)
        self._gateway.feed(ReplicaJoined(replica_id, pool_id, node))
        self._gateway.service.join(replica_id, engine, peer)
        return replica_id

    def remove(self, replica_id: ReplicaId) -> None:
        """Let a replica finish what it has, and give it nothing more."""
        self._gateway.service.leave(replica_id)
        self._gateway.feed(ReplicaRemoved(replica_id))

    def _name(self, pool_id: PoolId, url: str) -> ReplicaId:
        """Return the name that this address had, if it is free again, else one never used."""
        for replica_id, known in self._urls.items():
            replica = self._replica(replica_id)
            is_free = replica.removed and not replica.in_flight
            if is_free and known == url and replica.pool.pool_id == pool_id:
                return replica_id
        number = 0
        while ReplicaId(f"{pool_id}-{number}") in self._urls:
            number += 1
        return ReplicaId(f"{pool_id}-{number}")

    def _replica(self, replica_id: ReplicaId) -> Replica:
        return self._gateway.scheduler.replicas[replica_id]
