"""What types cannot say of fleet and engine files: how their keys must fit each other."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from concertmaster.checks import check_known, check_unique
from concertmaster.config import EngineFile, FleetFile, NodeSection, PoolSection
from concertmaster.core.errors import InputError, unknown_name
from concertmaster.core.fleet import Readiness
from concertmaster.core.request import PREFIX_CHUNK_TOKENS
from concertmaster.engines.control import control_misfit
from concertmaster.physics.hardware import GPUS
from concertmaster.physics.models import MODELS

Check = Callable[[], object]
"""Raises ``InputError`` if something is wrong."""


def broken(checks: Iterable[Check]) -> Iterator[InputError]:
    """Make every check, and yield what failed."""
    for check in checks:
        try:
            check()
        except InputError as error:
            yield error


def fleet_checks(path: Path, fleet: FleetFile) -> Iterator[Check]:
    """Yield every check of a fleet file; each stands for itself."""
    yield partial(_check_pools, path, fleet)
    for kind in ("pools", "clusters", "nodes"):
        yield partial(check_unique, path, kind, [one.name for one in getattr(fleet, kind)])
    for i, pool in enumerate(fleet.pools):
        for check in (_check_counts, _check_command, _check_control, _check_endpoints):
            yield partial(check, path, f"pools[{i}]", pool)
        yield from _engine_checks(path, f"pools[{i}]", pool)
    for i, node in enumerate(fleet.nodes):
        yield partial(check_known, path, f"nodes[{i}]", "gpu", node.gpu, GPUS)
    yield partial(_check_clusters, path, fleet)
    for i, pool in enumerate(fleet.pools):
        yield partial(_check_shared, path, f"pools[{i}]", pool, fleet)
    yield partial(_check_scaling, path, fleet)


def engine_checks(path: Path, engine: EngineFile) -> Iterator[Check]:
    """Yield every check of an engine file."""
    yield from _engine_checks(path, "", engine)


def _check_pools(path: Path, fleet: FleetFile) -> None:
    if not fleet.pools:
        raise InputError(str(path), "pools", "expected at least one pool, found none")


def _check_counts(path: Path, where: str, pool: PoolSection) -> None:
    if pool.least > pool.count:
        problem = f"expected 0 to replicas ({pool.count}), found {pool.least}"
        raise InputError(str(path), f"{where}.least_replicas", problem)
    if pool.stopped is Readiness.RUNNING:
        hint = "choose sleeping, host, disk or remote"
        raise InputError(str(path), f"{where}.stopped", "a stopped replica does not run", hint)


def _check_command(path: Path, where: str, pool: PoolSection) -> None:
    if pool.command and pool.count > 1 and not any("{port}" in part for part in pool.command):
        problem = f"expected {{port}} in it, as {pool.count} replicas cannot share one"
        raise InputError(str(path), f"{where}.command", problem)


def _check_control(path: Path, where: str, pool: PoolSection) -> None:
    stopped = pool.stopped if pool.control else None
    misfit = control_misfit(
        pool.controlled_by, has_command=bool(pool.command), state=pool.state, stopped=stopped
    )
    if misfit is not None:
        raise InputError(str(path), f"{where}.control", *misfit)


def _check_endpoints(path: Path, where: str, pool: PoolSection) -> None:
    if pool.endpoints and pool.count != len(pool.endpoints):
        problem = f"expected one endpoint a replica ({pool.count}), found {len(pool.endpoints)}"
        hint = "leave replicas out to count endpoints"
        raise InputError(str(path), f"{where}.endpoints", problem, hint)
    for i, endpoint in enumerate(pool.endpoints):
        match = re.fullmatch(r"https?://[^/:\s]+(?::(\d+))?(?:/[^\s?#]*)?", endpoint)
        if match is None or not 0 < int(match[1] or 80) < 65_536:
            problem = f"expected http://HOST:PORT or https://HOST, found {endpoint!r}"
            raise InputError(str(path), f"{where}.endpoints[{i}]", problem)


def _engine_checks(path: Path, where: str, engine: PoolSection | EngineFile) -> Iterator[Check]:
    yield partial(check_known, path, where, "model", engine.model, MODELS)
    yield partial(check_known, path, where, "gpu", engine.gpu, GPUS)
    yield partial(_check_steps, path, f"{where}." if where else "", engine)


def _check_steps(path: Path, where: str, engine: PoolSection | EngineFile) -> None:
    """Check what engine models would refuse; ``where`` ends in a dot unless it is empty."""
    if PREFIX_CHUNK_TOKENS % engine.block_tokens:
        problem = f"expected a divisor of {PREFIX_CHUNK_TOKENS}, found {engine.block_tokens}"
        raise InputError(str(path), f"{where}block_tokens", problem)
    if engine.max_batch_tokens < engine.max_sequences:
        least = f"max_sequences ({engine.max_sequences})"
        problem = f"expected at least {least}, found {engine.max_batch_tokens}"
        hint = "each sequence decodes a token a step"
        raise InputError(str(path), f"{where}max_batch_tokens", problem, hint)


def _check_clusters(path: Path, fleet: FleetFile) -> None:
    known = {cluster.name for cluster in fleet.clusters}
    sections = [("pools", pool.cluster) for pool in fleet.pools]
    sections += [("nodes", node.cluster) for node in fleet.nodes]
    for kind, cluster in sections:
        if cluster is not None and cluster not in known:
            raise unknown_name(str(path), kind, "cluster", cluster, known)


def _check_shared(path: Path, where: str, pool: PoolSection, fleet: FleetFile) -> None:
    """Check that a pool which names nodes spans their GPUs, one replica on each."""
    nodes = {node.name: node for node in fleet.nodes}
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
    """Check that the GPUs hold what runs at the start and one of any other pool."""
    scaling = fleet.scaling
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
