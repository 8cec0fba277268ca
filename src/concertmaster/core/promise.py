"""KV that calls are promised, and whether one more fits beside those that run.

A promise covers the prompt and a likely answer, and grows with the answer. Room is judged by
what all calls will hold at their ends: a sum of independent amounts, so the tail of the sum
rather than the sum of tails (Maestro, arXiv 2606.12950, reserves a point forecast with a
margin that follows recent under-prediction; the test on the peak is ours).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

from concertmaster.core.fleet import InFlight, Pool, PoolId, Readiness, Replica
from concertmaster.core.queue import Waiting
from concertmaster.core.workflow import Workflows

KvKind: TypeAlias = Literal["forecast", "worst-case", "paged"]

MOST_MARGIN, MEMORY_CALLS = 1.0, 32
"""Widest margin that under-prediction leads to, and finished calls over which it is averaged."""

AHEAD_S = 1.5
"""Seconds of decoding by which promises run ahead of the tokens last heard of: drivers report
once a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRule:
    """How KV is promised.

    Attributes:
        kind: "forecast": a quantile of the answer and a margin, if the peak fits.
            "worst-case": all that the caller allows. "paged": the prompt; the engine
            allocates block by block and preempts when there are none (vLLM).
        level: Of "forecast": quantile of the answer that is promised.
        margin: Of "forecast": share of the answer promised on top, before under-prediction.
        eps: Of "forecast": chance with which the peak may pass the capacity.
        returning: Of "forecast": chance that a workflow between two calls comes back in time.
    """

    kind: KvKind = "forecast"
    level: float = 0.5
    margin: float = 0.1
    eps: float = 0.01
    returning: float = 0.5


