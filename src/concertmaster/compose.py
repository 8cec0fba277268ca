"""Puts the parts together: a fleet file becomes a fleet, a name a policy, both a run."""

import errno
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import uvloop

from concertmaster.config import (
    EngineFile,
    FleetFile,
    NodeSection,
    PoolSection,
)
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import (
    Cluster,
    ClusterId,
    Fleet,
    Model,
    Node,
    NodeId,
    Pool,
    PoolId,
    Readiness,
    ReplicaId,
    ScalingLimits,
)
from concertmaster.core.hbm import Footprint
from concertmaster.core.policy import Policy
from concertmaster.core.request import ModelName
from concertmaster.core.scheduler import Scheduler
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.faults import Faults
from concertmaster.forecaster import RECENT, predictor_of
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.hardware import gpu, ready_s
from concertmaster.physics.models import model_card
from concertmaster.physics.sharing import footprint, most_kv_blocks
from concertmaster.physics.step_time import kv_capacity_tokens, rate_curve
from concertmaster.policies.catalog import policy as policy_named
from concertmaster.predictors.interface import Predictor
from concertmaster.sim.clairvoyant import Clairvoyant
from concertmaster.sim.driver import EngineFactory, Observer, Simulation, engine_settings
from concertmaster.sim.incidents import Incident
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import RunRecords

_T = TypeVar("_T")

HERE = "local"
"""Cluster of a fleet file that names none."""


