"""How long a call would wait for a pool: until a place frees, and while others go first.

A pool without a free place frees one when the first of its running calls ends; then the
calls that come before this one in the real order of the line hold places, and all places of
the pool work them off. Both are rebuilt from the books at each question, in tokens, and
turned into seconds by the rate curve of the batches that run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

from concertmaster.core.fleet import Pool, Replica
from concertmaster.core.queue import Lane, Waiting
from concertmaster.core.request import RequestId
from concertmaster.core.sketch import Sketch, first_of, left_over, of_moments

SAMPLED_REPLICAS, SAMPLED_CALLS = 8, 24
"""Of a large pool, this many replicas and running calls stand for all, evenly spaced."""

SAMPLED_WAITING = 64
"""Of a long lane, about this many calls stand for all."""

_Item = TypeVar("_Item")


class Wait(NamedTuple):
    """A call's wait for a pool.

    Attributes:
        parts: Independent quantities whose sum it is, in seconds.
        behind: Calls in the line to the pool that this one would go before.
    """

    parts: Sequence[Sketch]
    behind: float


@dataclass(frozen=True, slots=True)
class Crew:
    """The replicas of a pool that serve, as one body.

    Attributes:
        running: Calls in flight on them.
        step_s: Seconds of a token in the mean batch, at the mean pace.
    """

    pool: Pool
    replicas: Sequence[Replica]
    running: int
    step_s: float


def crew_of(pool: Pool, replicas: Sequence[Replica]) -> Crew:
    """Take the mean over the replicas of a pool, at least one."""
    sampled = _spaced(replicas, SAMPLED_REPLICAS)
    count, running = len(sampled), sum(len(one.in_flight) for one in sampled)
    held_tokens = sum(one.context_tokens for one in sampled)
    pace = sum(one.pace for one in sampled) / count
    step_s = pace * pool.curve.step_s(max(1, running // count), held_tokens // count)
    return Crew(pool, replicas, round(running * len(replicas) / count), step_s)


def wait_parts(
    now_s: float,
    crew: Crew,
    running: Mapping[RequestId, tuple[Waiting, Replica]],
    ahead: Iterable[tuple[float, Waiting]],
    window_s: float,
) -> Sequence[Sketch]:
    """Return the parts of a call's wait for a pool without room.

    Args:
        now_s: This instant.
        crew: Replicas of the pool.
        running: Which call runs where, with its forecast.
        ahead: Calls that go first, each with the number of calls that it stands for here.
        window_s: Prefill that a replica may have been handed ahead of time.
    """
    opens_s = [
        one.prefill_clear_s - window_s - now_s
        for one in crew.replicas
        if len(one.in_flight) < crew.pool.max_sequences and one.prefill_clear_s > now_s + window_s
    ]
    if opens_s:
        return ((min(opens_s) + _prefill_s(crew, ahead) / len(crew.replicas),),)
    return (_first_end(crew, running), _held(crew, ahead))


def _prefill_s(crew: Crew, ahead: Iterable[tuple[float, Waiting]]) -> float:
    tokens = sum(weight * other.request.prompt_tokens for weight, other in ahead)
    return tokens * crew.pool.prefill_token_s


def _first_end(crew: Crew, running: Mapping[RequestId, tuple[Waiting, Replica]]) -> Sketch:
    """Return the seconds until the first of the running calls ends."""
    atoms: list[tuple[float, float]] = []
    model = crew.pool.model.name
    sampled = _spaced(crew.replicas, SAMPLED_REPLICAS)
    for replica in sampled:
        batch, held_tokens = len(replica.in_flight), replica.context_tokens
        step_s = replica.pace * crew.pool.curve.step_s(batch, held_tokens)
        for flight in _spaced(list(replica.in_flight.values()), SAMPLED_CALLS // len(sampled)):
            sketch = running[flight.request.request_id][0].output_sketch(model)
            for tokens, mass in left_over(sketch, flight.streamed_tokens):
                atoms.append((tokens * step_s, mass))
    atoms.sort()
    return first_of(crew.running, atoms) if atoms else (0.0,)


def _held(crew: Crew, ahead: Iterable[tuple[float, Waiting]]) -> Sketch:
    """Return the seconds that all places of a pool take over the calls that go first."""
    model, token_s, step_s = crew.pool.model.name, crew.pool.prefill_token_s, crew.step_s
    mean_s = variance = 0.0
    for weight, other in ahead:
        tokens, spread = other.output_moments(model)
        mean_s += weight * (other.request.prompt_tokens * token_s + tokens * step_s)
        variance += weight * spread * step_s * step_s
    places = max(1, crew.running)
    return of_moments(mean_s / places, variance / (places * places))


def ahead_of(
    call: Waiting, key: float, lanes: Iterable[tuple[Lane, float]], *, fifo: bool = False
) -> Iterator[tuple[float, Waiting]]:
    """Walk through the calls that go before a call, each with the number that it stands for.

    Args:
        call: The call that asks.
        key: Its key in the line.
        lanes: Lanes to the pool, each with the share of its calls that the pool will serve.
        fifo: Take calls to go in the order of their arrival, whatever the policy's order.
    """
    for lane, share in lanes:
        stride = 1 + len(lane) // SAMPLED_WAITING
        for other in islice(lane, 0, None, stride):
            before = (other.key, other.serial) < (key, call.serial)
            if (other.serial < call.serial if fifo else before) and other is not call:
                yield share * stride, other


def _spaced(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """Return at most so many of the items, evenly spaced."""
    return items if len(items) <= most else items[:: -(-len(items) // most)]
