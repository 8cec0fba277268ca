"""Fleet and engine files: TOML in, checked facts out. docs/fleet.md explains every key."""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from concertmaster.core.errors import InputError, unknown_name
from concertmaster.core.fleet import Readiness
from concertmaster.engines.faults import Faults


class ClusterSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[clusters]]``: a site and its distance from the caller."""

    name: str
    network_ms: float = 0.0


class NodeSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[nodes]]``: a machine with GPUs of one kind."""

    name: str
    gpu: str
    gpus: int
    cluster: str | None = None


class PoolSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[pools]]``: interchangeable replicas of one model on one kind of GPU."""

    name: str
    model: str
    gpu: str
    replicas: int | None = None
    endpoints: list[str] = msgspec.field(default_factory=list)
    tensor_parallel: int = 1
    cluster: str | None = None
    state: Readiness = Readiness.RUNNING
    memory_ratio: float = 0.9
    kv_blocks: int | None = None
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True

    @property
    def count(self) -> int:
        """Replicas in the pool: as said, else one an endpoint, else one."""
        return self.replicas if self.replicas is not None else max(1, len(self.endpoints))


class GatewaySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[gateway]``: where ``concertmaster serve`` listens and how it decides."""

    host: str = "127.0.0.1"
    port: int = 8000
    policy: str = "least-tokens+las"
    seed: int = 0
    window_s: float | None = None
    max_body_mb: float = 20.0
    connect_timeout_s: float = 5.0
    health_interval_s: float = 2.0


class EmulatorSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[emulator]``: emulated engines started by ``concertmaster demo``."""

    speedup: float = 1.0


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole fleet file."""

    pools: list[PoolSection]
    name: str | None = None
    clusters: list[ClusterSection] = msgspec.field(default_factory=list)
    nodes: list[NodeSection] = msgspec.field(default_factory=list)
    gateway: GatewaySection = GatewaySection()
    emulator: EmulatorSection = EmulatorSection()


class EngineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One emulated engine, as ``concertmaster engine`` starts it."""

    model: str
    gpu: str
    host: str = "127.0.0.1"
    port: int = 8100
    tensor_parallel: int = 1
    speedup: float = 1.0
    seed: int = 0
    memory_ratio: float = 0.9
    kv_blocks: int | None = None
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True
    faults: Faults = Faults()


_File = TypeVar("_File", FleetFile, EngineFile)


def load_fleet(path: Path) -> FleetFile:
    """Read and check a fleet file.

    Raises:
        InputError: The file is missing, is not TOML, or holds a key or value that is wrong.
    """
    fleet = _load(path, FleetFile)
    if not fleet.pools:
        raise InputError(str(path), "pools", "expected at least one pool, found none")
    _check_unique(path, "pools", [pool.name for pool in fleet.pools])
    _check_unique(path, "clusters", [cluster.name for cluster in fleet.clusters])
    _check_unique(path, "nodes", [node.name for node in fleet.nodes])
    for i, pool in enumerate(fleet.pools):
        _check_pool(path, f"pools[{i}]", pool)
    _check_clusters(path, fleet)
    return fleet


def load_engine(path: Path) -> EngineFile:
    """Read and check an engine file.

    Raises:
        InputError: As for ``load_fleet``.
    """
    engine = _load(path, EngineFile)
    _check_positive(path, "speedup", engine.speedup)
    return engine


def _load(path: Path, kind: type[_File]) -> _File:
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError:
        raise InputError(str(path), "", "no such file", "see examples/fleets/") from None
    except IsADirectoryError:
        raise InputError(str(path), "", "expected a TOML file, found a folder") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), "", f"not a TOML file: {error}") from None
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(path), str(error), raw, kind) from None


def _explain(file: str, message: str, raw: object, kind: type[msgspec.Struct]) -> InputError:
    """Turn msgspec's message into ours: place, problem, and a suggestion for a misspelt key."""
    text, _, path = message.partition(" - at `")
    where = path.rstrip("`").removeprefix("$").removeprefix(".")
    unknown = re.search(r"unknown field `(.*)`", text)
    if unknown:
        return unknown_name(file, where, "key", unknown.group(1), _keys_at(where, kind))
    missing = re.search(r"missing required field `(.*)`", text)
    if missing:
        return InputError(file, where, f'missing key "{missing.group(1)}"')
    return InputError(file, where, text[:1].lower() + text[1:], f"found {_value_at(raw, where)!r}")


def _keys_at(where: str, kind: type[msgspec.Struct]) -> set[str]:
    sections: dict[str, type[msgspec.Struct]] = {
        "pools": PoolSection,
        "nodes": NodeSection,
        "clusters": ClusterSection,
        "gateway": GatewaySection,
        "emulator": EmulatorSection,
    }
    section = sections.get(re.split(r"[\[.]", where)[0], kind)
    return set(section.__struct_fields__)


def _value_at(raw: Any, where: str) -> object:  # noqa: ANN401  # whatever the TOML held
    for part in re.findall(r"[^\[\].]+", where):
        try:
            raw = raw[int(part)] if part.isdigit() else raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _check_pool(path: Path, where: str, pool: PoolSection) -> None:
    if pool.count < 1:
        raise InputError(str(path), f"{where}.replicas", f"expected >= 1, found {pool.count}")
    if pool.endpoints and pool.count != len(pool.endpoints):
        raise InputError(
            str(path),
            f"{where}.endpoints",
            f"expected one endpoint a replica ({pool.count}), found {len(pool.endpoints)}",
            "leave replicas out to count endpoints",
        )
    for i, endpoint in enumerate(pool.endpoints):
        if not re.fullmatch(r"http://[^/:\s]+(:\d+)?/?", endpoint):
            raise InputError(
                str(path),
                f"{where}.endpoints[{i}]",
                f"expected http://HOST:PORT, found {endpoint!r}",
            )
    for key in ("tensor_parallel", "block_tokens", "max_batch_tokens", "max_sequences"):
        _check_positive(path, f"{where}.{key}", getattr(pool, key))
    if not 0 < pool.memory_ratio <= 1:
        raise InputError(
            str(path), f"{where}.memory_ratio", f"expected 0 to 1, found {pool.memory_ratio}"
        )


def _check_clusters(path: Path, fleet: FleetFile) -> None:
    known = {cluster.name for cluster in fleet.clusters}
    sections = [("pools", pool.cluster) for pool in fleet.pools]
    sections += [("nodes", node.cluster) for node in fleet.nodes]
    for kind, cluster in sections:
        if cluster is not None and cluster not in known:
            raise unknown_name(str(path), kind, "cluster", cluster, known)


def _check_unique(path: Path, where: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(str(path), where, f'the name "{name}" is used twice')


def _check_positive(path: Path, where: str, value: float) -> None:
    if value <= 0:
        raise InputError(str(path), where, f"expected a number above 0, found {value}")
