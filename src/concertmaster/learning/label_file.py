"""The file of labels: SQLite, joined by request id, bounded in rows and bytes.

Whatever is written in one go is one transaction: ``kill -9`` loses all of it or nothing,
and a power cut loses the last of them but leaves the file whole.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.learning.label_schema import SCHEMA
from concertmaster.learning.labels import (
    ANSWER_COLUMNS,
    CALL_COLUMNS,
    Answer,
    Asked,
    Names,
    pack_answer,
    pack_call,
)
from concertmaster.state.database import Connect, Database

BUSY_S = 1.0
SLICE_BYTES = 2**18
"""Room is looked for once this much has been written since the last look."""

ROW_BYTES = 512

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


class LabelFile:
    """One open file.

    Methods raise ``sqlite3.Error`` or ``OSError`` where it cannot be written; what was to be
    written is then undone, and the file is to be opened anew.

    Args:
        path: The file.
        max_rows: Calls, and workflows, to keep; the oldest go first.
        max_bytes: Of the file.
        names: Makes what callers write fit for it.
        connect: Opens it.

    Raises:
        OutOfReachError: It cannot be opened now.
        InputError: It is no file of labels, or one of a later version.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int,
        max_bytes: int,
        names: Names,
        connect: Connect = sqlite3.connect,
    ) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._names = names
        self._db = Database(path, SCHEMA, outlives_power=False, busy_s=BUSY_S, connect=connect)
        try:
            self._serial = self._db.number("SELECT value FROM counters")
            self._page_bytes = self._db.number("PRAGMA page_size")
            self._vacuum()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close it; the write-ahead log is folded in."""
        self._db.close()

    # Writing.

    def write(self, batch: Batch) -> Written:
        """Join a batch to what is there, all of it or nothing."""
        written = Written()
        with self._db.transaction():
            touched = self._insert(batch.asked, written)
            touched |= self._answer(batch.answers, written)
            touched |= self._close_workflows(batch.closed, written)
            for workflow_id in touched:
                self._label_rest(workflow_id)
            self._trim(written)
            self._db.write("UPDATE counters SET value = ?", self._serial)
        self._vacuum()
        return written

    def _insert(self, calls: Mapping[RequestId, Asked], written: Written) -> dict[WorkflowId, None]:
        touched: dict[WorkflowId, None] = {}
        fresh_bytes = SLICE_BYTES
        for asked in calls.values():
            try:
                row = pack_call(asked, self._names)
            except (ValueError, TypeError, OverflowError) as error:
                written.counts["refused"] += 1
                written.reason = str(error)
                continue
            fresh_bytes = self._make_room(fresh_bytes, written)
            fresh_bytes += ROW_BYTES + sum(len(x) for x in row if isinstance(x, (bytes, str)))
            if self._db.write(_INSERT, *row):
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
            key = (self._names.identity(request_id), row[-1])
            found = self._db.rows(_ANSWER, self._serial + 1, *row, *key)
            if found:
                self._serial += 1
                written.counts["labels"] += answer.completion is not None
                touched[found[0][0]] = None
            else:
                self._unmatched(request_id, answer, written)
        return touched

    def _unmatched(self, request_id: RequestId, answer: Answer, written: Written) -> None:
        query = "SELECT serial FROM calls WHERE request_id = ?"
        found = self._db.rows(query, self._names.identity(request_id))
        if not found:
            written.early.setdefault(request_id, answer)
        elif found[0][0] is not None:
            written.counts["duplicates"] += 1
        else:
            written.counts["refused"] += 1
            written.reason = "finished_s is before arrival_s"

    def _close_workflows(
        self, closed: Mapping[WorkflowId, float | None], written: Written
    ) -> dict[WorkflowId, None]:
        touched: dict[WorkflowId, None] = {}
        for workflow_id, success in closed.items():
            name = WorkflowId(self._names.identity(workflow_id))
            if self._db.write(_CLOSE, name, success):
                touched[name] = None
            else:
                written.counts["duplicates"] += 1
        return touched

    def _label_rest(self, workflow_id: WorkflowId) -> None:
        """Count what remained of a closed workflow from each of its calls on.

        Calls are ordered by arrival, then stage, then id. While one is still out, or the
        oldest have been trimmed and a late one may have been among them, nothing is known.
        """
        query = "SELECT cut FROM workflows WHERE workflow_id = ? AND closed = 1"
        state = self._db.rows(query, workflow_id)
        if not state:
            return
        calls = self._db.rows(_CALLS_OF, workflow_id)
        if state[0][0] or any(serial is None for *_, serial in calls):
            clear = "UPDATE calls SET remaining_tokens = NULL, remaining_calls = NULL"
            self._db.write(f"{clear} WHERE workflow_id = ?", workflow_id)
            return
        served = [(seq, tokens) for seq, tokens, _ in calls if tokens is not None]
        totals = accumulate(tokens for _, tokens in served)
        self._db.write_all(
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
            self._db.write(f"DELETE FROM workflows WHERE seq IN ({oldest})", spare)  # noqa: S608

    def _rows(self, table: str) -> int:
        return self._db.number(f"SELECT count(*) FROM {table}")  # noqa: S608

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
        pages = self._db.number("PRAGMA page_count") - self._db.number("PRAGMA freelist_count")
        return pages * self._page_bytes

    def _drop_oldest(self, count: int, written: Written) -> None:
        oldest = "SELECT max(seq) FROM (SELECT seq FROM calls ORDER BY seq LIMIT ?)"
        last = self._db.number(oldest, count)
        hit = self._db.rows("SELECT DISTINCT workflow_id FROM calls WHERE seq <= ?", last)
        written.counts["trimmed"] += self._db.write("DELETE FROM calls WHERE seq <= ?", last)
        for (workflow_id,) in hit:
            left = self._db.rows("SELECT 1 FROM calls WHERE workflow_id = ? LIMIT 1", workflow_id)
            forget = "DELETE FROM workflows WHERE workflow_id = ?"
            self._db.write(_CUT if left else forget, workflow_id)

    def _vacuum(self) -> None:
        """Give pages back if the file has outgrown its bound, as after the bound was lowered."""
        if self._db.number("PRAGMA page_count") * self._page_bytes > self._max_bytes:
            self._db.shrink()
