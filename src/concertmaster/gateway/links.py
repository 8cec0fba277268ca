"""The connections to every replica, to which more may come while calls are in flight."""

from collections.abc import Callable

from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.peers import Peer
from concertmaster.gateway.upstream import EngineLink


class Links(dict[ReplicaId, EngineLink]):
    """Links by replica.

    Args:
        link: Prepares the connections to an address.

    Attributes:
        places: The address of each replica, and what its engine is.
    """

    def __init__(self, link: Callable[[str, Peer], EngineLink]) -> None:
        super().__init__()
        self._link = link
        self.places: dict[ReplicaId, tuple[str, Peer]] = {}

    def add(self, replica_id: ReplicaId, url: str, peer: Peer) -> None:
        """Prepare the connections to a replica."""
        self.places[replica_id] = url, peer
        self[replica_id] = self._link(url, peer)
