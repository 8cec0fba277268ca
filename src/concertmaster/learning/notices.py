"""What went wrong, counted by kind, and said in the log once instead of once a call."""

import logging
import math
import threading
import traceback
from collections import Counter

from concertmaster.core.errors import ConcertmasterError

log = logging.getLogger("concertmaster.learning")
MOST_CHARS = 200


def one_line(value: object) -> str:
    r"""Write a value so that it can neither break a log line nor flood it.

    >>> one_line("two\nlines")
    "'two\\nlines'"
    """
    text = repr(value) if isinstance(value, str) else str(value)
    return " ".join(text[:MOST_CHARS].split())


def describe(error: BaseException) -> str:
    """Say what failed and where, without the message of a foreign error: it may quote a prompt.

    >>> describe(KeyError("a prompt"))
    'KeyError'
    """
    name = type(error).__name__
    if isinstance(error, (ConcertmasterError, OSError)):
        return f"{name}: {one_line(str(error))}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return name
    return f"{name} at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"


class Notices:
    """Counters of one part, and its lines in the log; safe to share between threads.

    Args:
        part: Who speaks; the first word of each line.
        every_s: Seconds after which a kind may be said again; never by default.
    """

    def __init__(self, part: str, *, every_s: float = math.inf) -> None:
        self.counts: Counter[str] = Counter()
        self._part = part
        self._every_s = every_s
        self._silent_until_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def count(self, kind: str, by: int = 1) -> None:
        """Count without a line."""
        with self._lock:
            self.counts[kind] += by

    def warn(self, kind: str, by: int = 1, *, now_s: float = 0.0, **facts: object) -> None:
        """Count, and say it unless this kind has been said lately.

        Args:
            kind: In words.
            by: How many; none are neither counted nor said.
            now_s: On the clock that ``every_s`` is measured by.
            facts: What the line says beside the kind; never a prompt.
        """
        if not by:
            return
        with self._lock:
            self.counts[kind] += by
            silent = now_s < self._silent_until_s.get(kind, -math.inf)
            if not silent:
                self._silent_until_s[kind] = now_s + self._every_s
        if not silent:
            said = "".join(f" {name}={one_line(value)}" for name, value in facts.items())
            log.warning("%s: %s%s", self._part, kind.replace(" ", "_"), said)

    def forget(self, kind: str) -> bool:
        """Let a kind be said again; whether it had been said."""
        with self._lock:
            return self._silent_until_s.pop(kind, None) is not None
