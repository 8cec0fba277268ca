"""Feedback: labels come late, out of order, twice or never, and disks fail."""

import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import a_request
from concertmaster.core.errors import InputError
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning import label_file, label_reader
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.label_schema import SCHEMA
from concertmaster.learning.labels import LEVELS, MOST_TOKENS, Label
from concertmaster.predictors.interface import Completion

M, BIG = ModelName("m"), ModelName("big")
SRC = Path(__file__).parent.parent / "src"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learning" / "labels.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(path) as one:
        yield one


def asked_by(name: str, workflow: str = "w1", **changes: object) -> Request:
    return a_request(name, workflow_id=WorkflowId(workflow), **changes)


def came_to(tokens: int, finished_s: float = 9.0, model: ModelName = M) -> Completion:
    return Completion(model=model, output_tokens=tokens, finished_s=finished_s)


def learn_some(store: FeedbackStore, count: int, first: int = 0, **asked: object) -> None:
    for i in range(first, first + count):
        store.asked(asked_by(f"r{i}", f"w{i}"), **asked)  # type: ignore[arg-type]
        store.answered(RequestId(f"r{i}"), came_to(i))


def names(labels: list[Label]) -> list[str]:
    return [label.request_id for label in labels]


# What is kept.


def test_a_label_holds_what_was_known_predicted_and_came_of_it(store: FeedbackStore) -> None:
    request = asked_by(
        "r1", arrival_s=1.5, app="chat", template="t", role="coder", step="vote", stage=3
    )
    law = Quantiles((0.05, 0.5, 0.99), (10.0, 20.0, 69.0))
    forecast = Forecast(
        output_tokens=law,
        output_tokens_on={BIG: law.scale(2.0)},
        success={BIG: 0.25},
        remaining_tokens=Quantiles.exactly(400.0),
        tool_call=0.5,
        source="role",
    )
    features, embedding = np.arange(3.0, dtype=np.float32), np.array([0.5, -1.0])
    store.asked(request, forecast, features=features, embedding=embedding, text="a secret")
    done = Completion(model=BIG, output_tokens=33, finished_s=4.0, tool_call=True)
    store.answered(RequestId("r1"), done, gpu="h200", success=1.0)
    assert store.flush()

    (label,) = store.latest(10)
    assert (label.app, label.template, label.role, label.step) == ("chat", "t", "coder", "vote")
    assert (label.stage, label.prompt_tokens, label.max_output_tokens) == (3, 100, 50)
    assert (label.arrival_s, label.finished_s, label.source) == (1.5, 4.0, "role")
    assert (label.model, label.gpu, label.output_tokens) == (BIG, "h200", 33)
    assert (label.tool_call, label.success, label.workflow_success) == (True, 1.0, None)
    assert label.said_output == pytest.approx([2 * law.at(level) for level in LEVELS])
    assert (label.said_success, label.said_tool_call) == (0.25, 0.5)
    assert label.said_remaining_tokens == (400.0,) * len(LEVELS)
    assert label.said_remaining_calls is None
    assert label.features is not None
    assert label.embedding is not None
    assert (label.features.tolist(), label.embedding.tolist()) == ([0, 1, 2], [0.5, -1.0])
    assert label.text is None


def test_the_forecast_is_the_one_for_the_model_that_served(store: FeedbackStore) -> None:
    both = Forecast(
        output_tokens=Quantiles.exactly(5.0), output_tokens_on={BIG: Quantiles.exactly(7.0)}
    )
    only_success = Forecast(success={M: 0.5})
    for name, forecast, model in (
        ("general", both, M),
        ("own", both, BIG),
        ("success", only_success, M),
        ("nothing", Forecast(), M),
    ):
        store.asked(asked_by(name), forecast)
        store.answered(RequestId(name), came_to(1, model=model))
    store.flush()

    said = [(label.said_output or (None,))[0] for label in store.latest(4)]
    assert said == [5.0, 7.0, None, None]
    assert [label.said_success for label in store.latest(4)] == [None, None, 0.5, None]


def test_no_prompt_reaches_the_file_unless_it_is_asked_for(tmp_path: Path) -> None:
    for keep_text in (False, True):
        path = tmp_path / f"{keep_text}.sqlite"
        with FeedbackStore(path, keep_text=keep_text) as store:
            learn_some(store, 1, text="a secret \ud800" + "x" * 9_000)
            store.flush()
            found = b"a secret" in path.read_bytes() + Path(f"{path}-wal").read_bytes()
            assert found == keep_text
            (label,) = store.latest(1)
            assert (label.text or "").startswith("a secret ?x") == keep_text


