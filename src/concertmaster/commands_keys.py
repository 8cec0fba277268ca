"""What ``concertmaster keys`` does; ``cli_keys`` says how it is called."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from concertmaster.core.errors import InputError
from concertmaster.observe import console as show
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import NO_LIMITS, Key, Limits, new_key


def create(*, file: Path, tenant: str, name: str, operator: bool, limits: Limits) -> None:
    """Make a key and print its secret, this once."""
    key, secret = new_key(tenant, name=name, operator=operator, now_s=_now_s())
    with _opened(file, must_exist=False) as store:
        store.create(key)
        if limits != NO_LIMITS:
            store.limit(tenant, limits)
    out = show.console()
    show.say(out, secret)
    show.say(show.console(stderr=True), f"{key.key_id} of {tenant}; it is not shown again")


def limit(*, file: Path, tenant: str, limits: Limits) -> None:
    """Set what a tenant may use."""
    with _opened(file) as store:
        store.limit(tenant, limits)
    show.say(show.console(), f"{tenant}: {_limits(limits)}")


def revoke(*, file: Path, key_id: str) -> None:
    """End a key."""
    with _opened(file) as store:
        key = store.revoke(key_id, _now_s())
    show.say(show.console(), f"{key.key_id} of {key.tenant} ended {_date(key.revoked_s)}")


def listed(*, file: Path) -> None:
    """Print keys, without secrets, and what their tenants may use."""
    with _opened(file) as store:
        keys, tenants = store.issued(), store.tenants()
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("id", "secret", "tenant", "name", "opens", "made", "ended", "limits"):
        table.add_column(heading, no_wrap=True)
    for key in keys:
        table.add_row(*_row(key, tenants[key.tenant]))
    show.console().print(table)


def _row(key: Key, limits: Limits) -> tuple[str, ...]:
    return (
        key.key_id,
        f"{key.shown}…",
        key.tenant,
        key.name,
        "all" if key.operator else "/v1",
        _date(key.created_s),
        _date(key.revoked_s),
        _limits(limits),
    )


def _limits(limits: Limits) -> str:
    parts = (
        (limits.requests_per_min, "requests/min"),
        (limits.tokens_per_min, "tokens/min"),
        (limits.in_flight, "in flight"),
    )
    told = [f"{most} {unit}" for most, unit in parts if most is not None]
    if limits.weight is not None:
        told.append(f"weight {limits.weight}")
    return ", ".join(told) or "none"


def _date(instant_s: float | None) -> str:
    if instant_s is None:
        return ""
    return datetime.fromtimestamp(instant_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _now_s() -> float:
    return datetime.now(UTC).timestamp()


@contextmanager
def _opened(file: Path, *, must_exist: bool = True) -> Iterator[KeyFile]:
    if must_exist and not file.exists():
        hint = "run: concertmaster keys create --tenant NAME"
        raise InputError(str(file), "", "no such file", hint)
    with closing(KeyFile(file)) as store:
        try:
            yield store
        except sqlite3.Error as error:
            raise InputError(str(file), "", f"cannot be written: {error}") from None
