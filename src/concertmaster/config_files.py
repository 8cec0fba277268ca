"""Fleet and engine files: read, checked, and described as JSON Schema."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from concertmaster.config import EngineFile, FleetFile
from concertmaster.config_reading import REFERENCE, Reading, toml_in
from concertmaster.config_rules import Check, broken, engine_checks, fleet_checks
from concertmaster.core.errors import InputError

_File = TypeVar("_File", FleetFile, EngineFile)
_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def load_fleet(path: Path) -> FleetFile:
    """Read and check a fleet file.

    Raises:
        InputError: The file is missing, is not TOML, or holds a key or value that is wrong.
    """
    return _first_or(*_read(path, toml_in(path), FleetFile, os.environ))


def load_engine(path: Path) -> EngineFile:
    """Read and check an engine file.

    Raises:
        InputError: As for ``load_fleet``.
    """
    return _first_or(*_read(path, toml_in(path), EngineFile, os.environ))


def problems_of(path: Path) -> tuple[list[InputError], FleetFile | EngineFile | None]:
    """Return everything that is wrong with a fleet file or an engine file, and what it says."""
    try:
        raw = toml_in(path)
    except InputError as error:
        return [error], None
    file: FleetFile | EngineFile | None
    if "model" in raw and "pools" not in raw:
        file, problems = _read(path, raw, EngineFile, os.environ)
    else:
        file, problems = _read(path, raw, FleetFile, os.environ)
    return problems, file


def _read(
    path: Path, raw: Mapping[str, Any], kind: type[_File], environ: Mapping[str, str]
) -> tuple[_File | None, list[InputError]]:
    reading = Reading(str(path), environ)
    file = reading.read(raw, kind)
    if file is None:
        return None, reading.problems
    return file, list(broken(_checks(path, file)))


def _checks(path: Path, file: FleetFile | EngineFile) -> Iterator[Check]:
    if isinstance(file, FleetFile):
        return fleet_checks(path, file)
    return engine_checks(path, file)


def _first_or(file: _File | None, problems: list[InputError]) -> _File:
    if file is None or problems:
        raise problems[0]
    return file


def schema(kind: type[FleetFile | EngineFile]) -> dict[str, Any]:
    """Return the JSON Schema of a file: keys, types, bounds and defaults, as they are enforced.

    Rules between keys are not in it; ``concertmaster check`` knows them.
    """
    (found,), parts = msgspec.json.schema_components((kind,), ref_template="#/$defs/{name}")
    for part in parts.values():
        if part.get("type") == "object":
            properties = part["properties"].items()
            part["properties"] = {key: _or_reference(value) for key, value in properties}
            part["additionalProperties"] = False
    return {"$schema": _SCHEMA, **found, "$defs": dict(sorted(parts.items()))}


def _or_reference(value: dict[str, Any]) -> dict[str, Any]:
    """Let a reference to the environment stand for a number, for true and false, or for a word."""
    kinds = value.get("anyOf", [value])
    if not any(map(_is_plain, kinds)):
        return value
    default = {"default": value.pop("default")} if "default" in value else {}
    reference = {"type": "string", "pattern": f"^{REFERENCE}$"}
    return {"anyOf": [*kinds, reference], **default}


def _is_plain(kind: Mapping[str, Any]) -> bool:
    """Whether it is a number, a truth value or one of some words; free text may be anything."""
    words = "enum" in kind or kind.get("$ref") == "#/$defs/Readiness"
    return words or kind.get("type") in ("integer", "number", "boolean")