# Joining.


def test_an_outcome_that_comes_before_its_forecast_waits_for_it(store: FeedbackStore) -> None:
    store.answered(RequestId("r1"), came_to(7))
    store.flush()
    store.asked(asked_by("r1"))
    store.flush()

    assert [label.output_tokens for label in store.latest(1)] == [7]


def test_an_outcome_without_a_call_is_dropped_with_one_line(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FeedbackStore(path, early_flushes=3) as store:
        for name in ("x1", "x2"):
            store.answered(RequestId(name), came_to(7))
        for _ in range(5):
            store.flush()
        store.asked(asked_by("x1"))
        store.flush()

        assert (store.latest(1), store.counts["unknown"]) == ([], 2)
    assert [record.getMessage() for record in caplog.records] == ["feedback: unknown"]


def test_early_outcomes_are_bounded_and_the_oldest_go_first(path: Path) -> None:
    with FeedbackStore(path, max_early=3) as store:
        for i in range(10):
            store.answered(RequestId(f"r{i}"), came_to(i))
            store.flush()
        for i in range(10):
            store.asked(asked_by(f"r{i}"))
        store.flush()

        assert names(store.latest(10)) == ["r7", "r8", "r9"]
        assert store.counts["unknown"] == 7


def test_the_first_word_holds(store: FeedbackStore) -> None:
    for round_ in range(4):
        store.asked(asked_by("r1", role=f"role {round_}"))
        store.answered(RequestId("r1"), came_to(round_))
        store.closed(WorkflowId("w1"), 1.0 - round_ / 4)
        if round_ % 2:
            store.flush()

    (label,) = store.latest(9)
    assert (label.role, label.output_tokens, label.workflow_success) == ("role 0", 0, 1.0)
    assert store.counts["duplicates"] == 9


@pytest.mark.parametrize(
    ("completion", "success"),
    [
        (came_to(-1), None),
        (came_to(MOST_TOKENS + 1), None),
        (came_to(float("nan")), None),  # type: ignore[arg-type]
        (came_to(5, finished_s=float("inf")), None),
        (came_to(5, finished_s=-1.0), None),
        (came_to(5), 1.5),
        (came_to(5), float("nan")),
    ],
)
def test_an_absurd_outcome_is_refused_with_one_line(
    store: FeedbackStore,
    caplog: pytest.LogCaptureFixture,
    completion: Completion,
    success: float | None,
) -> None:
    for i in range(3):
        store.asked(asked_by(f"r{i}"))
        store.answered(RequestId(f"r{i}"), completion, success=success)
    store.flush()

    assert (store.latest(9), store.counts["refused"]) == ([], 3)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "said",
    [
        {"forecast": Forecast(output_tokens=Quantiles.exactly(float("nan")))},
        {"forecast": Forecast(output_tokens=Quantiles.exactly(1e300))},
        {"forecast": Forecast(remaining_calls=Quantiles.exactly(-1.0))},
        {"forecast": Forecast(success={M: 2.0})},
        {"features": np.array([1.0, float("nan")])},
        {"embedding": np.array([1e9])},
        {"embedding": np.zeros(100_000)},
    ],
)
def test_an_absurd_forecast_is_refused_and_the_others_are_kept(
    store: FeedbackStore, said: dict[str, object]
) -> None:
    store.asked(asked_by("r0"), **said)  # type: ignore[arg-type]
    store.answered(RequestId("r0"), came_to(1))
    learn_some(store, 1, first=1)
    store.flush()

    assert (names(store.latest(9)), store.counts["refused"]) == (["r1"], 1)


def test_names_that_no_file_can_hold_are_mended(store: FeedbackStore) -> None:
    store.asked(asked_by("r\ud800", "w" * 10_000, role="\ud800", app="a\nb"))
    store.answered(RequestId("r\ud800"), came_to(1))
    assert store.flush()

    (label,) = store.latest(1)
    assert (label.role, len(label.workflow_id), label.app) == ("?", 256, "a\nb")


# What remained.


def remaining(store: FeedbackStore) -> dict[str, tuple[int | None, int | None]]:
    return {x.request_id: (x.remaining_tokens, x.remaining_calls) for x in store.rows()}


