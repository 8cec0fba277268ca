"""Predictor, coordinator, memory and a bounded set of actions, for a scheduler that hosts them.

The frame of SwarmX (arXiv 2606.21401, section 2.1): Ray, Kubernetes or anything else keeps
its own loop and asks for one decision at a time. It goes on by its own policy when no
decision comes in time, and tells the agent what happened either way.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from concertmaster.core.fleet import Fleet, InFlight, Replica, ReplicaId
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.policy import Policy
from concertmaster.core.queue import Waiting
from concertmaster.core.request import Request, RequestId
from concertmaster.core.service import lacking_tokens, service_on
from concertmaster.core.sketch import Bar, affine
from concertmaster.core.workflow import Workflow, Workflows

HostPolicy = Callable[[Request, Sequence[ReplicaId]], ReplicaId]


class Foresight(Protocol):
    """What will a call need, if that can be said in time?"""

    def forecast(self, request: Request, *, within_s: float) -> Forecast | None:
        """Return what is predicted, or ``None`` after at most that many seconds."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Send the call there: the only action that a host has to carry out."""

    replica_id: ReplicaId
    cost_s: float
    forecast: Forecast


class SchedulerAgent:
    """Decides where a call goes, among the replicas that its host offers.

    Args:
        fleet: All that the host may offer.
        policy: Its filters, scorers and picker decide; order and admission are the host's.
        foresight: Predicts calls.
        rng: Source of randomness.
        clock: Seconds, for deadlines and ledgers.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        foresight: Foresight,
        rng: random.Random,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = {replica.replica_id: replica for replica in fleet.build()}
        self._policy = policy
        self._foresight = foresight
        self._rng = rng
        self._clock = clock
        self._workflows = Workflows()
        self._running: dict[RequestId, tuple[Workflow, Replica]] = {}
        self._serial = 0

    def decide(
        self, request: Request, candidates: Sequence[ReplicaId], *, within_s: float
    ) -> Decision | None:
        """Choose one of the candidates; ``None`` if no choice can be made in time.

        Args:
            request: The call.
            candidates: Replicas that the host would send it to; those not known are left out.
            within_s: Seconds that the host can wait.
        """
        ends_s = self._clock() + within_s
        replicas = [self._replicas[name] for name in candidates if name in self._replicas]
        forecast = self._foresight.forecast(request, within_s=within_s)
        if forecast is None or not replicas:
            return None
        now_s, policy = self._clock(), self._policy
        call = self._call(request, forecast, self._workflows.known(now_s, request))

        def cost_s(replica: Replica) -> float:
            return sum(scorer.cost_s(now_s, call, replica) for scorer in policy.scorers)

        chosen = policy.picker.pick(call, self._fitting(call, replicas), cost_s, self._rng)
        decision = Decision(chosen.replica_id, cost_s(chosen), forecast)
        return decision if self._clock() <= ends_s else None

    def sent(
        self, request: Request, replica_id: ReplicaId, forecast: Forecast = NO_FORECAST
    ) -> None:
        """Take in where a call went, whoever chose it."""
        replica, now_s = self._replicas.get(replica_id), self._clock()
        if replica is None:
            return
        call = self._call(request, forecast, self._workflows.arrive(now_s, request))
        model = replica.pool.model.name
        tokens = call.expected_tokens(model)
        flight = InFlight(
            request=request,
            prefill_tokens=lacking_tokens(request, replica),
            decode_tokens=tokens,
            expected_tokens=tokens,
        )
        replica.admit(now_s, flight, min(call.kv_tokens(model), replica.pool.kv_tokens))
        self._running[request.request_id] = (call.workflow, replica)
        if self._policy.siblings:
            law = service_on(now_s, call, replica).law(call.output_sketch(model))
            call.workflow.ends[request.request_id] = Bar(affine(law, 1.0, now_s))

    def streamed(self, request_id: RequestId, tokens: int) -> None:
        """Take in how many output tokens a call has so far."""
        if request_id in self._running:
            self._running[request_id][1].stream(request_id, tokens)

    def ended(self, request_id: RequestId) -> None:
        """Take in that a call is over, however it ended; unknown ones are none of ours."""
        found = self._running.pop(request_id, None)
        if found is not None:
            workflow, replica = found
            replica.release(request_id)
            workflow.ends.pop(request_id, None)
            self._workflows.settle(workflow.workflow_id)

    def _call(self, request: Request, forecast: Forecast, workflow: Workflow) -> Waiting:
        self._serial += 1
        return Waiting(
            request=request,
            forecast=forecast,
            workflow=workflow,
            pools=(),
            serial=self._serial,
            attempt=1,
            expires_s=float("inf"),
            kv_level=self._policy.kv_level,
            by_mean=self._policy.by_mean,
        )

    def _fitting(self, call: Waiting, replicas: Sequence[Replica]) -> Sequence[Replica]:
        """Leave out what the policy's filters would, unless that is all there is."""
        kept = list(replicas)
        for one in self._policy.filters:
            kept = [r for r in kept if one.keep(call, r.pool, (r,))]
        return kept or replicas


def with_fallback(agent: SchedulerAgent, host: HostPolicy, *, within_s: float) -> HostPolicy:
    """Return a policy for the host: the agent's choice, or the host's own where none came.

    Args:
        agent: Asked first, and told of the outcome.
        host: What the host does by itself.
        within_s: Seconds that a decision may take.
    """

    def choose(request: Request, candidates: Sequence[ReplicaId]) -> ReplicaId:
        decision = agent.decide(request, candidates, within_s=within_s)
        if decision is None:
            chosen = host(request, candidates)
            agent.sent(request, chosen)
            return chosen
        agent.sent(request, decision.replica_id, decision.forecast)
        return decision.replica_id

    return choose
