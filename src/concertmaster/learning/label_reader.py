"""Labels read back for training, also by another process while they are being written."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from concertmaster.core.request import ModelName
from concertmaster.learning.label_schema import SCHEMA
from concertmaster.learning.labels import Label, unpack_floats, unpack_said, unpack_vector
from concertmaster.state.database import reading

PAGE_ROWS = 500
_READ = """
SELECT calls.*, workflows.success AS workflow_success
FROM calls LEFT JOIN workflows USING (workflow_id)
WHERE serial > ? AND output_tokens IS NOT NULL ORDER BY serial LIMIT ?
"""
_NEWEST = """
SELECT serial FROM calls WHERE output_tokens IS NOT NULL ORDER BY serial DESC LIMIT 1 OFFSET ?
"""


def latest_labels(path: Path, most: int) -> list[Label]:
    """Read the newest ``most`` labels, oldest of them first; none if there is no file."""
    with reading(path, SCHEMA) as db:
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
    with reading(path, SCHEMA) as db:
        while db is not None and (page := db.execute(_READ, (since, PAGE_ROWS)).fetchall()):
            for row in page:
                yield _unpack(row)
            since = page[-1]["serial"]


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
