"""The file of labels: SQLite, joined by request id, bounded in rows and bytes.

Whatever is written in one go is one transaction: ``kill -9`` loses all of it or nothing,
and a power cut loses the last of them but leaves the file whole (write-ahead log,
``synchronous=NORMAL``).
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.learning.label_reader import (
    APPLICATION_ID,
    BUSY_S,
    SCHEMA,
    check_version,
    not_ours,
)
from concertmaster.learning.labels import (
    ANSWER_COLUMNS,
    CALL_COLUMNS,
    Answer,
    Asked,
    clean,
    pack_answer,
    pack_call,
)

MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {}
"""By version: how to bring a file of that version to the next, within a transaction."""

LOG_BYTES = 4 * 2**20
SLICE_BYTES = 2**18
"""Room is looked for once this much has been written since the last look."""

ROW_BYTES = 512

_CREATE = """
CREATE TABLE calls (
  seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, workflow_id TEXT NOT NULL,
  app TEXT NOT NULL, template TEXT NOT NULL, role TEXT NOT NULL, step TEXT NOT NULL,
  stage INTEGER, arrival_s REAL NOT NULL, prompt_tokens INTEGER NOT NULL,
  max_output_tokens INTEGER NOT NULL, source TEXT NOT NULL, said_models TEXT NOT NULL,
  said BLOB, said_remaining_tokens BLOB, said_remaining_calls BLOB, said_tool_call REAL,
  features BLOB, embedding BLOB, prompt_text TEXT,
  serial INTEGER, success REAL, gpu TEXT, model TEXT, output_tokens INTEGER,
  tool_call INTEGER, finished_s REAL, remaining_tokens INTEGER, remaining_calls INTEGER
);
CREATE INDEX calls_of_workflow ON calls (workflow_id);
CREATE UNIQUE INDEX labels_in_order ON calls (serial) WHERE output_tokens IS NOT NULL;
CREATE TABLE workflows (
  seq INTEGER PRIMARY KEY, workflow_id TEXT NOT NULL UNIQUE, closed INTEGER NOT NULL,
  cut INTEGER NOT NULL, success REAL
);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO counters VALUES ('serial', 0);
"""
_PLACES = ", ".join("?" * len(CALL_COLUMNS))
_INSERT = f"INSERT OR IGNORE INTO calls ({', '.join(CALL_COLUMNS)}) VALUES ({_PLACES})"  # noqa: S608 - names of this file
_ANSWER = f"""
UPDATE calls SET serial = ?, {", ".join(f"{name} = ?" for name in ANSWER_COLUMNS)}
WHERE request_id = ? AND serial IS NULL AND arrival_s <= coalesce(?, arrival_s)
RETURNING workflow_id
"""  # noqa: S608 - names of this file
_CLOSE = """
INSERT INTO workflows (workflow_id, closed, cut, success) VALUES (?, 1, 0, ?)
ON CONFLICT (workflow_id) DO UPDATE SET closed = 1, success = excluded.success
WHERE closed = 0 OR (success IS NULL AND excluded.success IS NOT NULL)
"""
_CUT = """
INSERT INTO workflows (workflow_id, closed, cut) VALUES (?, 0, 1)
ON CONFLICT (workflow_id) DO UPDATE SET cut = 1
"""
_CALLS_OF = """
SELECT seq, output_tokens, serial FROM calls WHERE workflow_id = ?
ORDER BY arrival_s DESC, stage DESC, request_id DESC
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """What was heard since the last flush."""

    asked: Mapping[RequestId, Asked]
    answers: Iterable[tuple[RequestId, Answer]]
    closed: Mapping[WorkflowId, float | None]


