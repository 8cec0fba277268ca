"""The parts of a scheduler, each handed what it needs of the others."""

import random

from concertmaster.core.dispatching import Dispatcher
from concertmaster.core.fleet import Fleet, Pool, PoolId, Replica, ReplicaId
from concertmaster.core.outlook import Outlook
from concertmaster.core.policy import Filter, Policy
from concertmaster.core.promise import Promises
from concertmaster.core.queue import Waiting, WaitingLine
from concertmaster.core.races import Races
from concertmaster.core.request import RequestId
from concertmaster.core.residency import Residents
from concertmaster.core.routing import Routing
from concertmaster.core.scaling import Scaler
from concertmaster.core.waking import Waking
from concertmaster.core.wants import Wants
from concertmaster.core.weighing import Weighing
from concertmaster.core.window import Window
from concertmaster.core.workflow import Workflows

MAX_ATTEMPTS = 3
"""Dispatches of one call before it fails; a retry happens only if its caller saw nothing."""


class Assembly:
    """All parts, fresh.

    Args:
        fleet: What there is.
        policy: How to decide.
        rng: Source of randomness.
        record_candidates: Keep the costs of every candidate with a dispatch.
        weighs: Keep what was weighed at a dispatch until somebody asks.

    Attributes:
        running: Calls that were handed out, with the replica of their first attempt.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        rng: random.Random,
        *,
        record_candidates: bool,
        weighs: bool,
    ) -> None:
        self.weighing: Weighing | None = Weighing(policy.scorers) if weighs else None
        self._build_books(fleet, policy)
        self._build_views(policy, rng)
        self.residents = self._build_residents(fleet, policy)
        self.scaler = self._build_scaler(fleet, policy)
        self.dispatcher = Dispatcher(
            policy,
            pools=self.pools,
            line=self.line,
            running=self.running,
            workflows=self.workflows,
            window=self.window,
            routing=self.routing,
            races=self.races,
            promises=self.promises,
            residents=self.residents,
            scaler=self.scaler,
            rng=rng,
            record_candidates=record_candidates,
            weighing=self.weighing,
        )

    def _build_books(self, fleet: Fleet, policy: Policy) -> None:
        self.replicas: dict[ReplicaId, Replica] = {r.replica_id: r for r in fleet.build()}
        self.pools: dict[PoolId, Pool] = {pool.pool_id: pool for pool in fleet.pools}
        replicas = self.replicas.values()
        self.by_pool = {one: [r for r in replicas if r.pool.pool_id == one] for one in self.pools}
        self.line = WaitingLine()
        self.workflows = Workflows()
        self.promises: Promises | None = None
        if policy.kv is not None and policy.binds == "late":
            self.promises = Promises(policy.kv, self.by_pool, self.workflows)
        filters = filters_of(policy, self.promises)
        self.window = Window(replicas, policy.window_s, filters, policy.binds)
        self.running: dict[RequestId, tuple[Waiting, Replica]] = {}

    def _build_views(self, policy: Policy, rng: random.Random) -> None:
        self.outlook = Outlook(
            policy,
            by_pool=self.by_pool,
            line=self.line,
            running=self.running,
            workflows=self.workflows,
            window=self.window,
        )
        self.routing = Routing(
            policy,
            pools=self.pools,
            by_pool=self.by_pool,
            workflows=self.workflows,
            outlook=self.outlook,
            rng=rng,
        )
        self.races = Races(
            policy.hedge, pools=self.pools, outlook=self.outlook, attempts=MAX_ATTEMPTS
        )
        self.waking = Waking(self.by_pool, self.window)
        self.wants = Wants(self.by_pool, self.line, self.workflows)

    def _build_residents(self, fleet: Fleet, policy: Policy) -> Residents | None:
        if policy.residency is None or not any(node.shared for node in fleet.nodes):
            return None
        assert self.promises is not None, "who shares nodes promises KV by a rule"
        return Residents(
            policy.residency,
            by_pool=self.by_pool,
            waking=self.waking,
            line=self.line,
            promises=self.promises,
            wants=self.wants,
        )

    def _build_scaler(self, fleet: Fleet, policy: Policy) -> Scaler | None:
        if policy.scaling is None:
            return None
        return Scaler(
            policy.scaling,
            fleet.limits,
            by_pool=self.by_pool,
            waking=self.waking,
            line=self.line,
            running=self.running,
            workflows=self.workflows,
        )


def filters_of(policy: Policy, promises: Promises | None) -> tuple[Filter, ...]:
    """Return what keeps replicas from a call: the policy's own filters, and promised KV."""
    return policy.filters if promises is None else (*policy.filters, promises)
