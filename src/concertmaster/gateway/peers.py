"""What the gateway must know of an engine to call it: its kind and its key."""

from collections.abc import Mapping
from typing import NamedTuple

from concertmaster.config import FleetFile, PoolSection
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.dialects import DIALECTS, Dialect, EngineKind


class Peer(NamedTuple):
    """An engine as a caller sees it.

    Attributes:
        api_key: Sent in place of the caller's own; empty lets that pass.
    """

    kind: EngineKind = "vllm"
    api_key: str = ""

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
    return Peer(section.speaks, environ.get(name, "") if name else "")
