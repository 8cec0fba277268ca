"""Keeps what tenants have used, so that a gateway that starts anew fills no bucket.

No call waits for the disk: what changed is written every ``FLUSH_S``, and at the end. A process
that is killed forgets at most what was used since the last writing, which its tenants may then
use once more. Requests in flight are not kept: none outlives the process.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.gateway.keyring import Keyring
from concertmaster.state.account_file import AccountFile
from concertmaster.state.accounts import AccountStore, Spent

FLUSH_S = 1.0
_log = logging.getLogger(__name__)


def unix_s() -> float:
    """Seconds since 1970."""
    return time.time_ns() / 1e9


class Accounts:
    """Charges tenants what they owed at the last writing, and writes what they owe since.

    Args:
        keyring: Has the quotas.
        store: Keeps them.
        wall: Seconds since 1970. Where it was set back, nothing has flowed back meanwhile.
    """

    def __init__(
        self, keyring: Keyring, store: AccountStore, wall: Callable[[], float] = unix_s
    ) -> None:
        self._keyring = keyring
        self._store = store
        self._wall = wall
        self._blind = False
        self._thread = ThreadPoolExecutor(1, "accounts")
        for tenant, spent in store.spent().items():
            quota = keyring.quota(tenant)
            if quota is not None:
                quota.recall(spent.requests, spent.tokens, max(0.0, wall() - spent.at_s))

    async def watch(self) -> None:
        """Write now and then what has changed, for ever."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        """Write what has changed; if that fails it is tried again the next time."""
        changed = self._changed()
        if not changed:
            return
        try:
            await self._aside(lambda: self._store.put(changed))
        except (sqlite3.Error, InputError) as error:
            self._failed(changed, error)
        else:
            self._blind = False

    def _changed(self) -> dict[str, Spent]:
        now_s = self._wall()
        changed = {}
        for quota in self._keyring.quotas:
            if quota.touched:
                quota.touched = False
                changed[quota.tenant] = Spent(*quota.spent(), now_s)
        return changed

    def _failed(self, changed: dict[str, Spent], error: Exception) -> None:
        if not self._blind:
            _log.error("what tenants have used cannot be written: %s", error)
        self._blind = True
        for tenant in changed:
            quota = self._keyring.quota(tenant)
            if quota is not None:
                quota.touched = True

    async def close(self) -> None:
        """Write all there is once more and let go of the store."""
        for quota in self._keyring.quotas:
            quota.touched = True  # a writing that was broken off may have failed
        await self.flush()
        await self._aside(self._store.close)
        self._thread.shutdown()

    async def _aside(self, task: Callable[[], None]) -> None:
        """Run something in the one thread that touches the store."""
        await asyncio.get_running_loop().run_in_executor(self._thread, task)


@asynccontextmanager
async def accounts_kept(keyring: Keyring | None, keys: str) -> AsyncIterator[None]:
    """Keep accounts in the file of keys, if there is one, until the block ends."""
    if keyring is None:
        yield
        return
    accounts = Accounts(keyring, AccountFile(Path(keys)))
    writing = asyncio.create_task(accounts.watch())
    try:
        yield
    finally:
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing
        await accounts.close()
