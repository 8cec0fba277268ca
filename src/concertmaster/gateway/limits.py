"""What the gateway puts up with, from its engines and from its callers."""

from typing import NamedTuple

from concertmaster.config import GatewaySection


class Limits(NamedTuple):
    """Bounds of one gateway; seconds are the wall's.

    Attributes:
        connect_s: To reach an engine.
        first_byte_s: From dispatch to the first byte of a stream.
        chunk_s: Between two pieces of an answer.
        total_s: From acceptance to the last byte.
        retry_ratio: Retries that calls may cause, as a share of all calls.
        breaker_failures: Failures in a row after which a replica gets no calls; 0 for never.
        breaker_error_ratio: The same as a share of its latest calls.
        breaker_pause_s: Until the first trial of such a replica.
        most_open: Calls without an outcome, above which newcomers are refused.
        most_lag_s: Lateness of the event loop, above which they are refused as well.
        most_connections: Connections to one replica.
    """

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    chunk_s: float = 120.0
    total_s: float = 3600.0
    retry_ratio: float = 0.2
    breaker_failures: int = 5
    breaker_error_ratio: float = 0.5
    breaker_pause_s: float = 1.0
    most_open: int = 10_000
    most_lag_s: float = 2.0
    most_connections: int = 1024


LIMITS = Limits()


def limits_of(settings: GatewaySection) -> Limits:
    """Read them from a fleet file."""
    return Limits(
        connect_s=settings.connect_timeout_s,
        first_byte_s=settings.first_byte_timeout_s,
        chunk_s=settings.chunk_timeout_s,
        total_s=settings.total_timeout_s,
        retry_ratio=settings.retry_ratio,
        breaker_failures=settings.breaker_failures,
        breaker_error_ratio=settings.breaker_error_ratio,
        breaker_pause_s=settings.breaker_pause_s,
        most_open=settings.most_open,
        most_lag_s=settings.most_lag_ms / 1000,
        most_connections=settings.most_connections,
    )
