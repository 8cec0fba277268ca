"""Labels read back for training, also by another process while they are being written."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName
from concertmaster.learning.labels import Label, unpack_floats, unpack_said, unpack_vector

SCHEMA = 1
"""Version of the file's format, kept in ``PRAGMA user_version``."""

APPLICATION_ID = 0x434D4C42
"""Marks the file as ours in ``PRAGMA application_id``: "CMLB"."""

BUSY_S = 1.0
PAGE_ROWS = 500
_READ = """
SELECT calls.*, workflows.success AS workflow_success
FROM calls LEFT JOIN workflows USING (workflow_id)
WHERE serial > ? AND output_tokens IS NOT NULL ORDER BY serial LIMIT ?
"""
_NEWEST = """
SELECT serial FROM calls WHERE output_tokens IS NOT NULL ORDER BY serial DESC LIMIT 1 OFFSET ?
"""


def check_version(db: sqlite3.Connection, path: Path) -> int:
    """Return the version of an open file, 0 if it is empty; raise if it is not for us."""
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (mark,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        raise not_ours(path, error) from None
    if tables and mark != APPLICATION_ID:
        raise not_ours(path, None)
    if version > SCHEMA:
        problem = f"expected a version up to {SCHEMA}, found {version}"
        hint = "a later concertmaster wrote it: upgrade this one, or name another file"
        raise InputError(str(path), "user_version", problem, hint)
    return int(version) if tables else 0


def not_ours(path: Path, error: sqlite3.Error | None) -> Exception:
    """Return the error to raise: a file of something else is not one that is out of reach."""
    if isinstance(error, sqlite3.OperationalError):
        return error
    found = str(error) if error is not None else "a database of another program"
    hint = "name another file, or move this one away"
    return InputError(str(path), "", f"expected a file of labels, found: {found}", hint)


def latest_labels(path: Path, most: int) -> list[Label]:
    """Read the newest ``most`` labels, oldest of them first; none if there is no file."""
    with _reading(path) as db:
        if most < 1 or db is None:
            return []
        found = db.execute(_NEWEST, (most - 1,)).fetchone()
    return list(read_labels(path, 0 if found is None else found["serial"] - 1))[-most:]


def read_labels(path: Path, since: int = 0) -> Iterator[Label]:
    """Read labels in the order in which outcomes came; none if there is no file.

    Args:
        path: The file.
        since: The serial after which to begin.

    Raises:
        InputError: The file is of a later version or holds something else.
        sqlite3.Error: It cannot be read right now.
    """
    with _reading(path) as db:
        while db is not None and (page := db.execute(_READ, (since, PAGE_ROWS)).fetchall()):
            for row in page:
                yield _unpack(row)
            since = page[-1]["serial"]


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    """Open the file for reading; ``None`` if nothing has been written yet."""
    if not path.exists():
        yield None
        return
    where = f"{path.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(where, uri=True, timeout=BUSY_S, isolation_level=None)) as db:
        db.row_factory = sqlite3.Row
        yield db if check_version(db, path) else None


_AS_THEY_ARE = (
    *("serial", "request_id", "workflow_id", "app", "template", "role", "step", "stage"),
    *("arrival_s", "finished_s", "gpu", "prompt_tokens", "max_output_tokens", "output_tokens"),
    *("success", "workflow_success", "source", "said_tool_call"),
    *("remaining_tokens", "remaining_calls"),
)


def _unpack(row: sqlite3.Row) -> Label:
    said_output, said_success = unpack_said(row["said"], row["said_models"], row["model"])
    tool_call = row["tool_call"]
    return Label(
        **{name: row[name] for name in _AS_THEY_ARE},
        model=ModelName(row["model"]),
        tool_call=None if tool_call is None else bool(tool_call),
        said_output=said_output,
        said_success=said_success,
        said_remaining_tokens=unpack_floats(row["said_remaining_tokens"]),
        said_remaining_calls=unpack_floats(row["said_remaining_calls"]),
        features=unpack_vector(row["features"], "<f4"),
        embedding=unpack_vector(row["embedding"], "<f2"),
        text=row["prompt_text"],
    )