def test_what_remained_is_known_once_the_workflow_is_closed_and_all_calls_are_back(
    store: FeedbackStore,
) -> None:
    for i in range(3):
        store.asked(asked_by(f"r{i}", arrival_s=float(i)))
    for i in (2, 0):
        store.answered(RequestId(f"r{i}"), came_to(10**i))
    store.closed(WorkflowId("w1"), 0.5)
    store.flush()
    assert remaining(store) == {"r2": (None, None), "r0": (None, None)}

    store.answered(RequestId("r1"), came_to(10))
    store.flush()
    assert remaining(store) == {"r2": (100, 1), "r0": (111, 3), "r1": (110, 2)}
    assert {label.workflow_success for label in store.rows()} == {0.5}


def test_what_remained_follows_arrival_whatever_was_heard_first(store: FeedbackStore) -> None:
    """Of calls that arrive together, the later stage comes later, then the later id."""
    for i, (arrival_s, stage) in enumerate([(2.0, 0), (1.0, 2), (1.0, 1), (1.0, 2)]):
        store.asked(asked_by(f"r{i}", arrival_s=arrival_s, stage=stage))
        store.answered(RequestId(f"r{i}"), came_to(10**i))
        store.flush()
    assert set(remaining(store).values()) == {(None, None)}

    store.closed(WorkflowId("w1"))
    store.flush()
    assert remaining(store) == {"r2": (1111, 4), "r1": (1011, 3), "r3": (1001, 2), "r0": (1, 1)}


def test_a_call_that_failed_is_no_label_and_keeps_no_workflow_waiting(
    store: FeedbackStore,
) -> None:
    for i in range(3):
        store.asked(asked_by(f"r{i}", arrival_s=float(i)))
    store.answered(RequestId("r0"), came_to(1))
    store.answered(RequestId("r2"), came_to(100))
    store.failed(RequestId("r1"))
    store.closed(WorkflowId("w1"))
    store.flush()

    assert remaining(store) == {"r0": (101, 2), "r2": (100, 1)}


def test_a_grade_may_come_after_the_end(store: FeedbackStore) -> None:
    learn_some(store, 1)
    for success in (None, 0.25, 0.75):
        store.closed(WorkflowId("w0"), success)
        store.flush()

    assert [label.workflow_success for label in store.rows()] == [0.25]


def test_a_workflow_whose_oldest_calls_are_gone_learns_nothing_of_the_rest(path: Path) -> None:
    with FeedbackStore(path, max_rows=20) as store:
        for i in range(21):
            store.asked(asked_by(f"r{i}", "long"))
            store.answered(RequestId(f"r{i}"), came_to(1))
            store.flush()
        store.closed(WorkflowId("long"))
        store.flush()

        assert len(remaining(store)) == 19
        assert set(remaining(store).values()) == {(None, None)}


# Reading.


def test_the_newest_labels_are_the_last_outcomes(store: FeedbackStore) -> None:
    for name in "abcd":
        store.asked(asked_by(name))
    for name in "dcb":
        store.answered(RequestId(name), came_to(1))
    store.flush()
    store.answered(RequestId("a"), came_to(1))
    store.flush()

    assert names(store.latest(2)) == ["b", "a"]
    assert names(list(store.rows())) == ["d", "c", "b", "a"]
    serial = store.latest(3)[0].serial
    assert names(list(store.rows(since=serial))) == ["b", "a"]


def test_labels_can_be_read_while_others_are_written(store: FeedbackStore) -> None:
    learn_some(store, 1_200)
    store.flush()
    reading = store.rows()
    first = next(reading)
    learn_some(store, 10, first=1_200)
    assert store.flush()

    assert first.request_id == "r0"
    assert len(list(reading)) == 1_209


def test_nothing_is_there_before_the_first_flush(tmp_path: Path) -> None:
    assert label_reader.latest_labels(tmp_path / "none", 5) == []
    (tmp_path / "empty").touch()
    assert list(label_reader.read_labels(tmp_path / "empty")) == []


# Bounds.


def file_bytes(path: Path) -> int:
    return path.stat().st_size


def test_rows_are_bounded_and_the_oldest_go_first(path: Path) -> None:
    with FeedbackStore(path, max_rows=100) as store:
        for first in range(0, 1_000, 50):
            learn_some(store, 50, first=first)
            store.flush()
            assert len(store.latest(1_000)) <= 100

        assert names(store.latest(50)) == [f"r{i}" for i in range(950, 1_000)]
        assert store.counts["trimmed"] >= 900


