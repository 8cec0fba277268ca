"""Fleets of studies, which ship in the package."""

from collections.abc import Sequence
from importlib.resources import as_file, files

import msgspec

from concertmaster.compose import build_fleet
from concertmaster.config import ClusterSection, FleetFile
from concertmaster.config_files import load_fleet
from concertmaster.core.fleet import Fleet


def study_fleet(name: str, *, times: int = 1) -> Fleet:
    """Read ``fleets/NAME.toml`` of this package, every pool as often as ``times`` says.

    Raises:
        InputError: There is none.
    """
    file = _read(name)
    if file.nodes:
        file = _on_machines(file, [""] * times)
    pools = [
        pool if pool.nodes else msgspec.structs.replace(pool, replicas=times * pool.count)
        for pool in file.pools
    ]
    return build_fleet(msgspec.structs.replace(file, pools=pools), name=name)


def clustered_fleet(name: str, network_ms: Sequence[float]) -> Fleet:
    """Read ``fleets/NAME.toml``, and give each distance a cluster with all its nodes once.

    Args:
        name: A fleet whose pools share nodes.
        network_ms: Round trips from the caller, in ascending order; equal ones share a cluster.

    Raises:
        InputError: There is none of this name.
    """
    names = [f"{distance_ms:g}ms" for distance_ms in network_ms]
    clusters = {
        name: ClusterSection(name=name, network_ms=distance_ms)
        for name, distance_ms in zip(names, network_ms, strict=True)
    }
    file = msgspec.structs.replace(_read(name), clusters=list(clusters.values()))
    return build_fleet(_on_machines(file, names), name=name)


def _read(name: str) -> FleetFile:
    with as_file(files("concertmaster.reproduce").joinpath("fleets", f"{name}.toml")) as path:
        return load_fleet(path)


def _on_machines(file: FleetFile, clusters: Sequence[str]) -> FleetFile:
    """Copy the nodes once for each cluster named; pools share all copies of theirs."""
    machines = [*enumerate(clusters)]
    nodes = [
        msgspec.structs.replace(node, name=f"{node.name}.{at}", cluster=cluster or None)
        for at, cluster in machines
        for node in file.nodes
    ]
    pools = [
        msgspec.structs.replace(
            pool, nodes=[f"{one}.{at}" for at, _ in machines for one in pool.nodes]
        )
        for pool in file.pools
    ]
    return msgspec.structs.replace(file, nodes=nodes, pools=pools)
