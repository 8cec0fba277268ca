"""What keys and quotas add to a request, in microseconds of this machine: best of five."""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from concertmaster.gateway.keyring import Keyring
from concertmaster.gateway.quotas import Quota
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import NO_LIMITS, Limits, new_key

ROUNDS = 100_000
KEYS = 1000
ALL_LIMITS = Limits(requests_per_min=10**9, tokens_per_min=10**12, in_flight=10**6)


def microseconds(once: Callable[[], object]) -> float:
    """Return what one call takes, without the loop around it."""

    def seconds(step: Callable[[], object]) -> float:
        started_s = time.perf_counter()
        for _ in range(ROUNDS):
            step()
        return time.perf_counter() - started_s

    nothing_s = min(seconds(lambda: None) for _ in range(5))
    return (min(seconds(once) for _ in range(5)) - nothing_s) / ROUNDS * 1e6


def main() -> None:
    """Print the figures that docs/security.md states."""
    with tempfile.TemporaryDirectory() as folder, closing(KeyFile(Path(folder, "k"))) as store:
        for _ in range(KEYS):
            key, secret = new_key("t", now_s=1.0)
            store.create(key)
        keyring = Keyring(store, time.monotonic)
        bearer = b"Bearer " + secret.encode()

        def head() -> dict[bytes, bytes]:
            return {b"content-type": b"application/json", b"authorization": bearer}

        check_us = microseconds(lambda: keyring.holder(head())) - microseconds(head)
        print(f"key check, {KEYS} keys           {check_us:6.2f} µs")
        for what, limits in (("no limit", NO_LIMITS), ("three limits", ALL_LIMITS)):
            quota = Quota(limits, time.monotonic)
            quota_us = microseconds(lambda quota=quota: (quota.begin(9), quota.end(9, 0.1)))  # type: ignore[misc]
            print(f"quota, {what:<12}           {quota_us:6.2f} µs")
        print(f"is the file as it was?         {microseconds(store.changes):6.2f} µs")


if __name__ == "__main__":
    main()
