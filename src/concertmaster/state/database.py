"""One SQLite file: whose it is, which version, and how it is written.

What is acknowledged is on the disk: write-ahead log with ``synchronous=FULL``, one transaction
a change. ``kill -9`` at any point leaves all of a change or nothing of it.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from concertmaster.core.errors import InputError

BUSY_S = 5.0
"""How long a writer waits for another one."""

LOG_BYTES = 4 * 2**20


class Schema(NamedTuple):
    """What a file holds.

    Attributes:
        holds: Its content in words, for errors.
        mark: ``PRAGMA application_id`` of such files.
        migrations: Statements that bring version 0, 1, … to the next; the version of a file is
            how many of them it has been through. Published ones never change.
    """

    holds: str
    mark: int
    migrations: tuple[Sequence[str], ...]


class Database:
    """One open file; made, with its folder, where there is none.

    Readable by its owner only, as far as this process makes it.

    Raises:
        InputError: It is a file of something else, of a later version, or out of reach.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._schema = schema
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._db = self._connect()
        except (OSError, sqlite3.OperationalError) as error:
            raise InputError(str(path), "", f"cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            raise self._foreign(str(error)) from None

    def close(self) -> None:
        """Close it; the write-ahead log is folded in."""
        self._db.close()

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Read all rows."""
        return self._db.execute(statement, values).fetchall()

    def number(self, statement: str, *values: object) -> int:
        """Read one number."""
        return int(self._db.execute(statement, values).fetchone()[0])

    def write(self, statement: str, *values: object) -> int:
        """Change rows, within ``transaction``; return how many."""
        return self._db.execute(statement, values).rowcount

    def write_all(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        """Change rows, within ``transaction``, once for each row of values."""
        self._db.executemany(statement, rows)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write all of what the block writes, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                db.execute(f"PRAGMA {setting}")
            db.execute(f"PRAGMA journal_size_limit={LOG_BYTES}")
            self._db = db
            with self.transaction():
                self._migrate()
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self) -> None:
        _, mark, migrations = self._schema
        version = self._version()
        for number in range(version, len(migrations)):
            for statement in migrations[number]:
                self.write(statement)
        if version < len(migrations):
            self.write(f"PRAGMA application_id={mark}")
            self.write(f"PRAGMA user_version={len(migrations)}")

    def _version(self) -> int:
        if not self.number("SELECT count(*) FROM sqlite_master"):
            return 0
        if self.number("PRAGMA application_id") != self._schema.mark:
            raise self._foreign("a database of another program")
        version, newest = self.number("PRAGMA user_version"), len(self._schema.migrations)
        if version > newest:
            problem = f"expected a version up to {newest}, found {version}"
            hint = "a later concertmaster wrote it: upgrade this one, or name another file"
            raise InputError(str(self.path), "user_version", problem, hint)
        return version

    def _foreign(self, found: str) -> InputError:
        problem = f"expected a file of {self._schema.holds}, found: {found}"
        return InputError(str(self.path), "", problem, "name another file, or move this one away")
