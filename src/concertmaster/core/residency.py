"""Which models are in service on nodes that they share.

A policy prices the steps that free memory and says whether a model is worth them; this gathers
what is known, carries a plan out step by step, and keeps the ledgers. Memory is claimed for one
model at a time on each node, so that what is freed for it is not taken by another meanwhile.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from concertmaster.core.actions import Action, Resize
from concertmaster.core.fleet import PoolId, Readiness, Replica, ReplicaId
from concertmaster.core.hbm import NodeMemory
from concertmaster.core.promise import Promises, ahead_tokens
from concertmaster.core.queue import WaitingLine
from concertmaster.core.reclaim import Plan, cheapest, ending, steps_of
from concertmaster.core.request import ModelName
from concertmaster.core.tenancy import Residency, Step, Want
from concertmaster.core.waking import Waking
from concertmaster.core.wants import Wants

_Asked = Callable[[ModelName], tuple[Want, int]]

LOOK_S = 0.1
"""Seconds between two looks at models that calls wait for and nobody serves."""


@dataclass(slots=True)
class _Site:
    """A shared node.

    Attributes:
        claim: The replica that memory is being freed for, if any.
    """

    memory: NodeMemory
    tenants: list[Replica] = field(default_factory=list)
    claim: Replica | None = None


class Residents:
    """The replicas of shared nodes, brought up and put away as a policy says.

    Args:
        residency: The policy.
        by_pool: Replicas of each pool, whatever their state.
        waking: Brings replicas into service and takes them out.
        line: Calls that wait.
        promises: They tell what KV a call needs.
        wants: They tell what models are asked for.
    """

    def __init__(
        self,
        residency: Residency,
        *,
        by_pool: Mapping[PoolId, Sequence[Replica]],
        waking: Waking,
        line: WaitingLine,
        promises: Promises,
        wants: Wants,
    ) -> None:
        self.due_s: float | None = None
        self._residency = residency
        self._by_pool = by_pool
        self._waking = waking
        self._line = line
        self._promises = promises
        self._wants = wants
        self._short: dict[ReplicaId, Replica] = {}
        self._looked_s = -math.inf
        self._sites: dict[int, _Site] = {}
        self._pools: dict[ModelName, list[PoolId]] = {}
        for pool_id, replicas in by_pool.items():
            for replica in replicas:
                if replica.memory is not None:
                    site = self._sites.setdefault(id(replica.memory), _Site(replica.memory))
                    site.tenants.append(replica)
                    replica.ahead_tokens = ahead_tokens(replica.pool)
            if replicas and replicas[0].memory is not None:
                self._pools.setdefault(replicas[0].pool.model.name, []).append(pool_id)

    # What happens

    def note_growth(self, replica: Replica) -> None:
        """Take in that calls have outgrown their promises, if they have."""
        if replica.kv.reserved_blocks > replica.kv.capacity_blocks:
            self._short[replica.replica_id] = replica

    def grants(self, now_s: float, replica: Replica) -> list[Action]:
        """See that a replica is granted the KV that its calls were promised, as far as it goes."""
        footprint, memory, kv = replica.pool.footprint, replica.memory, replica.kv
        if footprint is None or memory is None or kv.reserved_blocks <= kv.capacity_blocks:
            self._short.pop(replica.replica_id, None)
            return []
        needed = min(kv.reserved_blocks, replica.pool.kv_blocks)
        lacking_bytes = (needed - replica.reach_blocks) * footprint.kv_block_bytes
        actions: list[Action] = []
        if lacking_bytes > 0:
            actions = self._reclaim_for(now_s, replica, lacking_bytes)
        blocks = min(needed + footprint.least_kv_blocks, replica.reach_blocks)
        if blocks > kv.capacity_blocks:
            actions.append(self._resize(replica, blocks))
        if kv.capacity_blocks < needed:
            self._short[replica.replica_id] = replica
        else:
            self._short.pop(replica.replica_id, None)
        return actions

    def act(self, now_s: float) -> list[Action]:
        """Do what has become possible or due."""
        actions: list[Action] = []
        for replica in list(self._short.values()):
            actions += self.grants(now_s, replica)
        for site in self._sites.values():
            if site.claim is not None:
                self._pursue(now_s, site, site.claim, actions)
        if now_s >= self._looked_s + LOOK_S:
            self._looked_s = now_s
            self._look(now_s, actions)
        self.due_s = self._looked_s + LOOK_S if self._is_looked_for() else None
        return actions

    def _is_looked_for(self) -> bool:
        """Whether calls wait for a model that is to come up, once or once more."""
        return any(
            self._may_ever_rise(replica) and not self._waking.counts(replica)
            for pools in self._line.lanes
            for one in pools
            for replica in self._by_pool[one]
        )

    # Who shall come up

    def _unserved(self) -> Iterable[tuple[PoolId, ...]]:
        """Lanes to shared pools where nobody serves or is about to."""
        for pools in self._line.lanes:
            if any(self._waking.present(one) for one in pools):
                continue
            if any(self._may_ever_rise(r) for one in pools for r in self._by_pool[one]):
                yield pools

    def _may_ever_rise(self, replica: Replica) -> bool:
        drained = replica.draining and not self._waking.leaves(replica)
        return replica.memory is not None and replica.alive and not drained

    def _look(self, now_s: float, actions: list[Action]) -> None:
        """Bring up what calls wait for, the longest waits first; then what will be asked for."""
        lanes = list(self._unserved())
        self._wants.note_held(lanes)
        wants = {pools: self._wants.of_lane(now_s, pools) for pools in lanes}
        for pools in sorted(lanes, key=lambda one: _rank(wants[one])):
            self._bring_up(now_s, pools, wants[pools], actions, self._residency.worth)
        for pools in self._line.lanes:
            if pools not in wants:
                self._make_room(now_s, pools, actions)
                self._spread(now_s, pools, actions)
        for model, pool_ids in self._pools.items():
            if not any(self._waking.present(one) for one in pool_ids):
                waiting = any(one in pools for pools in lanes for one in pool_ids)
                want = self._wants.soon(now_s, model)
                if want.owing_workflows and not waiting:
                    fetches = self._residency.prefetches
                    self._bring_up(now_s, tuple(pool_ids), want, actions, fetches)

    def _bring_up(
        self,
        now_s: float,
        pools: Iterable[PoolId],
        want: Want,
        actions: list[Action],
        agrees: Callable[[Want, float, float], bool],
    ) -> None:
        """Choose a node by seconds until a call could be answered there, and what others pay."""
        options = []
        asked = cache(partial(self._asked, now_s))
        for replica in (r for one in pools for r in self._by_pool[one]):
            site = self._sites.get(id(replica.memory))
            if site is None or not self._may_rise(replica):
                continue
            if site.claim is not None:
                if site.claim.pool.pool_id in pools:
                    return
                continue
            plan = self._plan(now_s, replica, site, want, asked)
            if plan is not None:
                ready_s = replica.pool.ready_s.get(replica.readiness, 0.0)
                cost_s = ready_s + plan.price_s + replica.network_s
                options.append((cost_s, replica.replica_id, replica, site, plan, ready_s))
        if not options:
            return
        _, _, replica, site, plan, ready_s = min(options, key=lambda one: one[:2])
        if agrees(want, ready_s, plan.price_s):
            site.claim = replica
            actions += self._take(now_s, plan.steps)
            self._pursue(now_s, site, replica, actions)

    def _spread(self, now_s: float, pools: tuple[PoolId, ...], actions: list[Action]) -> None:
        """Bring up one more replica where those that run keep calls waiting."""
        replicas = [r for one in pools for r in self._by_pool[one]]
        starting = any(r.replica_id in self._waking.starting for r in replicas)
        if not starting and any(r.memory is not None for r in replicas):
            serving = [r.replica_id for r in replicas if r.alive and self._waking.counts(r)]
            came_s = max((self._waking.since_s.get(one, 0.0) for one in serving), default=now_s)
            want = replace(self._wants.of_lane(now_s, pools), served_s=now_s - came_s)
            self._bring_up(now_s, pools, want, actions, self._residency.spreads)

    def _make_room(self, now_s: float, pools: tuple[PoolId, ...], actions: list[Action]) -> None:
        """Free memory for the KV of a call that waits, where its model runs without room for it."""
        call = self._line.lanes[pools].head(None)
        running = [r for one in pools for r in self._by_pool[one] if self._waking.counts(r)]
        if call is None or any(one.memory is None for one in running):
            return
        for replica in running:
            site = self._sites[id(replica.memory)]
            lacking_bytes = self._promises.lacking_bytes(call, replica)
            busy = replica.replica_id in self._waking.starting or lacking_bytes <= 0
            if busy or site.claim or any(map(self._waking.leaves, site.tenants)):
                continue
            want = self._wants.of_lane(now_s, pools)
            steps = self._steps_but_drains(now_s, site, replica)
            plan = cheapest(steps, math.ceil(lacking_bytes), self._residency, want)
            if plan is not None and self._residency.worth(want, 0.0, plan.price_s):
                actions += self._take(now_s, plan.steps)

    def _may_rise(self, replica: Replica) -> bool:
        return replica.alive and not replica.draining and not self._waking.counts(replica)

    def _in_the_way(self, site: _Site, replica: Replica) -> list[Replica]:
        """Others on the node that run or start, if it shall run one model only."""
        if self._residency.colocates:
            return []
        starting = self._waking.starting
        return [
            one
            for one in site.tenants
            if one is not replica and one.alive
            if one.readiness is Readiness.RUNNING or one.replica_id in starting
        ]

    def _plan(
        self, now_s: float, replica: Replica, site: _Site, want: Want, asked: _Asked
    ) -> Plan | None:
        lacking_hbm, lacking_host = site.memory.lacks(
            replica.replica_id, replica.holding(rising=True)
        )
        if lacking_host:
            return None
        others = self._in_the_way(site, replica)
        ends = ending(self._steps(now_s, others, asked), len(others), self._residency, want)
        if ends is None:
            return None
        kept = [one for one in site.tenants if one is not replica and one not in others]
        lacking_hbm -= sum(step.hbm_bytes for step in ends.steps)
        rest = cheapest(self._steps(now_s, kept, asked), lacking_hbm, self._residency, want)
        return None if rest is None else ends.and_then(rest)

    def _steps(self, now_s: float, tenants: Iterable[Replica], asked: _Asked) -> list[Step]:
        starting = self._waking.starting
        return [
            step
            for one in tenants
            if not one.draining and one.replica_id not in starting
            for step in steps_of(
                one,
                *asked(one.pool.model.name),
                now_s=now_s,
                since_s=self._waking.since_s.get(one.replica_id, 0.0),
            )
        ]

    def _steps_but_drains(self, now_s: float, site: _Site, beneficiary: Replica) -> list[Step]:
        others = [one for one in site.tenants if one is not beneficiary]
        steps = self._steps(now_s, others, partial(self._asked, now_s))
        return [step for step in steps if step.kind != "drain"]

    def _asked(self, now_s: float, model: ModelName) -> tuple[Want, int]:
        """Return what is asked of a model, and how many of its replicas run or will."""
        return self._wants.soon(now_s, model), self._running_of(model)

    def _running_of(self, model: ModelName) -> int:
        pools = self._pools.get(model, ())
        return sum(self._waking.present(one) for one in pools)

    # How they come up

    def _pursue(self, now_s: float, site: _Site, replica: Replica, actions: list[Action]) -> None:
        """Load a replica once its memory is free; give the claim up if it will not be."""
        fits = site.memory.fits(replica.replica_id, replica.holding(rising=True))
        if not self._may_rise(replica):
            site.claim = None
        elif fits and not self._in_the_way(site, replica):
            site.claim = None
            actions.append(self._waking.start(replica))
        elif not any(self._waking.leaves(one) for one in site.tenants):
            site.claim = None

    def _take(self, now_s: float, steps: Iterable[Step]) -> list[Action]:
        actions: list[Action] = []
        for step in steps:
            replica = step.replica
            if step.to is None:
                actions.append(self._shrink(replica, step.hbm_bytes))
            elif step.kind == "unload":
                actions.append(self._waking.put_away(replica, step.to))
            else:
                self._waking.drain(now_s, replica)
        return actions

    def _reclaim_for(self, now_s: float, replica: Replica, lacking_bytes: int) -> list[Action]:
        """Free memory for calls that run already, unless enough of it is on its way."""
        site = self._sites[id(replica.memory)]
        if any(self._waking.leaves(one) and not one.in_flight for one in site.tenants):
            return []
        want = self._wants.soon(now_s, replica.pool.model.name)
        steps = self._steps_but_drains(now_s, site, replica)
        plan = cheapest(steps, lacking_bytes, self._residency, want)
        if plan is None:
            plan = Plan(tuple(step for step in steps if step.kind in ("shrink", "drop")))
        return self._take(now_s, plan.steps)

    def _shrink(self, replica: Replica, hbm_bytes: int) -> Resize:
        footprint = replica.pool.footprint
        assert footprint is not None
        blocks = -(-hbm_bytes // footprint.kv_block_bytes)
        return self._resize(replica, replica.kv.capacity_blocks - blocks)

    def _resize(self, replica: Replica, kv_blocks: int) -> Resize:
        replica.grant(kv_blocks)
        replica.account(to=self._waking.bound_for(replica))
        return Resize(replica.replica_id, kv_blocks)

    def validate(self) -> None:
        """Check every ledger."""
        for site in self._sites.values():
            site.memory.validate()
            for one in site.tenants:
                held = site.memory.held(one.replica_id)
                rising = one.replica_id in self._waking.starting
                expected = one.holding(rising=rising, to=self._waking.bound_for(one))
                assert held == expected, f"{one.replica_id} holds {held}, expected {expected}"


def _rank(want: Want) -> tuple[bool, float, float]:
    """Models that a person waits for first, then the longest wait."""
    return not want.interactive_calls, want.first_due_s, -want.oldest_s
