"""What a store says of itself: where it comes from, and what its arrays are."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from concertmaster import __version__
from concertmaster.core.errors import InputError
from concertmaster.predictors.heads import FIGURES, HEAD_TARGETS, LEVELS

FORMAT = 1
"""Version of the layout of a store."""

MANIFEST = "manifest.json"
AGAIN = "train it again"
"""What to do about most of what can be wrong with a store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOn:
    """What a store was trained on.

    Attributes:
        names: Workloads and routing folders, as they were named.
        rows: Calls.
        groups: Group keys of workflows and questions, see ``learning.datasets``.
        held_out: Whether a fifth of the groups was kept back.
    """

    names: tuple[str, ...] = ()
    rows: int = 0
    workflows: int = 0
    questions: int = 0
    groups: int = 0
    held_out: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFacts:
    """Which encoder made the vectors that the success head reads; no name, no encoder."""

    name: str = ""
    dims: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a store says of itself.

    Attributes:
        format: Version of the layout.
        version: Of the product that wrote it.
        made: When, in the words of whoever trained it; "" if they did not say.
        figures: What training reported.
        features: Names of the figures that the heads read, in their order.
        levels: Of the heads' quantiles.
        targets: Of the heads.
        files: SHA-256 of each data file; filled in by ``write_store``.
    """

    format: int = FORMAT
    version: str = __version__
    made: str = ""
    trained_on: TrainedOn = TrainedOn()
    figures: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    encoder: EncoderFacts = EncoderFacts()
    features: tuple[str, ...] = FIGURES
    levels: tuple[float, ...] = LEVELS
    targets: tuple[str, ...] = HEAD_TARGETS
    files: dict[str, str] = field(default_factory=dict)


def rendered(manifest: Manifest) -> bytes:
    """Return the file's content; equal manifests give equal bytes."""
    return msgspec.json.format(msgspec.json.encode(asdict(manifest)), indent=2) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store and check that its heads fit this version.

    Raises:
        InputError: It is missing, was changed since it was written, or does not fit.
    """
    where = str(folder / MANIFEST)
    raw = read_bytes(folder / MANIFEST, "a store has one: concertmaster train writes it")
    try:
        fields = msgspec.json.decode(raw, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(where, "", f"expected a JSON object, found: {error}", AGAIN) from None
    found = fields.get("format")
    if type(found) is int and found > FORMAT:
        problem = f"expected format {FORMAT} or older, found {found}"
        raise InputError(where, "format", problem, "update concertmaster")
    try:
        manifest = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as error:
        raise InputError(where, "", f"expected a manifest: {error}", AGAIN) from None
    if rendered(manifest) != raw:
        raise InputError(where, "", "it was changed since it was written", AGAIN)
    _check_fit(where, manifest)
    return manifest


def _check_fit(where: str, manifest: Manifest) -> None:
    """Check that the heads read what this version shows them."""
    for name, wanted in (("features", FIGURES), ("levels", LEVELS), ("targets", HEAD_TARGETS)):
        found = getattr(manifest, name)
        if found != wanted:
            odd = sorted(map(str, set(found) ^ set(wanted))) or ["another order"]
            problem = f"expected the {len(wanted)} of this version, found others: {odd[0]}"
            raise InputError(where, name, problem, AGAIN)
    for name in manifest.files:
        if Path(name).name != name or not name.endswith(".npz"):
            raise InputError(where, "files", f'expected names of .npz files, found "{name}"')


def read_bytes(path: Path, hint: str) -> bytes:
    """Read a file of a store.

    Raises:
        InputError: It is not there, with ``hint``, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(str(path), "", "expected this file, found none", hint) from None
    except OSError as error:
        raise InputError(str(path), "", f"cannot read: {error.strerror}") from None
