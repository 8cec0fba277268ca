"""Builders of valid things; a test names only what it is about."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.cost import RateCurve
from concertmaster.core.events import Event, RequestArrived
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
    Replica,
    ReplicaId,
    ScalingLimits,
)
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.hbm import Footprint
from concertmaster.core.policy import Policy
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.core.wait import Crew, Wait, crew_of
from concertmaster.core.workflow import Owed, Workflow
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.catalog import policy
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.workload.plan import Call, ModelOutcome, WorkflowPlan, Workload

READY_S: Mapping[Readiness, float] = {
    Readiness.RUNNING: 0.0,
    Readiness.SLEEPING: 2.0,
    Readiness.HOST: 5.0,
    Readiness.DISK: 20.0,
    Readiness.REMOTE: 60.0,
}


def a_curve(*, slowness: float = 1.0) -> RateCurve:
    """10,000 prompt tokens a second, 100 tokens a second of one answer, at slowness 1."""
    return RateCurve(
        fixed_s=0.0099 * slowness,
        linear_tokens=(1, 101),
        linear_s=(0.0001 * slowness, 0.0101 * slowness),
        kv_token_s=1e-7 * slowness,
    )


def a_pool(name: str = "p", *, model: str = "m", slowness: float = 1.0, **changes: object) -> Pool:
    facts: dict[str, object] = {
        "pool_id": PoolId(name),
        "model": Model(
            name=ModelName(model),
            context_tokens=32_768,
            weights_bytes=16_000_000_000,
            kv_bytes_per_token=131_072,
        ),
        "gpu": "a100-80g",
        "tensor_parallel": 1,
        "curve": a_curve(slowness=slowness),
        "kv_blocks": 4096,
        "ready_s": READY_S,
    }
    return Pool(**{**facts, **changes})  # type: ignore[arg-type]


def a_fleet(
    *pools: Pool,
    replicas: int = 1,
    states: Mapping[str, Readiness] | None = None,
    network_s: float = 0.0,
    name: str = "test",
    limits: ScalingLimits | None = None,
) -> Fleet:
    """Every pool has ``replicas`` replicas, named ``p-0``, ``p-1``…; ``states`` by that name."""
    cluster = Cluster(cluster_id=ClusterId("local"), network_s=network_s)
    pools = pools or (a_pool(),)
    nodes: list[Node] = []
    placed: dict[ReplicaId, tuple[Pool, Node, Readiness]] = {}
    for pool in pools:
        for i in range(replicas):
            replica = f"{pool.pool_id}-{i}"
            nodes.append(Node(node_id=NodeId(replica), cluster=cluster, gpu=pool.gpu, gpus=1))
            state = (states or {}).get(replica, Readiness.RUNNING)
            placed[ReplicaId(replica)] = (pool, nodes[-1], state)
    return Fleet(
        name=name,
        clusters=(cluster,),
        nodes=tuple(nodes),
        pools=tuple(pools),
        replicas=placed,
        limits=limits or ScalingLimits(),
    )


FOOTPRINT = Footprint(
    weights_bytes=16_000_000_000,
    runtime_bytes=1_000_000_000,
    asleep_bytes=500_000_000,
    kv_block_bytes=16 * 131_072,
    least_kv_blocks=64,
)
"""Of a pool that shares nodes."""


def a_shared_fleet(
    *pools: Pool,
    nodes: int = 1,
    hbm_bytes: int = 40_000_000_000,
    host_bytes: int = 64_000_000_000,
    states: Mapping[str, Readiness] | None = None,
    network_s: Sequence[float] = (),
) -> Fleet:
    """Every pool has a replica on each node, ``p-0`` on the first; on disk unless told."""
    placed: dict[ReplicaId, tuple[Pool, Node, Readiness]] = {}
    machines = []
    for i in range(nodes):
        away_s = network_s[i] if network_s else 0.0
        cluster = Cluster(cluster_id=ClusterId(f"site-{i}"), network_s=away_s)
        machines.append(
            Node(
                node_id=NodeId(f"n{i}"),
                cluster=cluster,
                gpu="a100-80g",
                gpus=1,
                hbm_bytes=hbm_bytes,
                host_bytes=host_bytes,
            )
        )
        for pool in pools:
            state = (states or {}).get(f"{pool.pool_id}-{i}", Readiness.DISK)
            placed[ReplicaId(f"{pool.pool_id}-{i}")] = (pool, machines[i], state)
    return Fleet(
        name="shared",
        clusters=tuple(node.cluster for node in machines),
        nodes=tuple(machines),
        pools=pools,
        replicas=placed,
    )


def a_sharing_pool(name: str = "p", *, model: str = "", **changes: object) -> Pool:
    """One of its own model; up to 9,000 blocks, about half of a node's memory."""
    facts: dict[str, object] = {"footprint": FOOTPRINT, "kv_blocks": 9000, **changes}
    return a_pool(name, model=model or name, **facts)  # type: ignore[arg-type]


