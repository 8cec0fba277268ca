"""Fleets of studies, which ship in the package."""

from importlib.resources import as_file, files

import msgspec

from concertmaster.compose import build_fleet
from concertmaster.config import load_fleet
from concertmaster.core.fleet import Fleet


def study_fleet(name: str, *, times: int = 1) -> Fleet:
    """Read ``fleets/NAME.toml`` of this package, every pool as often as ``times`` says.

    Raises:
        InputError: There is none.
    """
    with as_file(files("concertmaster.reproduce").joinpath("fleets", f"{name}.toml")) as path:
        file = load_fleet(path)
    pools = [msgspec.structs.replace(pool, replicas=times * pool.count) for pool in file.pools]
    return build_fleet(msgspec.structs.replace(file, pools=pools), name=name)
