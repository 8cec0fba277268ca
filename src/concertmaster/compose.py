"""Puts the parts together: a fleet file becomes a fleet, a name a policy, both a run."""

import errno
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvloop

from concertmaster.config import (
    EngineFile,
    FleetFile,
    PoolSection,
)
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import (
    Cluster,
    ClusterId,
    Fleet,
    Node,
    Pool,
    Readiness,
    ReplicaId,
    ScalingLimits,
)
from concertmaster.core.policy import Policy
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.faults import Faults
from concertmaster.forecaster import RECENT, predictor_of
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.predictors.interface import Predictor
from concertmaster.sim.clairvoyant import Clairvoyant
from concertmaster.sim.driver import EngineFactory, Observer, Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.sim.incidents import Incident
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import RunRecords, WorkflowRecord
from concertmaster.yard import Yard, build_node, build_pool, check_start

_T = TypeVar("_T")

HERE = "local"
"""Cluster of a fleet file that names none."""


def build_fleet(file: FleetFile, *, name: str, served: bool = False) -> Fleet:
    """Turn a checked fleet file into a fleet: curves, KV room, and a node for each replica.

    Args:
        file: The fleet file.
        name: What to call it if the file does not say.
        served: Whether its engines are real, and keep the KV that they were started with.

    Raises:
        InputError: A model or GPU is not known, weights do not fit, or nodes lack GPUs.
    """
    clusters = {
        section.name: Cluster(
            cluster_id=ClusterId(section.name), network_s=section.network_ms / 1000
        )
        for section in file.clusters
    } or {HERE: Cluster(cluster_id=ClusterId(HERE))}
    default = next(iter(clusters))
    shared = {name for section in file.pools for name in section.nodes}
    yard = Yard(
        {
            section.name: build_node(
                section, clusters[section.cluster or default], shared=section.name in shared
            )
            for section in file.nodes
        }
    )
    pools = []
    replicas: dict[ReplicaId, tuple[Pool, Node, Readiness]] = {}
    for section in file.pools:
        try:
            nodes = [yard.nodes[name] for name in section.nodes]
            pool = build_pool(section, nodes, served=served)
        except InputError as error:
            where = f"pools.{section.name}.{error.where}"
            raise InputError("fleet", where, error.problem, error.hint) from None
        pools.append(pool)
        for i in range(section.count):
            node = yard.place(section, clusters[section.cluster or default], i)
            replicas[ReplicaId(f"{section.name}-{i}")] = (pool, node, section.state)
    check_start(yard.nodes.values(), replicas)
    return Fleet(
        name=file.name or name,
        clusters=tuple(clusters.values()),
        nodes=tuple(yard.nodes.values()),
        pools=tuple(pools),
        replicas=replicas,
        limits=ScalingLimits(
            gpus=file.scaling.gpus,
            most_changes=file.scaling.most_changes,
            cooldown_s=file.scaling.cooldown_s,
        ),
    )


def simulate(
    fleet: Fleet,
    workload: Workload,
    policy_name: str,
    *,
    seed: int,
    models: str = RECENT,
    predictor: Predictor | None = None,
    make_engine: EngineFactory | None = None,
    incidents: Sequence[Incident] = (),
    follow_pace: bool = True,
    observe: Observer | None = None,
    progress: Callable[[int], None] | None = None,
    enough: Callable[[WorkflowRecord], bool] | None = None,
) -> RunRecords:
    """Run one workload through one policy in virtual time.

    Args:
        fleet: What serves.
        workload: What is asked.
        policy_name: As in the catalog.
        seed: Of the scheduler's randomness.
        models: Name of the predictor.
        predictor: The predictor itself, instead of its name; the run teaches it.
        make_engine: Engine models; the fast one by default.
        incidents: What befalls the fleet.
        follow_pace: Whether the core is told of replicas that are slower than their curve.
        observe: Sees every event and its actions.
        progress: Hears how many workflows are over.
        enough: Shown each workflow that is over; the run ends at the first yes.

    Raises:
        InputError: No policy has this name, ``models`` names no predictor, or the workload
            asks for a model that the fleet lacks.
    """
    check_models(fleet, workload)
    policy = policy_named(policy_name)
    check_residency(fleet, policy)
    scheduler = Scheduler(fleet, policy, random.Random(seed), record_candidates=observe is not None)
    predictor = predictor or predictor_of(models, fleet)
    if policy.clairvoyant:
        predictor = Clairvoyant(workload, predictor, policy.clairvoyant)
    simulation = Simulation(
        scheduler,
        workload,
        predictor,
        make_engine or (lambda pool: FastEngine(pool.curve, engine_settings(pool))),
        incidents=incidents,
        observe=observe,
        progress=progress,
        enough=enough,
        follow_pace=follow_pace,
    )
    return simulation.run(policy=policy_name, seed=seed)


