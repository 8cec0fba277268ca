"""How the fleet stands when a call asks where to go."""

import math
from collections.abc import Iterable, Mapping, Sequence

from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica
from concertmaster.core.policy import Policy
from concertmaster.core.queue import Waiting, WaitingLine, line_key
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.sketch import affine
from concertmaster.core.traffic import Traffic
from concertmaster.core.wait import Crew, Wait, ahead_of, crew_of, wait_parts
from concertmaster.core.window import Window
from concertmaster.core.workflow import Owed, Workflows


class Outlook:
    """A scheduler's own books, opened to its router: nothing is counted twice to be shown.

    Args:
        policy: Gives the order in which calls wait.
        by_pool: Replicas of each pool, whatever their state.
        line: Calls that wait.
        running: Calls that were handed out, with their replica.
        workflows: Live workflows.
        window: Which replicas have room.

    Attributes:
        traffic: What has arrived lately.
        now_s: The instant that is looked at; the scheduler sets it.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        by_pool: Mapping[PoolId, Sequence[Replica]],
        line: WaitingLine,
        running: Mapping[RequestId, tuple[Waiting, Replica]],
        workflows: Workflows,
        window: Window,
    ) -> None:
        self.now_s = 0.0
        self.traffic = Traffic()
        self._policy = policy
        self._by_pool = by_pool
        self._line = line
        self._running = running
        self._workflows = workflows
        self._window = window

    def in_service(self, pool: Pool) -> list[Replica]:
        """Replicas that are alive, ready and not on their way out."""
        return [
            replica
            for replica in self._by_pool[pool.pool_id]
            if replica.alive and not replica.draining and replica.readiness is Readiness.RUNNING
        ]

    def ready_s(self, pool: Pool) -> float:
        """Seconds until a replica of the pool can serve: 0 if one does.

        Infinite if all of them died or take no further calls. A replica on its way up counts
        as if it were woken only at this instant.
        """
        staying = [r for r in self._by_pool[pool.pool_id] if r.alive and not r.draining]
        if any(replica.readiness is Readiness.RUNNING for replica in staying):
            return 0.0
        return min((pool.ready_s.get(r.readiness, 0.0) for r in staying), default=math.inf)

    def has_room(self, call: Waiting, pool: Pool) -> bool:
        """Whether nobody waits for the pool and a replica of it is open to the call."""
        return bool(self.room(call, pool))

    def room(self, call: Waiting, pool: Pool) -> list[Replica]:
        """Replicas of the pool that are open to the call, if nobody waits for the pool."""
        if any(pool.pool_id in pools for pools in self._line.lanes):
            return []
        return list(self._window.room(call, pool))

    def crew(self, pool: Pool) -> Crew | None:
        """Take the replicas that are in service together."""
        replicas = self.in_service(pool)
        return crew_of(pool, replicas) if replicas else None

    def wait(self, call: Waiting, crew: Crew, *, fifo: bool = False) -> Wait:
        """Compute the wait from the calls that run, those that go first, and those to come."""
        pool = crew.pool
        lanes = [
            (lane, self._share(pool.pool_id, crew, lane.pools))
            for lane in self._line.lanes.values()
            if pool.pool_id in lane.pools
        ]
        key = key_of(self._policy, call, pool)
        ahead = list(ahead_of(call, key, lanes, fifo=fifo))
        parts = wait_parts(self.now_s, crew, self._running, ahead, self._policy.window_s)
        if not fifo:
            lead_s = key - self._policy.aging * self.now_s
            factor = self.traffic.stretch(self.now_s, lead_s, self._tokens_per_s(pool.model.name))
            parts = [affine(part, factor) for part in parts]
        all_waiting = sum(len(lane) * share for lane, share in lanes)
        return Wait(parts, max(0.0, all_waiting - sum(weight for weight, _ in ahead)))

    def _tokens_per_s(self, model: ModelName) -> float:
        pools = [replicas[0].pool for replicas in self._by_pool.values() if replicas]
        crews = [self.crew(pool) for pool in pools if pool.model.name == model]
        return sum(max(1, crew.running) / crew.step_s for crew in crews if crew)

    def _share(self, pool_id: PoolId, crew: Crew, pools: Sequence[PoolId]) -> float:
        """Part of the calls in a lane that one of its pools will serve, by tokens a second."""
        rate = total = max(1, crew.running) / crew.step_s
        for other_id in pools:
            others = self._by_pool[other_id]
            other = self.crew(others[0].pool) if other_id != pool_id and others else None
            total += max(1, other.running) / other.step_s if other else 0.0
        return rate / total

    def waiting_tokens(self, pool: Pool) -> int:
        """Tokens that the workflows in all lanes to the pool still need."""
        lanes = self._line.lanes.values()
        return sum(lane.tokens for lane in lanes if pool.pool_id in lane.pools)

    def owed(self, model: ModelName) -> Owed:
        """Return what live workflows still need of a model."""
        return self._workflows.owed(model)

    def open_calls(self, model: ModelName) -> Iterable[Waiting]:
        """Walk through the line and all running calls: slow, for the rules that need it."""
        for call in self._line:
            if call.workflow.model == model:
                yield call
        for call, replica in self._running.values():
            if replica.pool.model.name == model:
                yield call


def key_of(policy: Policy, call: Waiting, pool: Pool) -> float:
    """Sort key that a call has in the line of a pool."""
    urgency_s = policy.ordering.urgency_s(call.request, call.forecast, call.workflow, pool)
    return line_key(urgency_s=urgency_s, arrival_s=call.request.arrival_s, aging=policy.aging)