def a_replica(name: str = "p-0", pool: Pool | None = None) -> Replica:
    cluster = Cluster(cluster_id=ClusterId("local"))
    node = Node(node_id=NodeId(name), cluster=cluster, gpu="a100-80g", gpus=1)
    return Replica(ReplicaId(name), pool or a_pool(), node)


def a_request(name: str = "r1", **changes: object) -> Request:
    facts: dict[str, object] = {
        "request_id": RequestId(name),
        "workflow_id": WorkflowId(f"workflow of {name}"),
        "arrival_s": 0.0,
        "prompt_tokens": 100,
        "max_output_tokens": 50,
    }
    return Request(**{**facts, **changes})  # type: ignore[arg-type]


def a_workflow(name: str = "w1", **changes: object) -> Workflow:
    facts: dict[str, object] = {"workflow_id": WorkflowId(name), "started_s": 0.0, "seen_s": 0.0}
    return Workflow(**{**facts, **changes})  # type: ignore[arg-type]


def a_waiting_call(name: str = "r1", **changes: object) -> Waiting:
    request = a_request(name)
    facts: dict[str, object] = {
        "request": request,
        "forecast": NO_FORECAST,
        "workflow": a_workflow(request.workflow_id),
        "pools": (PoolId("p"),),
        "serial": 1,
        "attempt": 1,
        "expires_s": 3600.0,
        "kv_level": 0.9,
    }
    return Waiting(**{**facts, **changes})  # type: ignore[arg-type]


@dataclass(kw_only=True)
class StubView:
    """What a router sees, written down by pool or model; nothing said is an idle fleet."""

    replicas: dict[str, int] = field(default_factory=dict)
    wake_s: dict[str, float] = field(default_factory=dict)
    full: tuple[str, ...] = ()
    waiting: dict[str, int] = field(default_factory=dict)
    live: dict[str, Owed] = field(default_factory=dict)
    open: dict[str, Sequence[Waiting]] = field(default_factory=dict)
    waits_s: dict[str, Sequence[float]] = field(default_factory=dict)
    pools: Sequence[Pool] = ()
    now_s: float = 0.0

    def pools_of(self, model: ModelName) -> list[Pool]:
        return [pool for pool in self.pools if pool.model.name == model]

    def in_service(self, pool: Pool) -> list[Replica]:
        count = self.replicas.get(pool.pool_id, 1)
        return [a_replica(f"{pool.pool_id}-{i}", pool) for i in range(count)]

    def ready_s(self, pool: Pool) -> float:
        return self.wake_s.get(pool.pool_id, 0.0)

    def has_room(self, call: Waiting, pool: Pool) -> bool:
        return pool.pool_id not in self.full

    def room(self, call: Waiting, pool: Pool) -> list[Replica]:
        return self.in_service(pool) if self.has_room(call, pool) else []

    def crew(self, pool: Pool) -> Crew | None:
        replicas = self.in_service(pool)
        return crew_of(pool, replicas, self.now_s, 0.25) if replicas else None

    def wait(self, call: Waiting, crew: Crew, *, fifo: bool = False) -> Wait:
        return Wait([self.waits_s.get(crew.pool.pool_id, (0.0,))], 0.0)

    def waiting_tokens(self, pool: Pool) -> int:
        return self.waiting.get(pool.pool_id, 0)

    def owed(self, model: ModelName) -> Owed:
        return self.live.get(model, Owed())

    def open_calls(self, model: ModelName) -> Sequence[Waiting]:
        return self.open.get(model, ())


def a_view(**changes: object) -> StubView:
    return StubView(**changes)  # type: ignore[arg-type]


def a_forecast(output_tokens: float, **changes: object) -> Forecast:
    facts: dict[str, object] = {"output_tokens": Quantiles.exactly(output_tokens)}
    return Forecast(**{**facts, **changes})  # type: ignore[arg-type]


def a_policy(
    name: str = "least-tokens", *, max_waiting: int | None = None, **changes: object
) -> Policy:
    if max_waiting is not None:
        changes["admission"] = BoundedLine(max_waiting=max_waiting)
    return replace(policy(name), **changes)  # type: ignore[arg-type]


