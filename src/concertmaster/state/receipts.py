"""Receipts on the disk: a ring of the latest, found by the id of a request or of its workflow."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from concertmaster.core.errors import InputError
from concertmaster.state.database import Database, Schema

MARK = 0x434D5243

SCHEMA = Schema(
    holds="receipts",
    mark=MARK,
    migrations=(
        (
            """
            CREATE TABLE receipts (
              seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL, workflow_id TEXT NOT NULL,
              owner TEXT NOT NULL, body BLOB NOT NULL
            )
            """,
            "CREATE INDEX receipts_by_request ON receipts (request_id, seq)",
            "CREATE INDEX receipts_by_workflow ON receipts (workflow_id, seq)",
        ),
        (),  # bodies written from here on are packed, those before are JSON, and stay
    ),
)

_INSERT = "INSERT INTO receipts (request_id, workflow_id, owner, body) VALUES (?, ?, ?, ?)"
_TRIM = "DELETE FROM receipts WHERE seq <= (SELECT max(seq) FROM receipts) - ?"
_FIND = """
SELECT body FROM receipts WHERE request_id = ?1 AND (?2 IS NULL OR owner = ?2)
ORDER BY seq DESC LIMIT 1
"""
_LIST = """
SELECT body FROM receipts WHERE workflow_id = ?1 AND (?2 IS NULL OR owner = ?2)
ORDER BY seq DESC LIMIT ?3
"""


class Row(NamedTuple):
    """One receipt.

    Attributes:
        owner: Tenant that it belongs to; "" where there are no keys.
        body: As whoever writes and reads it agree; of no concern here.
    """

    request_id: str
    workflow_id: str
    owner: str
    body: bytes


class ReceiptStore(Protocol):
    """Who keeps receipts. What ``add`` has returned from is on the disk.

    ``owner`` finds those of one tenant only; ``None`` finds everybody's.
    """

    def add(self, rows: Sequence[Row]) -> None:
        """Keep all of them or none, and let go of the oldest beyond the bound."""

    def find(self, request_id: str, owner: str | None) -> bytes | None:
        """Return the latest receipt of a request."""

    def of_workflow(self, workflow_id: str, owner: str | None, most: int) -> list[bytes]:
        """Return receipts of a workflow, newest first."""

    def close(self) -> None:
        """Let go of what is open."""


class ReceiptFile:
    """A ``ReceiptStore`` in one file; the space of what was let go is used again.

    Args:
        path: The file, made where there is none.
        most: Receipts that it holds.

    Raises:
        InputError: It is a file of something else, of a later version, or out of reach.
    """

    def __init__(self, path: Path, *, most: int) -> None:
        self._db = Database(path, SCHEMA)
        self._most = most

    @classmethod
    def existing(cls, path: Path) -> "ReceiptFile":
        """Open a file to read from it.

        Raises:
            InputError: There is none, or it is something else.
        """
        if not path.is_file():
            raise InputError(str(path), "", "no such file", "see gateway.receipts")
        return cls(path, most=2**62)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep all of them or none, and let go of the oldest beyond the bound."""
        with self._db.transaction():
            self._db.write_all(_INSERT, rows)
            self._db.write(_TRIM, self._most)

    def find(self, request_id: str, owner: str | None) -> bytes | None:
        """Return the latest receipt of a request."""
        found = self._db.rows(_FIND, request_id, owner)
        return found[0][0] if found else None

    def of_workflow(self, workflow_id: str, owner: str | None, most: int) -> list[bytes]:
        """Return receipts of a workflow, newest first."""
        return [row[0] for row in self._db.rows(_LIST, workflow_id, owner, most)]

    def close(self) -> None:
        """Let go of what is open."""
        self._db.close()
