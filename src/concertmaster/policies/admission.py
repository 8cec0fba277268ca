"""Admission: who may join the line, and for how long."""

from dataclasses import dataclass

from concertmaster.core.events import RejectReason
from concertmaster.core.request import Request


@dataclass(frozen=True, slots=True)
class BoundedLine:
    """Refuse newcomers while the line is full, and calls that have waited too long.

    The newest is turned away: it has waited least, and its caller can still go elsewhere.

    Attributes:
        max_waiting: Calls that may wait.
        max_wait_s: Longest time in the line.
    """

    max_waiting: int = 100_000
    max_wait_s: float = 3600.0

    def refuses(self, request: Request, waiting_requests: int) -> RejectReason | None:
        """Compare the line with its bound."""
        return "queue_full" if waiting_requests >= self.max_waiting else None

    def expires_s(self, request: Request) -> float:
        """Count from arrival."""
        return request.arrival_s + self.max_wait_s
