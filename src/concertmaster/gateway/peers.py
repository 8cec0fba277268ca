"""What the gateway must know of an engine to call it: its kind and its key."""

from collections.abc import Mapping
from typing import NamedTuple

from concertmaster.config import FleetFile, PoolSection, Serves
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Pool, ReplicaId
from concertmaster.core.request import ModelName
from concertmaster.engines.dialects import DIALECTS, Dialect, EngineKind


class Peer(NamedTuple):
    """An engine as a caller sees it.

    Attributes:
        api_key: Sent in place of the caller's own; empty lets that pass.
        serves: Which calls it takes.
    """

    kind: EngineKind = "vllm"
    api_key: str = ""
    serves: Serves = "chat"

    @property
    def dialect(self) -> Dialect:
        """What its kind calls things."""
        return DIALECTS[self.kind]


VLLM = Peer()
"""What an engine is taken for of which nothing is said."""


def peers_of(path: str, file: FleetFile, environ: Mapping[str, str]) -> dict[ReplicaId, Peer]:
    """Return what is known of each replica's engine.

    Raises:
        InputError: The environment has no key that a pool names.
    """
    return {
        ReplicaId(f"{section.name}-{number}"): _peer(path, f"pools[{at}]", section, environ)
        for at, section in enumerate(file.pools)
        for number in range(section.count)
    }


def _peer(path: str, where: str, section: PoolSection, environ: Mapping[str, str]) -> Peer:
    name = section.api_key_env
    if name and not environ.get(name):
        raise InputError(
            path, f"{where}.api_key_env", f"the environment has no {name}", f"export {name}=…"
        )
    return Peer(section.speaks, environ.get(name, "") if name else "", section.serves)


def models_for(
    serves: Serves, pools: Mapping[ReplicaId, Pool], peers: Mapping[ReplicaId, Peer]
) -> tuple[ModelName, ...]:
    """Return the models of which a replica takes such calls, in the order of replicas."""
    found = [
        pool.model.name
        for replica_id, pool in pools.items()
        if peers.get(replica_id, VLLM).serves in (serves, "both")
    ]
    return tuple(dict.fromkeys(found))
