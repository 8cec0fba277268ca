"""Measured numbers on disk, by all that they depend on, so that nothing is measured twice."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from concertmaster.reproduce.fingerprint import code_fingerprint


def kept(
    folder: Path | None, kind: str, key: tuple[object, ...], measure: Callable[[], float]
) -> float:
    """Return a number that was measured before, or measure it and keep it.

    Args:
        folder: Where numbers are kept; ``None`` measures always.
        kind: Of the number: a folder in it.
        key: All that the number depends on beside the code; told apart by ``repr``.
        measure: Gives the number.
    """
    if folder is None:
        return measure()
    path = folder / kind / f"{_digest(key)}.json"
    known = _read(path)
    if known is not None:
        return known
    measured = measure()
    _write(path, measured)
    return measured


def _digest(key: tuple[object, ...]) -> str:
    whole = hashlib.sha256()
    for part in (code_fingerprint(), *key):
        whole.update(repr(part).encode())
    return whole.hexdigest()[:16]


def _read(path: Path) -> float | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=float)
    except (OSError, msgspec.DecodeError):
        return None


def _write(path: Path, value: float) -> None:
    """Put it in place whole, since several processes may measure the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)
