"""How long a call would take on a replica from now on: backlog, prefill, and decoding at pace."""

from typing import NamedTuple

from concertmaster.core.fleet import Replica
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


def service_on(now_s: float, call: Waiting, replica: Replica) -> Service:
    """Look at one replica: prefill ahead, what it lacks of the prompt, the batch with the call."""
    pool, request, pace = replica.pool, call.request, replica.pace
    prefill_s = pool.curve.prefill_s(
        request.prompt_tokens,
        cached_tokens=request.prompt_tokens - lacking_tokens(request, replica),
        chunk_tokens=pool.max_batch_tokens,
    )
    step_s = pool.curve.step_s(
        len(replica.in_flight) + 1, replica.context_tokens + request.prompt_tokens
    )
    backlog_s = max(0.0, replica.prefill_clear_s - now_s)
    token_s = pace * step_s * stretch(replica.prefill_share.ratio(now_s))
    return Service(replica.network_s + backlog_s + pace * prefill_s, token_s)


def stretch(prefill_busy_ratio: float) -> float:
    """Return how many times as long decoding takes if prefill takes so much of the time.

    >>> stretch(0.0), stretch(0.5)
    (1.0, 2.0)
    """
    return 1 / (1 - min(MOST_PREFILL, prefill_busy_ratio))