def test_bytes_are_bounded_and_the_oldest_go_first(path: Path) -> None:
    rng = np.random.default_rng(0)
    with FeedbackStore(path, max_bytes=4 * 2**20) as store:
        for first in range(0, 5_000, 1_000):
            learn_some(store, 1_000, first=first, features=rng.normal(size=1_000))
            store.flush()
            assert file_bytes(path) <= 4 * 2**20

        assert names(store.latest(200)) == [f"r{i}" for i in range(4_800, 5_000)]
    assert not Path(f"{path}-wal").exists()


def test_a_lower_bound_shrinks_the_file(path: Path) -> None:
    with FeedbackStore(path) as store:
        learn_some(store, 2_000, features=np.zeros(1_000))
        store.flush()
    assert file_bytes(path) > 6 * 2**20

    with FeedbackStore(path, max_bytes=4 * 2**20) as store:
        learn_some(store, 1, first=2_000)
        store.flush()
    assert file_bytes(path) <= 4 * 2**20


def test_memory_is_bounded_and_keeps_the_newest(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FeedbackStore(path, max_buffered=5) as store:
        learn_some(store, 20)
        assert store.buffered == 10
        store.flush()

        assert names(store.latest(20)) == [f"r{i}" for i in range(15, 20)]
        assert store.counts["overflowed"] == 30
    assert len(caplog.records) == 1


# Faults.


@dataclass
class Disk:
    """Opens files that can be made to fail."""

    fault: str = ""

    def connect(self, path: Path, **settings: Any) -> sqlite3.Connection:  # noqa: ANN401  # sqlite3's
        if self.fault == "gone":
            raise OSError(5, "Input/output error")
        db: sqlite3.Connection = sqlite3.connect(path, **settings)
        if self.fault:
            db.execute(f"PRAGMA {self.fault}")
        return db


@pytest.mark.parametrize("fault", ["max_page_count=1", "query_only=1", "gone"])
@pytest.mark.parametrize("broken_from_the_start", [False, True])
def test_what_cannot_be_written_is_kept_and_written_later(
    path: Path, caplog: pytest.LogCaptureFixture, fault: str, *, broken_from_the_start: bool
) -> None:
    disk = Disk(fault if broken_from_the_start else "")
    with FeedbackStore(path, max_buffered=50, connect=disk.connect) as store:
        if not broken_from_the_start:
            learn_some(store, 10)
            assert store.flush()
            disk.fault = fault
            store._out_of_reach(OSError())
            caplog.clear()
            store._notices.forget("unwritable")
        for first in (10, 40, 70):
            learn_some(store, 30, first=first, features=np.zeros(100))
            assert not store.flush()
        assert store.counts["unwritable"] >= 3
        disk.fault = ""
        assert store.flush()

        assert names(store.latest(100))[-50:] == [f"r{i}" for i in range(50, 100)]
    said = [record.getMessage().split()[1] for record in caplog.records]
    assert said == ["unwritable", "overflowed", "writable_again"]


def test_a_locked_file_is_waited_for_in_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_file, "BUSY_S", 0.01)
    with FeedbackStore(path) as store, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        learn_some(store, 3)
        assert not store.flush()
        other.rollback()
        assert store.flush()

        assert len(store.latest(9)) == 3


def test_a_batch_that_fails_half_way_leaves_no_trace(store: FeedbackStore) -> None:
    learn_some(store, 3)
    store.flush()
    learn_some(store, 3, first=3)
    serials = [label.serial for label in store.rows()]
    assert store._file is not None
    pages = store._file._db.number("PRAGMA page_count")
    store._file._db.write(f"PRAGMA max_page_count={pages}")
    learn_some(store, 500, first=6, features=np.zeros(1_000))
    assert not store.flush()

    assert [label.serial for label in store.rows()] == serials
    assert store.flush()
    assert [label.serial for label in store.rows()] == list(range(1, 507))
    assert store.counts["duplicates"] == 0


