"""Models, clusters, pools and replicas: what there is, and what each replica has in flight."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from concertmaster.core.cost import RateCurve
from concertmaster.core.hbm import NOTHING, Footprint, Holding, NodeMemory, both
from concertmaster.core.memory import KvLedger, PrefixIndex
from concertmaster.core.prefill_share import PrefillShare
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName, Request, RequestId

PoolId = NewType("PoolId", str)
ReplicaId = NewType("ReplicaId", str)
ClusterId = NewType("ClusterId", str)
NodeId = NewType("NodeId", str)


class Readiness(StrEnum):
    """Where the weights of a replica's model lie, from ready to far (Maestro 3.2)."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the scheduler needs to know of a model."""

    name: ModelName
    context_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A site: its nodes are near each other.

    Attributes:
        network_s: Round trip from the caller.
    """

    cluster_id: ClusterId
    network_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine with GPUs of one kind.

    Attributes:
        hbm_bytes: What engines may use of all its GPUs if models share it; 0 if none do.
        host_bytes: RAM for weights of models that share it.
    """

    node_id: NodeId
    cluster: Cluster
    gpu: str
    gpus: int
    hbm_bytes: int = 0
    host_bytes: int = 0

    @property
    def shared(self) -> bool:
        """Whether models share its memory."""
        return self.hbm_bytes > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Interchangeable replicas: one model on one kind of GPU with one set of settings.

    Attributes:
        kv_blocks: KV blocks of one replica; on a node that it shares, the most it could have.
        max_sequences: Most calls that one replica decodes at once.
        ready_s: Seconds until a replica in that state can serve.
        prefill_token_s: Seconds a prompt token adds while steps are full; computed.
        decode_token_s: Seconds of a step that decodes for one call; computed.
        most_tokens: Longest prompt and answer that a replica can hold; computed.
        priority_scheduling: Whether its engines take a priority (vLLM: lower goes first).
        least_replicas: Replicas that a scaling policy leaves it with.
        stopped: Where the weights of a replica lie once it was stopped.
        footprint: What a replica takes of a node that it shares; ``None`` if it shares none.
    """

    pool_id: PoolId
    model: Model
    gpu: str
    tensor_parallel: int
    curve: RateCurve
    kv_blocks: int
    block_tokens: int = 16
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    priority_scheduling: bool = False
    prefix_caching: bool = True
    ready_s: Mapping[Readiness, float] = field(default_factory=dict)
    least_replicas: int = 1
    stopped: Readiness = Readiness.DISK
    footprint: Footprint | None = None
    prefill_token_s: float = field(init=False)
    decode_token_s: float = field(init=False)
    most_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        full_step_s = self.curve.step_s(0, 0, self.max_batch_tokens)
        object.__setattr__(self, "prefill_token_s", full_step_s / self.max_batch_tokens)
        object.__setattr__(self, "decode_token_s", self.curve.step_s(1, 0))
        object.__setattr__(self, "most_tokens", min(self.model.context_tokens, self.kv_tokens))

    def cacheable(self, request: Request) -> tuple[int, ...]:
        """Hashes of the chunks of a prompt that its engines keep and share.

        An engine always computes the last token, so the chunk that ends a prompt is left out.
        """
        hashes = request.prefix_hashes
        if not hashes or not self.prefix_caching:
            return ()
        return hashes[: (request.prompt_tokens - 1) // PREFIX_CHUNK_TOKENS]

    @property
    def kv_tokens(self) -> int:
        """KV room of one replica, in tokens."""
        return self.kv_blocks * self.block_tokens

    def longest_s(self, request: Request) -> float:
        """Upper end of a call's service here: its whole prompt and all it may generate."""
        return self.service_s(request.prompt_tokens, request.max_output_tokens, batch=1)

    def service_s(self, prompt_tokens: int, output_tokens: float, *, batch: int) -> float:
        """Seconds of prefill and decode in a batch of this size."""
        kv_tokens = batch * (prompt_tokens + output_tokens / 2)
        return self.curve.prefill_s(
            prompt_tokens, chunk_tokens=self.max_batch_tokens
        ) + self.curve.decode_s(output_tokens, batch=batch, kv_tokens=kv_tokens)


def able_pools(pools: Iterable[Pool], request: Request) -> list[Pool]:
    """Return the pools that hold prompt and longest answer; if none does, those for the prompt.

    Engines refuse a call whose cap does not fit their context, so the first kind is safer.
    """
    prompt_tokens = request.prompt_tokens
    whole_tokens = prompt_tokens + request.max_output_tokens
    roomy = [pool for pool in pools if whole_tokens <= pool.most_tokens]
    return roomy or [pool for pool in pools if prompt_tokens < pool.most_tokens]


