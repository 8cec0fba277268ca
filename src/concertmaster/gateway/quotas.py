"""What tenants have used, in the units of their limits.

Rates are token buckets that hold a minute's worth: a tenant may use all of it at once and then
goes on at the mean rate. What a request will write is not known when it arrives, so its prompt
is charged then and its output when it ends; a bucket may fall below zero for that and refuses
until it has refilled.
"""

import math
from collections.abc import Callable

from concertmaster.core.errors import QuotaError
from concertmaster.state.keys import NO_LIMITS, Limits

_LEFT = b"""\
x-ratelimit-limit-UNIT: %d\r
x-ratelimit-remaining-UNIT: %d\r
x-ratelimit-reset-UNIT: %.3fs\r
"""
_REQUESTS_LEFT = _LEFT.replace(b"UNIT", b"requests")
_TOKENS_LEFT = _LEFT.replace(b"UNIT", b"tokens")
_SMOOTHING = 0.2
_FIRST_S = 1.0
"""How long a request is taken to last before any has ended."""


class Bucket:
    """Refills steadily up to a minute's worth.

    Args:
        per_min: What flows in within a minute, and the most it holds.
        now_s: The instant; it begins full.
    """

    __slots__ = ("_filled_s", "_level", "per_min")

    def __init__(self, per_min: int, now_s: float) -> None:
        self.per_min = per_min
        self._level = float(per_min)
        self._filled_s = now_s

    def level(self, now_s: float) -> float:
        """Return what is in it; below 0 where more was taken than it held."""
        flown = (now_s - self._filled_s) * self.per_min / 60.0
        if flown > 0.0:
            self._level = min(float(self.per_min), self._level + flown)
            self._filled_s = now_s
        return self._level

    def wait_s(self, now_s: float, wanted: float) -> float:
        """Seconds until so much is in it; who wants more than it holds waits until it is full."""
        missing = min(wanted, float(self.per_min)) - self.level(now_s)
        return max(0.0, missing * 60.0 / self.per_min)

    def left(self, now_s: float) -> tuple[int, int, float]:
        """Return its size, what is left, and the seconds until it is full."""
        level, size = self.level(now_s), self.per_min
        return size, max(0, int(level)), (size - level) * 60.0 / size

    def spent(self, now_s: float) -> float:
        """Return what was taken and has not flowed back."""
        return self.per_min - self.level(now_s)

    def recall(self, now_s: float, spent: float, ago_s: float) -> None:
        """Take out what was spent a while ago, less what would have flowed back since."""
        self.take(now_s, max(0.0, spent - ago_s * self.per_min / 60.0))

    def take(self, now_s: float, amount: float) -> None:
        """Take so much out, whether it is there or not."""
        self._level = self.level(now_s) - amount

    def resize(self, now_s: float, per_min: int) -> None:
        """Change its size; what was taken stays taken."""
        self._level = self.level(now_s) + per_min - self.per_min
        self.per_min = per_min


class Quota:
    """One tenant's account.

    Args:
        limits: What it may use.
        clock: Seconds that never go back.
        tenant: Its name.

    Attributes:
        in_flight: Requests that were admitted and have not ended.
        shared: Whether there are other tenants.
        touched: Whether what was spent has changed, other than by flowing back.
    """

    __slots__ = (
        "_clock",
        "_lasts_s",
        "_limits",
        "_requests",
        "_tokens",
        "in_flight",
        "shared",
        "tenant",
        "touched",
    )

    def __init__(self, limits: Limits, clock: Callable[[], float], tenant: str = "") -> None:
        self._clock = clock
        self.tenant = tenant
        self.shared = False
        self._limits = NO_LIMITS
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._lasts_s = _FIRST_S
        self.in_flight = 0
        self.touched = False
        self.limit(limits)

    @property
    def weight(self) -> float:
        """Its share beside those of other tenants."""
        return float(self._limits.weight or 1)

    def limit(self, limits: Limits) -> None:
        """Set other limits; what was used stays used."""
        if limits == self._limits:
            return
        now_s = self._clock()
        self._limits = limits
        self.touched = True
        self._requests = _resized(self._requests, limits.requests_per_min, now_s)
        self._tokens = _resized(self._tokens, limits.tokens_per_min, now_s)

    def begin(self, prompt_tokens: int) -> bytes:
        """Admit a request and charge its prompt; return the headers that tell what is left.

        Raises:
            QuotaError: A limit is reached; nothing was charged.
        """
        now_s = self._clock()
        self._check(now_s, prompt_tokens)
        self.in_flight += 1
        if self._requests is not None:
            self.touched = True
            self._requests.take(now_s, 1)
        if self._tokens is not None:
            self.touched = True
            self._tokens.take(now_s, prompt_tokens)
        return self._left(now_s)

    def end(self, output_tokens: int, lasted_s: float) -> None:
        """Charge what a request has written, however it ended."""
        self.in_flight -= 1
        self._lasts_s += _SMOOTHING * (lasted_s - self._lasts_s)
        if self._tokens is not None:
            self.touched = True
            self._tokens.take(self._clock(), output_tokens)

    def spent(self) -> tuple[float, float]:
        """Return requests and tokens that were used and have not flowed back; 0 without limit."""
        now_s = self._clock()
        buckets = (self._requests, self._tokens)
        requests, tokens = (0.0 if one is None else one.spent(now_s) for one in buckets)
        return requests, tokens

    def recall(self, requests: float, tokens: float, ago_s: float) -> None:
        """Charge what was spent a while ago, less what would have flowed back since."""
        now_s = self._clock()
        for bucket, spent in ((self._requests, requests), (self._tokens, tokens)):
            if bucket is not None:
                bucket.recall(now_s, spent, ago_s)
        self.touched = True

    def _check(self, now_s: float, prompt_tokens: int) -> None:
        limits, requests, tokens = self._limits, self._requests, self._tokens
        if requests is not None and (wait_s := requests.wait_s(now_s, 1)):
            self._refuse(now_s, wait_s, f"{limits.requests_per_min} requests a minute")
        if tokens is not None and (wait_s := tokens.wait_s(now_s, prompt_tokens)):
            self._refuse(now_s, wait_s, f"{limits.tokens_per_min} tokens a minute")
        if limits.in_flight is not None and self.in_flight >= limits.in_flight:
            next_end_s = self._lasts_s / self.in_flight
            self._refuse(now_s, next_end_s, f"{limits.in_flight} requests in flight")

    def _refuse(self, now_s: float, wait_s: float, limit: str) -> None:
        lines = self._left(now_s).decode().splitlines()
        left = [line.split(": ") for line in lines]
        headers = [
            (b"retry-after", b"%d" % max(1, math.ceil(wait_s))),
            (b"retry-after-ms", b"%d" % max(1, math.ceil(1000 * wait_s))),
            *((name.encode(), value.encode()) for name, value in left),
        ]
        problem = f"the tenant is at its limit of {limit}: try again in {max(wait_s, 0.001):.3f} s"
        raise QuotaError(problem, headers=headers)

    def _left(self, now_s: float) -> bytes:
        left = b"" if self._requests is None else _REQUESTS_LEFT % self._requests.left(now_s)
        return left if self._tokens is None else left + _TOKENS_LEFT % self._tokens.left(now_s)


def _resized(bucket: Bucket | None, per_min: int | None, now_s: float) -> Bucket | None:
    if per_min is None:
        return None
    if bucket is None:
        return Bucket(per_min, now_s)
    bucket.resize(now_s, per_min)
    return bucket
