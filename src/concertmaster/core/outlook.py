"""How the fleet stands when a call asks where to go."""

import math
from collections.abc import Iterable, Mapping, Sequence

from concertmaster.core.crews import Crews
from concertmaster.core.fleet import Pool, PoolId, Replica
from concertmaster.core.policy import Policy
from concertmaster.core.queue import Waiting, WaitingLine, line_key
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.sketch import Sketch, affine
from concertmaster.core.traffic import Traffic
from concertmaster.core.wait import Ahead, Crew, Wait, held, until_clear_s
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
        self._by_pool = by_pool
        self._line = line
        self._running = running
        self._workflows = workflows
        self._window = window
        self.adopt(policy)

    def adopt(self, policy: Policy) -> None:
        """Go by another policy from here on."""
        self._policy = policy
        window_s = math.inf if policy.binds == "early" else policy.window_s
        self._crews = Crews(self._by_pool, self._running, self._window, window_s)

    def pools_of(self, model: ModelName) -> list[Pool]:
        """Pools of a model."""
        pools = (replicas[0].pool for replicas in self._by_pool.values() if replicas)
        return [pool for pool in pools if pool.model.name == model]

    def in_service(self, pool: Pool) -> list[Replica]:
        """Replicas that are alive, ready and not on their way out."""
        return self._crews.serving(pool.pool_id)

    def ready_s(self, pool: Pool) -> float:
        """Seconds until a replica of the pool can serve: 0 if one does.

        Infinite if all of them died or take no further calls. A replica on its way up counts
        as if it were woken only at this instant.
        """
        if self.crew(pool) is not None:
            return 0.0
        staying = [r for r in self._by_pool[pool.pool_id] if r.alive and not r.draining]
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
        return self._crews.crew(self.now_s, pool)

    def wait(self, call: Waiting, crew: Crew, *, fifo: bool = False) -> Wait:
        """Compute the wait from the calls that run, those that go first, and those to come."""
        pool = crew.pool
        key = key_of(self._policy, call, pool)
        lanes = [
            (self._share(crew, lane.pools), lane)
            for lane in self._line.lanes.values()
            if pool.pool_id in lane.pools
        ]
        model = pool.model.name
        ahead = Ahead.of((share, lane.ahead(call, key, model, fifo=fifo)) for share, lane in lanes)
        parts, factor = self._wait_parts(crew, ahead), 1.0
        if not fifo:
            lead_s = key - self._policy.aging * self.now_s
            tokens_per_s = self._crews.model_tokens_per_s(self.now_s, model)
            factor = self.traffic.stretch(self.now_s, lead_s, tokens_per_s)
            parts = [affine(part, factor) for part in parts]
        others = sum(share * (len(lane) - (call in lane)) for share, lane in lanes)
        since_s = self._line.since_s
        seen_s = 0.0 if since_s is None else max(0.0, self.now_s - since_s)
        return Wait(parts, max(0.0, others - ahead.calls), factor, seen_s)

    def _wait_parts(self, crew: Crew, ahead: Ahead) -> Sequence[Sketch]:
        if math.isinf(crew.clear_s):
            return (self._crews.first_end(crew), held(crew, ahead))
        wait_s = max(0.0, crew.clear_s - self._policy.window_s - self.now_s)
        return ((until_clear_s(crew, ahead, wait_s),),)

    def _share(self, crew: Crew, pools: Sequence[PoolId]) -> float:
        """Part of the calls in a lane that one of its pools will serve, by tokens a second."""
        total = sum(self._crews.tokens_per_s(self.now_s, pool_id) for pool_id in pools)
        return crew.tokens_per_s / total

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

    def validate(self) -> None:
        """Check what is kept from one question to the next."""
        self._crews.validate(self.now_s)


def key_of(policy: Policy, call: Waiting, pool: Pool) -> float:
    """Sort key that a call has in the line of a pool."""
    urgency_s = policy.ordering.urgency_s(call.request, call.forecast, call.workflow, pool)
    return line_key(urgency_s=urgency_s, arrival_s=call.request.arrival_s, aging=policy.aging)
