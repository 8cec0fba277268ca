"""How many replicas: by the calls there are, or by the tokens that will be needed."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.request import ModelName
from concertmaster.core.standing import Demand, FleetStanding, Standing

SLOWDOWN = 1.5
"""A replica is full once a step takes this much longer than with one call."""


def full_batch(pool: Pool, context_tokens: float) -> int:
    """Return how many calls a replica decodes at once while it is still quick.

    The most for which a step takes at most ``SLOWDOWN`` times that of a single call, within
    its sequences and its KV room; at least one.
    """
    curve, bound_s = pool.curve, SLOWDOWN * pool.curve.step_s(1, round(context_tokens))
    low = 1
    high = max(1, min(pool.max_sequences, int(pool.kv_tokens / context_tokens)))
    while low < high:
        middle = (low + high + 1) // 2
        if curve.step_s(middle, round(middle * context_tokens)) <= bound_s:
            low = middle
        else:
            high = middle - 1
    return low


def replica_tokens_per_s(pool: Pool, demand: Demand) -> float:
    """Output tokens a second of a full replica that also reads the prompts."""
    batch = full_batch(pool, demand.context_tokens)
    step_s = pool.curve.step_s(batch, round(batch * demand.context_tokens))
    return 1 / (step_s / batch + demand.prefill_ratio * pool.prefill_token_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reactive:
    """As many replicas as the calls there are fill, as autoscalers on queue length do.

    The rule and its constants are those of Kubernetes' HorizontalPodAutoscaler: replicas
    times load over target, rounded up, unless that is within the tolerance.

    Attributes:
        target: Calls a replica shall have, running and waiting; ``None`` for a full batch.
        tolerance: Distance from the target, as a share, within which nothing changes.
        burst: Share of its replicas by which a pool may grow at once, but always by four.
    """

    interval_s: float = 15.0
    settle_s: float = 300.0
    memory_s: float = 120.0
    target: float | None = None
    tolerance: float = 0.1
    burst: float = 1.0

    def targets(self, now_s: float, view: FleetStanding) -> Mapping[PoolId, int]:
        """Look at each pool alone."""
        return {pool_id: self._replicas(one, view) for pool_id, one in view.pools.items()}

    def _replicas(self, standing: Standing, view: FleetStanding) -> int:
        pool, present = standing.pool, standing.present
        target = self.target
        if target is None:
            target = full_batch(pool, view.demand(pool.model.name).context_tokens)
        if present and abs(standing.calls / (present * target) - 1) <= self.tolerance:
            return present
        most = present + max(4, math.ceil(self.burst * present))
        return min(math.ceil(standing.calls / target), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """The cheapest fleet that serves what will be needed, with a given probability.

    Attributes:
        level: Probability with which the replicas shall suffice.
        clear_s: Seconds in which what has piled up shall be worked off.
        tolerance: Share of what there is by which it may fall short before anything starts.
    """

    interval_s: float = 15.0
    settle_s: float = 600.0
    memory_s: float = 120.0
    level: float = 0.9
    clear_s: float = 120.0
    tolerance: float = 0.1

    def targets(self, now_s: float, view: FleetStanding) -> Mapping[PoolId, int]:
        """Give each model what it needs; if GPUs are too few, first where most is missing."""
        by_model: dict[ModelName, list[Standing]] = {}
        for standing in view.pools.values():
            by_model.setdefault(standing.pool.model.name, []).append(standing)
        plans = [self._plan(view.demand(model), own) for model, own in by_model.items()]
        free_gpus = math.inf if view.gpus is None else float(view.gpus)
        for plan in plans:
            free_gpus -= plan.start()
        _share_out(plans, free_gpus)
        return {pool_id: count for plan in plans for pool_id, count in plan.counts.items()}

    def _plan(self, demand: Demand, standings: list[Standing]) -> "_Plan":
        rates = {one.pool.pool_id: replica_tokens_per_s(one.pool, demand) for one in standings}
        cheapest = sorted(
            standings, key=lambda one: -rates[one.pool.pool_id] / one.pool.tensor_parallel
        )
        pool = cheapest[0].pool
        ready_s = pool.ready_s.get(pool.stopped, 0.0)
        horizon_s = self.interval_s + ready_s
        batch = full_batch(pool, demand.context_tokens)
        call_tokens_per_s = rates[pool.pool_id] / batch
        if not demand.owed_workflows and self._is_quiet(demand, horizon_s):
            need = 0.0
        else:
            present_tokens_per_s = sum(one.present * rates[one.pool.pool_id] for one in standings)
            need = needed_tokens_per_s(
                demand,
                call_tokens_per_s,
                present_tokens_per_s=present_tokens_per_s,
                ready_s=ready_s,
                clear_s=self.clear_s,
                level=self.level,
            )
            if 0 < need - present_tokens_per_s <= self.tolerance * present_tokens_per_s:
                need = present_tokens_per_s
        return _Plan(cheapest, rates, need)

    def _is_quiet(self, demand: Demand, horizon_s: float) -> bool:
        """Whether probably nothing comes before another replica could be ready."""
        return math.exp(-demand.announcements_per_s * horizon_s) >= self.level


def needed_tokens_per_s(
    demand: Demand,
    call_tokens_per_s: float,
    *,
    present_tokens_per_s: float,
    ready_s: float,
    clear_s: float,
    level: float,
) -> float:
    """Output tokens a second that suffice with this probability.

    What comes in, and beyond it the larger of two: a margin for chance, and what it takes to
    work off what has piled up, since a margin that chance does not use does that too. Piled up
    is what live workflows owe beyond what such a stream keeps in flight, as far as they can
    use it meanwhile, and what comes until another replica is ready.
    All are taken at the pace of calls on a full replica.

    >>> steady = Demand(tokens_per_s=100.0, owed_tokens=1000, owed_workflows=10)
    >>> needed_tokens_per_s(
    ...     steady, 10.0, present_tokens_per_s=100.0, ready_s=15.0, clear_s=15.0, level=0.5
    ... )
    100.0

    Args:
        demand: What is asked of the model.
        call_tokens_per_s: Output tokens a second of one call on a full replica.
        present_tokens_per_s: The same of all replicas that serve or start.
        ready_s: Seconds until another replica can serve.
        clear_s: Seconds in which what has piled up shall be worked off.
        level: Probability with which it shall suffice.
    """
    deviations = NormalDist().inv_cdf(level)
    coming = demand.tokens_per_s
    workflow_tokens_per_s = max(demand.open_ratio, 1e-3) * call_tokens_per_s
    each_tokens = demand.owed_tokens / max(1, demand.owed_workflows)
    lasts_s = each_tokens / workflow_tokens_per_s
    excess_tokens = max(0.0, demand.owed_tokens - coming * lasts_s)
    used_ratio = -math.expm1(-clear_s / lasts_s) if lasts_s else 0.0
    piled_tokens = max(0.0, coming - present_tokens_per_s) * ready_s
    clearing_tokens_per_s = (excess_tokens * used_ratio + piled_tokens) / clear_s
    spread = demand.variance * (1 / (ready_s + clear_s + lasts_s) + demand.uncertainty_per_s)
    return coming + max(clearing_tokens_per_s, deviations * math.sqrt(spread))


class _Plan:
    """Replicas given to one model so far.

    Args:
        standings: Its pools, the cheapest token first.
        rates: Output tokens a second of a replica, by pool.
        need: Output tokens a second that the model needs.
    """

    def __init__(
        self, standings: list[Standing], rates: Mapping[PoolId, float], need: float
    ) -> None:
        self.counts = {one.pool.pool_id: 0 for one in standings}
        self.need = need
        self._standings = standings
        self._rates = rates
        self._given = 0.0

    def start(self) -> int:
        """Give every pool its least; return the GPUs that takes."""
        gpus = 0
        for one in self._standings:
            gpus += self._add(one, min(one.pool.least_replicas, one.most))
        return gpus

    def next(self) -> tuple[float, Standing] | None:
        """Return the next replica, and the share of the need that a GPU of it would meet."""
        short = self.need - self._given
        if short <= 0:
            return None
        for one in self._standings:
            pool = one.pool
            if self.counts[pool.pool_id] < one.most:
                met = min(short, self._rates[pool.pool_id]) / self.need
                return met / pool.tensor_parallel, one
        return None

    def give(self, standing: Standing) -> int:
        """Add a replica; return its GPUs."""
        return self._add(standing, 1)

    def _add(self, standing: Standing, replicas: int) -> int:
        pool = standing.pool
        self.counts[pool.pool_id] += replicas
        self._given += replicas * self._rates[pool.pool_id]
        return replicas * pool.tensor_parallel


def _share_out(plans: list[_Plan], free_gpus: float) -> None:
    """Give out replicas one by one, each to the model with the largest shortage a GPU."""
    heap = [(-wish[0], i, wish[1]) for i, plan in enumerate(plans) if (wish := plan.next())]
    heapq.heapify(heap)
    while heap:
        _, i, standing = heapq.heappop(heap)
        if standing.pool.tensor_parallel > free_gpus:
            continue
        free_gpus -= plans[i].give(standing)
        wish = plans[i].next()
        if wish is not None:
            heapq.heappush(heap, (-wish[0], i, wish[1]))
