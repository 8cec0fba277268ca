"""Circuit breakers: a replica that keeps failing is let be, and tried with one call at a time."""

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum

from concertmaster.core.events import Event, ReplicaDraining, ReplicaOnTrial, ReplicaReady
from concertmaster.core.fleet import Readiness, Replica, ReplicaId
from concertmaster.gateway.limits import Limits

_log = logging.getLogger(__name__)

LEAST_CALLS = 20
"""Calls before a share of failures means anything."""

MEMORY_CALLS = 64
"""Once so many are counted, each count is halved: the latest weigh most."""

MOST_PAUSE_S = 30.0


class State(StrEnum):
    """Closed lets calls through, open none, trial one."""

    CLOSED = "closed"
    OPEN = "open"
    TRIAL = "trial"


class Breaker:
    """What one replica's latest calls came to. Times are the wall's.

    Args:
        limits: When to open.

    Attributes:
        due_s: When an open one goes on trial.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.due_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget all: the replica is another one now."""
        self.state = State.CLOSED
        self._pause_s = self._limits.breaker_pause_s
        self._forget()

    def served(self) -> bool:
        """Count an answer; return whether that ends a trial."""
        self._in_row = 0
        self._good += 1
        if self.state is not State.TRIAL:
            return False
        self.reset()
        return True

    def failed(self, now_s: float, jitter: float) -> bool:
        """Count a failure; return whether no more calls shall come.

        Args:
            now_s: The instant.
            jitter: From 0 to 1, so that gateways do not try a replica all at once.
        """
        self._in_row += 1
        self._bad += 1
        if self.state is State.OPEN or not self._trips():
            return False
        self.due_s = now_s + self._pause_s * (1 + jitter / 4)
        self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
        self.state = State.OPEN
        self._forget()
        return True

    def try_out(self, now_s: float) -> bool:
        """Go on trial if it is time; return whether it was."""
        if self.state is not State.OPEN or now_s < self.due_s:
            return False
        self.state = State.TRIAL
        return True

    def _trips(self) -> bool:
        limits = self._limits
        if not limits.breaker_failures:
            return False
        return (
            self.state is State.TRIAL
            or self._in_row >= limits.breaker_failures
            or self._share() >= limits.breaker_error_ratio
        )

    def _share(self) -> float:
        """Share of failures among the latest calls; 0 while they are few."""
        calls = self._good + self._bad
        if calls < LEAST_CALLS:
            return 0.0
        share = self._bad / calls
        if calls >= MEMORY_CALLS:
            self._good //= 2
            self._bad //= 2
        return share

    def _forget(self) -> None:
        self._in_row = self._good = self._bad = 0


class Breakers:
    """The breakers of a fleet; they drain a replica that fails and put it on trial later.

    Attributes:
        restless: Those that are not closed.

    Args:
        replicas: As the core knows them.
        limits: When to open.
        feed: Tells the core.
        clock: Seconds of the wall.
        rng: Draws how long to wait.
    """

    def __init__(
        self,
        replicas: Mapping[ReplicaId, Replica],
        limits: Limits,
        feed: Callable[[Event], None],
        *,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._replicas = replicas
        self._feed = feed
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._breakers: dict[ReplicaId, Breaker] = {}
        self.restless: dict[ReplicaId, Breaker] = {}

    def state(self, replica_id: ReplicaId) -> State:
        """Say how the breaker of a replica stands."""
        return self._breaker(replica_id).state

    def served(self, replica_id: ReplicaId) -> None:
        """Take in that a replica has answered."""
        if not self._breaker(replica_id).served():
            return
        self.restless.pop(replica_id, None)
        if self._in_service(replica_id) and self._replicas[replica_id].most_requests is not None:
            self._feed(ReplicaReady(replica_id))

    def failed(self, replica_id: ReplicaId) -> None:
        """Take in that a replica has failed a call."""
        breaker = self._breaker(replica_id)
        if not breaker.failed(self._clock(), self._rng.random()):
            return
        self.restless[replica_id] = breaker
        if self._in_service(replica_id) and not self._replicas[replica_id].draining:
            _log.warning("replica %s keeps failing and rests", replica_id)
            self._feed(ReplicaDraining(replica_id))

    def look(self) -> None:
        """Put on trial what has rested for long enough; call it now and then."""
        now_s = self._clock()
        for replica_id, breaker in list(self.restless.items()):
            drained = self._replicas[replica_id].draining
            if not self._in_service(replica_id) or (breaker.state is State.OPEN and not drained):
                breaker.reset()  # the health watch brings it back, or somebody has already
                del self.restless[replica_id]
            elif breaker.try_out(now_s):
                self._feed(ReplicaOnTrial(replica_id))

    def trial_in_s(self, replicas: Iterable[Replica]) -> float | None:
        """Seconds until the first of these is tried; ``None`` unless breakers hold them all.

        The dead are passed over; those that sleep may be woken, so they are not held.
        """
        living = [replica for replica in replicas if replica.alive]
        if any(replica.replica_id not in self.restless for replica in living):
            return None
        dues_s = (self.restless[replica.replica_id].due_s for replica in living)
        due_s = min(dues_s, default=None)
        return None if due_s is None else max(0.0, due_s - self._clock())

    def _breaker(self, replica_id: ReplicaId) -> Breaker:
        """Return the breaker of a replica, which may have joined since."""
        found = self._breakers.get(replica_id)
        if found is None:
            found = self._breakers[replica_id] = Breaker(self._limits)
        return found

    def _in_service(self, replica_id: ReplicaId) -> bool:
        replica = self._replicas[replica_id]
        return replica.alive and replica.readiness is Readiness.RUNNING
