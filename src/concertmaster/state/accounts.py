"""What tenants have used and not got back yet: the facts, and who keeps them."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Spent(NamedTuple):
    """What one tenant owes its rates; it flows back at these rates.

    Attributes:
        requests: At least 0; 0 where there is no such limit.
        tokens: Likewise; above a minute's worth where answers were long.
        at_s: When that was so, in seconds since 1970.
    """

    requests: float
    tokens: float
    at_s: float

    @property
    def is_nothing(self) -> bool:
        """Whether all of it has flowed back."""
        return self.requests <= 0.0 and self.tokens <= 0.0


class AccountStore(Protocol):
    """Who keeps what tenants have used. What ``put`` has returned from is on the disk."""

    def spent(self) -> dict[str, Spent]:
        """Return what is kept, by tenant."""

    def put(self, accounts: Mapping[str, Spent]) -> None:
        """Replace what is kept of these tenants, of all of them or of none.

        Who owes nothing, and who is no tenant any more, is forgotten.
        """

    def close(self) -> None:
        """Let go of what is open."""