@dataclass(slots=True)
class Written:
    """What became of a batch.

    Attributes:
        counts: Of "labels", "duplicates", "refused", "trimmed".
        reason: Why one was refused, for the log.
        early: Outcomes of calls that are not in the file.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    early: dict[RequestId, Answer] = field(default_factory=dict)


def connect(path: Path) -> sqlite3.Connection:
    """Open a file for writing, and make it and its folder if there are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        for setting in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {setting}")
        connection.execute(f"PRAGMA journal_size_limit={LOG_BYTES}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class LabelFile:
    """One open file.

    Methods raise ``sqlite3.Error`` or ``OSError`` where it cannot be written; what was to be
    written is then undone, and the file is to be opened anew.

    Args:
        connect: Opens the file.

    Raises:
        InputError: It is no file of labels, or one of a later version.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int,
        max_bytes: int,
        connect: Callable[[Path], sqlite3.Connection] = connect,
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        try:
            self._db = connect(path)
        except sqlite3.DatabaseError as error:
            raise not_ours(path, error) from None
        try:
            self._prepare(path)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close it; the write-ahead log is folded in."""
        self._db.close()

    def _prepare(self, path: Path) -> None:
        with self._transaction():
            version = check_version(self._db, path)
            if version == 0:
                for statement in _CREATE.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            for step in range(version or SCHEMA, SCHEMA):
                MIGRATIONS[step](self._db)
            self._db.execute(f"PRAGMA user_version={SCHEMA}")
        (self._serial,) = self._db.execute("SELECT value FROM counters").fetchone()
        self._page_bytes = self._pragma("page_size")
        self._vacuum()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    # Writing.

    def write(self, batch: Batch) -> Written:
        """Join a batch to what is there, all of it or nothing."""
        written = Written()
        with self._transaction():
            touched = self._insert(batch.asked, written)
            touched |= self._answer(batch.answers, written)
            touched |= self._close_workflows(batch.closed, written)
            for workflow_id in touched:
                self._label_rest(workflow_id)
            self._trim(written)
            self._db.execute("UPDATE counters SET value = ?", (self._serial,))
        self._vacuum()
        return written

    def _insert(self, calls: Mapping[RequestId, Asked], written: Written) -> dict[WorkflowId, None]:
        touched: dict[WorkflowId, None] = {}
        fresh_bytes = SLICE_BYTES
        for asked in calls.values():
            try:
                row = pack_call(asked)
            except (ValueError, TypeError, OverflowError) as error:
                written.counts["refused"] += 1
                written.reason = str(error)
                continue
            fresh_bytes = self._make_room(fresh_bytes, written)
            fresh_bytes += ROW_BYTES + sum(len(x) for x in row if isinstance(x, (bytes, str)))
            if self._db.execute(_INSERT, row).rowcount:
                touched[WorkflowId(str(row[1]))] = None
            else:
                written.counts["duplicates"] += 1
        return touched

    def _answer(
        self, answers: Iterable[tuple[RequestId, Answer]], written: Written
    ) -> dict[WorkflowId, None]:
        touched: dict[WorkflowId, None] = {}
        fresh_bytes = SLICE_BYTES
        for request_id, answer in answers:
            fresh_bytes = self._make_room(fresh_bytes, written) + ROW_BYTES
            row = pack_answer(answer)
            key = (clean(request_id), row[-1])
            found = self._db.execute(_ANSWER, (self._serial + 1, *row, *key)).fetchall()
            if found:
                self._serial += 1
                written.counts["labels"] += answer.completion is not None
                touched[found[0][0]] = None
            else:
                self._unmatched(request_id, answer, written)
        return touched

    def _unmatched(self, request_id: RequestId, answer: Answer, written: Written) -> None:
        found = self._db.execute(
            "SELECT serial FROM calls WHERE request_id = ?", (clean(request_id),)
        ).fetchone()
        if found is None:
            written.early.setdefault(request_id, answer)
        elif found[0] is not None:
            written.counts["duplicates"] += 1
        else:
            written.counts["refused"] += 1
            written.reason = "finished_s is before arrival_s"

    def _close_workflows(
        self, closed: Mapping[WorkflowId, float | None], written: Written
    ) -> dict[WorkflowId, None]:
        touched: dict[WorkflowId, None] = {}
        for workflow_id, success in closed.items():
            name = WorkflowId(clean(workflow_id))
            if self._db.execute(_CLOSE, (name, success)).rowcount:
                touched[name] = None
            else:
                written.counts["duplicates"] += 1
        return touched

    def _label_rest(self, workflow_id: WorkflowId) -> None:
        """Count what remained of a closed workflow from each of its calls on.

        Calls are ordered by arrival, then stage, then id. While one is still out, or the
        oldest have been trimmed and a late one may have been among them, nothing is known.
        """
        state = self._db.execute(
            "SELECT cut FROM workflows WHERE workflow_id = ? AND closed = 1", (workflow_id,)
        ).fetchone()
        if state is None:
            return
        calls = self._db.execute(_CALLS_OF, (workflow_id,)).fetchall()
        if state[0] or any(serial is None for *_, serial in calls):
            clear = "UPDATE calls SET remaining_tokens = NULL, remaining_calls = NULL"
            self._db.execute(f"{clear} WHERE workflow_id = ?", (workflow_id,))
            return
        served = [(seq, tokens) for seq, tokens, _ in calls if tokens is not None]
        totals = accumulate(tokens for _, tokens in served)
        self._db.executemany(
            "UPDATE calls SET remaining_tokens = ?, remaining_calls = ? WHERE seq = ?",
            [
                (total, i, seq)
                for i, ((seq, _), total) in enumerate(zip(served, totals, strict=True), start=1)
            ],
        )

    # Bounds.

    def _trim(self, written: Written) -> None:
        rows = self._rows("calls")
        if rows > self._max_rows:
            self._drop_oldest(rows - self._max_rows + self._max_rows // 20, written)
        spare = self._rows("workflows") - self._max_rows
        if spare > 0:
            oldest = "SELECT seq FROM workflows ORDER BY seq LIMIT ?"
            self._db.execute(f"DELETE FROM workflows WHERE seq IN ({oldest})", (spare,))  # noqa: S608

    def _rows(self, table: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608

    def _make_room(self, fresh_bytes: int, written: Written) -> int:
        """Drop the oldest rows until four slices fit; return the bytes written since."""
        if fresh_bytes < SLICE_BYTES:
            return fresh_bytes
        while self._used_bytes() + 4 * SLICE_BYTES > self._max_bytes:
            rows = self._rows("calls")
            if not rows:
                break
            self._drop_oldest(max(1, rows // 20), written)
        return 0

    def _used_bytes(self) -> int:
        return (self._pragma("page_count") - self._pragma("freelist_count")) * self._page_bytes

    def _drop_oldest(self, count: int, written: Written) -> None:
        (last,) = self._db.execute(
            "SELECT max(seq) FROM (SELECT seq FROM calls ORDER BY seq LIMIT ?)", (count,)
        ).fetchone()
        hit = self._db.execute(
            "SELECT DISTINCT workflow_id FROM calls WHERE seq <= ?", (last,)
        ).fetchall()
        gone = self._db.execute("DELETE FROM calls WHERE seq <= ?", (last,)).rowcount
        written.counts["trimmed"] += gone
        for (workflow_id,) in hit:
            left = self._db.execute(
                "SELECT 1 FROM calls WHERE workflow_id = ? LIMIT 1", (workflow_id,)
            ).fetchone()
            forget = "DELETE FROM workflows WHERE workflow_id = ?"
            self._db.execute(_CUT if left else forget, (workflow_id,))

    def _vacuum(self) -> None:
        """Give pages back if the file has outgrown its bound, as after the bound was lowered."""
        if self._pragma("page_count") * self._page_bytes > self._max_bytes:
            self._db.executescript("PRAGMA incremental_vacuum")  # execute stops after a page