class Promises:
    """A rule at work; also the filter that keeps replicas with room.

    Args:
        rule: The rule.
        by_pool: Replicas of each pool, whatever their state.
        workflows: They tell which agents may come back.
    """

    name = "kv_promises"

    def __init__(
        self, rule: KvRule, by_pool: Mapping[PoolId, Sequence[Replica]], workflows: Workflows
    ) -> None:
        self._rule = rule
        self._by_pool = by_pool
        self._workflows = workflows
        self._deviations = NormalDist().inv_cdf(1 - rule.eps)
        self._overruns = dict.fromkeys(by_pool, 0.0)
        self._tenants: dict[int, list[Replica]] = {}
        for replicas in by_pool.values():
            for replica in replicas:
                if replica.memory is not None:
                    self._tenants.setdefault(id(replica.memory), []).append(replica)

    # Promises

    def margin(self, pool_id: PoolId) -> float:
        """Share of a forecast that is promised on top of it."""
        return min(MOST_MARGIN, self._rule.margin + self._overruns[pool_id])

    def tokens(self, call: Waiting, pool: Pool) -> int:
        """KV tokens to promise: the prompt and, by the rule, an answer."""
        rule, request = self._rule, call.request
        most = request.max_output_tokens
        match rule.kind:
            case "worst-case":
                output = most
            case "paged":
                output = 1
            case "forecast":
                likely = call.forecast.output_at(pool.model.name, rule.level, most)
                output = min(most, math.ceil(likely * (1 + self.margin(pool.pool_id))))
        return min(request.prompt_tokens + output, pool.kv_tokens)

    def enter(self, call: Waiting, replica: Replica) -> None:
        """Note what a call just dispatched will hold at its end."""
        if self._rule.kind == "forecast":
            work = call.work(replica.pool.model.name)
            end_tokens = work.prompt_tokens + work.output_tokens
            replica.kv.expect(call.request.request_id, end_tokens, work.variance)

    def learn(self, pool: Pool, call: InFlight) -> None:
        """Take in how far a finished answer passed what it was first promised."""
        promised = max(1, call.promised_tokens - call.request.prompt_tokens)
        over = min(MOST_MARGIN, max(0.0, call.streamed_tokens / promised - 1))
        before = self._overruns[pool.pool_id]
        self._overruns[pool.pool_id] = before + (over - before) / MEMORY_CALLS

    # Room

    def keep(self, call: Waiting, pool: Pool, replicas: Iterable[Replica]) -> list[Replica]:
        """Keep the replicas that can make the promise now and, by forecast, keep it."""
        return [replica for replica in replicas if self.lacking_bytes(call, replica) <= 0]

    def lacking_bytes(self, call: Waiting, replica: Replica) -> float:
        """Bytes short of the promise, or of the peak by forecast; 0 or less if both fit.

        What no call is promised counts as free wherever it lies on the node. A call alone on
        an engine that shares nothing always fits.
        """
        return max(self._short_of_promise(call, replica), self._short_of_peak(call, replica))

    def _short_of_promise(self, call: Waiting, replica: Replica) -> int:
        if replica.memory is None and not replica.in_flight:
            return 0
        pool = replica.pool
        hashes = pool.cacheable(call.request)
        blocks = -(-self.tokens(call, pool) // pool.block_tokens)
        blocks -= replica.kv.shared_blocks(hashes) if hashes else 0
        needed = replica.kv.reserved_blocks + blocks - replica.reach_blocks
        if needed <= 0:
            return 0
        return needed * self._block_bytes(replica) - self._idle_bytes(replica)

    def _idle_bytes(self, replica: Replica) -> int:
        """KV granted to others on its node that no call there is promised."""
        if replica.memory is None or replica.kv.reserved_blocks >= replica.pool.kv_blocks:
            return 0
        return sum(
            spare_blocks(other) * self._block_bytes(other)
            for other in self._tenants[id(replica.memory)]
            if other is not replica
        )

    def _short_of_peak(self, call: Waiting, replica: Replica) -> float:
        """Bytes by which the peak of all calls together may pass the capacity, at the level."""
        if self._rule.kind != "forecast":
            return 0.0
        tenants = [replica] if replica.memory is None else self._tenants[id(replica.memory)]
        if not any(one.in_flight for one in tenants):
            return 0.0
        work = call.work(replica.pool.model.name)
        hashes = replica.pool.cacheable(call.request)
        held = replica.kv.shared_blocks(hashes) if hashes else 0
        mean = work.output_tokens + work.prompt_tokens - held * replica.pool.block_tokens
        room_bytes, needed, spread = self._capacity(replica, tenants), 0.0, 0.0
        for one in tenants:
            extra = (mean, work.variance) if one is replica else (0.0, 0.0)
            tokens, square = self._peak(one, extra)
            token_bytes = self._block_bytes(one) / one.pool.block_tokens
            needed += tokens * token_bytes
            spread += square * token_bytes * token_bytes
        return needed + self._deviations * math.sqrt(spread) - room_bytes

    def _capacity(self, replica: Replica, tenants: Iterable[Replica]) -> int:
        """Bytes for KV of replicas that run, weights and loads under way left out."""
        memory = replica.memory
        if memory is None:
            return replica.kv.capacity_blocks * self._block_bytes(replica)
        fixed_bytes = 0
        for one in tenants:
            held = memory.held(one.replica_id)
            runs = one.readiness is Readiness.RUNNING
            fixed_bytes += held.hbm_bytes - (held.kv_bytes if runs else 0)
        return memory.hbm_bytes - fixed_bytes

    def _peak(self, replica: Replica, extra: tuple[float, float]) -> tuple[float, float]:
        """Mean and variance of the KV tokens that a replica's calls hold at their ends."""
        if replica.readiness is not Readiness.RUNNING or not replica.alive:
            return 0.0, 0.0
        kv, (mean, variance) = replica.kv, extra
        back_tokens, back_variance = self._returning(replica)
        tokens = kv.end_tokens + mean + back_tokens
        footprint = replica.pool.footprint
        if footprint is not None:
            tokens = max(tokens, footprint.least_kv_blocks * replica.pool.block_tokens)
        return tokens, kv.end_variance + variance + back_variance

    def _returning(self, replica: Replica) -> tuple[float, float]:
        """Return what agents between two calls may bring back to one replica of their model."""
        owed, chance = self._workflows.owed(replica.pool.model.name), self._rule.returning
        if not owed.away_tokens:
            return 0.0, 0.0
        serving = sum(one.readiness is Readiness.RUNNING for one in self._siblings(replica))
        share = chance / max(1, serving)
        return share * owed.away_tokens, share * (1 - share) * owed.away_squares

    def _siblings(self, replica: Replica) -> Iterable[Replica]:
        model = replica.pool.model.name
        return (
            one
            for replicas in self._by_pool.values()
            if replicas and replicas[0].pool.model.name == model
            for one in replicas
        )

    def _block_bytes(self, replica: Replica) -> int:
        footprint = replica.pool.footprint
        return replica.pool.block_tokens if footprint is None else footprint.kv_block_bytes


def spare_blocks(replica: Replica) -> int:
    """KV blocks granted to a replica that runs which no call is promised; it keeps the least."""
    footprint = replica.pool.footprint
    if footprint is None or not replica.alive or replica.readiness is not Readiness.RUNNING:
        return 0
    kv = replica.kv
    return max(0, kv.capacity_blocks - max(footprint.least_kv_blocks, kv.reserved_blocks))


def ahead_tokens(pool: Pool) -> int:
    """Tokens that one call may have produced since its replica was last heard of."""
    return math.ceil(AHEAD_S / pool.decode_token_s)
