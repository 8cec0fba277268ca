"""The log: one line an event on standard error, as text or JSON, without secrets.

An exception is told by its type and where it came from: its message may quote what a caller sent.
"""

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

LogForm = Literal["text", "json"]

_SECRETS = re.compile(r"(?:\b(?:cm|sk)-[A-Za-z0-9_-]{16,}|(?<=bearer )[\w.~+/=-]+)", re.IGNORECASE)
_MOST_FRAMES = 12
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

Error = tuple[type[BaseException], BaseException, TracebackType | None]


def redacted(text: str) -> str:
    """Take keys out of a text.

    >>> redacted("authorization: Bearer abc, x-api-key: cm-0123456789abcdefgh")
    'authorization: Bearer [redacted], x-api-key: [redacted]'
    """
    return _SECRETS.sub("[redacted]", text)


def _origin(error: BaseException | None) -> list[str]:
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    return [f"{one.filename}:{one.lineno} {one.name}" for one in frames[-_MOST_FRAMES:]]


class TextFormatter(logging.Formatter):
    """``2026-01-31T10:00:00.000Z warning message``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and one more a frame of an exception."""
        words = " ".join(redacted(record.getMessage()).splitlines())
        said = "".join(filter(str.isprintable, words))
        lines = [f"{_instant(record)} {record.levelname.lower()} {said}"]
        if record.exc_info and record.exc_info[0] is not None:
            lines.append(f"  {record.exc_info[0].__name__}")
            lines += [f"  at {frame}" for frame in _origin(record.exc_info[1])]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``logger``, ``event``, ``message``, facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        facts: dict[str, Any] = {
            "time": _instant(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": "log",
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _PLAIN},
        }
        if record.exc_info and record.exc_info[0] is not None:
            facts["exception"] = record.exc_info[0].__name__
            facts["at"] = _origin(record.exc_info[1])
        return redacted(json.dumps(facts, default=str))


def _instant(record: logging.LogRecord) -> str:
    instant = datetime.fromtimestamp(record.created, UTC)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_to(form: LogForm, out: TextIO | None = None) -> logging.Handler:
    """Send all logs of this process to standard error, or elsewhere, from now on."""
    handler = logging.StreamHandler(out or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    return handler
