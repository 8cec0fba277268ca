"""How long a call would take on a replica from now on: backlog, prefill, and decoding at pace."""

from typing import NamedTuple

from concertmaster.core.fleet import Pool, Replica
from concertmaster.core.queue import Waiting
from concertmaster.core.request import Request
from concertmaster.core.sketch import Sketch, affine

MOST_PREFILL = 0.8
"""Largest share of prefill that is believed to last."""


class Service(NamedTuple):
    """Seconds on a replica as its batch stands: some before decoding, and some for each token."""

    first_s: float
    token_s: float

    def law(self, tokens: Sketch) -> Sketch:
        """Return the seconds that so many tokens take."""
        return affine(tokens, self.token_s, self.first_s)


def lacking_tokens(request: Request, replica: Replica) -> int:
    """Prompt tokens that the replica does not hold: what it would have to compute, at least 1."""
    hashes = replica.pool.cacheable(request)
    return max(1, request.prompt_tokens - (replica.prefixes.hit_tokens(hashes) if hashes else 0))


class Stand(NamedTuple):
    """How a replica stands before a call: enough to say later how long the call would take.

    Attributes:
        cached_tokens: Of the call's prompt.
        running: Calls on it, this one not among them.
        context_tokens: Theirs.
        backlog_s: Until the prefill that it was handed is done, the network included.
        busy_ratio: Share of its time that prefill takes.
    """

    pool: Pool
    prompt_tokens: int
    cached_tokens: int
    running: int
    context_tokens: int
    backlog_s: float
    busy_ratio: float
    pace: float

    def service(self) -> Service:
        """Add up: prefill ahead, what it lacks of the prompt, the batch with the call."""
        pool, prompt_tokens, pace = self.pool, self.prompt_tokens, self.pace
        prefill_s = pool.curve.prefill_s(
            prompt_tokens,
            cached_tokens=self.cached_tokens,
            chunk_tokens=pool.max_batch_tokens,
        )
        step_s = pool.curve.step_s(self.running + 1, self.context_tokens + prompt_tokens)
        token_s = pace * step_s * stretch(self.busy_ratio)
        return Service(self.backlog_s + pace * prefill_s, token_s)


def stand_of(now_s: float, call: Waiting, replica: Replica) -> Stand:
    """Look at one replica as a call may come to it."""
    request = call.request
    return Stand(
        replica.pool,
        request.prompt_tokens,
        request.prompt_tokens - lacking_tokens(request, replica),
        len(replica.in_flight),
        replica.context_tokens,
        replica.network_s + max(0.0, replica.prefill_clear_s - now_s),
        replica.prefill_share.ratio(now_s),
        replica.pace,
    )


def service_on(now_s: float, call: Waiting, replica: Replica) -> Service:
    """Say how long a call would take on one replica."""
    return stand_of(now_s, call, replica).service()


def stretch(prefill_busy_ratio: float) -> float:
    """Return how many times as long decoding takes if prefill takes so much of the time.

    >>> stretch(0.0), stretch(0.5)
    (1.0, 2.0)
    """
    return 1 / (1 - min(MOST_PREFILL, prefill_busy_ratio))
