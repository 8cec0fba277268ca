"""Which code and settings a result comes from, so that results of others are not taken for it."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from concertmaster.reproduce.study import Study

PACKAGE = Path(__file__).parents[1]

UNSEEN = (
    "cli.py",
    "commands*.py",
    "demo.*",
    "local.py",
    "engines/**/*",
    "gateway/**/*",
    "observe/console.py",
    "observe/draw_plots.py",
    "observe/forecast_*.py",
    "observe/plot*.py",
    "observe/trace.py",
    "reproduce/*.py",
)
"""Files that no simulated run depends on; a change in them lets results stand."""

SHARED = ("capacity", "draw", "fleets", "kept", "window")
"""Modules of this package that every study's runs depend on."""


def fingerprint(study: Study) -> str:
    """Sixteen digits that change with the code of a study's runs and with its settings."""
    settings = msgspec.json.encode(dict(study.settings), order="deterministic")
    own = _digest(PACKAGE / "reproduce" / f"{name}.py" for name in sorted(study.modules))
    return _short(code_fingerprint().encode(), own.encode(), settings)


@functools.cache
def code_fingerprint() -> str:
    """Sixteen digits that change with what all simulated runs depend on."""
    return _digest(sorted({*_seen(PACKAGE), *(PACKAGE / "reproduce" / f"{n}.py" for n in SHARED)}))


def _seen(package: Path) -> Iterator[Path]:
    """Files of the package that runs depend on, data files too."""
    unseen = {path for pattern in UNSEEN for path in package.glob(pattern)}
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path not in unseen:
            yield path


def _digest(files: Iterable[Path]) -> str:
    parts = [(str(path.relative_to(PACKAGE)).encode(), path.read_bytes()) for path in files]
    return _short(*(part for pair in parts for part in pair))


def _short(*parts: bytes) -> str:
    """Hash parts with their lengths, so that none can run into the next."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]
