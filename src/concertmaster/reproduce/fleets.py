"""Fleets of studies, which ship in the package."""

from importlib.resources import as_file, files

from concertmaster.compose import build_fleet
from concertmaster.config import load_fleet
from concertmaster.core.fleet import Fleet


def study_fleet(name: str) -> Fleet:
    """Read ``fleets/NAME.toml`` of this package.

    Raises:
        InputError: There is none.
    """
    with as_file(files("concertmaster.reproduce").joinpath("fleets", f"{name}.toml")) as path:
        return build_fleet(load_fleet(path), name=name)
