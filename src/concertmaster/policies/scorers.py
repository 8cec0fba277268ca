"""Scorers: seconds that a replica would add to a call, one replica at a time, at its pace."""

from dataclasses import dataclass

from concertmaster.core.fleet import Pool, Replica
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ServiceClass
from concertmaster.core.service import lacking_tokens

TOKEN_BYTES = 4
"""Bytes of a prompt token on the wire."""


@dataclass(frozen=True, slots=True)
class RunningRequests:
    """Each call in flight counts for the same time, whatever it is.

    Attributes:
        request_s: The exchange rate: seconds that one call in flight is taken to add.
    """

    request_s: float = 1.0
    name: str = "running_requests"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Multiply calls in flight by their rate."""
        return self.request_s * len(replica.in_flight)


@dataclass(frozen=True, slots=True)
class WeightedRequests:
    """Calls on a replica as vLLM's own balancer weighs them: one that waits counts four times.

    A call waits until its first token has been seen.

    Attributes:
        request_s: The exchange rate: seconds that one running call is taken to add.
        waiting_weight: Running calls that a waiting one counts for.
    """

    request_s: float = 1.0
    waiting_weight: int = 4
    name: str = "weighted_requests"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Weigh the calls in flight."""
        waiting = sum(not one.streamed_tokens for one in replica.in_flight.values())
        running = len(replica.in_flight) - waiting
        return self.request_s * (running + self.waiting_weight * waiting)


@dataclass(frozen=True, slots=True)
class PrefillBacklog:
    """Prefill that was handed over and is not done: it delays the first token."""

    name: str = "prefill_backlog"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Time until the replica's prefill should be clear."""
        return max(0.0, replica.prefill_clear_s - now_s)


@dataclass(frozen=True, slots=True)
class PrefillMiss:
    """Prefill of the part of the prompt that the replica does not hold."""

    name: str = "prefill_miss"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds of the tokens to compute, chunk by chunk."""
        request, pool = call.request, replica.pool
        return replica.pace * pool.curve.prefill_s(
            request.prompt_tokens,
            cached_tokens=request.prompt_tokens - lacking_tokens(request, replica),
            chunk_tokens=pool.max_batch_tokens,
        )


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefill of the whole prompt, blind to the prefix cache."""

    name: str = "prefill"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds of all prompt tokens."""
        pool, tokens = replica.pool, call.request.prompt_tokens
        return replica.pace * pool.curve.prefill_s(tokens, chunk_tokens=pool.max_batch_tokens)


@dataclass(frozen=True, slots=True)
class Decode:
    """Decoding the expected answer in the batch that the call would join.

    Continuous batching: the step grows with the sequences and the KV tokens in it, so a
    busy replica is slower for everyone rather than first-come-first-served.
    """

    name: str = "decode"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Multiply expected tokens by the step of the batch with this call in it."""
        pool = replica.pool
        tokens = call.expected_tokens(pool.model.name)
        kv_tokens = replica.context_tokens + call.request.prompt_tokens
        return replica.pace * (tokens * pool.curve.step_s(len(replica.in_flight) + 1, kv_tokens))


@dataclass(frozen=True, slots=True)
class InFlightTokens:
    """Predicted tokens in flight: what the replica still has to decode, shared by its batch."""

    name: str = "in_flight_tokens"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Slow-down that the tokens in flight cause: their decoding beyond an empty batch's."""
        running = len(replica.in_flight)
        if not running:
            return 0.0
        curve = replica.pool.curve
        extra_s = curve.step_s(running + 1, replica.context_tokens) - curve.step_s(1, 0)
        return replica.pace * (max(0.0, extra_s) * replica.decode_tokens / running)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanLatency:
    """Growth of the sum of mean latencies on a replica: a greedy step of the best placement.

    Every call is taken for the mean one of a profile, so nothing is predicted of it. The sum
    over a replica grows ever faster with its calls, hence greedy steps reach its least total.

    Attributes:
        prompt_tokens: Of the mean call.
        output_tokens: Of the mean call.
    """

    prompt_tokens: int
    output_tokens: float
    name: str = "mean_latency"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Compare the calls there with and without one more."""
        pool, running = replica.pool, len(replica.in_flight)
        return replica.pace * (self._sum_s(pool, running + 1) - self._sum_s(pool, running))

    def _sum_s(self, pool: Pool, calls: int) -> float:
        if not calls:
            return 0.0
        return calls * pool.service_s(self.prompt_tokens, self.output_tokens, batch=calls)


@dataclass(frozen=True, slots=True)
class Network:
    """Round trip to the replica's cluster."""

    name: str = "network"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds of distance."""
        return replica.network_s


@dataclass(frozen=True, slots=True)
class Distance:
    """Round trip to the replica's cluster and the way of the prompt there.

    Attributes:
        interactive: What a second counts for if a person waits for it; else 1.
        bytes_per_s: Of the line to a cluster that is not here.
    """

    interactive: float = 4.0
    bytes_per_s: float = 1.25e8
    name: str = "distance"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Seconds of distance, weighed by who waits."""
        if not replica.network_s:
            return 0.0
        request = call.request
        sent_s = TOKEN_BYTES * request.prompt_tokens / self.bytes_per_s
        weight = self.interactive if request.service_class is ServiceClass.INTERACTIVE else 1.0
        return weight * (replica.network_s + sent_s)
