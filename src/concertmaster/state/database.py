"""One SQLite file: whose it is, which version, and how it is written and read.

What is acknowledged is on the disk: write-ahead log with ``synchronous=FULL``, one transaction
a change. ``kill -9`` at any point leaves all of a change or nothing of it. So it does with
``synchronous=NORMAL``, where a power cut may lose the last changes, but leaves the file whole.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from concertmaster.core.errors import InputError

BUSY_S = 5.0
"""How long a writer waits for another one."""

READ_BUSY_S = 1.0
LOG_BYTES = 4 * 2**20

Connect = Callable[..., sqlite3.Connection]
"""Opens a file as ``sqlite3.connect`` does, with its arguments."""


class OutOfReachError(InputError):
    """A file that may be ours, but cannot be opened now."""


class Schema(NamedTuple):
    """What a file holds.

    Attributes:
        holds: Its content in words, for errors.
        mark: ``PRAGMA application_id`` of such files.
        migrations: Statements that bring version 0, 1, … to the next; the version of a file is
            how many of them it has been through. Published ones never change.
        shrinks: Whether room that was let go can be given back to the disk.
    """

    holds: str
    mark: int
    migrations: tuple[Sequence[str], ...]
    shrinks: bool = False


class Database:
    """One open file; made, with its folder, where there is none.

    Readable by its owner only, as far as this process makes it.

    Args:
        path: The file.
        schema: What it holds.
        outlives_power: Whether what is acknowledged outlives a power cut, which takes a write
            to the disk itself for each change.
        busy_s: How long to wait for another writer.
        connect: Opens the file.

    Raises:
        OutOfReachError: It cannot be opened now.
        InputError: It is a file of something else, or of a later version.
    """

    def __init__(
        self,
        path: Path,
        schema: Schema,
        *,
        outlives_power: bool = True,
        busy_s: float = BUSY_S,
        connect: Connect = sqlite3.connect,
    ) -> None:
        self._schema = schema
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._db = connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
            self._prepare("FULL" if outlives_power else "NORMAL")
        except (OSError, sqlite3.OperationalError) as error:
            raise OutOfReachError(str(path), "", f"cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            raise _foreign(path, schema, str(error)) from None

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

    def shrink(self) -> None:
        """Give room that was let go back to the disk, where the schema ``shrinks``."""
        self._db.executescript("PRAGMA incremental_vacuum")  # execute stops after a page

    def _prepare(self, synchronous: str) -> None:
        shrinks = "INCREMENTAL" if self._schema.shrinks else "NONE"
        settings = (
            f"auto_vacuum={shrinks}",
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            f"journal_size_limit={LOG_BYTES}",
        )
        try:
            for setting in settings:
                self._db.execute(f"PRAGMA {setting}")
            with self.transaction():
                self._migrate()
        except BaseException:
            self._db.close()
            raise

    def _migrate(self) -> None:
        schema = self._schema
        version, newest = version_of(self._db, self.path, schema), len(schema.migrations)
        for migration in schema.migrations[version:]:
            for statement in migration:
                self.write(statement)
        if version < newest:
            self.write(f"PRAGMA application_id={schema.mark}")
            self.write(f"PRAGMA user_version={newest}")


@contextmanager
def reading(path: Path, schema: Schema) -> Iterator[sqlite3.Connection | None]:
    """Open a file only to read it; yields ``None`` if nothing has been written yet.

    Raises:
        InputError: It is a file of something else, or of a later version.
        sqlite3.Error: It cannot be read now.
    """
    if not path.exists():
        yield None
        return
    where = f"{path.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(where, uri=True, timeout=READ_BUSY_S, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        yield db if version_of(db, path, schema) else None


def version_of(db: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """Return the version of an open file, 0 if it is empty; raise if it is not for us."""
    try:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (mark,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise _foreign(path, schema, str(error)) from None
    if not tables:
        return 0
    if mark != schema.mark:
        raise _foreign(path, schema, "a database of another program")
    if version > (newest := len(schema.migrations)):
        problem = f"expected a version up to {newest}, found {version}"
        hint = "a later concertmaster wrote it: upgrade this one, or name another file"
        raise InputError(str(path), "user_version", problem, hint)
    return int(version)


def _foreign(path: Path, schema: Schema, found: str) -> InputError:
    problem = f"expected a file of {schema.holds}, found: {found}"
    return InputError(str(path), "", problem, "name another file, or move this one away")
