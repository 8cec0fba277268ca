"""A call that a worker has read: what it keeps of it, and what it tells the scheduler."""

import asyncio

from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.keyring import TENANT_HEADER
from concertmaster.gateway.reading import Opened
from concertmaster.gateway.trails import LATEST, PromptTrail, Trail
from concertmaster.gateway.workers.frames import Called, ToldTrail
from concertmaster.gateway.workers.side import ELSEWHERE

_TOLD_HEADERS = (b"x-request-id", TENANT_HEADER, b"traceparent", b"tracestate")


def carried(opened: Opened, number: int) -> Exchange:
    """Return what the worker keeps of a call."""
    message, reading = opened.message, opened.reading
    exchange = Exchange(
        ELSEWHERE,
        opened.caller,
        b"",
        message.body,
        model_named=reading.model_named,
        streams=reading.streams,
    )
    exchange.number, exchange.quota = number, message.quota
    exchange.arrived_s = asyncio.get_running_loop().time()
    return exchange


def called(number: int, opened: Opened) -> Called:
    """Return what the scheduler is told of a call."""
    message, reading = opened.message, opened.reading
    headers = {name: message.headers[name] for name in _TOLD_HEADERS if name in message.headers}
    trail = None if reading.identity.workflow_id else told(opened.trail())
    return Called(number, message.target, headers, message.takes_chunks, reading, trail)


def told(trail: Trail) -> ToldTrail:
    """Return what the scheduler is told of a prompt."""
    assert isinstance(trail, PromptTrail), "a worker has the prompt at hand"
    return ToldTrail(list(trail.ends), trail.by_message(LATEST), trail.last)
