"""What tenants have used, in SQLite: a table in the file of keys."""

from collections.abc import Mapping
from pathlib import Path

from concertmaster.state.accounts import Spent
from concertmaster.state.database import Database
from concertmaster.state.key_file import SCHEMA

_PUT = """
INSERT INTO spent (tenant, requests, tokens, at_s)
SELECT name, ?2, ?3, ?4 FROM tenants WHERE name = ?1
ON CONFLICT (tenant) DO UPDATE
SET requests = excluded.requests, tokens = excluded.tokens, at_s = excluded.at_s
"""
_FORGET = "DELETE FROM spent WHERE tenant = ?"


class AccountFile:
    """An ``AccountStore`` in a file of keys; a row goes with its tenant.

    It has the file open by itself, so that another thread than the one of the keys may write.

    Raises:
        InputError: It is a file of something else, of a later version, or out of reach.
    """

    def __init__(self, path: Path) -> None:
        self._db = Database(path, SCHEMA)

    def spent(self) -> dict[str, Spent]:
        """Return what is kept, by tenant."""
        rows = self._db.rows("SELECT tenant, requests, tokens, at_s FROM spent ORDER BY tenant")
        return {tenant: Spent(*amounts) for tenant, *amounts in rows}

    def put(self, accounts: Mapping[str, Spent]) -> None:
        """Replace what is kept of these tenants, of all of them or of none."""
        owing = [(name, *one) for name, one in accounts.items() if not one.is_nothing]
        clear = [(name,) for name, one in accounts.items() if one.is_nothing]
        with self._db.transaction():
            self._db.write_all(_PUT, owing)
            self._db.write_all(_FORGET, clear)

    def close(self) -> None:
        """Let go of what is open."""
        self._db.close()
