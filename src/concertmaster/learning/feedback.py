"""Labels as they come in: late, out of order, twice, or never; joined to what was predicted.

A completion is a label for the forecast made at arrival (SwarmX 2.2, ``adapt``). Saying
something to the store touches memory alone; ``flush`` writes, on a thread of the driver's.
"""

import secrets
import sqlite3
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from concertmaster.core.errors import InputError
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import Request, RequestId, WorkflowId
from concertmaster.learning.label_file import Batch, LabelFile, Written
from concertmaster.learning.label_reader import latest_labels, read_labels
from concertmaster.learning.labels import (
    MOST_TEXT_CHARS,
    Answer,
    Asked,
    Label,
    Names,
    Vector,
    absurd,
)
from concertmaster.learning.notices import Notices, describe
from concertmaster.learning.redaction import LONGEST_CHARS, Redactor
from concertmaster.predictors.interface import Completion
from concertmaster.state.database import Connect, OutOfReachError

_K = TypeVar("_K")
_V = TypeVar("_V")
MIN_BYTES = 4 * 2**20


class FeedbackStore:
    """Forecasts joined to outcomes by request id, and to the end of their workflow.

    All but ``flush``, ``close`` and reading take a few microseconds, never raise for what
    callers or disks do, and may be called in any order: the rows that result are the same.
    The first word on anything holds; repeated ones are counted as "duplicates".
    While the file cannot be written the newest ``max_buffered`` are kept in memory.

    Args:
        path: The file; with its folder it is made where there is none.
        max_rows: Calls to keep; the oldest go first.
        max_bytes: Of the file, 4 MiB at least; its write-ahead log, beside it, has as much
            as was written at once, and shrinks to 4 MiB after that.
        max_buffered: Calls, and outcomes, to hold until the next flush; beyond that the
            oldest are dropped and counted as "overflowed".
        max_early: Outcomes to hold whose call is not known; the oldest go first.
        early_flushes: How many flushes such an outcome waits before it counts as "unknown".
        keep_text: Whether to keep the first 8,000 characters of prompts.
        redacts: Whether to take addresses, keys and numbers out of names and prompts.
        connect: Opens the file.

    Raises:
        InputError: The file is of a later version, or no file of labels.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int = 200_000,
        max_bytes: int = 512 * 2**20,
        max_buffered: int = 10_000,
        max_early: int = 1_000,
        early_flushes: int = 60,
        keep_text: bool = False,
        redacts: bool = True,
        connect: Connect = sqlite3.connect,
    ) -> None:
        self._path = path
        self._max_rows = max_rows
        self._max_bytes = max(max_bytes, MIN_BYTES)
        self._max_buffered = min(max_buffered, max_rows)
        self._max_early = max_early
        self._early_flushes = early_flushes
        self._keep_text = keep_text
        self._names = Names(Redactor(secrets.token_bytes(16)) if redacts else None)
        self._connect = connect
        self._asked: OrderedDict[RequestId, Asked] = OrderedDict()
        self._answers: OrderedDict[RequestId, Answer] = OrderedDict()
        self._closed: OrderedDict[WorkflowId, float | None] = OrderedDict()
        self._early: OrderedDict[RequestId, Answer] = OrderedDict()
        self._notices = Notices("feedback")
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._file: LabelFile | None = None
        try:
            self._file = self._open()
        except (sqlite3.Error, OSError, OutOfReachError) as error:
            self._out_of_reach(error)

    @property
    def counts(self) -> Counter[str]:
        """What became of what was said, for metrics.

        "labels", "duplicates", "refused" (absurd), "unknown" (outcomes without a call),
        "overflowed", "trimmed" (rows that made room), "unwritable" (flushes that failed).
        """
        return self._notices.counts

    @property
    def buffered(self) -> int:
        """Things said that the next flush will write."""
        return len(self._asked) + len(self._answers) + len(self._closed)

    # Saying.

    def asked(
        self,
        request: Request,
        forecast: Forecast = NO_FORECAST,
        *,
        features: Vector | None = None,
        embedding: Vector | None = None,
        text: str = "",
    ) -> None:
        """Take in a call and what was predicted of it.

        Args:
            request: The call.
            forecast: What was predicted.
            features: What the forecast was made from; kept as float32, not copied until then.
            embedding: Of the prompt; kept as float16.
            text: The prompt; dropped at once unless ``keep_text``.
        """
        kept = text[: MOST_TEXT_CHARS + LONGEST_CHARS] if self._keep_text and text else None
        call = Asked(request, forecast, features, embedding, kept)
        with self._lock:
            self._take_in(self._asked, request.request_id, call)

    def answered(
        self,
        request_id: RequestId,
        completion: Completion,
        *,
        gpu: str = "",
        success: float | None = None,
    ) -> None:
        """Take in what came of a call.

        Args:
            request_id: The call.
            completion: What came of it.
            gpu: What it ran on.
            success: Grade of this call in 0…1, where someone graded it.
        """
        self._answer(request_id, Answer(completion, gpu, success))

    def failed(self, request_id: RequestId) -> None:
        """Take in that no answer will come: its workflow need not wait for it to be counted."""
        self._answer(request_id, Answer(None))

    def closed(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Take in that a workflow is over, and its grade in 0…1; a grade may come later."""
        if success is not None and not 0.0 <= success <= 1.0:
            self._notices.warn("refused", reason=f"success={success}")
            success = None
        with self._lock:
            if success is not None and self._closed.get(workflow_id, success) is None:
                self._closed[workflow_id] = success
            else:
                self._take_in(self._closed, workflow_id, success)

    def _answer(self, request_id: RequestId, answer: Answer) -> None:
        if reason := absurd(answer):
            self._notices.warn("refused", reason=reason)
            return
        with self._lock:
            self._take_in(self._answers, request_id, answer)

    def _take_in(self, buffer: OrderedDict[_K, _V], key: _K, value: _V) -> None:
        if key in buffer:
            self._notices.count("duplicates")
            return
        buffer[key] = value
        if len(buffer) > self._max_buffered:
            buffer.popitem(last=False)
            self._notices.warn("overflowed", max_buffered=self._max_buffered)

    # Writing.

    def flush(self) -> bool:
        """Write what was said; return whether it could be written. Not for the hot path.

        If not, it is kept for the next flush, and the log says so once an outage.
        """
        with self._flushing:
            batch, answers = self._take()
            try:
                self._file = self._file or self._open()
                written = self._file.write(batch)
            except (sqlite3.Error, OSError, InputError) as error:
                self._put_back(batch, answers)
                self._out_of_reach(error)
                return False
            self._settle(batch, written)
            if self._notices.forget("unwritable"):
                self._notices.warn("writable again", labels=written.counts["labels"])
                self._notices.forget("writable again")
            return True

    def _open(self) -> LabelFile:
        return LabelFile(
            self._path,
            max_rows=self._max_rows,
            max_bytes=self._max_bytes,
            names=self._names,
            connect=self._connect,
        )

    def _out_of_reach(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, sqlite3.Error) else describe(error)
        self._notices.warn("unwritable", path=str(self._path), reason=reason)
        if self._file is not None:
            with suppress(sqlite3.Error):
                self._file.close()
            self._file = None

    def _take(self) -> tuple[Batch, OrderedDict[RequestId, Answer]]:
        """Empty the buffers; outcomes that waited for one of these calls go along."""
        with self._lock:
            asked, self._asked = self._asked, OrderedDict()
            answers, self._answers = self._answers, OrderedDict()
            closed, self._closed = self._closed, OrderedDict()
        due = [(name, self._early[name]) for name in asked if name in self._early]
        return Batch(asked, [*due, *answers.items()], closed), answers

    def _put_back(self, batch: Batch, answers: Mapping[RequestId, Answer]) -> None:
        """Return to the buffers what could not be written, before what was said meanwhile."""
        with self._lock:
            asked_since, self._asked = self._asked, OrderedDict(batch.asked)
            answers_since, self._answers = self._answers, OrderedDict(answers)
            closed_since, self._closed = self._closed, OrderedDict(batch.closed)
            for request_id, call in asked_since.items():
                self._take_in(self._asked, request_id, call)
            for request_id, answer in answers_since.items():
                self._take_in(self._answers, request_id, answer)
        for workflow_id, success in closed_since.items():
            self.closed(workflow_id, success)

    def _settle(self, batch: Batch, written: Written) -> None:
        """Count what became of a batch, and let outcomes without a call grow older."""
        for kind in ("labels", "duplicates", "trimmed"):
            self._notices.count(kind, written.counts[kind])
        self._notices.warn("refused", written.counts["refused"], reason=written.reason)
        waiting: OrderedDict[RequestId, Answer] = OrderedDict()
        for request_id, answer in self._early.items():
            if request_id not in batch.asked:
                waiting[request_id] = replace(answer, flushes=answer.flushes + 1)
        for request_id, answer in written.early.items():
            if request_id in waiting:
                self._notices.count("duplicates")
            else:
                waiting[request_id] = answer
        too_many = len(waiting) - self._max_early
        self._early = OrderedDict(
            (name, answer)
            for i, (name, answer) in enumerate(waiting.items())
            if i >= too_many and answer.flushes < self._early_flushes
        )
        self._notices.warn("unknown", len(waiting) - len(self._early))

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        with self._flushing:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Reading; unflushed labels are not seen.

    def latest(self, most: int) -> list[Label]:
        """Read the newest ``most`` labels, oldest of them first."""
        return latest_labels(self._path, most)

    def rows(self, since: int = 0) -> Iterator[Label]:
        """Read the labels after a serial, in the order in which outcomes came.

        A label whose workflow closes later is not read again by who has passed it.
        """
        return read_labels(self._path, since)