def build_fleet(file: FleetFile, *, name: str) -> Fleet:
    """Turn a checked fleet file into a fleet: curves, KV room, and a node for each replica.

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
    yard = _Yard(
        {
            section.name: _node(
                section, clusters[section.cluster or default], shared=section.name in shared
            )
            for section in file.nodes
        }
    )
    pools = []
    replicas: dict[ReplicaId, tuple[Pool, Node, Readiness]] = {}
    for section in file.pools:
        try:
            pool = build_pool(section, [yard.nodes[name] for name in section.nodes])
        except InputError as error:
            where = f"pools.{section.name}.{error.where}"
            raise InputError("fleet", where, error.problem, error.hint) from None
        pools.append(pool)
        for i in range(section.count):
            node = yard.place(section, clusters[section.cluster or default], i)
            replicas[ReplicaId(f"{section.name}-{i}")] = (pool, node, section.state)
    _check_start(yard.nodes.values(), replicas)
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


def _node(section: NodeSection, cluster: Cluster, *, shared: bool) -> Node:
    hbm_bytes = int(section.gpus * gpu(section.gpu).hbm_bytes * section.memory_ratio)
    return Node(
        node_id=NodeId(section.name),
        cluster=cluster,
        gpu=section.gpu,
        gpus=section.gpus,
        hbm_bytes=hbm_bytes if shared else 0,
        host_bytes=int(section.host_gb * 1e9),
    )


def _check_start(
    nodes: Iterable[Node], replicas: Mapping[ReplicaId, tuple[Pool, Node, Readiness]]
) -> None:
    """Make sure that shared nodes hold what lies on them at the start.

    Raises:
        InputError: One does not.
    """
    for node in filter(attrgetter("shared"), nodes):
        parts = [
            pool.footprint.at(state, pool.footprint.least_kv_blocks)
            for pool, where, state in replicas.values()
            if where is node and pool.footprint
        ]
        for kind, needed, there in (
            ("GPU memory", sum(part.hbm_bytes for part in parts), node.hbm_bytes),
            ("RAM (host_gb)", sum(part.host_bytes for part in parts), node.host_bytes),
        ):
            if needed > there:
                problem = f"expected at least {needed / 1e9:.1f} GB of {kind} for what lies there"
                problem += f" at the start, found {there / 1e9:.1f} GB"
                hint = 'set state = "disk" for some of its pools'
                raise InputError("fleet", f"nodes.{node.node_id}", problem, hint)


def build_pool(section: PoolSection, nodes: Sequence[Node] = ()) -> Pool:
    """Look a pool's model and GPU up and compute its rate curve and KV room.

    Args:
        section: The pool.
        nodes: Those that it shares, if it shares any.
    """
    card, hardware = model_card(section.model), gpu(section.gpu)
    curve = rate_curve(card, hardware, section.tensor_parallel)
    kv_blocks, shares = section.kv_blocks, None
    if nodes:
        shares = footprint(card, section.tensor_parallel, section.block_tokens)
        kv_blocks = _shared_blocks(shares, nodes, kv_blocks)
    if kv_blocks is None:
        tokens = kv_capacity_tokens(
            card, hardware, section.tensor_parallel, memory_ratio=section.memory_ratio
        )
        kv_blocks = tokens // section.block_tokens
    return Pool(
        pool_id=PoolId(section.name),
        model=Model(
            name=ModelName(section.served_name or section.model),
            context_tokens=card.context_tokens,
            weights_bytes=card.weights_bytes,
            kv_bytes_per_token=card.kv_bytes_per_token,
        ),
        gpu=section.gpu,
        tensor_parallel=section.tensor_parallel,
        curve=curve,
        kv_blocks=kv_blocks,
        block_tokens=section.block_tokens,
        max_sequences=section.max_sequences,
        max_batch_tokens=section.max_batch_tokens,
        priority_scheduling=section.scheduling == "priority",
        prefix_caching=section.prefix_caching,
        least_replicas=section.least,
        stopped=section.stopped_state,
        footprint=shares,
        ready_s={
            state: ready_s(state.value, card.weights_bytes / section.tensor_parallel, hardware)
            for state in Readiness
        },
    )


def _shared_blocks(shares: Footprint, nodes: Sequence[Node], told: int | None) -> int:
    """KV blocks that a replica could have if it were alone on the smallest of its nodes."""
    least = min(nodes, key=attrgetter("hbm_bytes"))
    blocks = most_kv_blocks(shares, least.hbm_bytes)
    if blocks < shares.least_kv_blocks:
        needed = shares.at("running", shares.least_kv_blocks).hbm_bytes
        problem = f"it needs {needed / 1e9:.1f} GB, {least.node_id} has {least.hbm_bytes / 1e9:.1f}"
        raise InputError("", "nodes", problem, "name a node with more GPUs")
    return blocks if told is None else max(shares.least_kv_blocks, min(told, blocks))


class _Yard:
    """Places replicas on nodes, first fit; without named nodes each gets a node of its own."""

    def __init__(self, named: dict[str, Node]) -> None:
        self.nodes: dict[str, Node] = named
        self._named = bool(named)
        self._free = {name: node.gpus for name, node in named.items()}

    def place(self, section: PoolSection, cluster: Cluster, number: int) -> Node:
        if section.nodes:
            return self.nodes[section.nodes[number]]
        needs = section.tensor_parallel if section.state is Readiness.RUNNING else 0
        if not self._named:
            node = Node(
                node_id=NodeId(f"{section.name}-{number}"),
                cluster=cluster,
                gpu=section.gpu,
                gpus=section.tensor_parallel,
            )
            self.nodes[node.node_id] = node
            return node
        for name, node in self.nodes.items():
            fits = node.gpu == section.gpu and self._free[name] >= needs and not node.shared
            if fits and (section.cluster is None or node.cluster is cluster):
                self._free[name] -= needs
                return node
        raise InputError(
            "fleet",
            f"pools.{section.name}",
            f"no node has {needs} free {section.gpu} for replica {number}",
            "add a [[nodes]] entry or fewer replicas",
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

    Raises:
        InputError: No policy has this name, ``models`` names no predictor, or the workload
            asks for a model that the fleet lacks.
    """
    check_models(fleet, workload)
    policy = policy_named(policy_name)
    _check_residency(fleet, policy)
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
        follow_pace=follow_pace,
    )
    return simulation.run(policy=policy_name, seed=seed)


def _check_residency(fleet: Fleet, policy: Policy) -> None:
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
        InputError: A pool names no endpoints, or shares its nodes.
    """
    found: dict[ReplicaId, str] = {}
    for i, section in enumerate(file.pools):
        if section.nodes:
            problem = f'pool "{section.name}" shares nodes, which only the simulator does'
            raise InputError(where, f"pools[{i}].nodes", problem, "leave nodes out to serve")
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
    pool: Pool, *, speedup: float, seed: int = 0, faults: Faults | None = None
) -> Emulator:
    """Build an emulated engine that is one replica of a pool."""
    return Emulator(
        model_name=pool.model.name,
        curve=pool.curve,
        settings=engine_settings(pool),
        speedup=speedup,
        seed=seed,
        wake_s=pool.ready_s[Readiness.SLEEPING],
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
