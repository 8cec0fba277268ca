"""How many replicas each pool has: a policy says what it wants, this says what may be done.

At every interval the policy is asked for targets. They are kept between the least and the
most of each pool and within the GPUs of the fleet; a pool shrinks only to what was never too
few for a while; few replicas change at a time, and none in one direction soon after the
other; one that shall go is drained first. A call that waits for pools with nobody there is a
target of one. Pools that share nodes are left to their residency.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from concertmaster.core.actions import Action
from concertmaster.core.demand import Demands
from concertmaster.core.fleet import InFlight, Pool, PoolId, Readiness, Replica, ScalingLimits
from concertmaster.core.queue import Waiting, WaitingLine
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.standing import FleetStanding, Scaling, Standing
from concertmaster.core.waking import Waking, distance
from concertmaster.core.workflow import Workflows


class Wishes:
    """What a policy wanted for one pool over the last ``settle_s`` seconds."""

    def __init__(self) -> None:
        self._wanted: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, replicas: int, settle_s: float) -> None:
        """Remember a wish; all but the latest of those that are too old are dropped."""
        self._wanted.append((now_s, replicas))
        while len(self._wanted) > 1 and self._wanted[1][0] <= now_s - settle_s:
            self._wanted.popleft()

    def most(self, now_s: float, settle_s: float) -> int | None:
        """Return the most that was wanted; ``None`` if that is not known for so long."""
        if not self._wanted or self._wanted[0][0] > now_s - settle_s:
            return None
        return max(replicas for _, replicas in self._wanted)


class Scaler:
    """Asks a scaling policy at its interval, and does as much of it as may be done.

    Args:
        scaling: The policy.
        limits: What it may not exceed.
        by_pool: Replicas of each pool, whatever their state.
        waking: Brings replicas into service and takes them out.
        line: Calls that wait.
        running: Calls that were handed out, with their replica.
        workflows: Live workflows; they tell what models are asked for.
    """

    def __init__(
        self,
        scaling: Scaling,
        limits: ScalingLimits,
        *,
        by_pool: Mapping[PoolId, Sequence[Replica]],
        waking: Waking,
        line: WaitingLine,
        running: Mapping[RequestId, tuple[Waiting, Replica]],
        workflows: Workflows,
    ) -> None:
        self.due_s: float | None = None
        self._scaling = scaling
        self._limits = limits
        self._by_pool = {
            pool_id: replicas
            for pool_id, replicas in by_pool.items()
            if replicas and replicas[0].memory is None
        }
        self._pools: dict[PoolId, Pool] = {
            pool_id: replicas[0].pool for pool_id, replicas in by_pool.items() if replicas
        }
        self._waking = waking
        waking.gpus = limits.gpus
        self._line = line
        self._running = running
        self._workflows = workflows
        self._demands = workflows.demands = Demands(scaling.memory_s)
        self._wishes = {pool_id: Wishes() for pool_id in self._by_pool}
        self._grown_s: dict[PoolId, float] = {}
        self._shrunk_s: dict[PoolId, float] = {}

    def note_dispatch(self, model: ModelName, call: InFlight) -> None:
        """Take in that a replica was handed a call."""
        context_tokens = call.request.prompt_tokens + call.expected_tokens / 2
        self._demands.dispatched(model, call.prefill_tokens, context_tokens)

    def act(self, now_s: float) -> list[Action]:
        """Ask the policy if it is time; the first event only starts the clock."""
        if self.due_s is None:
            self._demands.fade(now_s)
        elif now_s < self.due_s:
            return []
        else:
            self._see(now_s)
            view = self.view()
            targets = self._bounded(now_s, self._scaling.targets(now_s, view), view)
            self.due_s = now_s + self._scaling.interval_s
            return self._change(now_s, targets, view)
        self.due_s = now_s + self._scaling.interval_s
        return []

    # What the policy sees

    def _see(self, now_s: float) -> None:
        """Sample how many calls live workflows have open, and let old news fade."""
        for call in self._line:
            self._demands.flow(self._pools[call.pools[0]].model.name).open_calls += 1.0
        for _, replica in self._running.values():
            self._demands.flow(replica.pool.model.name).open_calls += 1.0
        for model in self._demands.models:
            self._demands.flow(model).live_workflows += self._workflows.owed(model).workflows
        self._demands.fade(now_s)

    def view(self) -> FleetStanding:
        """Return the fleet as it stands."""
        waiting = self._waiting()
        demands = {}
        for model in self._demands.models:
            owed = self._workflows.owed(model)
            demands[model] = self._demands.demand(
                model, owed_tokens=owed.tokens, owed_workflows=owed.workflows
            )
        return FleetStanding(
            pools={pool_id: self._standing(pool_id, waiting) for pool_id in self._by_pool},
            demands=demands,
            gpus=self._limits.gpus,
        )

    def _waiting(self) -> dict[PoolId, float]:
        """Return calls waiting by pool; one that may go to several is a part of a call in each."""
        waiting = dict.fromkeys(self._by_pool, 0.0)
        for pools, lane in self._line.lanes.items():
            for pool_id in filter(waiting.__contains__, pools):
                waiting[pool_id] += len(lane) / len(pools)
        return waiting

    def _standing(self, pool_id: PoolId, waiting: Mapping[PoolId, float]) -> Standing:
        starting, leaving = self._waking.starting, self._waking.leaving
        serving = rising = most = calls = 0
        for replica in self._by_pool[pool_id]:
            if replica.alive:
                calls += len(replica.in_flight)
                rises = replica.replica_id in starting
                rising += rises
                if rises or not replica.draining or replica.replica_id in leaving:
                    most += 1
                if replica.readiness is Readiness.RUNNING and not replica.draining:
                    serving += 1
        return Standing(
            pool=self._pools[pool_id],
            serving=serving,
            starting=rising,
            most=most,
            calls=calls + waiting[pool_id],
        )

    # What may be done

    def _bounded(
        self, now_s: float, wanted: Mapping[PoolId, int], view: FleetStanding
    ) -> dict[PoolId, int]:
        """Return what is granted: needs come first, then wishes, then what has not settled."""
        settle_s = self._scaling.settle_s
        floors, wishes, targets = {}, {}, {}
        for pool_id, standing in view.pools.items():
            present, most = standing.present, standing.most
            floors[pool_id] = min(standing.pool.least_replicas, most)
            wish = min(max(wanted.get(pool_id, present), floors[pool_id]), most)
            self._wishes[pool_id].note(now_s, wish, settle_s)
            settled = self._wishes[pool_id].most(now_s, settle_s)
            wishes[pool_id] = wish
            targets[pool_id] = max(wish, min(present, most if settled is None else settled, most))
        for pool_id in self._called_for(view, wishes):
            for tier in (floors, wishes, targets):
                tier[pool_id] = max(1, tier[pool_id])
        if self._limits.gpus is None:
            return targets
        fitted = dict.fromkeys(view.pools, 0)
        gpus = {pool_id: one.pool.tensor_parallel for pool_id, one in view.pools.items()}
        free_gpus = max(0, self._limits.gpus - self._drained_gpus())
        for tier in (floors, wishes, targets):
            free_gpus -= _grant(fitted, tier, gpus, free_gpus)
        return fitted

    def _called_for(self, view: FleetStanding, targets: Mapping[PoolId, int]) -> Iterable[PoolId]:
        """Pools that need a replica: calls wait, and none of their pools has one or shall."""
        for lane_pools in self._line.lanes:
            pools = [one for one in lane_pools if one in view.pools]
            present = [one for one in pools if view.pools[one].present]
            if not present:
                startable = [r for one in pools for r in self._by_pool[one] if _may_start(r)]
                if startable:
                    yield min(startable, key=distance).pool.pool_id
            elif not any(targets[one] for one in pools):
                yield present[0]

    def _drained_gpus(self) -> int:
        """GPUs of replicas that an operator drains: they run, and no target counts them."""
        leaving = self._waking.leaving
        return sum(
            replica.pool.tensor_parallel
            for replicas in self._by_pool.values()
            for replica in replicas
            if replica.alive
            and replica.draining
            and replica.readiness is Readiness.RUNNING
            and replica.replica_id not in leaving
        )

    # Doing it

    def _change(
        self, now_s: float, targets: Mapping[PoolId, int], view: FleetStanding
    ) -> list[Action]:
        """Grow first, those furthest from their target first; then shrink."""
        self._waking.promised = targets
        actions: list[Action] = []
        left = self._limits.most_changes
        self._grown_s.update((one, now_s) for one in targets if view.pools[one].starting)
        ranked = sorted(targets, key=lambda one: -_lack(targets[one], view.pools[one]))
        for pool_id in ranked:
            lack = targets[pool_id] - view.pools[pool_id].present
            if lack > 0:
                left -= self._grow(now_s, pool_id, min(lack, left), actions)
        for pool_id in ranked:
            standing = view.pools[pool_id]
            spare = min(standing.present - targets[pool_id], left)
            if spare > 0 and not standing.starting:
                left -= self._shrink(now_s, pool_id, spare)
        return actions

    def _grow(self, now_s: float, pool_id: PoolId, most: int, actions: list[Action]) -> int:
        """Take back what is leaving, then wake; return how many."""
        leaving = [r for r in self._waking.leaving.values() if r.pool.pool_id == pool_id]
        for replica in leaving[:most]:
            self._waking.take_back(now_s, replica)
        grown = min(most, len(leaving))
        if grown < most and self._rested(now_s, self._shrunk_s.get(pool_id)):
            startable = [r for r in self._by_pool[pool_id] if self._is_down(r)]
            for replica in sorted(startable, key=distance)[: most - grown]:
                if not self._waking.fits(replica):
                    break
                actions.append(self._waking.start(replica))
                grown += 1
        if grown:
            self._grown_s[pool_id] = now_s
        return grown

    def _shrink(self, now_s: float, pool_id: PoolId, most: int) -> int:
        """Drain the replicas with the fewest calls; of equals the last."""
        if not self._rested(now_s, self._grown_s.get(pool_id)):
            return 0
        serving = [r for r in self._by_pool[pool_id] if r.alive and self._waking.counts(r)]
        serving.reverse()
        ranked = sorted(serving, key=lambda replica: len(replica.in_flight))
        for replica in ranked[:most]:
            self._waking.drain(now_s, replica)
        self._shrunk_s[pool_id] = now_s
        return min(most, len(ranked))

    def _is_down(self, replica: Replica) -> bool:
        return _may_start(replica) and replica.replica_id not in self._waking.starting

    def _rested(self, now_s: float, changed_s: float | None) -> bool:
        return changed_s is None or changed_s + self._limits.cooldown_s <= now_s


def _may_start(replica: Replica) -> bool:
    return replica.alive and not replica.draining and replica.readiness is not Readiness.RUNNING


def _grant(
    fitted: dict[PoolId, int],
    targets: Mapping[PoolId, int],
    gpus: Mapping[PoolId, int],
    free_gpus: int,
) -> int:
    """Raise what is granted towards targets; return the GPUs that takes.

    If they are too few, each pool gets the same share of what it lacks, and what is left goes
    to the first that can use it.
    """
    lacking = {pool_id: max(0, target - fitted[pool_id]) for pool_id, target in targets.items()}
    lacking_gpus = sum(gpus[pool_id] * lack for pool_id, lack in lacking.items())
    share = min(1.0, free_gpus / lacking_gpus) if lacking_gpus else 1.0
    left_gpus = free_gpus
    for pool_id, lack in lacking.items():
        granted = int(lack * share)
        fitted[pool_id] += granted
        left_gpus -= granted * gpus[pool_id]
    for pool_id, target in targets.items():
        if fitted[pool_id] < target and gpus[pool_id] <= left_gpus:
            fitted[pool_id] += 1
            left_gpus -= gpus[pool_id]
    return free_gpus - left_gpus


def _lack(target: int, standing: Standing) -> float:
    """How far a pool is below its target, as a share of it."""
    return (target - standing.present) / target if target else 0.0
