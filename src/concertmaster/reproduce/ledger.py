"""Finished cells on disk, one JSON line each, so that a study goes on where it stopped.

A line is written once, when its cell is done. A broken line, the last one of a run that was
killed, counts as not written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from concertmaster.core.errors import InputError
from concertmaster.reproduce.results import Cell

FOLDER = Path("runs/reproduce")
"""Where ledgers lie, under the folder in which the command runs."""

Measured = Mapping[str, float | list[float]]


class Line(msgspec.Struct, kw_only=True):
    """One finished cell, and the code it comes from."""

    fingerprint: str
    cell: Cell
    figures: dict[str, float | list[float]]
    wall_s: float


class Ledger:
    """The finished cells of a study.

    Args:
        path: Made on the first write.
        fingerprint: Lines with another one are left alone and not read.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint

    def read(self) -> dict[Cell, Measured]:
        """Return what is finished."""
        lines = self._lines()
        return {line.cell: line.figures for line in lines if line.fingerprint == self._fingerprint}

    def _lines(self) -> Iterator[Line]:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable(error) from None
        for line in text.splitlines():
            try:
                yield msgspec.json.decode(line, type=Line)
            except msgspec.DecodeError:  # a killed run left half of it, or another version
                continue

    def append(self, cell: Cell, figures: Measured, wall_s: float) -> None:
        """Write one finished cell, whole or not at all."""
        line = Line(fingerprint=self._fingerprint, cell=cell, figures=dict(figures), wall_s=wall_s)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(self._mend() + msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise self._unusable(error) from None

    def _mend(self) -> bytes:
        """Return what ends a line that was cut off: nothing, mostly."""
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 1))
            return b"" if file.read(1) in {b"", b"\n"} else b"\n"

    def clear(self) -> None:
        """Forget everything, of other code too."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> InputError:
        return InputError(str(self.path), "", f"cannot keep results: {error.strerror}")
