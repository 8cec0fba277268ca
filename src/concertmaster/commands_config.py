"""What ``concertmaster check`` and ``schema`` do; ``cli_config`` says how they are called."""

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from concertmaster import compose
from concertmaster.config import EngineFile, FleetFile
from concertmaster.config_files import load_fleet, problems_of, schema
from concertmaster.core.errors import InputError
from concertmaster.gateway.peers import peers_of
from concertmaster.gateway.probing import probed
from concertmaster.gateway.server import controls_of
from concertmaster.observe import console as show
from concertmaster.serving import build_problems


def check(*, files: Sequence[Path], probe: bool) -> bool:
    """Print a line for everything that is wrong with some files; return whether nothing is."""
    out, good = show.console(), True
    for path in files:
        problems = list(_problems(path, probe=probe))
        for problem in problems:
            show.say(out, str(problem))
        if not problems:
            show.say(out, f"{path}: good")
        good = good and not problems
    return good


def print_schema(kind: Literal["fleet", "engine"]) -> None:
    """Print the JSON Schema of a kind of file."""
    found = schema(FleetFile if kind == "fleet" else EngineFile)
    show.say(show.console(), json.dumps(found, indent=2))


def _problems(path: Path, *, probe: bool) -> Iterator[InputError]:
    """Find what is wrong; a file that cannot be read whole is not built, nor its engines asked."""
    written, file = problems_of(path)
    yield from written
    if written or not isinstance(file, FleetFile):
        return
    found = list(build_problems(path, file, os.environ))
    yield from found
    if probe and not found:
        yield from _engine_problems(path)


def _engine_problems(path: Path) -> Iterator[InputError]:
    """Ask every engine whether it is there and serves its model."""
    file = load_fleet(path)
    urls = compose.endpoints(file, where=str(path))
    fleet = compose.build_fleet(file, name=path.stem, served=True)
    pools = {replica_id: pool for replica_id, (pool, _, _) in fleet.replicas.items()}
    peers = peers_of(str(path), file, os.environ)
    for replica_id, problem in asyncio.run(probed(urls, pools, peers, controls_of(file))):
        yield InputError(str(path), f"{replica_id} at {urls[replica_id]}", problem)
