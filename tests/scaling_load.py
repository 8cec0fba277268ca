"""Loads and a fleet to scale, and what a run did to it."""

import random
from collections.abc import Callable

from builders import a_call, a_fleet, a_plan, a_pool, a_workload
from concertmaster.compose import simulate
from concertmaster.core.actions import Action, Demote, Wake
from concertmaster.core.events import Event, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, ScalingLimits
from concertmaster.core.standing import Demand
from concertmaster.policies.scaling import replica_tokens_per_s
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import RunRecords

SEATS = 4
TOKENS = (300, 1500)
CALLS = (1, 2)


def a_scaled_fleet(*, most: int = 16, serving: int = 1, gpus: int | None = None) -> Fleet:
    """One pool of small replicas; the others lie on disk, 20 s away."""
    states = {f"p-{i}": Readiness.DISK for i in range(serving, most)}
    pool = a_pool(max_sequences=SEATS, least_replicas=min(1, serving))
    return a_fleet(pool, replicas=most, states=states, limits=ScalingLimits(gpus=gpus))


def agents(rate: Callable[[float], float], until_s: float, seed: int) -> Workload:
    """One call, or two with a tool between, at a rate that may change."""
    rng = random.Random(seed)
    plans: list[WorkflowPlan] = []
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(max(1e-3, rate(now_s)))) < until_s:
        calls = [
            a_call(
                stage,
                prompt_tokens=300 + 200 * stage,
                output_tokens=rng.randint(*TOKENS),
                max_output_tokens=2048,
                tool_s=round(3 * rng.random(), 3) if stage else 0.0,
            )
            for stage in range(rng.randint(*CALLS))
        ]
        plans.append(a_plan(f"w{len(plans):05d}", *calls, arrival_s=round(now_s, 3)))
    return a_workload(*plans)


def needed_replicas(rate: float) -> float:
    """Replicas that the mean of such a load keeps full."""
    mean_calls, mean_tokens = sum(CALLS) / 2, sum(TOKENS) / 2
    demand = Demand(prefill_ratio=350 / mean_tokens, context_tokens=850.0)
    pool = a_scaled_fleet().pools[0]
    return rate * mean_calls * mean_tokens / replica_tokens_per_s(pool, demand)


class Comings:
    """When replicas were woken, ready and stopped; give it as observer."""

    def __init__(self) -> None:
        self.starts_s: list[float] = []
        self.woken: list[tuple[float, str]] = []
        self.ready_s: list[float] = []
        self.stops_s: list[float] = []

    def __call__(self, now_s: float, event: Event, actions: list[Action]) -> None:
        woken = [action.replica_id for action in actions if isinstance(action, Wake)]
        self.woken += [(now_s, replica_id) for replica_id in woken]
        self.starts_s += [now_s] * len(woken)
        self.stops_s += [now_s for action in actions if isinstance(action, Demote)]
        self.ready_s += [now_s] if isinstance(event, ReplicaReady) else []

    def serving_from(self, count: int, *, after_s: float, first: int = 1) -> float:
        """Instant after which so many have served; it takes no stops before for granted."""
        changes = sorted([(t, 1) for t in self.ready_s] + [(t, -1) for t in self.stops_s])
        serving = first
        for now_s, change in changes:
            serving += change
            if serving >= count and now_s >= after_s:
                return now_s
        return float("inf")


def scaled(
    fleet: Fleet, workload: Workload, policy: str, seed: int = 1
) -> tuple[RunRecords, Comings]:
    """Run a load; lengths are those seen lately, so nothing is known ahead."""
    seen = Comings()
    return simulate(fleet, workload, policy, seed=seed, models="recent", observe=seen), seen
