"""Where a gateway may listen, and how: who has no keys stays on this machine."""

import ipaddress
import ssl
from pathlib import Path

from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.state.key_file import KeyFile


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


def open_keys(where: str, path: str) -> KeyFile:
    """Open the file of keys that the gateway shall ask for.

    Raises:
        InputError: There is none, or it is no file of keys.
    """
    if not Path(path).exists():
        hint = f"run: concertmaster keys create --file {path} --tenant NAME"
        raise InputError(where, "gateway.keys", f"no such file: {path}", hint)
    return KeyFile(Path(path))
