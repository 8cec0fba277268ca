"""Who may come in: API keys, checked before anything else looks at a message."""

import asyncio
import hmac
import logging
import sqlite3
from collections.abc import Callable, Iterable
from typing import NamedTuple

from concertmaster.core.errors import CallerError, ForbiddenError, InputError, UnauthorizedError
from concertmaster.gateway.operations import OPENAPI
from concertmaster.gateway.quotas import Quota
from concertmaster.state.keys import KeyStore, digest_of

REREAD_S = 0.25
"""How often the store is asked whether anything has changed: the age of a revoked key."""

LIVE_PATHS = frozenset({b"/livez", b"/health/live", b"/liveness", b"/healthz", b"/health"})
OPEN_PATHS = LIVE_PATHS | {b"/readyz", b"/health/ready", b"/readiness"}
"""What load balancers ask, which have no key; says no more than that the process runs."""

TENANT_HEADER = b"x-concertmaster-tenant"
"""Set on what was let in, for those who keep answers apart; no caller's own gets through."""

_DOCUMENT = OPENAPI.encode()
_log = logging.getLogger(__name__)


def secret_in(headers: dict[bytes, bytes]) -> bytes:
    """Take the secret out of a head; empty if there is none."""
    bearer = headers.pop(b"authorization", b"")
    other = (headers.pop(b"x-api-key", b""), headers.pop(b"api-key", b""))
    secret = bearer[7:].strip() if bearer[:7].lower() == b"bearer " else b""
    return secret or other[0] or other[1]


class Holder(NamedTuple):
    """Who a good key belongs to."""

    digest: bytes
    tenant: str
    operator: bool
    quota: Quota


class Keyring:
    """The keys that are good now, and what their tenants have used.

    If the store cannot be read, the keys last read stay good, and the log says so.

    Args:
        store: Keeps keys and tenants.
        clock: Seconds that never go back.
    """

    def __init__(self, store: KeyStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._quotas: dict[str, Quota] = {}
        self._good: dict[bytes, Holder] = {}
        self._seen = -1
        self._blind = False
        self._read()

    def holder(self, headers: dict[bytes, bytes]) -> Holder | None:
        """Return who sent a message, and take the secret out of its head: no engine shall see it.

        The secret is hashed and the hash looked up: a sender who could time the look-up would
        learn about hashes, which lead to no secret. The last comparison is constant-time.
        """
        return self.known(digest_of(secret_in(headers)))

    def known(self, digest: bytes) -> Holder | None:
        """Return whose secret this is the hash of."""
        holder = self._good.get(digest)
        return holder if holder and hmac.compare_digest(holder.digest, digest) else None

    def quota(self, tenant: str) -> Quota | None:
        """Return the account of a tenant; ``None`` if there is no such tenant."""
        return self._quotas.get(tenant)

    @property
    def quotas(self) -> Iterable[Quota]:
        """Accounts of all tenants."""
        return self._quotas.values()

    async def watch(self) -> None:
        """Follow the store, for ever."""
        while True:
            await asyncio.sleep(REREAD_S)
            self.refresh()

    def refresh(self) -> None:
        """Read the store if somebody has changed it."""
        try:
            self._read()
        except (sqlite3.Error, InputError) as error:
            if not self._blind:
                _log.error("keys cannot be read, those last read stay good: %s", error)
            self._blind = True
        else:
            self._blind = False

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    def _read(self) -> None:
        changes = self._store.changes()
        if changes == self._seen:
            return
        tenants = self._store.tenants()
        for name, limits in tenants.items():
            quota = self._quotas.get(name)
            if quota is None:
                quota = self._quotas[name] = Quota(limits, self._clock, name)
            else:
                quota.limit(limits)
            quota.shared = len(tenants) > 1
        self._good = {
            key.digest: Holder(key.digest, key.tenant, key.operator, self._quotas[key.tenant])
            for key in self._store.issued()
            if key.revoked_s is None
        }
        self._quotas = {name: self._quotas[name] for name in tenants}
        self._seen = changes


class KeyCheck:
    """Lets in who has a key: the ``Judge`` of a gateway that has keys.

    Calls, what belongs to them (``/v1/…``) and the document that describes them take any good key,
    all else an operator's.

    Args:
        keyring: Knows the keys.
        count: Told of every refusal: its status, and 0 s.
    """

    def __init__(self, keyring: Keyring, count: Callable[[int, float], None]) -> None:
        self._keyring = keyring
        self._count = count

    def __call__(self, target: bytes, headers: dict[bytes, bytes]) -> Quota | None:
        """Return whose account a message is on.

        Raises:
            UnauthorizedError: It needs a key and has no good one.
            ForbiddenError: It needs an operator's.
        """
        holder = self._keyring.holder(headers)
        path = target.partition(b"?")[0]
        if path not in OPEN_PATHS:
            if holder is None:
                raise self._counted(UnauthorizedError("expected a good API key"))
            if not holder.operator and not path.startswith(b"/v1/") and path != _DOCUMENT:
                raise self._counted(ForbiddenError("expected an operator's API key"))
        headers.pop(TENANT_HEADER, None)
        if holder is None:
            return None
        headers[TENANT_HEADER] = holder.tenant.encode()
        return holder.quota

    def _counted(self, error: CallerError) -> CallerError:
        self._count(error.status, 0.0)
        return error
