"""Where the weights of replicas lie: who comes into service, who leaves it, and what is known.

Every change of readiness goes through here, whoever wants it: calls that wait, a scaling, a
residency, an operator, or the hardware itself. One that shall go takes no further calls,
finishes those it has, and is moved away once it is idle. Until then it can be taken back,
which is better than waking another. On shared nodes every change is entered into the ledger
of the node when it is asked for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from concertmaster.core.actions import Action, Demote, Resize, Wake
from concertmaster.core.fleet import Pool, PoolId, Readiness, Replica, ReplicaId
from concertmaster.core.window import Window


class Waking:
    """The replicas that were told to wake, shall leave, or were told to go.

    Attributes:
        starting: Told to wake, and not heard of since.
        leaving: Drained by a policy and not told to go yet.
        since_s: When the weights of a replica came to where they lie; none is noted at first.
        gpus: Most GPUs of replicas that run or start, shared nodes apart; ``None`` for no limit.
        promised: Replicas that each pool shall have; their GPUs are kept for it.

    Args:
        by_pool: Replicas of each pool, whatever their state.
        window: Told which replicas take calls.
    """

    def __init__(self, by_pool: Mapping[PoolId, Sequence[Replica]], window: Window) -> None:
        self._by_pool = by_pool
        self._window = window
        self._bound: dict[ReplicaId, Readiness] = {}
        self.gpus: int | None = None
        self.starting: dict[ReplicaId, Replica] = {}
        self.leaving: dict[ReplicaId, Replica] = {}
        self.since_s: dict[ReplicaId, float] = {}
        self.promised: Mapping[PoolId, int] = {}

    # What has happened

    def came_up(self, now_s: float, replica: Replica) -> list[Action]:
        """Take in that a replica serves."""
        replica.alive, replica.draining = True, replica.removed
        replica.most_requests = None
        return self._moved(now_s, replica, Readiness.RUNNING)

    def went(self, now_s: float, replica: Replica, readiness: Readiness) -> list[Action]:
        """Take in that the weights of a replica were moved away."""
        replica.prefixes.clear()
        return self._moved(now_s, replica, readiness)

    def died(self, now_s: float, replica: Replica) -> list[Action]:
        """Take in that a replica is gone."""
        replica.alive = False
        return self.went(now_s, replica, replica.readiness)

    def disown(self, now_s: float, replica: Replica) -> None:
        """Take in that somebody else drains a replica: it is theirs to end."""
        self.leaving.pop(replica.replica_id, None)
        replica.draining = True
        self._window.update(now_s, replica)

    def remove(self, now_s: float, replica: Replica) -> None:
        """Take in that a replica shall serve no more, whatever is heard of it."""
        replica.removed = True
        self.disown(now_s, replica)

    def try_out(self, now_s: float, replica: Replica) -> None:
        """Take in that a drained replica may take one more call, unless it is on its way out."""
        if self.leaves(replica) or replica.removed:
            return
        replica.draining = False
        replica.most_requests = len(replica.in_flight) + 1
        self._window.update(now_s, replica)

    def _moved(self, now_s: float, replica: Replica, readiness: Readiness) -> list[Action]:
        replica_id = replica.replica_id
        replica.readiness = readiness
        if self.leaves(replica):
            replica.draining = replica.removed
        self.starting.pop(replica_id, None)
        self.leaving.pop(replica_id, None)
        self._bound.pop(replica_id, None)
        self.since_s[replica_id] = now_s
        actions = self._settle(replica)
        self._window.update(now_s, replica)
        return actions

    def _settle(self, replica: Replica) -> list[Action]:
        """Enter where weights on a shared node lie by now; if they do not fit, they must go.

        That happens only to a replica that was moved by somebody else.
        """
        footprint, memory = replica.pool.footprint, replica.memory
        if footprint is None or memory is None:
            return []
        if replica.readiness is Readiness.RUNNING and not replica.in_flight:
            replica.grant(footprint.least_kv_blocks)
        if not memory.fits(replica.replica_id, replica.holding()):
            replica.readiness = Readiness.DISK
            return [self.put_away(replica, Readiness.DISK)]
        replica.account()
        if replica.readiness is not Readiness.RUNNING or not replica.alive:
            return []
        return [Resize(replica.replica_id, replica.kv.capacity_blocks)]

    # What shall happen

    def wake(self, now_s: float, pools: Iterable[PoolId]) -> list[Wake]:
        """See that one of these pools takes calls, or soon will.

        If none does, a replica that is leaving is taken back, else the nearest is woken. Those
        on shared nodes are left to their residency policy.
        """
        pools = tuple(pools)
        staying = [replica for replica in self._alive(pools) if not replica.draining]
        if any(r.readiness is Readiness.RUNNING or r.replica_id in self.starting for r in staying):
            return []
        for replica in self.leaving.values():
            if replica.pool.pool_id in pools and replica.memory is None:
                self.take_back(now_s, replica)
                return []
        wakeable = [replica for replica in staying if replica.memory is None]
        nearest = min(filter(self.affords, wakeable), key=distance, default=None)
        return [] if nearest is None else [self.start(nearest)]

    def wake_all(self, now_s: float, lanes: Iterable[tuple[PoolId, ...]]) -> list[Wake]:
        """Wake what each lane of the line needs after a replica has left service."""
        return [action for pools in lanes for action in self.wake(now_s, pools)]

    def start(self, replica: Replica) -> Wake:
        """Wake a replica; the memory that it will take is reserved."""
        replica.account(rising=True)
        self.starting[replica.replica_id] = replica
        return Wake(replica.replica_id)

    def drain(self, now_s: float, replica: Replica) -> None:
        """Let a replica finish what it has and take nothing more."""
        replica.draining = True
        self.leaving[replica.replica_id] = replica
        self._window.update(now_s, replica)

    def take_back(self, now_s: float, replica: Replica) -> None:
        """Let a replica that was leaving take calls again."""
        replica.draining = False
        del self.leaving[replica.replica_id]
        self._window.update(now_s, replica)

    def let_go(self) -> list[Demote]:
        """Move every leaving replica away that is idle."""
        idle = [replica for replica in self.leaving.values() if not replica.in_flight]
        return [self.put_away(replica, rest_of(replica)) for replica in idle]

    def put_away(self, replica: Replica, to: Readiness) -> Demote:
        """Move the weights of an idle replica there; the memory that takes is reserved."""
        replica_id = replica.replica_id
        self.leaving.pop(replica_id, None)
        self._bound[replica_id] = to
        replica.draining = True
        replica.account(to=to)
        return Demote(replica_id, to)

    # How it stands

    def bound_for(self, replica: Replica) -> Readiness | None:
        """Where the weights of a replica are on their way to, if they are."""
        return self._bound.get(replica.replica_id)

    def leaves(self, replica: Replica) -> bool:
        """Whether a replica was drained or told to go, and has not gone yet."""
        return replica.replica_id in self.leaving or replica.replica_id in self._bound

    def affords(self, replica: Replica) -> bool:
        """Whether it fits the GPUs that are neither busy nor promised to other pools."""
        if self.gpus is None:
            return True
        mine = replica.pool
        promised_gpus = sum(
            (shall - self.present(pool_id)) * self._pool(pool_id).tensor_parallel
            for pool_id, shall in self.promised.items()
            if pool_id != mine.pool_id and shall > self.present(pool_id)
        )
        return self.fits(replica, promised_gpus)

    def fits(self, replica: Replica, promised_gpus: int = 0) -> bool:
        """Whether it fits beside the replicas that run, leave or start."""
        if self.gpus is None:
            return True
        busy_gpus = sum(
            other.pool.tensor_parallel
            for other in self._alive(self._by_pool)
            if other.memory is None
            and (other.readiness is Readiness.RUNNING or other.replica_id in self.starting)
        )
        return busy_gpus + promised_gpus + replica.pool.tensor_parallel <= self.gpus

    def present(self, pool_id: PoolId) -> int:
        """Replicas of a pool that take calls or are about to."""
        return sum(self.counts(replica) for replica in self._alive((pool_id,)))

    def counts(self, replica: Replica) -> bool:
        """Whether a living replica takes calls or is about to."""
        if replica.replica_id in self.starting:
            return True
        return replica.readiness is Readiness.RUNNING and not replica.draining

    def _pool(self, pool_id: PoolId) -> Pool:
        return self._by_pool[pool_id][0].pool

    def _alive(self, pools: Iterable[PoolId]) -> Iterator[Replica]:
        return (r for pool_id in pools for r in self._by_pool[pool_id] if r.alive)


def rest_of(replica: Replica) -> Readiness:
    """Where the weights of a replica go that leaves service.

    On a shared node it sleeps if there is room for that, else its weights go to disk.
    """
    if replica.memory is None:
        return replica.pool.stopped
    sleeps = replica.memory.fits(replica.replica_id, replica.holding(to=Readiness.SLEEPING))
    return Readiness.SLEEPING if sleeps else Readiness.DISK


def distance(replica: Replica) -> tuple[float, ReplicaId]:
    """Sort key of replicas that could be woken: the nearest to serving first."""
    return replica.pool.ready_s.get(replica.readiness, 0.0), replica.replica_id
