"""Which pools calls go to: asked on arrival, and again while a call waits."""

import random
from collections.abc import Iterable, Mapping, Sequence

from concertmaster.core.events import RejectReason
from concertmaster.core.fleet import Pool, PoolId, Replica, able_pools
from concertmaster.core.outlook import Outlook, key_of
from concertmaster.core.policy import Policy
from concertmaster.core.queue import Waiting, WaitingLine
from concertmaster.core.request import ModelName, Request
from concertmaster.core.workflow import Workflows

LONGEST_REVIEW_S = 10.0
"""No call waits longer than this between two looks at where it may go."""

MOST_REVIEWS, REVIEW_GAP_S = 1, 0.05
"""Calls that one event may look at again, and the time until others that are due get their turn.

An arrival looks at no other call: no event routes more than one.
"""


class Routing:
    """Asks the policy's router, and writes down what comes of it.

    Args:
        policy: Holds the router.
        pools: All there are.
        by_pool: Replicas of each, whatever their state.
        workflows: Where it is noted what a workflow will need of its model.
        outlook: What the router may see.
        rng: Source of randomness.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        pools: Mapping[PoolId, Pool],
        by_pool: Mapping[PoolId, Sequence[Replica]],
        workflows: Workflows,
        outlook: Outlook,
        rng: random.Random,
    ) -> None:
        self._policy = policy
        self._pools = pools
        self._by_pool = by_pool
        self._workflows = workflows
        self._outlook = outlook
        self._rng = rng

    def adopt(self, policy: Policy) -> None:
        """Go by another policy from here on."""
        self._policy = policy

    def able(self, request: Request) -> list[Pool] | RejectReason:
        """Return the pools that can hold a call, or why there is none."""
        pools: Iterable[Pool] = self._pools.values()
        if request.models:
            pools = [pool for pool in pools if pool.model.name in request.models]
            if not pools:
                return "model_not_found"
        able = able_pools(pools, request)
        if not able:
            return "too_long"
        living = [pool for pool in able if any(r.alive for r in self._by_pool[pool.pool_id])]
        return living or "no_replica"

    def assign(self, call: Waiting, able: Sequence[Pool]) -> None:
        """Route a call that arrives."""
        call.pools = self._route(call, able)
        call.workflow.note_role(call.request.role)
        pool = self._pools[call.pools[0]]
        self.commit(call, pool.model.name)
        if self._policy.reroute_s is not None or self._policy.gate is not None:
            arrival_s = call.request.arrival_s
            urgency_s = key_of(self._policy, call, pool) - self._policy.aging * arrival_s
            tokens = call.expected_tokens(pool.model.name)
            self._outlook.traffic.note(arrival_s, urgency_s, tokens)

    def commit(self, call: Waiting, model: ModelName) -> None:
        """Note which model a call goes to, and what its workflow will need of it."""
        call.owed_tokens = call.owes_tokens(model)
        elsewhere = call.forecast.elsewhere(model)
        self._workflows.commit(call.workflow, model, call.owed_tokens, elsewhere)
        call.workflow.context_tokens = call.request.prompt_tokens + call.expected_tokens(model)

    def review(self, now_s: float, line: WaitingLine) -> list[Waiting]:
        """Route the calls anew whose time for it has come; return those that changed lanes."""
        if self._policy.reroute_s is None:
            return []
        moved = []
        for _ in range(MOST_REVIEWS):
            call = line.pop_review(now_s)
            if call is None:
                break
            if self._reroute(call, line):
                moved.append(call)
            self.plan_review(now_s, call, line)
        return moved

    def next_review_s(self, now_s: float, line: WaitingLine) -> float | None:
        """When to look at the next call; those that are overdue take turns."""
        due_s = line.next_review_s()
        return None if due_s is None else max(due_s, now_s + REVIEW_GAP_S)

    def plan_review(self, now_s: float, call: Waiting, line: WaitingLine) -> None:
        """Look at a call that waits once its wait has doubled, and at least now and then."""
        if self._policy.reroute_s is not None:
            waited_s = max(0.0, now_s - call.request.arrival_s)
            after_s = min(max(self._policy.reroute_s, waited_s), LONGEST_REVIEW_S)
            line.review_at(now_s + after_s, call)

    def _reroute(self, call: Waiting, line: WaitingLine) -> bool:
        able = self.able(call.request)
        if isinstance(able, str):
            return False
        pools = self._route(call, able)
        if pools == call.pools:
            return False
        before, pool = self._pools[call.pools[0]].model, self._pools[pools[0]]
        line.leave(call)
        if pool.model is not before:
            self.commit(call, pool.model.name)
        call.pools = pools
        call.key = key_of(self._policy, call, pool)
        line.enter(call)
        return True

    def _route(self, call: Waiting, able: Sequence[Pool]) -> tuple[PoolId, ...]:
        """Ask the router; a workflow stays with the model that it is kept to where that can be."""
        kept_to = call.workflow.kept_to
        kept = [pool for pool in able if pool.model.name == kept_to] if kept_to else []
        return self._policy.router.route(call, kept or able, self._outlook, self._rng)
