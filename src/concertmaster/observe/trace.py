"""Traces: every event with its instant and the actions it led to, one JSON line each.

The first line is a header with the format version. A trace replays through the core
without weights or engines, and ``explain`` reads from it why a call went where it went.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, get_args

import msgspec

from concertmaster.core import actions as core_actions
from concertmaster.core import events as core_events
from concertmaster.core.actions import Action
from concertmaster.core.errors import CallerError, InputError
from concertmaster.core.events import Event

VERSION = 1

_EVENTS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(core_events.Event)}
_ACTIONS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(core_actions.Action)}


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a trace: what made it."""

    trace: int
    fleet: str
    policy: str
    seed: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One event and what the core answered."""

    now_s: float
    event: Event
    actions: tuple[Action, ...]


class _Line(msgspec.Struct, frozen=True):
    now_s: float
    event: dict[str, Any]
    actions: list[dict[str, Any]]


def as_line(now_s: float, event: Event, actions: Sequence[Action]) -> dict[str, object]:
    """Return one event as a line of a trace holds it, each part under the name of its kind."""
    return {
        "now_s": now_s,
        "event": {type(event).__name__: event},
        "actions": [{type(action).__name__: action} for action in actions],
    }


def _as_dict(value: object) -> object:
    """Write a mapping that works its values out as the dictionary that it stands for."""
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"a trace cannot hold a {type(value).__name__}")


class TraceWriter:
    """Writes a trace line by line; use it as a context manager.

    Raises:
        InputError: The file cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("wb")
        except OSError as error:
            raise InputError(str(path), "", f"cannot write a trace: {error.strerror}") from None
        self._encode = msgspec.json.Encoder(enc_hook=_as_dict).encode
        self._file.write(self._encode(header) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __call__(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Append one event."""
        line = as_line(now_s, event, actions)
        self._file.write(self._encode(line) + b"\n")


class TraceReader:
    """Reads a trace; a half-written last line ends it and is noted.

    Attributes:
        header: What made the trace.
        broken_at: Number of the line that could not be read; ``None`` if all could, which is
            known once ``entries`` is through.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.broken_at: int | None = None
        try:
            with path.open("rb") as file:
                first = file.readline()
        except OSError as error:
            raise InputError(str(path), "", f"cannot read a trace: {error.strerror}") from None
        try:
            self.header = msgspec.json.decode(first, type=Header)
        except msgspec.MsgspecError:
            raise InputError(
                str(path),
                "line 1",
                "expected the header of a trace",
                "traces are written by concertmaster simulate --trace and serve --trace",
            ) from None
        if self.header.trace != VERSION:
            raise InputError(
                str(path), "line 1", f"expected trace version {VERSION}, found {self.header.trace}"
            )

    def entries(self) -> Iterator[Entry]:
        """Yield the events in order, up to the end or the first line that is broken."""
        with self._path.open("rb") as file:
            file.readline()
            for number, line in enumerate(file, start=2):
                try:
                    yield _entry(msgspec.json.decode(line, type=_Line))
                except (msgspec.MsgspecError, CallerError, KeyError, ValueError):
                    self.broken_at = number
                    return


def _entry(line: _Line) -> Entry:
    return Entry(
        line.now_s,
        _untag(line.event, _EVENTS),
        tuple(_untag(action, _ACTIONS) for action in line.actions),
    )


def _untag(raw: dict[str, Any], kinds: dict[str, type[Any]]) -> Any:  # noqa: ANN401
    ((name, value),) = raw.items()
    return msgspec.convert(value, kinds[name], str_keys=True)
