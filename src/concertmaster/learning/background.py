"""Training beside the gateway: another process, of the lowest priority, that cannot hurt it.

The function runs in a fresh interpreter (``spawn``): it shares no memory, lock or event loop
with the caller, may crash, hang or be killed for memory, and ends with the caller.
"""

import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self, TypeAlias

from concertmaster.learning.notices import describe, log

NICE = 19
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that hold numpy to one core."""

REAP_S = 5.0
_CONTEXT = multiprocessing.get_context("spawn")
_MOST_REPORT_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing runs, and nothing is left to report."""


@dataclass(frozen=True, slots=True)
class Running:
    """A training is under way."""


@dataclass(frozen=True, slots=True)
class Done:
    """It has ended well, and this is what it wrote."""

    path: Path


@dataclass(frozen=True, slots=True)
class Failed:
    """It has ended without a result; the reason holds no prompt."""

    reason: str


State: TypeAlias = Idle | Running | Done | Failed


@dataclass(slots=True)
class _Run:
    process: BaseProcess
    report: Connection
    lifeline: Connection
    began_s: float
    killed: str = ""


class BackgroundTrainer:
    """Runs one training at a time; no method but ``close`` waits for the process.

    Args:
        timeout_s: Seconds after which a training is killed.
        cooldown_s: Seconds from the end of one to the beginning of the next.
        most_cooldown_s: The cooldown doubles with each failure in a row, up to this.

    Attributes:
        counts: Of "done" and "failed", for metrics.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 1_800.0,
        cooldown_s: float = 60.0,
        most_cooldown_s: float = 3_600.0,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._timeout_s = timeout_s
        self._cooldown_s = cooldown_s
        self._most_cooldown_s = most_cooldown_s
        self._failures = 0
        self._ready_s = float("-inf")
        self._run: _Run | None = None

    def may_start(self, now_s: float) -> bool:
        """Whether nothing runs and the cooldown is over."""
        return self._run is None and now_s >= self._ready_s

    def start(self, now_s: float, train: Callable[..., Path], *args: object) -> bool:
        """Start a training unless one runs or the cooldown lasts; return whether it did.

        Takes some milliseconds, for the process to be made.

        Args:
            now_s: On the clock that ``poll`` is told.
            train: A function at the top of a module; returns the folder that it wrote.
            args: What it takes, such as paths: must pickle, small, and so must the function.

        Raises:
            pickle.PicklingError: Something does not; ``AttributeError`` or ``TypeError`` also.
        """
        task = pickle.dumps((train, args))
        if not self.may_start(now_s):
            return False
        report, their_report = _CONTEXT.Pipe(duplex=False)
        their_lifeline, lifeline = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(
            target=_train, args=(task, their_report, their_lifeline), daemon=True
        )
        self._run = _Run(process, report, lifeline, now_s)
        try:
            process.start()
        except OSError as error:
            self._run = None
            report.close()
            lifeline.close()
            self._end(now_s, Failed(describe(error)))
            return False
        finally:
            their_report.close()
            their_lifeline.close()
        return True

    def poll(self, now_s: float) -> State:
        """Say how it stands, without waiting; an end is told once, then ``Idle``."""
        run = self._run
        if run is None:
            return Idle()
        if not run.killed and now_s - run.began_s >= self._timeout_s:
            run.killed = f"took longer than {self._timeout_s:g} s"
            run.process.kill()
        if run.process.exitcode is None:
            return Running()
        state = _outcome(run)
        self._let_go(run)
        self._end(now_s, state)
        return state

    def close(self) -> None:
        """Kill what runs; waits for it to be gone, five seconds at most."""
        if self._run is not None:
            self._run.process.kill()
            self._run.process.join(REAP_S)
            self._let_go(self._run)

    def _let_go(self, run: _Run) -> None:
        self._run = None
        run.report.close()
        run.lifeline.close()
        if run.process.exitcode is not None:
            run.process.close()

    def _end(self, now_s: float, state: Done | Failed) -> None:
        if isinstance(state, Done):
            self.counts["done"] += 1
            self._failures = 0
            log.info("training: done path=%s", state.path)
        else:
            self.counts["failed"] += 1
            self._failures += 1
            log.warning("training: failed reason=%r", state.reason)
        wait_s = self._cooldown_s * 2.0 ** min(self._failures, 60)
        self._ready_s = now_s + min(wait_s, max(self._most_cooldown_s, self._cooldown_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _outcome(run: _Run) -> Done | Failed:
    """Read what a process that has ended left in its pipe."""
    if run.killed:
        return Failed(run.killed)
    said: dict[str, str] = {}
    with suppress(EOFError, OSError, ValueError):
        if run.report.poll():
            said = json.loads(run.report.recv_bytes())
    if "path" in said:
        path = Path(said["path"])
        return Done(path) if path.exists() else Failed(f"wrote nothing at {path}")
    if "reason" in said:
        return Failed(said["reason"])
    code = run.process.exitcode or 0
    return Failed(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")


# In the other process.


def _train(task: bytes, report: Connection, lifeline: Connection) -> None:
    _step_back()
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    try:
        train, args = pickle.loads(task)  # noqa: S301 - from our own parent
        said = {"path": str(train(*args))}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        said = {"reason": describe(error)[:_MOST_REPORT_CHARS]}
    report.send_bytes(json.dumps(said).encode())


def _step_back() -> None:
    """Take what cores and memory others leave; the kernel kills this process first."""
    for variable in ONE_THREAD:
        os.environ[variable] = "1"
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _end_with_parent(lifeline: Connection) -> None:
    """Wait for the other end to close, which even ``kill -9`` does."""
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
