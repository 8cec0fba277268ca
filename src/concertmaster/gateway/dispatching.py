"""A call as it goes to the engine that was chosen for it."""

from collections.abc import Iterable, Mapping

from concertmaster.core.actions import Dispatch
from concertmaster.core.fleet import Replica, ReplicaId
from concertmaster.gateway import heads, openai_api, stream
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.limits import Limits
from concertmaster.gateway.links import Links
from concertmaster.gateway.peers import VLLM, Peer
from concertmaster.gateway.upstream import EngineLink, Outcomes


def links(
    urls: Mapping[ReplicaId, str],
    outcomes: Outcomes,
    peers: Mapping[ReplicaId, Peer],
    limits: Limits,
) -> Links:
    """Prepare the connections to every replica."""

    def link(url: str, peer: Peer) -> EngineLink:
        return EngineLink(
            url,
            outcomes,
            heads.error_frame,
            peer=peer,
            connect_timeout_s=limits.connect_s,
            most_connections=limits.most_connections,
        )

    found = Links(link)
    for replica_id, url in urls.items():
        found.add(replica_id, url, peers.get(replica_id, VLLM))
    return found


def send(exchange: Exchange, action: Dispatch, replica: Replica, links: Links) -> None:
    """Begin an attempt, here or in the process that moves the call's bytes."""
    exchange.attempt, exchange.replica_id = action.attempt, action.replica_id
    exchange.tokens = exchange.told_tokens = 0
    exchange.drop_hedge()
    if exchange.relay is not None:
        exchange.relay.send(exchange, action, replica)
        return
    priority = action.priority if replica.pool.priority_scheduling else 0
    begin(exchange, replica.pool.model.name, priority, links[action.replica_id])


def stop(exchange: Exchange | None, replica_id: ReplicaId) -> None:
    """Stop one of two attempts at a call; if that is the first, the second stands for both."""
    if exchange is None or exchange.hedge is None:
        return
    hedge = exchange.hedge
    exchange.lose(hedge.attempt if hedge.replica_id == replica_id else exchange.attempt)


def hang_up(exchanges: Iterable[Exchange], replica_id: ReplicaId, links: Links) -> None:
    """Let a replica that is gone answer nothing more: the core sends elsewhere what has not begun.

    The core fails what has begun, which cuts it.
    """
    links[replica_id].close()
    for exchange in exchanges:
        if exchange.relay is not None and not exchange.started:
            for attempt in (exchange, exchange.hedge):
                if attempt is not None and attempt.replica_id == replica_id:
                    _cancel(attempt)


def _cancel(exchange: Exchange) -> None:
    if exchange.engine is not None:
        exchange.engine.cancel()
        exchange.engine = None


def begin(exchange: Exchange, model: str, priority: int, link: EngineLink) -> None:
    """Send a call to an engine; the attempt before is on a replica that is gone."""
    if exchange.engine is not None:
        exchange.engine.cancel()
    body = exchange.body
    if exchange.model_named != model:
        body = openai_api.with_model(body, model)
    head = heads.addressed(exchange.head, link.prefix, link.api_key)
    if priority:
        line, body = link.dialect.prioritised(body, priority)
        head += line
    head += b"host: %b\r\ncontent-length: %d\r\n" % (link.authority, len(body))
    link.send(exchange, head + b"\r\n" + body)


def tell_decision(exchange: Exchange, policy: str, replica: Replica, action: Dispatch) -> None:
    """Add to the answer where the first attempt went and why; in a held stream, as comments."""
    model = replica.pool.model.name
    if exchange.held:
        lines = heads.decision_headers(policy, model, action).decode("latin-1").splitlines()
        exchange.caller.write(stream.chunk(stream.comment(*lines)))
    elif exchange.attempt == 0:
        exchange.response_headers += heads.decision_headers(policy, model, action)
