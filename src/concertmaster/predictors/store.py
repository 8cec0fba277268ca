"""What was trained, on disk: a folder with a manifest and one file of arrays a part.

Nothing in a store is code: arrays are read without pickle, and every file is held against
the hash that the manifest states. A store is written beside its place and then moved there,
so that a reader meets a whole one or none.
"""

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName
from concertmaster.predictors.calibration import Calibration
from concertmaster.predictors.encoder import Encoder, StaticEncoder
from concertmaster.predictors.evidence import LEAN, Evidence
from concertmaster.predictors.hashing import HashedEncoder
from concertmaster.predictors.heads import LEVELS, Heads, part
from concertmaster.predictors.hub import HubEncoder, OnnxEncoder
from concertmaster.predictors.judge import Judge
from concertmaster.predictors.laws import LawTree
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.manifest import (
    AGAIN,
    MANIFEST,
    EncoderFacts,
    Manifest,
    read_bytes,
    read_manifest,
    rendered,
)
from concertmaster.predictors.shapes import MisshapenError, check_part, check_static_encoder
from concertmaster.predictors.success import SuccessHead

DEFAULT = Path(__file__).parent / "default"
"""The store that ships in the package."""

SEEN = "seen"
NEEDED = ("laws", "heads", "calibration")
"""Parts without which there is no forecast."""

_HASHED = re.compile(r"hashed-(\d{1,4})(-projected)?")
_STATIC = re.compile(r"static-\d+")
_OUTSIDE = ("onnx:", "hub:")
_PARTIAL = ".part"
_REPLACED = ".old"

Array = npt.NDArray[np.generic]
Arrays = dict[str, Array]
Seen = npt.NDArray[np.uint64]


class Store(NamedTuple):
    """A store as it was read: checked, and taken apart by nobody yet.

    Attributes:
        seen: Sorted hashes of what it was trained on, see ``learning.datasets``.
    """

    folder: Path
    manifest: Manifest
    parts: dict[str, Arrays]
    seen: Seen


