"""Where a gateway may listen, and how: who has no keys stays on this machine."""

import ipaddress
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import digest_of

LEAST_SECRET_CHARS = 16
"""Of the admin key: shorter ones can be guessed."""


def check_reach(where: str, settings: GatewaySection) -> None:
    """Refuse to listen where strangers can reach a gateway that asks for no keys.

    Raises:
        InputError: The host is not loopback, and there are no keys.
    """
    if settings.keys or _is_loopback(settings.host):
        return
    problem = f"without keys the gateway listens on loopback only, found {settings.host!r}"
    hint = 'set gateway.keys = "keys.sqlite" and run: concertmaster keys create --help'
    raise InputError(where, "gateway.host", problem, hint)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_of(where: str, settings: GatewaySection) -> ssl.SSLContext | None:
    """Return what the gateway speaks TLS with (1.2 or later); ``None`` if it speaks plain HTTP.

    Raises:
        InputError: One of the two files is missing, or they are no certificate and its key.
    """
    if not settings.tls_cert and not settings.tls_key:
        return None
    if not settings.tls_cert or not settings.tls_key:
        missing = "gateway.tls_key" if settings.tls_cert else "gateway.tls_cert"
        raise InputError(where, missing, "TLS needs both tls_cert and tls_key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:
        problem = f"no certificate and its key in PEM: {error}"
        raise InputError(where, "gateway.tls_cert", problem) from None
    return context


def check_safe(where: str, settings: GatewaySection, environ: Mapping[str, str]) -> None:
    """Refuse what a gateway would refuse to start with.

    Raises:
        InputError: As for ``check_reach``, ``tls_of`` and ``open_keys``.
    """
    check_reach(where, settings)
    tls_of(where, settings)
    admin_door(where, settings, environ)
    if settings.keys:
        open_keys(where, settings.keys).close()


class AdminDoor(NamedTuple):
    """Where operators come in.

    Attributes:
        digest: Hash of the key that lets them; empty if only operators' keys of the file do.
    """

    host: str
    port: int
    digest: bytes


def admin_door(
    where: str, settings: GatewaySection, environ: Mapping[str, str]
) -> AdminDoor | None:
    """Return where operators come in; ``None`` if they have no door of their own.

    Raises:
        InputError: The address is none, nothing guards it, or the environment lacks the key.
    """
    name = settings.admin_key_env
    if not settings.admin:
        if name:
            hint = 'set gateway.admin = "127.0.0.1:9000"'
            raise InputError(where, "gateway.admin_key_env", "there is no admin address", hint)
        return None
    host, _, port = settings.admin.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        problem = f"expected HOST:PORT, found {settings.admin!r}"
        raise InputError(where, "gateway.admin", problem)
    if not name and not settings.keys:
        hint = "set gateway.admin_key_env, or gateway.keys and make a key with --operator"
        raise InputError(where, "gateway.admin", "nothing guards it", hint)
    secret = environ.get(name, "")
    if name and len(secret) < LEAST_SECRET_CHARS:
        found = f"has {len(secret)} characters in" if name in environ else "lacks"
        problem = (
            f"expected {LEAST_SECRET_CHARS} characters or more, the environment {found} {name}"
        )
        raise InputError(where, "gateway.admin_key_env", problem, f"export {name}=…")
    digest = digest_of(secret.encode()) if name else b""
    return AdminDoor(host.strip("[]"), int(port), digest)


def open_keys(where: str, path: str) -> KeyFile:
    """Open the file of keys that the gateway shall ask for.

    Raises:
        InputError: There is none, or it is no file of keys.
    """
    if not Path(path).exists():
        hint = f"run: concertmaster keys create --file {path} --tenant NAME"
        raise InputError(where, "gateway.keys", f"no such file: {path}", hint)
    return KeyFile(Path(path))
