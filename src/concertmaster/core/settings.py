"""Settings, as they are written after the name of what has them: ``chimera:tau=0.3,rule=paper``."""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from concertmaster.core.errors import InputError, unknown_name

Reader: TypeAlias = Callable[[str], object]


def number(low: float, high: float = math.inf) -> Reader:
    """Read a number from ``low`` to ``high``.

    >>> number(0, 1)("0.5")
    0.5
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            bound = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise ValueError(f"expected a number, {bound}")
        return value

    return read


def whole(low: int, high: int | None = None) -> Reader:
    """Read a whole number from ``low`` to ``high``.

    >>> whole(1)("12")
    12
    """

    def read(text: str) -> int:
        value = int(text) if text.isdecimal() else low - 1
        if value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"expected a whole number, {bound}")
        return value

    return read


def word(text: str) -> str:
    """Read a name or a path: whatever is not empty."""
    if not text:
        raise ValueError("expected a name")
    return text


def choice(**values: object) -> Reader:
    """Read one of several words.

    >>> choice(yes=True, no=False)("no")
    False
    """

    def read(text: str) -> object:
        if text not in values:
            raise ValueError(f"expected {' or '.join(values)}")
        return values[text]

    return read


def read_settings(where: str, text: str, known: Mapping[str, Reader]) -> dict[str, object]:
    """Read ``KEY=VALUE,KEY=VALUE``; ``where`` is what complaints name.

    Raises:
        InputError: A key is unknown or named twice, or its value is none.
    """
    found: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise unknown_name("", where, "setting", key, known)
        if key in found:
            raise InputError("", where, f"setting {key} is named twice", "name it once")
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise InputError("", f"{where}: {key}", f'{error}, found "{value}"') from None
    return found
