"""Every study by name; a study is imported when it is asked for."""

from importlib import import_module
from importlib.util import find_spec
from typing import cast

from concertmaster.core.errors import unknown_name
from concertmaster.reproduce.study import Study

STUDIES: dict[str, str] = {
    "chimera": "concertmaster.reproduce.chimera:STUDY",
    "swarmx": "concertmaster.reproduce.swarmx:STUDY",
    "coding": "concertmaster.reproduce.coding:STUDY",
    "maestro": "concertmaster.reproduce.maestro:STUDY",
    "orders": "concertmaster.reproduce.orders:STUDY",
}
"""Module and name of the study in it."""


def available() -> list[str]:
    """Names of the studies whose module is there."""
    return [name for name, place in STUDIES.items() if find_spec(place.partition(":")[0])]


def study_named(name: str) -> Study:
    """Return a study.

    Raises:
        InputError: There is none of this name; it suggests the nearest.
    """
    known = available()
    if name not in known:
        raise unknown_name("reproduce", "", "study", name, known)
    module, _, attribute = STUDIES[name].partition(":")
    return cast("Study", getattr(import_module(module), attribute))
