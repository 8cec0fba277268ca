"""A call whose bytes a worker moves, as the scheduler's process sees it."""

from typing import Protocol

from concertmaster.core.actions import Dispatch
from concertmaster.core.fleet import Replica
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.workers.frames import Cut, Drop, End, Frame, GiveUp, Say, Send


class Line(Protocol):
    """The calls of one worker, and the way to it."""

    def tell(self, frame: Frame) -> None:
        """Send a frame."""

    def introduce(self, replica_id: str) -> None:
        """Make sure that the worker can reach a replica."""

    def forget(self, number: int) -> None:
        """Drop a call that has its answer."""


class RelayedCall:
    """Caller and carrier of one call: each is a word to its worker.

    Args:
        line: The way to the worker.
        number: The worker's for it.
    """

    __slots__ = ("_line", "exchange", "number")

    def __init__(self, line: Line, number: int) -> None:
        self._line = line
        self.number = number
        self.exchange: Exchange | None = None

    # Relay

    def send(self, exchange: Exchange, action: Dispatch, replica: Replica) -> None:
        """Have an attempt begun."""
        self._line.introduce(action.replica_id)
        exchange.engine = RelayedAttempt(self._line, self.number, action.attempt)
        priority = action.priority if replica.pool.priority_scheduling else 0
        self._line.tell(
            Send(
                self.number,
                action.attempt,
                action.hedge,
                action.replica_id,
                replica.pool.model.name,
                priority,
                exchange.request.request_id,
                exchange.response_headers,
                exchange.head,
            )
        )

    # Caller

    def write(self, data: bytes) -> None:
        """Have bytes sent."""
        held = self.exchange is not None and self.exchange.held
        self._line.tell(Say(self.number, held, data))

    def finished(self, *, keep_alive: bool) -> None:
        """Have the answer ended."""
        self._line.tell(End(self.number, keep_alive))
        self._line.forget(self.number)

    def abort(self) -> None:
        """Have the connection cut."""
        self._line.tell(Cut(self.number))
        self._line.forget(self.number)


class RelayedAttempt:
    """Engine's side of one attempt.

    Args:
        line: The way to its worker.
        number: The worker's for the call.
        attempt: As the core counts.
    """

    __slots__ = ("_attempt", "_line", "_number")

    def __init__(self, line: Line, number: int, attempt: int) -> None:
        self._line = line
        self._number = number
        self._attempt = attempt

    def cancel(self) -> None:
        """Have the connection to the engine dropped."""
        self._line.tell(Drop(self._number, self._attempt))

    def give_up(self, problem: str) -> None:
        """Have the attempt ended; the worker tells that it broke."""
        self._line.tell(GiveUp(self._number, problem))

    @property
    def paused(self) -> bool:
        """Yes: silence of the engine is for the worker to notice."""
        return True

    def pause(self) -> None:
        """Leave it to the worker."""

    def resume(self) -> None:
        """Leave it to the worker."""