def write_store(
    folder: Path, manifest: Manifest, parts: Mapping[str, Mapping[str, Array]], seen: Seen
) -> None:
    """Write a store, in place of one that is there.

    Args:
        folder: Where; parents are made.
        manifest: All but ``files``.
        parts: Arrays by part and name; parts without any are left out.
        seen: Sorted hashes.

    Raises:
        InputError: Something else than a store is in that place, or it cannot be written.
    """
    check_place(folder)
    contents = {f"{name}.npz": _packed(arrays) for name, arrays in parts.items() if arrays}
    contents[f"{SEEN}.npz"] = _packed({SEEN: seen})
    hashes = {name: sha256(raw).hexdigest() for name, raw in contents.items()}
    contents[MANIFEST] = rendered(replace(manifest, files=hashes))
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        for name, raw in contents.items():
            (partial / name).write_bytes(raw)
        _move(partial, folder)
    except OSError as error:
        raise InputError(str(folder), "", f"cannot write: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Check that a store may be written there: nothing is, or a store.

    Raises:
        InputError: Something else is.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(str(folder), "", "expected a folder, found a file", "name another place")
    names = [entry.name for entry in folder.iterdir()]
    ours = MANIFEST in names and all(n == MANIFEST or n.endswith(".npz") for n in names)
    if names and not ours:
        problem = f'expected a store or nothing, found "{min(names)}" there'
        raise InputError(str(folder), "", problem, "name another place: it would be replaced")


def _packed(arrays: Mapping[str, Array]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, allow_pickle=False, **arrays)
    return out.getvalue()


def _move(partial: Path, folder: Path) -> None:
    """Put a whole store in its place; the one before comes back if that fails."""
    if not folder.exists():
        partial.rename(folder)
        return
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    _remove(replaced)
    folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    _remove(replaced)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def read_store(folder: Path) -> Store:
    """Read a store and check all of it.

    Raises:
        InputError: It is not there, not whole, changed since it was written, or made by a
            version whose forecasts this one cannot make.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        hint = "concertmaster train writes one"
        raise InputError(str(folder), "", f"expected the folder of a store, found {found}", hint)
    manifest = read_manifest(folder)
    parts = {
        name.removesuffix(".npz"): _read_arrays(folder / name, stated)
        for name, stated in manifest.files.items()
    }
    seen = _checked_seen(folder, parts.pop(SEEN, {}))
    for name in NEEDED:
        if name not in parts:
            raise InputError(str(folder), MANIFEST, f"expected the part {name}, found none", AGAIN)
    for name, arrays in parts.items():
        _check_part(folder, name, arrays, manifest.encoder)
    return Store(folder, manifest, parts, seen)


def _read_arrays(path: Path, stated: str) -> Arrays:
    raw = read_bytes(path, AGAIN)
    found = sha256(raw).hexdigest()
    if found != stated:
        problem = f"expected sha256 {stated[:12]}…, found {found[:12]}…"
        raise InputError(str(path), "", problem, "the file was changed or broke off: " + AGAIN)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # noqa: BLE001  # zip and numpy stumble over damage anywhere
        problem = f"expected arrays without Python objects, found: {_first_line(error)}"
        raise InputError(str(path), "", problem, AGAIN) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checked_seen(folder: Path, arrays: Arrays) -> Seen:
    seen = arrays.get(SEEN)
    if seen is None or seen.dtype != np.uint64 or seen.ndim != 1:
        where = str(folder / f"{SEEN}.npz")
        raise InputError(where, SEEN, "expected the hashes of what it was trained on", AGAIN)
    return seen.astype(np.uint64)


def _check_part(folder: Path, name: str, arrays: Arrays, encoder: EncoderFacts) -> None:
    try:
        check_part(name, arrays, dims=encoder.dims)
        if name == "encoder" and _STATIC.fullmatch(encoder.name):
            check_static_encoder(arrays, dims=encoder.dims)
    except MisshapenError as error:
        raise InputError(str(folder / f"{name}.npz"), "", str(error), AGAIN) from None


def pack_laws(evidence: Evidence) -> Arrays:
    """Return the arrays of all laws: the part ``laws``."""
    return {
        f"{name}.{key}": array
        for name, tree in evidence.laws.items()
        for key, array in tree.arrays().items()
    }


def unpack_laws(arrays: Arrays) -> Evidence:
    """Restore what ``pack_laws`` gave; histories are empty."""
    evidence = Evidence()
    evidence.laws = {
        name: LawTree.from_arrays(part(arrays, name), lean_workflows=lean)
        for name, lean in LEAN.items()
    }
    return evidence


def encoder_of(store: Store) -> Encoder | None:
    """Restore the encoder of a store; ``None`` if it has none.

    Raises:
        InputError: Its name is not known, or its arrays do not fit it.
    """
    facts, arrays = store.manifest.encoder, store.parts.get("encoder", {})
    if not facts.name:
        return None
    where = str(store.folder / MANIFEST)
    hashed = _HASHED.fullmatch(facts.name)
    encoder: Encoder
    try:
        if _STATIC.fullmatch(facts.name):
            encoder = StaticEncoder.from_arrays(arrays)
        elif hashed:
            encoder = _hashed(int(hashed[1]), arrays.get("projection"))
        elif facts.name.startswith(_OUTSIDE):
            encoder = _outside(facts.name)
        else:
            problem = f'expected static-N, hashed-N, onnx:… or hub:…, found "{facts.name}"'
            raise InputError(where, "encoder", problem, "update concertmaster, or train it again")
    except (KeyError, ValueError) as error:
        problem = f"expected the arrays of {facts.name}: {_first_line(error)}"
        raise InputError(where, "encoder", problem, AGAIN) from None
    if (encoder.name, encoder.dims) != (facts.name, facts.dims):
        problem = f"expected {facts.dims} dims, found {encoder.dims} of {encoder.name}"
        raise InputError(where, "encoder", problem, AGAIN)
    return encoder


def default_encoder() -> Encoder:
    """Return the encoder of the store that ships, else one that needs no training.

    Raises:
        InputError: The store that ships cannot be read.
    """
    shipped = encoder_of(read_store(DEFAULT)) if DEFAULT.is_dir() else None
    return shipped or HashedEncoder()


def encoder_named(name: str) -> Encoder:
    """Return the encoder to train with.

    Args:
        name: ``default``, ``hashed``, ``onnx:FOLDER``, ``hub:NAME``, or the file of a table.

    Raises:
        InputError: It cannot be loaded, or what it needs is not installed.
    """
    if name == "default":
        return default_encoder()
    if name == "hashed":
        return HashedEncoder()
    if name.startswith(_OUTSIDE):
        return _outside(name)
    try:
        with np.load(name, allow_pickle=False) as arrays:
            return StaticEncoder.from_arrays(dict(arrays))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        known = "default, hashed, onnx:FOLDER, hub:NAME, or a file that distill wrote"
        problem = f"expected {known}: {_first_line(error)}"
        raise InputError("--encoder", name, problem) from None


def _outside(name: str) -> Encoder:
    """Load an encoder that lies outside the store, which keeps its name alone."""
    kind, _, place = name.partition(":")
    return OnnxEncoder(Path(place)) if kind == "onnx" else HubEncoder(place)


def _hashed(dims: int, projection: Array | None) -> HashedEncoder:
    if projection is None:
        return HashedEncoder(dims)
    return HashedEncoder(dims, np.asarray(projection, dtype=np.float32))


def judge_of(store: Store) -> Judge | None:
    """Restore the success head with its encoder; ``None`` if the store was trained without.

    Raises:
        InputError: As for ``encoder_of``, or the head reads another encoder's vectors.
    """
    arrays = store.parts.get("success")
    if arrays is None:
        return None
    encoder, head = encoder_of(store), SuccessHead.from_arrays(arrays)
    if encoder is None or head.encoder != encoder.name:
        problem = f'expected the encoder "{head.encoder}", found "{store.manifest.encoder.name}"'
        raise InputError(str(store.folder / MANIFEST), "encoder", problem, AGAIN)
    return Judge(head, encoder, at_once=encoder.name.startswith(_OUTSIDE))


def restore(
    store: Store, *, models: Sequence[ModelName] = (), adapt: bool = True
) -> LearnedPredictor:
    """Make a predictor of a store; each call makes one that has learnt nothing since.

    Args:
        store: As it was read.
        models: Models of the fleet.
        adapt: Whether labels move laws, calibration and success.

    Raises:
        InputError: As for ``judge_of``.
    """
    calibration = Calibration(LEVELS)
    calibration.restore(store.parts["calibration"])
    return LearnedPredictor(
        unpack_laws(store.parts["laws"]),
        Heads.from_arrays(store.parts["heads"]),
        calibration,
        models=models,
        judge=judge_of(store),
        adapt=adapt,
    )


def load_predictor(
    folder: Path | None, *, models: Sequence[ModelName] = (), adapt: bool = True
) -> LearnedPredictor:
    """Read a store and make a predictor of it.

    Args:
        folder: ``None`` takes the store that ships in the package.
        models: Models of the fleet: each gets forecasts of its own.
        adapt: Whether labels move laws, calibration and success.

    Raises:
        InputError: As for ``read_store`` and ``judge_of``.
    """
    return restore(read_store(folder or DEFAULT), models=models, adapt=adapt)
