"""How long a call would take on a replica from now on: backlog, prefill, and decoding at pace."""

from typing import NamedTuple

from concertmaster.core.fleet import Replica
from concertmaster.core.queue import Waiting
from concertmaster.core.sketch import Sketch, affine


class Service(NamedTuple):
    """Seconds on a replica as its batch stands: some before decoding, and some for each token."""

    first_s: float
    token_s: float

    def law(self, tokens: Sketch) -> Sketch:
        """Return the seconds that so many tokens take."""
        return affine(tokens, self.token_s, self.first_s)


def service_on(now_s: float, call: Waiting, replica: Replica) -> Service:
    """Look at one replica: prefill ahead, what it lacks of the prompt, the batch with the call."""
    pool, request, pace = replica.pool, call.request, replica.pace
    hashes = pool.cacheable(request)
    prefill_s = pool.curve.prefill_s(
        request.prompt_tokens,
        cached_tokens=replica.prefixes.hit_tokens(hashes) if hashes else 0,
        chunk_tokens=pool.max_batch_tokens,
    )
    step_s = pool.curve.step_s(
        len(replica.in_flight) + 1, replica.context_tokens + request.prompt_tokens
    )
    backlog_s = max(0.0, replica.prefill_clear_s - now_s)
    return Service(replica.network_s + backlog_s + pace * prefill_s, pace * step_s)