class Notebook:
    """A predictor that writes down all that it is told."""

    def __init__(self, *, reads_prompts: bool = True) -> None:
        self.reads_prompts = reads_prompts
        self.asked: list[tuple[Request, Prompt]] = []
        self.learnt: list[tuple[Request, Completion, Prompt]] = []
        self.closed: list[tuple[WorkflowId, float | None]] = []

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        self.asked.append((request, prompt))
        return NO_FORECAST

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        self.learnt.append((request, completion, prompt))

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        self.closed.append((workflow_id, success))


class CheckedScheduler:
    """A scheduler whose invariants are checked after every event.

    Attributes:
        history: Every event with its instant and its actions.
    """

    def __init__(
        self, fleet: Fleet | None = None, of: Policy | str = "least-tokens", *, seed: int = 1
    ) -> None:
        self.fleet = fleet or a_fleet()
        self.policy = policy(of) if isinstance(of, str) else of
        self.seed = seed
        self.core = self.fresh()
        self.history: list[tuple[float, Event, list[Action]]] = []

    def fresh(self) -> Scheduler:
        """Another scheduler that has seen nothing yet."""
        return Scheduler(self.fleet, self.policy, random.Random(self.seed), record_candidates=True)

    def at(self, now_s: float, event: Event) -> list[Action]:
        actions = self.core.handle(now_s, event)
        self.core.validate()
        wakeup_s = self.core.next_wakeup_s()
        assert wakeup_s is None or wakeup_s > self.core._now_s, "a timer in the past would spin"
        self.history.append((now_s, event, actions))
        return actions

    def arrive(
        self, name: str, now_s: float = 0.0, forecast: Forecast = NO_FORECAST, **changes: object
    ) -> list[Action]:
        request = a_request(name, **{"arrival_s": now_s, **changes})
        return self.at(now_s, RequestArrived(request, forecast))

    def replica(self, name: str = "p-0") -> Replica:
        return self.core.replicas[ReplicaId(name)]


def placements(actions: Iterable[Action]) -> dict[str, str]:
    """Request to replica, for the calls that these actions dispatch, in order."""
    return {a.request_id: a.replica_id for a in actions if isinstance(a, Dispatch)}


def a_call(stage: int = 0, **changes: object) -> Call:
    facts: dict[str, object] = {
        "stage": stage,
        "prompt_tokens": 200,
        "output_tokens": 40,
        "max_output_tokens": 256,
        "parents": (stage - 1,) if stage else (),
    }
    return Call(**{**facts, **changes})  # type: ignore[arg-type]


def a_plan(name: str = "w1", *calls: Call, **changes: object) -> WorkflowPlan:
    facts: dict[str, object] = {
        "workflow_id": WorkflowId(name),
        "arrival_s": 0.0,
        "calls": calls or (a_call(),),
    }
    return WorkflowPlan(**{**facts, **changes})  # type: ignore[arg-type]


def a_workload(*plans: WorkflowPlan) -> Workload:
    ranked = sorted(plans, key=lambda plan: (plan.arrival_s, plan.workflow_id))
    return Workload(name="test", workflows=tuple(ranked))


def chains(
    count: int, *, gap_s: float, seed: int, most_calls: int = 6, most_tokens: int = 400
) -> Workload:
    """Workflows that are chains of calls, with a tool between, and two models' outcomes."""
    rng = random.Random(seed)
    plans = []
    arrival_s = 0.0
    for i in range(count):
        arrival_s += rng.expovariate(1 / gap_s)
        calls = []
        for stage in range(rng.randint(1, most_calls)):
            tokens = rng.randint(1, most_tokens)
            solves = rng.random() < 0.5
            chunks = range(1, 1 + stage)
            calls.append(
                a_call(
                    stage,
                    prompt_tokens=200 + 256 * stage + rng.randint(0, 100),
                    output_tokens=tokens,
                    max_output_tokens=1024,
                    role=("planner", "coder", "critic")[stage % 3],
                    tool_s=round(rng.random(), 3) if stage else 0.0,
                    prefix_hashes=tuple(1000 * i + chunk for chunk in chunks),
                    outcomes={
                        ModelName("m"): ModelOutcome(correct=1.0, output_tokens=tokens),
                        ModelName("small"): ModelOutcome(
                            correct=float(solves), output_tokens=tokens + 7
                        ),
                    },
                )
            )
        plans.append(a_plan(f"w{i:03d}", *calls, arrival_s=round(arrival_s, 3), app="chains"))
    return a_workload(*plans)
