"""Checks of single values of a file; what fails raises ``InputError`` with its place."""

from collections.abc import Collection
from pathlib import Path

from concertmaster.core.errors import InputError, unknown_name


def check_unique(path: Path, where: str, names: list[str]) -> None:
    """Refuse a name that is used twice."""
    for name in names:
        if names.count(name) > 1:
            raise InputError(str(path), where, f'the name "{name}" is used twice')


def check_known(path: Path, where: str, kind: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that is not known."""
    if name not in known:
        raise unknown_name(str(path), where, kind, name, known)


def check_least(path: Path, where: str, value: float, least: float) -> None:
    """Refuse what is less, or no number."""
    if not value >= least:
        raise InputError(str(path), where, f"expected at least {least}, found {value}")


def check_ratio(path: Path, where: str, value: float) -> None:
    """Refuse what is no share of something."""
    if not 0 < value <= 1:
        raise InputError(str(path), where, f"expected 0 to 1, found {value}")


def check_positive(path: Path, where: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0:
        raise InputError(str(path), where, f"expected a number above 0, found {value}")
