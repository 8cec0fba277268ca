"""TOML in, values of a type out, and a line for everything that is wrong, not only the first.

Text may refer to the environment: ``${NAME}``, or ``${NAME:-default}`` where it may be unset or
empty; ``$${`` stands for ``${`` itself. A value that is one reference and nothing else may
stand where a number or true and false are expected.
"""

import dataclasses
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from concertmaster.core.errors import InputError, InvalidRequestError, unknown_name

T = TypeVar("T")

REFERENCE = r"\$\{[A-Za-z_][A-Za-z0-9_]*(?::-[^}]*)?\}"
_REFERENCES = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_BOUND = re.compile(r"Expected `(?:int|float)` (>=|>|<=) ([\d.]+)")
_WORDS = {">": "a number above", ">=": "at least", "<=": "at most"}


class _Told(str):
    """Text of which the environment has told all, with what stood in the file."""

    __slots__ = ("written",)
    written: str


def toml_in(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: It is missing, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise InputError(str(path), "", "no such file", "see examples/fleets/") from None
    except IsADirectoryError:
        raise InputError(str(path), "", "expected a TOML file, found a folder") from None
    except OSError as error:
        raise InputError(str(path), "", f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), "", f"not a TOML file: {error}") from None


class Reading:
    """One file on its way from text to facts.

    Args:
        file: What complaints name.
        environ: What references are looked up in.

    Attributes:
        problems: All that was found to be wrong, in the order of the file's sections.
    """

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self._file = file
        self._environ = environ
        self.problems: list[InputError] = []

    def read(self, raw: Mapping[str, Any], kind: type[T]) -> T | None:
        """Return what the file says; ``None`` if anything is wrong with it."""
        found = self._section("", self._filled("", raw), kind)
        return None if self.problems else found

    def _complain(self, where: str, problem: str, hint: str = "") -> None:
        self.problems.append(InputError(self._file, where, problem, hint))

    # References

    def _filled(self, where: str, value: Any) -> Any:  # noqa: ANN401  # whatever the TOML held
        if isinstance(value, str):
            return self._text(where, value) if "${" in value else value
        if isinstance(value, list):
            return [_plain(self._filled(f"{where}[{i}]", one)) for i, one in enumerate(value)]
        if isinstance(value, Mapping):
            return {key: self._filled(_join(where, key), one) for key, one in value.items()}
        return value

    def _text(self, where: str, text: str) -> str:
        found = _REFERENCES.sub(lambda match: self._named(where, match), text)
        if not re.fullmatch(REFERENCE, text):
            return found
        told = _Told(found)
        told.written = text
        return told

    def _named(self, where: str, match: re.Match[str]) -> str:
        escaped, inner, closing = match.groups()
        if escaped:
            return match[0][1:]
        named = _NAME.fullmatch(inner) if closing else None
        if named is None:
            self._complain(where, f"expected ${{NAME}} or ${{NAME:-default}}, found {match[0]!r}")
            return ""
        name, default = named.groups()
        value = self._environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            hint = f"export {name}=… or write ${{{name}:-default}}"
            self._complain(where, f"the environment has no {name}", hint)
        return value or ""

    # Types

    def _section(self, where: str, raw: Mapping[str, Any], kind: type[T]) -> T | None:
        keys, before = _keys_of(kind), len(self.problems)
        for key in raw:
            if key not in keys:
                self.problems.append(unknown_name(self._file, where, "key", key, keys))
        values = {}
        for key, (type_, required) in keys.items():
            if key in raw:
                values[key] = self._value(_join(where, key), key, raw[key], type_)
            elif required:
                self._complain(where, f'missing key "{key}"')
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except InvalidRequestError as error:
            self._complain("", str(error))
            return None

    def _value(self, where: str, key: str, value: Any, kind: Any) -> Any:  # noqa: ANN401
        item = _struct_of_items(kind)
        if item is not None and isinstance(value, list) and all(isinstance(i, dict) for i in value):
            return [self._section(f"{where}[{i}]", one, item) for i, one in enumerate(value)]
        if _is_section(kind) and isinstance(value, dict):
            return self._section(where, value, kind)
        try:
            return msgspec.convert(_plain(value), kind, strict=not isinstance(value, _Told))
        except msgspec.ValidationError as error:
            self._explain(where, key, value, kind, str(error))
        except InvalidRequestError as error:
            self._complain(where, str(error))
        return None

    def _explain(self, where: str, key: str, value: Any, kind: Any, message: str) -> None:  # noqa: ANN401
        """Turn msgspec's message into ours: place, problem, and the nearest word that is known."""
        text, _, inner = message.partition(" - at `$")
        where += inner.rstrip("`")
        found = value.written if isinstance(value, _Told) else _inner(value, inner)
        choices = list(_choices(kind))
        bound = _BOUND.match(text)
        if choices and isinstance(found, str):
            self.problems.append(unknown_name(self._file, where, key, found, choices))
        elif bound:
            self._complain(where, f"expected {_WORDS[bound[1]]} {float(bound[2]):g}, found {found}")
        else:
            self._complain(where, text[:1].lower() + text[1:], f"found {found!r}")


def _plain(value: Any) -> Any:  # noqa: ANN401  # whatever the TOML held
    return str(value) if isinstance(value, _Told) else value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _inner(value: Any, path: str) -> Any:  # noqa: ANN401
    for number in re.findall(r"\[(\d+)\]", path):
        value = value[int(number)]
    return value


def _is_section(kind: Any) -> bool:  # noqa: ANN401
    return isinstance(kind, type) and (
        issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind)
    )


def _struct_of_items(kind: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401
    if get_origin(kind) is not list:
        return None
    (item,) = get_args(kind)
    return item if _is_section(item) else None


def _keys_of(kind: Any) -> Mapping[str, tuple[Any, bool]]:  # noqa: ANN401
    """Return the keys of a section: their types, and whether they must be there."""
    if dataclasses.is_dataclass(kind):
        return {field.name: (field.type, False) for field in dataclasses.fields(kind)}
    return {field.name: (field.type, field.required) for field in msgspec.structs.fields(kind)}


def _choices(kind: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the words that a key may have, if only some may stand there."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        yield from (one.value for one in kind)
    else:
        for one in get_args(kind) if isinstance(get_args(kind), Collection) else ():
            yield from _choices(one)
