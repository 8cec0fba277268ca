"""What a message is called in answers and logs."""

import itertools
from collections.abc import Mapping

from concertmaster.gateway.identity import MAX_ID_CHARS


class Names:
    """Gives names to messages that come without one.

    Args:
        prefix: What fresh names begin with.
    """

    def __init__(self, prefix: str = "cm-") -> None:
        self._prefix = prefix
        self._numbers = itertools.count(1)

    def name(self, headers: Mapping[bytes, bytes]) -> str:
        """Return what a caller calls its message, else a name that is fresh."""
        given = headers.get(b"x-request-id", b"")[:MAX_ID_CHARS].decode("latin-1")
        return given or self.fresh()

    def fresh(self) -> str:
        """Return a name that was not given before."""
        return f"{self._prefix}{next(self._numbers)}"
