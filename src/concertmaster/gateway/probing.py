"""Are the engines there, and do they serve what the fleet file says? Asked once."""

import asyncio
from collections.abc import Mapping

from concertmaster.core.fleet import Pool, ReplicaId
from concertmaster.engines.control import CONTROLS, ControlKind
from concertmaster.engines.discovery import contradiction, served_models
from concertmaster.engines.openai_http import fetch
from concertmaster.gateway.peers import VLLM, Peer

TIMEOUT_S = 5.0


async def probed(
    urls: Mapping[ReplicaId, str],
    pools: Mapping[ReplicaId, Pool],
    peers: Mapping[ReplicaId, Peer],
    controls: Mapping[ReplicaId, ControlKind],
) -> list[tuple[ReplicaId, str]]:
    """Return the replicas whose engines are not as they should be, and what is wrong with each."""

    async def problem(replica_id: ReplicaId, url: str) -> str:
        peer = peers.get(replica_id, VLLM)
        health = CONTROLS[controls.get(replica_id, "vllm")].health_path
        try:
            return await _problem(url, pools[replica_id], peer, health)
        except TimeoutError:
            return f"no answer within {TIMEOUT_S:.0f} s"
        except (OSError, ValueError) as error:
            return str(error) or type(error).__name__

    found = await asyncio.gather(*(problem(*entry) for entry in urls.items()))
    return [(replica_id, text) for replica_id, text in zip(urls, found, strict=True) if text]


async def _problem(url: str, pool: Pool, peer: Peer, health: str) -> str:
    path = peer.dialect.health_path or health
    status, _ = await fetch("GET", url, path, api_key=peer.api_key, timeout_s=TIMEOUT_S)
    if status != 200:
        return f"GET {path} answered {status}"
    status, body = await fetch("GET", url, "/v1/models", api_key=peer.api_key, timeout_s=TIMEOUT_S)
    if status != 200:
        return f"GET /v1/models answered {status}"
    return contradiction(served_models(body), pool.model.name, pool.model.context_tokens)