def test_a_batch_that_fails_at_its_end_leaves_no_trace(
    store: FeedbackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    learn_some(store, 3)
    with monkeypatch.context() as broken:
        broken.setattr(label_file.LabelFile, "_trim", fail)
        assert not store.flush()

    assert store.latest(9) == []
    assert store.flush()
    assert (len(store.latest(9)), store.counts["duplicates"]) == (3, 0)


def test_what_is_said_during_a_write_that_fails_joins_what_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FeedbackStore(path) as store:
        assert store._file is not None
        store.asked(asked_by("r1"))

        def fail(_batch: object) -> None:
            store.answered(RequestId("r1"), came_to(3))
            store.asked(asked_by("r1", role="again"))
            store.closed(WorkflowId("w1"), 1.0)
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(store._file, "write", fail)
        assert not store.flush()
        assert store.flush()

        (label,) = store.rows()
        assert (label.role, label.remaining_calls, label.workflow_success) == ("", 1, 1.0)
        assert store.counts["duplicates"] == 1


def test_a_killed_process_loses_at_most_what_was_not_flushed(path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from test_feedback import FeedbackStore, learn_some
        store = FeedbackStore(Path(sys.argv[1]))
        for first in range(0, 10**6, 20):
            learn_some(store, 20, first=first, features=np.zeros(300))
            assert store.flush()
            print(first + 20, flush=True)
    """)
    where = {**os.environ, "PYTHONPATH": f"{SRC}:{Path(__file__).parent}"}
    for lines in (3, 40):
        with subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, env=where
        ) as child:
            assert child.stdout is not None
            said = [int(child.stdout.readline()) for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split()
        flushed = int(rest[-1]) if rest else said[-1]
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = names(list(label_reader.read_labels(path)))
        assert found == [f"r{i}" for i in range(len(found))]
        assert flushed <= len(found) <= flushed + 20
        path.unlink()


def test_threads_may_speak_while_another_flushes(store: FeedbackStore) -> None:
    def speak(first: int) -> None:
        learn_some(store, 500, first=first)

    threads = [threading.Thread(target=speak, args=(1_000 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.flush()
    store.flush()

    assert sorted(names(store.latest(9_999))) == sorted(
        f"r{1_000 * i + j}" for i in range(3) for j in range(500)
    )


# Versions.


def test_a_file_of_a_later_version_is_an_input_error(path: Path) -> None:
    FeedbackStore(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={len(SCHEMA.migrations) + 1}")

    expected = f"{path}: user_version: expected a version up to 1, found 2 "
    for open_it in (FeedbackStore, lambda path: label_reader.latest_labels(path, 1)):
        with pytest.raises(InputError) as caught:
            open_it(path)
        assert str(caught.value).startswith(expected)
        assert "upgrade" in str(caught.value)


@pytest.mark.parametrize("content", [b"not a database at all, " * 100, None])
def test_a_file_of_something_else_is_an_input_error_and_is_left_alone(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "labels.sqlite"
    if content is None:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE theirs (x)")
    else:
        path.write_bytes(content)

    with pytest.raises(InputError, match="expected a file of labels, found: "):
        FeedbackStore(path)
    if content is not None:
        assert path.read_bytes() == content


# As files of the first version were made, by what opened them before others did.
FIRST = """
PRAGMA auto_vacuum=INCREMENTAL;
PRAGMA journal_mode=WAL;
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
INSERT INTO counters VALUES ('serial', 7);
INSERT INTO calls VALUES (
  1, 'old', 'w', '', '', '', '', 0, 1.0, 5, 6, 'role', '[]', NULL, NULL, NULL, NULL, NULL, NULL,
  NULL, 7, NULL, 'a40', 'm', 3, NULL, 2.0, NULL, NULL
);
PRAGMA application_id=1129139266;
PRAGMA user_version=1;
"""


def test_a_file_of_the_first_version_is_gone_on_with(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST)
    assert names(label_reader.latest_labels(path, 9)) == ["old"]
    with FeedbackStore(path) as store:
        learn_some(store, 2)
        store.flush()
        assert names(store.latest(9)) == ["old", "r0", "r1"]
        assert [label.serial for label in store.rows(7)] == [8, 9]


def test_an_older_file_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeedbackStore(path) as store:
        learn_some(store, 1)

    later = SCHEMA._replace(
        migrations=(*SCHEMA.migrations, ["ALTER TABLE calls ADD COLUMN fresh TEXT"])
    )
    monkeypatch.setattr(label_file, "SCHEMA", later)
    monkeypatch.setattr(label_reader, "SCHEMA", later)
    with FeedbackStore(path) as store:
        assert names(store.latest(1)) == ["r0"]
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(later.migrations),)
            assert db.execute("PRAGMA application_id").fetchone() == (SCHEMA.mark,)
            assert db.execute("SELECT fresh FROM calls").fetchone() == (None,)


def test_only_its_owner_may_read_the_file(path: Path) -> None:
    with FeedbackStore(path) as store:
        learn_some(store, 1)
        store.flush()
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_nothing_of_a_prompt_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FeedbackStore(path, max_buffered=1, keep_text=True) as store:
        learn_some(store, 3, text="a secret", features=np.array([float("nan")]))
        store.flush()

    assert caplog.records
    assert "secret" not in caplog.text
