"""What a fleet stands on: pools with their speed and KV room, and nodes with places on them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from concertmaster.config import NodeSection, PoolSection
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import (
    Cluster,
    Model,
    Node,
    NodeId,
    Pool,
    PoolId,
    Readiness,
    ReplicaId,
)
from concertmaster.core.hbm import Footprint
from concertmaster.core.request import ModelName
from concertmaster.physics.hardware import gpu, ready_s
from concertmaster.physics.models import model_card
from concertmaster.physics.sharing import footprint, most_kv_blocks
from concertmaster.physics.step_time import kv_capacity_tokens, rate_curve


class Yard:
    """Places replicas on nodes, first fit; without named nodes each gets a node of its own."""

    def __init__(self, named: dict[str, Node]) -> None:
        self.nodes: dict[str, Node] = named
        self._named = bool(named)
        self._free = {name: node.gpus for name, node in named.items()}

    def place(self, section: PoolSection, cluster: Cluster, number: int) -> Node:
        """Return the node of a pool's replica of that number.

        Raises:
            InputError: None has GPUs left for it.
        """
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


def build_node(section: NodeSection, cluster: Cluster, *, shared: bool) -> Node:
    """Turn the section of a node into one; only a shared one has memory to give away."""
    hbm_bytes = int(section.gpus * gpu(section.gpu).hbm_bytes * section.memory_ratio)
    return Node(
        node_id=NodeId(section.name),
        cluster=cluster,
        gpu=section.gpu,
        gpus=section.gpus,
        hbm_bytes=hbm_bytes if shared else 0,
        host_bytes=int(section.host_gb * 1e9),
    )


def check_start(
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


def build_pool(section: PoolSection, nodes: Sequence[Node] = (), *, served: bool = False) -> Pool:
    """Look a pool's model and GPU up and compute its rate curve and KV room.

    Args:
        section: The pool.
        nodes: Those that it shares, if it shares any.
        served: Whether its engines are real, and keep the KV that they were started with.

    Raises:
        InputError: It does not fit its nodes, or nobody says what KV its engines have.
    """
    card, hardware = model_card(section.model), gpu(section.gpu)
    curve = rate_curve(card, hardware, section.tensor_parallel)
    kv_blocks, shares = section.kv_blocks, None
    if nodes:
        shares = footprint(card, section.tensor_parallel, section.block_tokens)
        shares = _fixed(shares, kv_blocks) if served else shares
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


def _fixed(shares: Footprint, kv_blocks: int | None) -> Footprint:
    """Return what an engine takes whose KV neither grows nor shrinks."""
    if kv_blocks is None:
        problem = "expected what the engines were started with, as nodes are shared; found nothing"
        raise InputError("", "kv_blocks", problem, "add kv_blocks = NUMBER")
    return replace(shares, least_kv_blocks=kv_blocks)


def _shared_blocks(shares: Footprint, nodes: Sequence[Node], told: int | None) -> int:
    """KV blocks that a replica could have if it were alone on the smallest of its nodes."""
    least = min(nodes, key=attrgetter("hbm_bytes"))
    blocks = most_kv_blocks(shares, least.hbm_bytes)
    if blocks < shares.least_kv_blocks:
        needed = shares.at("running", shares.least_kv_blocks).hbm_bytes
        problem = f"it needs {needed / 1e9:.1f} GB, {least.node_id} has {least.hbm_bytes / 1e9:.1f}"
        raise InputError("", "nodes", problem, "name a node with more GPUs")
    return blocks if told is None else max(shares.least_kv_blocks, min(told, blocks))