def check_residency(fleet: Fleet, policy: Policy) -> None:
    """Make sure that somebody decides whose weights lie where, if nodes are shared.

    Raises:
        InputError: Nobody does.
    """
    if policy.residency is None and any(node.shared for node in fleet.nodes):
        problem = f"models share nodes of the fleet {fleet.name}, and nothing says which run"
        remedy = f"write {policy.name.partition('/')[0]}/expected, or another residency"
        raise InputError("", f"policy {policy.name}", problem, remedy)


def check_models(fleet: Fleet, workload: Workload) -> None:
    """Make sure that each call names a model of the fleet, or none.

    Raises:
        InputError: A call could be served by nobody.
    """
    known = fleet.models
    for asked in workload.models_asked:
        if not {*asked} & {*known}:
            expected = f"expected a model of the fleet {fleet.name} ({', '.join(known)})"
            problem = f"{expected}, found {', '.join(asked)}"
            remedy = "add a pool of that model, or give one that served_name"
            raise InputError(workload.name, "models", problem, remedy)


def endpoints(file: FleetFile, *, where: str = "fleet") -> dict[ReplicaId, str]:
    """Return the address of each replica, for a fleet that is served.

    Raises:
        InputError: A pool names no endpoints.
    """
    found: dict[ReplicaId, str] = {}
    for i, section in enumerate(file.pools):
        if not section.endpoints:
            raise InputError(
                where,
                f"pools[{i}].endpoints",
                f'pool "{section.name}" has no endpoints to serve from',
                'add endpoints = ["http://HOST:PORT", ...]',
            )
        for number, url in enumerate(section.endpoints):
            found[ReplicaId(f"{section.name}-{number}")] = url
    return found


def commands(file: FleetFile) -> dict[ReplicaId, tuple[str, ...]]:
    """Return what to run for each replica of the pools that have a command."""
    found: dict[ReplicaId, tuple[str, ...]] = {}
    for section in file.pools:
        for number, url in enumerate(section.endpoints if section.command else ()):
            port = str(urlsplit(url).port or 80)
            parts = (part.replace("{port}", port) for part in section.command)
            found[ReplicaId(f"{section.name}-{number}")] = tuple(parts)
    return found


def build_emulator(file: EngineFile) -> Emulator:
    """Build the emulated engine that an engine file describes.

    Raises:
        InputError: Its model or GPU is not known, or its weights do not fit.
    """
    section = PoolSection(
        name="engine",
        model=file.model,
        gpu=file.gpu,
        tensor_parallel=file.tensor_parallel,
        memory_ratio=file.memory_ratio,
        kv_blocks=file.kv_blocks,
        block_tokens=file.block_tokens,
        max_batch_tokens=file.max_batch_tokens,
        max_sequences=file.max_sequences,
        scheduling=file.scheduling,
        prefix_caching=file.prefix_caching,
    )
    return emulator_of(
        build_pool(section), speedup=file.speedup, seed=file.seed, faults=file.faults
    )


def emulator_of(
    pool: Pool,
    *,
    speedup: float,
    seed: int = 0,
    faults: Faults | None = None,
    lies: Readiness = Readiness.RUNNING,
) -> Emulator:
    """Build an emulated engine that is one replica of a pool."""
    return Emulator(
        model_name=pool.model.name,
        curve=pool.curve,
        settings=engine_settings(pool),
        speedup=speedup,
        seed=seed,
        wake_s=pool.ready_s[Readiness.SLEEPING],
        reload_s=pool.ready_s[Readiness.DISK],
        lies=lies,
        max_model_tokens=min(pool.model.context_tokens, pool.kv_tokens),
        faults=faults,
    )


async def listening(starting: Awaitable[_T], where: str, port: int) -> _T:
    """Await the start of a server.

    Raises:
        InputError: Its port is taken.
    """
    try:
        return await starting
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        problem = f"port {port} is in use" if taken else f"cannot listen: {error.strerror}"
        hint = "choose another with --port" if taken else ""
        raise InputError(where, "", problem, hint) from None


def run_loop(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on a fast event loop."""
    return uvloop.run(main)
