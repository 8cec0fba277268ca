"""API keys and tenants: the facts, how a secret is made and known again, and who keeps them."""

import hashlib
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from concertmaster.core.errors import InputError

SECRET_BYTES = 32
SHOWN_CHARS = 10
"""Leading characters of a secret that are kept in clear, to tell keys apart in a list."""

_PREFIX = "cm-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a tenant may use; ``None`` sets no limit.

    Attributes:
        tokens_per_min: Prompt and output tokens together.
        in_flight: Requests that have arrived and not ended.
        weight: Its share beside those of other tenants while several wait; ``None`` is 1.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    in_flight: int | None = None
    weight: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise InputError(option, "", f"expected at least 1, found {value}")


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key, without its secret.

    Attributes:
        key_id: Names it to whoever revokes it.
        digest: Of the secret, see ``digest_of``.
        shown: The first characters of the secret.
        name: What its owner calls it; "" if nothing.
        operator: Whether it opens what shows the whole fleet: metrics, state, the page.
        created_s: Seconds since 1970.
        revoked_s: Likewise; ``None`` while it is good.
    """

    key_id: str
    digest: bytes
    shown: str
    tenant: str
    name: str = ""
    operator: bool = False
    created_s: float
    revoked_s: float | None = None


class KeyStore(Protocol):
    """Who keeps keys and tenants. What a method has returned from is on the disk.

    A tenant is forgotten with the last of its keys.
    """

    def create(self, key: Key) -> None:
        """Keep a new key; its tenant is made if there is none of that name."""

    def revoke(self, key_id: str, now_s: float) -> Key:
        """End a key, for good; one that has ended stays as it is.

        Raises:
            InputError: There is no such key.
        """

    def limit(self, tenant: str, limits: Limits) -> None:
        """Set what a tenant may use, in place of all it was told before.

        Raises:
            InputError: There is no such tenant.
        """

    def issued(self) -> list[Key]:
        """Return all keys, in the order in which they were made."""

    def tenants(self) -> dict[str, Limits]:
        """Return all tenants by name."""

    def changes(self) -> int:
        """Return a number that moves whenever keys or limits have changed."""

    def close(self) -> None:
        """Let go of what is open."""


def digest_of(secret: bytes) -> bytes:
    """Hash a secret: one SHA-256.

    A password needs a slow, salted hash because people choose guessable ones. A secret here is
    256 bits of the system's randomness: there is nothing to guess, no two are equal, and so
    neither salt nor slowness would add anything but time on every request.
    """
    return hashlib.sha256(secret).digest()


def new_key(
    tenant: str,
    *,
    name: str = "",
    operator: bool = False,
    now_s: float,
    token_bytes: Callable[[int], bytes] = secrets.token_bytes,
) -> tuple[Key, str]:
    """Make a key; return it and its secret, which is nowhere else.

    Args:
        tenant: Who will use it.
        name: What its owner calls it.
        operator: Whether it opens what shows the whole fleet.
        now_s: Seconds since 1970.
        token_bytes: Draws so many random bytes; for secrets, so never a seeded generator.

    Raises:
        InputError: The tenant's name, or the key's, cannot be taken.
    """
    check_name("--tenant", tenant)
    if name:
        check_name("--name", name)
    secret = _PREFIX + urlsafe_b64encode(token_bytes(SECRET_BYTES)).decode().rstrip("=")
    key = Key(
        key_id="key-" + token_bytes(6).hex(),
        digest=digest_of(secret.encode()),
        shown=secret[:SHOWN_CHARS],
        tenant=tenant,
        name=name,
        operator=operator,
        created_s=now_s,
    )
    return key, secret


def check_name(option: str, name: str) -> None:
    """Refuse a name that would be hard to read in a list, a log or a label."""
    if not _NAME.fullmatch(name):
        problem = f"expected 1 to 64 letters, digits, dots, dashes or underscores, found {name!r}"
        raise InputError(option, "", problem)
