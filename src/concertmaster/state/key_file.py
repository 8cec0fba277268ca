"""Keys and tenants in SQLite."""

from pathlib import Path
from typing import Any

from concertmaster.core.errors import InputError
from concertmaster.state.database import Database, Schema
from concertmaster.state.keys import Key, Limits

MOST_KEYS = 10_000
"""Keys that may be good at a time."""

REVOKED_KEPT = 1000
"""Revoked keys that stay listed, the latest; older ones are forgotten, which revives none."""

_REVISE = "BEGIN UPDATE revision SET number = number + 1; END"
_REVISED = tuple(
    f"CREATE TRIGGER {verb}_{table} AFTER {verb} ON {table} {_REVISE}"
    for table in ("tenants", "keys")
    for verb in ("INSERT", "UPDATE", "DELETE")
)
"""Accounts are written to the same file every second, and are no reason to read keys again."""

SCHEMA = Schema(
    holds="keys",
    mark=0x434D4B59,
    migrations=(
        (
            """
            CREATE TABLE tenants (
              name TEXT PRIMARY KEY, requests_per_min INTEGER, tokens_per_min INTEGER,
              in_flight INTEGER
            )
            """,
            """
            CREATE TABLE keys (
              seq INTEGER PRIMARY KEY, key_id TEXT NOT NULL UNIQUE, digest BLOB NOT NULL UNIQUE,
              shown TEXT NOT NULL, tenant TEXT NOT NULL REFERENCES tenants (name),
              name TEXT NOT NULL, operator INTEGER NOT NULL, created_s REAL NOT NULL,
              revoked_s REAL
            )
            """,
        ),
        ("ALTER TABLE tenants ADD COLUMN weight INTEGER",),
        (
            """
            CREATE TABLE spent (
              tenant TEXT PRIMARY KEY REFERENCES tenants (name) ON DELETE CASCADE,
              requests REAL NOT NULL, tokens REAL NOT NULL, at_s REAL NOT NULL
            ) WITHOUT ROWID
            """,
            "CREATE TABLE revision (number INTEGER NOT NULL)",
            "INSERT INTO revision VALUES (0)",
            *_REVISED,
        ),
    ),
)

_COLUMNS = "key_id, digest, shown, tenant, name, operator, created_s, revoked_s"
_INSERT = f"INSERT INTO keys ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - names of this file
_KEYS = f"SELECT {_COLUMNS} FROM keys ORDER BY seq"  # noqa: S608 - names of this file
_TENANTS = """
SELECT name, requests_per_min, tokens_per_min, in_flight, weight FROM tenants ORDER BY name
"""
_FORGET = """
DELETE FROM keys WHERE seq IN (
  SELECT seq FROM keys WHERE revoked_s IS NOT NULL
  ORDER BY revoked_s DESC, seq DESC LIMIT -1 OFFSET ?
)
"""
_LIMIT = """
UPDATE tenants SET requests_per_min = ?, tokens_per_min = ?, in_flight = ?, weight = ?
WHERE name = ?
"""


class KeyFile:
    """A ``KeyStore`` in one file, which several processes may have open.

    Raises:
        InputError: It is a file of something else, of a later version, or out of reach.
    """

    def __init__(self, path: Path) -> None:
        self._db = Database(path, SCHEMA)

    def create(self, key: Key) -> None:
        """Keep a new key; its tenant is made if there is none of that name."""
        with self._db.transaction():
            good = self._db.number("SELECT count(*) FROM keys WHERE revoked_s IS NULL")
            if good >= MOST_KEYS:
                problem = f"expected at most {MOST_KEYS} keys that are good, found {good}"
                raise InputError(str(self._db.path), "keys", problem, "revoke some")
            self._db.write("INSERT OR IGNORE INTO tenants (name) VALUES (?)", key.tenant)
            self._db.write(
                _INSERT,
                key.key_id,
                key.digest,
                key.shown,
                key.tenant,
                key.name,
                key.operator,
                key.created_s,
                key.revoked_s,
            )

    def revoke(self, key_id: str, now_s: float) -> Key:
        """End a key, for good; one that has ended stays as it is."""
        with self._db.transaction():
            self._db.write(
                "UPDATE keys SET revoked_s = ? WHERE key_id = ? AND revoked_s IS NULL",
                now_s,
                key_id,
            )
            found = [key for key in self.issued() if key.key_id == key_id]
            if not found:
                problem = f"no key of this id: {key_id!r}"
                raise InputError(str(self._db.path), "keys", problem, "see concertmaster keys list")
            self._db.write(_FORGET, REVOKED_KEPT)
            self._db.write("DELETE FROM tenants WHERE name NOT IN (SELECT tenant FROM keys)")
        return found[0]

    def limit(self, tenant: str, limits: Limits) -> None:
        """Set what a tenant may use, in place of all it was told before."""
        with self._db.transaction():
            known = self._db.write(
                _LIMIT,
                limits.requests_per_min,
                limits.tokens_per_min,
                limits.in_flight,
                limits.weight,
                tenant,
            )
            if not known:
                problem = f"no tenant of this name: {tenant!r}"
                hint = "see concertmaster keys list"
                raise InputError(str(self._db.path), "tenants", problem, hint)

    def issued(self) -> list[Key]:
        """Return all keys, in the order in which they were made."""
        return [_key(row) for row in self._db.rows(_KEYS)]

    def tenants(self) -> dict[str, Limits]:
        """Return all tenants by name."""
        return {row[0]: _limits(row) for row in self._db.rows(_TENANTS)}

    def changes(self) -> int:
        """Return a number that moves whenever keys or limits have changed."""
        return self._db.number("SELECT number FROM revision")

    def close(self) -> None:
        """Let go of what is open."""
        self._db.close()


def _key(row: tuple[Any, ...]) -> Key:
    key_id, digest, shown, tenant, name, operator, created_s, revoked_s = row
    return Key(
        key_id=key_id,
        digest=digest,
        shown=shown,
        tenant=tenant,
        name=name,
        operator=bool(operator),
        created_s=created_s,
        revoked_s=revoked_s,
    )


def _limits(row: tuple[Any, ...]) -> Limits:
    _, requests_per_min, tokens_per_min, in_flight, weight = row
    return Limits(
        requests_per_min=requests_per_min,
        tokens_per_min=tokens_per_min,
        in_flight=in_flight,
        weight=weight,
    )