@dataclass(slots=True, kw_only=True)
class InFlight:
    """One call on one replica: what it was promised and how far it has come.

    Attributes:
        prefill_tokens: Prompt tokens still to be computed; 0 from the first token on.
        decode_tokens: Output tokens still predicted.
        streamed_tokens: Output tokens seen.
        promised_tokens: KV tokens that it was promised at first.
    """

    request: Request
    prefill_tokens: int
    decode_tokens: int
    expected_tokens: int
    streamed_tokens: int = 0
    promised_tokens: int = 0


class Replica:
    """One running copy of a model, the unit of placement. Policies read it, never write.

    Attributes:
        alive: False from its death until it is reported ready again.
        draining: True if it takes no further calls.
        removed: True if it never shall.
        most_requests: Most calls it may hold while it is on trial; ``None`` if it is not.
        prefill_tokens: Prompt tokens in flight that are not computed yet.
        decode_tokens: Predicted output tokens in flight.
        context_tokens: KV tokens that the calls in flight hold by forecast.
        prefill_clear_s: Instant by which the prefill handed over so far should be done, at the
            pace of each dispatch.
        prefill_share: Share of its time that prefill takes.
        last_dispatch: Serial number of the last dispatch to it, over the whole fleet; 0 if none.
        last_used_s: When it was last given a call.
        pace: Factor on the seconds of its rate curve, as completions show; above 0.
        memory: The ledger of the node that it shares; ``None`` if it shares none.
        ahead_tokens: Tokens by which promises run ahead of those that calls have produced.
    """

    __slots__ = (
        "ahead_tokens",
        "alive",
        "context_tokens",
        "decode_tokens",
        "draining",
        "in_flight",
        "kv",
        "last_dispatch",
        "last_used_s",
        "memory",
        "most_requests",
        "network_s",
        "node",
        "pace",
        "pool",
        "prefill_clear_s",
        "prefill_share",
        "prefill_tokens",
        "prefixes",
        "readiness",
        "removed",
        "replica_id",
    )

    def __init__(
        self,
        replica_id: ReplicaId,
        pool: Pool,
        node: Node,
        readiness: Readiness = Readiness.RUNNING,
        memory: NodeMemory | None = None,
    ) -> None:
        self.replica_id = replica_id
        self.pool = pool
        self.node = node
        self.network_s = node.cluster.network_s
        self.readiness = readiness
        self.alive = True
        self.draining = self.removed = False
        self.most_requests: int | None = None
        self.memory = memory
        self.ahead_tokens = 0
        kv_blocks = pool.kv_blocks if pool.footprint is None else pool.footprint.least_kv_blocks
        self.kv = KvLedger(capacity_blocks=kv_blocks, block_tokens=pool.block_tokens)
        chunks = kv_blocks * pool.block_tokens // PREFIX_CHUNK_TOKENS
        self.prefixes = PrefixIndex(capacity_chunks=max(1, chunks))
        self.in_flight: dict[RequestId, InFlight] = {}
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.context_tokens = 0
        self.prefill_clear_s = 0.0
        self.last_dispatch = 0
        self.last_used_s = 0.0
        self.pace = 1.0
        self.prefill_share = PrefillShare()
        if memory is not None:
            memory.hold(replica_id, self.holding())

    @property
    def reach_blocks(self) -> int:
        """KV blocks that it has or could be granted from what is free on its node."""
        granted, footprint = self.kv.capacity_blocks, self.pool.footprint
        if self.memory is None or footprint is None:
            return granted
        free_blocks = self.memory.free_hbm_bytes // footprint.kv_block_bytes
        return min(self.pool.kv_blocks, granted + free_blocks)

    def holding(self, *, rising: bool = False, to: Readiness | None = None) -> Holding:
        """Return what it takes of the node that it shares.

        Args:
            rising: Whether it is on its way up, with the least KV.
            to: Where its weights are on their way to, if they are.
        """
        footprint = self.pool.footprint
        if footprint is None or not self.alive:
            return NOTHING
        now = footprint.at(self.readiness, self.kv.capacity_blocks)
        if rising:
            return both(now, footprint.at(Readiness.RUNNING, footprint.least_kv_blocks))
        return now if to is None else both(now, footprint.at(to))

    def account(self, *, rising: bool = False, to: Readiness | None = None) -> None:
        """Enter what it takes into the ledger of its node."""
        if self.memory is not None:
            self.memory.hold(self.replica_id, self.holding(rising=rising, to=to))

    def grant(self, kv_blocks: int) -> None:
        """Set the KV that it may use."""
        self.kv.capacity_blocks = kv_blocks
        self.prefixes.resize(max(1, kv_blocks * self.pool.block_tokens // PREFIX_CHUNK_TOKENS))

    @property
    def running_requests(self) -> int:
        """Calls that it was handed and has not finished."""
        return len(self.in_flight)

    def admit(self, now_s: float, call: InFlight, kv_tokens: int) -> None:
        """Enter a call into every ledger."""
        request = call.request
        hashes = self.pool.cacheable(request)
        self.kv.reserve(request.request_id, kv_tokens, hashes)
        self.prefixes.touch(hashes)
        self.in_flight[request.request_id] = call
        self.prefill_tokens += call.prefill_tokens
        self.decode_tokens += call.decode_tokens
        self.context_tokens += request.prompt_tokens + call.expected_tokens
        backlog_s = call.prefill_tokens * self.pool.prefill_token_s * self.pace
        self.prefill_clear_s = max(now_s, self.prefill_clear_s) + backlog_s
        self.prefill_share.add(now_s, backlog_s)

    def stream(self, request_id: RequestId, streamed_tokens: int) -> int:
        """Take in that a call has now produced this many tokens; return how many are new."""
        call = self.in_flight[request_id]
        fresh = streamed_tokens - call.streamed_tokens
        if fresh <= 0:
            return 0
        call.streamed_tokens = streamed_tokens
        self.prefill_tokens -= call.prefill_tokens
        call.prefill_tokens = 0
        left = max(1, call.expected_tokens - streamed_tokens)
        self.decode_tokens -= call.decode_tokens - left
        call.decode_tokens = left
        ahead_tokens = min(streamed_tokens + self.ahead_tokens, call.request.max_output_tokens)
        answer_tokens = max(streamed_tokens, ahead_tokens)
        self.kv.grow(request_id, call.request.prompt_tokens + answer_tokens)
        return fresh

    def release(self, request_id: RequestId) -> InFlight:
        """Strike a call from every ledger."""
        call = self.in_flight.pop(request_id)
        self.kv.release(request_id)
        self.prefill_tokens -= call.prefill_tokens
        self.decode_tokens -= call.decode_tokens
        self.context_tokens -= call.request.prompt_tokens + call.expected_tokens
        if not self.in_flight:
            self.prefill_clear_s = 0.0
        return call

    def validate(self, *, queues: bool = False) -> None:
        """Check that totals are the sums of their parts, and zero when idle.

        Args:
            queues: Whether it may hold more calls than its engine can run.
        """
        calls = self.in_flight.values()
        self.kv.validate()
        assert self.prefill_tokens == sum(call.prefill_tokens for call in calls)
        assert self.decode_tokens == sum(call.decode_tokens for call in calls)
        assert queues or len(self.in_flight) <= self.pool.max_sequences, "more calls than sequences"
        if not self.in_flight:
            ledgers = (self.kv.reserved_blocks, self.prefill_tokens, self.context_tokens)
            assert ledgers == (0, 0, 0), f"{self.replica_id} is idle but holds {ledgers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLimits:
    """What no scaling policy may exceed.

    Attributes:
        gpus: GPUs of replicas that run or start; ``None`` for no limit.
        most_changes: Replicas started, drained or taken back at one time of asking.
        cooldown_s: Seconds after a pool grew before it shrinks, and the other way round.
    """

    gpus: int | None = None
    most_changes: int = 8
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All pools and replicas, as a fleet file describes them. Immutable: the scheduler copies it.

    Attributes:
        replicas: Replica id to (pool, node, first state), in a stable order.
    """

    name: str
    clusters: tuple[Cluster, ...]
    nodes: tuple[Node, ...]
    pools: tuple[Pool, ...]
    replicas: Mapping[ReplicaId, tuple[Pool, Node, Readiness]]
    limits: ScalingLimits = ScalingLimits()

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(pool.tensor_parallel for pool, _, _ in self.replicas.values())

    @property
    def models(self) -> tuple[ModelName, ...]:
        """Names of its models, each once, in the order of the pools."""
        return tuple(dict.fromkeys(pool.model.name for pool in self.pools))

    def build(self) -> list[Replica]:
        """Return fresh, idle replicas, those on one node with one ledger."""
        memories = {
            node.node_id: NodeMemory(hbm_bytes=node.hbm_bytes, host_bytes=node.host_bytes)
            for node in self.nodes
            if node.shared
        }
        return [
            Replica(name, pool, node, state, memories.get(node.node_id) if pool.footprint else None)
            for name, (pool, node, state) in self.replicas.items()
        ]
