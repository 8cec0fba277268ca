"""What the learning loop does off the hot path: labels to disk, trainings begun and read.

All of it happens in one thread beside the driver's, one round at a time, so that neither a
slow disk nor a large store holds up a call.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from concertmaster.learning.background import Done, Failed, State
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.installed import PLACES, installed, trained_at, write_note
from concertmaster.learning.notices import Notices, describe, log
from concertmaster.predictors.interface import Predictor


class Trainer(Protocol):
    """Runs one training at a time, elsewhere; see ``BackgroundTrainer``."""

    def may_start(self, now_s: float) -> bool:
        """Whether one may begin."""

    def start(self, now_s: float, train: Callable[..., Path], *args: object) -> bool:
        """Begin one."""

    def poll(self, now_s: float) -> State:
        """Say how it stands; an end is told once."""

    def close(self) -> None:
        """Kill what runs."""


@dataclass(slots=True, kw_only=True)
class School:
    """How challengers come about.

    Attributes:
        trainer: Runs trainings.
        train: Takes the champion's store, the file of labels, the folder to write, and a seed.
        load: Makes a predictor of a store.
        champion: Store of the champion.
        labels: File of labels.
        folder: Where challengers are written: in two places by turns, never the champion's.
        over: Fingerprint of the store that the gateway was told to serve.
        seed: Of the first training; each takes the next.
    """

    trainer: Trainer
    train: Callable[..., Path]
    load: Callable[[Path], Predictor]
    champion: Path
    labels: Path
    folder: Path
    over: str = ""
    seed: int = 0
    noted: Path | None = field(default=None, init=False)

    def take_up(self) -> Predictor:
        """Load the challenger that was installed last, else the champion as it was told."""
        store = installed(self.folder, self.over)
        if store is not None:
            try:
                predictor = self.load(store)
            except Exception as error:  # noqa: BLE001 - it may be broken in any way
                reason = describe(error)
                log.warning("learning: installed unreadable path=%s error=%s", store, reason)
            else:
                self.champion = store
                log.info("learning: took up path=%s trained=%s", store, trained_at(store))
                return predictor
        return self.load(self.champion)

    def note(self) -> None:
        """Note for the next start which challenger is champion, if one is.

        Raises:
            OSError: It cannot be written.
        """
        if self.champion != self.noted and self.champion.parent == self.folder:
            write_note(self.folder, self.champion, self.over)
            self.noted = self.champion

    def place(self) -> Path:
        """Return the place for the next challenger."""
        first, second = (self.folder / name for name in PLACES)
        return second if self.champion.resolve() == first.resolve() else first


class Challenger(NamedTuple):
    """A predictor that was trained, and where it is kept."""

    predictor: Predictor
    path: Path


class Round(NamedTuple):
    """What a round brought.

    Attributes:
        ended: "done" or "failed" if a training ended.
    """

    challenger: Challenger | None = None
    ended: str = ""


class Upkeep:
    """Runs rounds on an executor, never two at once.

    Args:
        store: Of labels, if any are kept.
        school: If challengers may be trained.
        executor: Runs rounds; shut down at the end.
    """

    def __init__(
        self, store: FeedbackStore | None, school: School | None, executor: Executor
    ) -> None:
        self.notices = Notices("learning", every_s=3_600.0)
        self._store = store
        self._school = school
        self._executor = executor
        self._round: Future[Round] | None = None

    def turn(self, now_s: float, *, wanted: bool) -> Round:
        """Return what the last round brought, and begin the next; never waits.

        Args:
            now_s: Seconds of the wall.
            wanted: Whether a training should begin as soon as one may.
        """
        if self._round is not None and not self._round.done():
            return Round()
        found = Round() if self._round is None else self._result(self._round, now_s)
        starts = wanted and not found.ended and found.challenger is None
        self._round = self._executor.submit(self._work, now_s, wanted=starts)
        return found

    def end(self) -> None:
        """Kill a training, write what is left, and close; waits for a round under way."""
        self._executor.shutdown(wait=True)
        if self._school is not None:
            self._school.trainer.close()
            self._note(self._school, 0.0)
        if self._store is not None:
            self._store.close()

    def _result(self, ended: Future[Round], now_s: float) -> Round:
        try:
            return ended.result()
        except Exception as error:  # noqa: BLE001 - a disk or a process may fail in any way
            self.notices.warn("upkeep failed", now_s=now_s, error=describe(error))
            return Round()

    # In the thread.

    def _work(self, now_s: float, *, wanted: bool) -> Round:
        if self._store is not None:
            self._store.flush()
        if self._school is None:
            return Round()
        self._note(self._school, now_s)
        found = self._read(self._school, now_s)
        if wanted and not found.ended and self._school.trainer.may_start(now_s):
            self._start(self._school, now_s)
        return found

    def _note(self, school: School, now_s: float) -> None:
        try:
            school.note()
        except OSError as error:
            self.notices.warn("installed not noted", now_s=now_s, error=describe(error))

    def _read(self, school: School, now_s: float) -> Round:
        """Ask how the training stands, and load what it wrote."""
        state = school.trainer.poll(now_s)
        if isinstance(state, Failed):
            return Round(ended="failed")
        if not isinstance(state, Done):
            return Round()
        try:
            return Round(Challenger(school.load(state.path), state.path), "done")
        except Exception as error:  # noqa: BLE001 - what was written may be broken in any way
            self.notices.warn("challenger unreadable", now_s=now_s, error=describe(error))
            return Round(ended="failed")

    def _start(self, school: School, now_s: float) -> None:
        school.seed += 1
        with suppress(OSError):  # the training says so itself
            school.folder.mkdir(parents=True, exist_ok=True)
        place = school.place()
        if school.trainer.start(
            now_s, school.train, school.champion, school.labels, place, school.seed
        ):
            log.info("learning: training begun labels=%s out=%s", school.labels, place)
