"""Fleet and engine files: TOML in, checked facts out. docs/fleet.md explains every key."""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from concertmaster.checks import (
    check_known,
    check_least,
    check_positive,
    check_ratio,
    check_unique,
)
from concertmaster.core.errors import InputError, InvalidRequestError, unknown_name
from concertmaster.core.fleet import Readiness
from concertmaster.core.request import PREFIX_CHUNK_TOKENS
from concertmaster.engines.control import ControlKind, control_misfit
from concertmaster.engines.dialects import EngineKind
from concertmaster.engines.faults import Faults
from concertmaster.physics.hardware import GPUS
from concertmaster.physics.models import MODELS


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
    host_gb: float = 0.0
    memory_ratio: float = 0.9


Serves = Literal["chat", "embeddings", "both"]
"""Calls that engines take: chats and completions, embeddings, or all of them."""


class PoolSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[pools]]``: interchangeable replicas of one model on one kind of GPU."""

    name: str
    model: str
    gpu: str
    served_name: str = ""
    replicas: int | None = None
    engine: EngineKind | None = None
    control: ControlKind | None = None
    api_key_env: str = ""
    serves: Serves = "chat"
    command: list[str] = msgspec.field(default_factory=list)
    endpoints: list[str] = msgspec.field(default_factory=list)
    nodes: list[str] = msgspec.field(default_factory=list)
    tensor_parallel: int = 1
    cluster: str | None = None
    state: Readiness = Readiness.RUNNING
    stopped: Readiness | None = None
    least_replicas: int | None = None
    memory_ratio: float = 0.9
    kv_blocks: int | None = None
    block_tokens: int = 16
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True

    @property
    def count(self) -> int:
        """Replicas in the pool: as said, else one a node or an endpoint, else one."""
        if self.replicas is not None:
            return self.replicas
        return len(self.nodes) or max(1, len(self.endpoints))

    @property
    def runs(self) -> bool:
        """Whether its replicas run at the start."""
        return self.state is Readiness.RUNNING

    @property
    def least(self) -> int:
        """Replicas that scaling leaves it with: as said, else one if it runs at the start."""
        return self.least_replicas if self.least_replicas is not None else int(self.runs)

    @property
    def controlled_by(self) -> ControlKind:
        """How its engines load and unload: as said, else as processes if it has a command."""
        return self.control or ("process" if self.command else "vllm")

    @property
    def speaks(self) -> EngineKind:
        """What its engines are: as said, else what they are controlled as, else vLLM."""
        controlled: EngineKind = "vllm"
        match self.control:
            case "llama.cpp" | "ollama":
                controlled = self.control
            case _:
                pass
        return self.engine or controlled

    @property
    def stopped_state(self) -> Readiness:
        """Where weights lie once stopped: as said, else where they lie at the start.

        If they run at the start: in RAM with vLLM that is served, else on disk.
        """
        if self.stopped or not self.runs:
            return self.stopped or self.state
        sleeps = self.controlled_by == "vllm" and bool(self.endpoints)
        return Readiness.SLEEPING if sleeps else Readiness.DISK


class GatewaySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[gateway]``: where ``concertmaster serve`` listens and how it decides."""

    host: str = "127.0.0.1"
    port: int = 8000
    policy: str = "least-tokens+las"
    models: str = "default"
    forecast_budget_ms: float = 20.0
    feedback: str = ""
    seed: int = 0
    window_s: float | None = None
    max_body_mb: float = 20.0
    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    chunk_timeout_s: float = 120.0
    total_timeout_s: float = 3600.0
    retry_ratio: float = 0.2
    breaker_failures: int = 5
    breaker_error_ratio: float = 0.5
    breaker_pause_s: float = 1.0
    most_open: int = 10_000
    most_lag_ms: float = 2000.0
    most_connections: int = 1024
    health_interval_s: float = 2.0
    hold_s: float = 600.0
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    keys: str = ""
    tls_cert: str = ""
    tls_key: str = ""


class EmulatorSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[emulator]``: emulated engines started by ``concertmaster demo``."""

    speedup: float = 1.0


class ScalingSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[scaling]``: what no scaling policy may exceed."""

    gpus: int | None = None
    most_changes: int = 8
    cooldown_s: float = 30.0


class FleetFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole fleet file."""

    pools: list[PoolSection]
    name: str | None = None
    clusters: list[ClusterSection] = msgspec.field(default_factory=list)
    nodes: list[NodeSection] = msgspec.field(default_factory=list)
    gateway: GatewaySection = GatewaySection()
    emulator: EmulatorSection = EmulatorSection()
    scaling: ScalingSection = ScalingSection()


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
    check_unique(path, "pools", [pool.name for pool in fleet.pools])
    check_unique(path, "clusters", [cluster.name for cluster in fleet.clusters])
    check_unique(path, "nodes", [node.name for node in fleet.nodes])
    for i, pool in enumerate(fleet.pools):
        _check_pool(path, f"pools[{i}]", pool)
    for i, node in enumerate(fleet.nodes):
        check_known(path, f"nodes[{i}]", "gpu", node.gpu, GPUS)
        check_positive(path, f"nodes[{i}].gpus", node.gpus)
        check_least(path, f"nodes[{i}].host_gb", node.host_gb, 0)
        check_ratio(path, f"nodes[{i}].memory_ratio", node.memory_ratio)
    for i, cluster in enumerate(fleet.clusters):
        check_least(path, f"clusters[{i}].network_ms", cluster.network_ms, 0)
    _check_clusters(path, fleet)
    _check_shared(path, fleet)
    _check_scaling(path, fleet)
    check_positive(path, "emulator.speedup", fleet.emulator.speedup)
    _check_gateway(path, fleet.gateway)
    return fleet


_POSITIVE = (
    "hold_s",
    "head_timeout_s",
    "body_timeout_s",
    "connect_timeout_s",
    "first_byte_timeout_s",
    "chunk_timeout_s",
    "total_timeout_s",
    "breaker_pause_s",
    "most_lag_ms",
    "forecast_budget_ms",
)


def _check_gateway(path: Path, gateway: GatewaySection) -> None:
    for key in _POSITIVE:
        check_positive(path, f"gateway.{key}", getattr(gateway, key))
    for key, least in (("most_open", 1), ("most_connections", 1), ("breaker_failures", 0)):
        check_least(path, f"gateway.{key}", getattr(gateway, key), least)
    check_ratio(path, "gateway.breaker_error_ratio", gateway.breaker_error_ratio)
    check_least(path, "gateway.retry_ratio", gateway.retry_ratio, 0)
    if gateway.window_s is not None:
        check_least(path, "gateway.window_s", gateway.window_s, 0)


def load_engine(path: Path) -> EngineFile:
    """Read and check an engine file.

    Raises:
        InputError: As for ``load_fleet``.
    """
    engine = _load(path, EngineFile)
    check_positive(path, "speedup", engine.speedup)
    check_known(path, "", "model", engine.model, MODELS)
    check_known(path, "", "gpu", engine.gpu, GPUS)
    _check_engine(path, "", engine)
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
    for key in raw.get("faults", ()) if kind is EngineFile else ():
        check_known(path, "faults", "key", key, Faults.__dataclass_fields__)
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(path), str(error), raw, kind) from None
    except InvalidRequestError as error:
        raise InputError(str(path), "", str(error)) from None


_CHOICES: dict[str, tuple[str, ...]] = {
    "engine": get_args(EngineKind),
    "state": tuple(Readiness),
    "stopped": tuple(Readiness),
    "control": get_args(ControlKind),
    "scheduling": ("fcfs", "priority"),
}


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
    key, found = where.rpartition(".")[2], _value_at(raw, where)
    if key in _CHOICES:
        return unknown_name(file, where, key, str(found), _CHOICES[key])
    return InputError(file, where, text[:1].lower() + text[1:], f"found {found!r}")


def _keys_at(where: str, kind: type[msgspec.Struct]) -> set[str]:
    sections: dict[str, type[msgspec.Struct]] = {
        "pools": PoolSection,
        "nodes": NodeSection,
        "clusters": ClusterSection,
        "gateway": GatewaySection,
        "emulator": EmulatorSection,
        "scaling": ScalingSection,
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
    if not 0 <= pool.least <= pool.count:
        problem = f"expected 0 to replicas ({pool.count}), found {pool.least}"
        raise InputError(str(path), f"{where}.least_replicas", problem)
    if pool.stopped is Readiness.RUNNING:
        hint = "choose sleeping, host, disk or remote"
        raise InputError(str(path), f"{where}.stopped", "a stopped replica does not run", hint)
    if pool.endpoints and pool.count != len(pool.endpoints):
        raise InputError(
            str(path),
            f"{where}.endpoints",
            f"expected one endpoint a replica ({pool.count}), found {len(pool.endpoints)}",
            "leave replicas out to count endpoints",
        )
    if pool.command and pool.count > 1 and not any("{port}" in part for part in pool.command):
        problem = f"expected {{port}} in it, as {pool.count} replicas cannot share one"
        raise InputError(str(path), f"{where}.command", problem)
    _check_control(path, where, pool)
    for i, endpoint in enumerate(pool.endpoints):
        match = re.fullmatch(r"https?://[^/:\s]+(?::(\d+))?(?:/[^\s?#]*)?", endpoint)
        if match is None or not 0 < int(match[1] or 80) < 65_536:
            raise InputError(
                str(path),
                f"{where}.endpoints[{i}]",
                f"expected http://HOST:PORT or https://HOST, found {endpoint!r}",
            )
    check_known(path, where, "model", pool.model, MODELS)
    check_known(path, where, "gpu", pool.gpu, GPUS)
    _check_engine(path, f"{where}.", pool)


def _check_control(path: Path, where: str, pool: PoolSection) -> None:
    stopped = pool.stopped if pool.control else None
    misfit = control_misfit(
        pool.controlled_by, has_command=bool(pool.command), state=pool.state, stopped=stopped
    )
    if misfit is not None:
        raise InputError(str(path), f"{where}.control", *misfit)


def _check_engine(path: Path, where: str, engine: PoolSection | EngineFile) -> None:
    """Check what engine models would refuse; ``where`` ends in a dot unless it is empty."""
    for key in ("tensor_parallel", "block_tokens", "max_batch_tokens", "max_sequences"):
        check_positive(path, f"{where}{key}", getattr(engine, key))
    if engine.kv_blocks is not None:
        check_positive(path, f"{where}kv_blocks", engine.kv_blocks)
    check_ratio(path, f"{where}memory_ratio", engine.memory_ratio)
    if PREFIX_CHUNK_TOKENS % engine.block_tokens:
        problem = f"expected a divisor of {PREFIX_CHUNK_TOKENS}, found {engine.block_tokens}"
        raise InputError(str(path), f"{where}block_tokens", problem)
    if engine.max_batch_tokens < engine.max_sequences:
        raise InputError(
            str(path),
            f"{where}max_batch_tokens",
            f"expected at least max_sequences ({engine.max_sequences}), "
            f"found {engine.max_batch_tokens}",
            "each sequence decodes a token a step",
        )


def _check_clusters(path: Path, fleet: FleetFile) -> None:
    known = {cluster.name for cluster in fleet.clusters}
    sections = [("pools", pool.cluster) for pool in fleet.pools]
    sections += [("nodes", node.cluster) for node in fleet.nodes]
    for kind, cluster in sections:
        if cluster is not None and cluster not in known:
            raise unknown_name(str(path), kind, "cluster", cluster, known)


def _check_shared(path: Path, fleet: FleetFile) -> None:
    """Check that pools which name nodes span their GPUs, one replica on each."""
    nodes = {node.name: node for node in fleet.nodes}
    for i, pool in enumerate(fleet.pools):
        where = f"pools[{i}]"
        if pool.nodes and pool.count != len(pool.nodes):
            problem = f"expected one replica a node ({len(pool.nodes)}), found {pool.count}"
            raise InputError(str(path), f"{where}.replicas", problem, "leave it out")
        check_unique(path, f"{where}.nodes", pool.nodes)
        for name in pool.nodes:
            check_known(path, f"{where}.nodes", "node", name, nodes)
            _check_spans(path, where, pool, nodes[name])


def _check_spans(path: Path, where: str, pool: PoolSection, node: NodeSection) -> None:
    """Check that a pool fits a node that it names."""
    if (pool.gpu.lower(), pool.tensor_parallel) != (node.gpu.lower(), node.gpus):
        found = f"{pool.tensor_parallel} x {pool.gpu} in {pool.name}"
        problem = f"expected all GPUs of {node.name} ({node.gpus} x {node.gpu}), found {found}"
        hint = "models that share a node span all its GPUs; write a larger machine as several nodes"
        raise InputError(str(path), f"{where}.nodes", problem, hint)
    if pool.cluster is not None and pool.cluster != node.cluster:
        problem = f"{node.name} does not stand in cluster {pool.cluster}"
        raise InputError(str(path), f"{where}.cluster", problem, "leave it out")


def _check_scaling(path: Path, fleet: FleetFile) -> None:
    """Check limits, and that the GPUs hold what runs at the start and one of any other pool."""
    scaling = fleet.scaling
    check_least(path, "scaling.most_changes", scaling.most_changes, 1)
    check_least(path, "scaling.cooldown_s", scaling.cooldown_s, 0)
    if scaling.gpus is None:
        return
    running = sum(pool.count * pool.tensor_parallel for pool in fleet.pools if pool.runs)
    least = sum(pool.least * pool.tensor_parallel for pool in fleet.pools)
    one = max((pool.tensor_parallel for pool in fleet.pools if not pool.least), default=0)
    needed = max(running, least + one)
    if scaling.gpus < needed:
        problem = f"expected at least {needed}, found {scaling.gpus}"
        hint = "it must hold what runs at the start, and least_replicas of each pool and one more"
        raise InputError(str(path), "scaling.gpus", problem, hint)
