"""How long a call would wait for a pool: until a place frees, and while others go first.

A pool without a free place frees one when the first of its running calls ends; then the
calls that come before this one in the real order of the line hold places, and all places of
the pool work them off. Both are rebuilt from the books, in tokens, and turned into seconds
by the rate curve of the batches that run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from concertmaster.core.fleet import Pool, Replica
from concertmaster.core.ladder import Work
from concertmaster.core.queue import Waiting
from concertmaster.core.request import RequestId
from concertmaster.core.service import stretch
from concertmaster.core.sketch import Sketch, first_of, left_over, moments, of_moments

SAMPLED_REPLICAS, SAMPLED_CALLS = 8, 24
"""Of a large pool, this many replicas and running calls stand for all, evenly spaced."""

_Item = TypeVar("_Item")


class Wait(NamedTuple):
    """A call's wait for a pool.

    Attributes:
        parts: Independent quantities whose sum it is, in seconds.
        behind: Calls in the line to the pool that this one would go before.
        stretch: Factor in it for calls that will come and go first, if they keep coming.
        seen_s: For how long somebody has been waiting by now.
    """

    parts: Sequence[Sketch]
    behind: float
    stretch: float = 1.0
    seen_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Mean, if calls keep coming for as long again as somebody has been waiting by now.

        >>> Wait([(30.0,)], 0.0, stretch=3.0, seen_s=9.0).mean_s
        16.0
        """
        for_ever_s = sum(moments(part)[0] for part in self.parts)
        share = 1 - 1 / self.stretch
        return min(for_ever_s, for_ever_s / self.stretch + share * self.seen_s)

    @property
    def least_s(self) -> float:
        """Seconds that it takes at the very least."""
        return sum(part[0] for part in self.parts)


class Ahead(NamedTuple):
    """What the calls that go first ask of a pool, as far as it will be the one to serve them.

    Attributes:
        variance: Of the output tokens, in tokens squared.
    """

    calls: float
    prompt_tokens: float
    output_tokens: float
    variance: float

    @classmethod
    def of(cls, lanes: Iterable[tuple[float, Work]]) -> "Ahead":
        """Add up lanes, each with the share of its calls that the pool will serve."""
        sums = [0.0] * len(Work._fields)
        for share, work in lanes:
            sums = [so_far + share * more for so_far, more in zip(sums, work, strict=True)]
        return cls(*sums)


@dataclass(frozen=True, slots=True)
class Crew:
    """The replicas of a pool that serve, as one body.

    Attributes:
        running: Calls in flight on them.
        step_s: Seconds of a token in the mean batch, at the mean pace, between others' prefills.
        network_s: Of the nearest.
        clear_s: Instant by which the first replica is done with prefill of those that take no
            call for that alone; infinite if there is none.
    """

    pool: Pool
    replicas: Sequence[Replica]
    running: int
    step_s: float
    network_s: float
    clear_s: float

    @property
    def tokens_per_s(self) -> float:
        """What it works off; of an idle one, what a single call would get."""
        return max(1, self.running) / self.step_s


def crew_of(pool: Pool, replicas: Sequence[Replica], now_s: float, window_s: float) -> Crew:
    """Take the mean over the replicas of a pool, at least one.

    Args:
        pool: Their pool.
        replicas: Those that serve.
        now_s: This instant.
        window_s: Prefill that a replica may have been handed ahead of time.
    """
    sampled = _spaced(replicas, SAMPLED_REPLICAS)
    count, running = len(sampled), sum(len(one.in_flight) for one in sampled)
    held_tokens = sum(one.context_tokens for one in sampled)
    pace = sum(one.pace for one in sampled) / count
    busy_ratio = sum(one.prefill_share.latest_ratio for one in sampled) / count
    step_s = pace * pool.curve.step_s(max(1, running // count), held_tokens // count)
    closed_s = (
        one.prefill_clear_s
        for one in replicas
        if one.prefill_clear_s - window_s > now_s and len(one.in_flight) < pool.max_sequences
    )
    return Crew(
        pool,
        replicas,
        running=round(running * len(replicas) / count),
        step_s=step_s * stretch(busy_ratio),
        network_s=min(one.network_s for one in replicas),
        clear_s=min(closed_s, default=math.inf),
    )


def first_end(crew: Crew, running: Mapping[RequestId, tuple[Waiting, Replica]]) -> Sketch:
    """Return the seconds until the first of the running calls ends."""
    atoms: list[tuple[float, float]] = []
    model = crew.pool.model.name
    sampled = _spaced(crew.replicas, SAMPLED_REPLICAS)
    for replica in sampled:
        batch, held_tokens = len(replica.in_flight), replica.context_tokens
        step_s = replica.pace * crew.pool.curve.step_s(batch, held_tokens)
        for flight in _spaced(list(replica.in_flight.values()), SAMPLED_CALLS // len(sampled)):
            sketch = running[flight.request.request_id][0].output_sketch(model)
            left = left_over(sketch, flight.streamed_tokens)
            atoms += [(tokens * step_s, mass) for tokens, mass in left]
    atoms.sort()
    return first_of(crew.running, atoms) if atoms else (0.0,)


def until_clear_s(crew: Crew, ahead: Ahead, wait_s: float) -> float:
    """Return the wait for a pool that only prefill keeps from taking calls.

    Args:
        crew: The pool.
        ahead: Calls that go first.
        wait_s: Until one of its replicas takes a call again.
    """
    return wait_s + ahead.prompt_tokens * crew.pool.prefill_token_s / len(crew.replicas)


def held(crew: Crew, ahead: Ahead) -> Sketch:
    """Return the seconds that all places of a pool take over the calls that go first."""
    step_s, places = crew.step_s, max(1, crew.running)
    mean_s = ahead.prompt_tokens * crew.pool.prefill_token_s + ahead.output_tokens * step_s
    variance = ahead.variance * step_s * step_s
    return of_moments(mean_s / places, variance / (places * places))


def _spaced(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """Return at most so many of the items, evenly spaced."""
    return items if len(items) <= most else items[:: -(-len(items) // most)]
