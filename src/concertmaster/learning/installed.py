"""Which challenger was installed last, noted beside the labels for the next start to take up."""

import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from concertmaster.learning.notices import describe, log
from concertmaster.predictors.manifest import MANIFEST

PLACES = ("a", "b")
"""Folders that challengers are written to by turns: the champion's stays, the other is next."""

NOTE = "installed.json"


def fingerprint(store: Path) -> str:
    """Return what tells a store from any other; "" if it cannot be read.

    A manifest states the hash of every file.
    """
    try:
        return sha256((store / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def trained_at(store: Path) -> str:
    """Return when a store was written, in UTC."""
    written_s = (store / MANIFEST).stat().st_mtime
    return datetime.fromtimestamp(written_s, UTC).isoformat(timespec="seconds")


def write_note(folder: Path, store: Path, over: str) -> None:
    """Note that a store of this folder was installed; a reader meets the whole note or none.

    Args:
        folder: Of challengers.
        store: One of its places.
        over: Fingerprint of the store that the gateway was told to serve.

    Raises:
        OSError: It cannot be written.
    """
    said = {"store": store.name, "is": fingerprint(store), "over": over}
    partial = folder / f".{NOTE}.part"
    partial.write_text(json.dumps(said), encoding="utf-8")
    partial.replace(folder / NOTE)


def installed(folder: Path, over: str) -> Path | None:
    """Return the store that was installed last, over a store with this fingerprint.

    ``None`` where none was, or either is another by now; the log says which.
    """
    note = folder / NOTE
    if not over or not note.exists():
        return None
    try:
        said = json.loads(note.read_bytes())
        name, store_was, over_was = said["store"], said["is"], said["over"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("learning: installed unknown path=%s error=%s", note, describe(error))
        return None
    if over_was != over:
        log.info("learning: installed passed over path=%s: models has changed since", note)
        return None
    if name not in PLACES or store_was != fingerprint(folder / name):
        log.warning("learning: installed passed over path=%s: it has changed since", folder)
        return None
    return folder / str(name)
