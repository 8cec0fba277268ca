"""Where an engine's API begins, and how it is reached."""

import ssl
from functools import cache
from typing import NamedTuple, Self
from urllib.parse import urlsplit


class Address(NamedTuple):
    """A host and what precedes ``/v1`` there.

    Attributes:
        prefix: Path before ``/v1``; empty if there is none.
        tls: How to speak to it; ``None`` for plain HTTP.
    """

    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None

    @property
    def authority(self) -> str:
        """Host and port as a ``host`` header has them."""
        usual = 80 if self.tls is None else 443
        return self.host if self.port == usual else f"{self.host}:{self.port}"

    @classmethod
    @cache  # roots take milliseconds to read, and probes ask for the same few engines for ever
    def of(cls, url: str) -> Self:
        """Read a URL; certificates are checked against the system's roots.

        >>> Address.of("http://engine:8000/api/v1").prefix
        '/api'
        """
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        return cls(
            parts.hostname or "127.0.0.1",
            parts.port or (443 if secure else 80),
            parts.path.rstrip("/").removesuffix("/v1"),
            ssl.create_default_context() if secure else None,
        )
