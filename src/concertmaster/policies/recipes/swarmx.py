"""SwarmX: completion as a distribution, and the choice by its tail.

For each pool, the wait under the line's real order, then readiness, network and service are
composed as independent distributions, rebuilt from the books at each decision (SwarmX, arXiv
2606.21401, algorithm 1). What is repaired: batches decode together rather than one call after
the other, the wait is that of the order which the line really has, and no sketch is carried
on from one decision to the next, so no error adds up.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from typing import Literal, NamedTuple, TypeAlias

from concertmaster.core.fleet import Pool, PoolId, Replica
from concertmaster.core.policy import Ordering, Policy, Scorer, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ServiceClass
from concertmaster.core.service import Service, lacking_tokens, service_on
from concertmaster.core.sketch import Measure, Sketch, add, add_in_step
from concertmaster.core.wait import Crew
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.filters import FitsKvCache
from concertmaster.policies.ordering import OldestWorkflow
from concertmaster.policies.pickers import LeastCost, shortlist

Cost: TypeAlias = Literal["cvar", "quantile"]
Law: TypeAlias = Literal["quantiles", "mean"]
Wait: TypeAlias = Literal["order", "fifo"]
Sum: TypeAlias = Literal["independent", "comonotone"]

Measures: TypeAlias = Mapping[ServiceClass, Measure]

SUMS: Mapping[Sum, Callable[[Sketch, Sketch], Sketch]] = {
    "independent": add,
    "comonotone": add_in_step,
}


def cost_of(
    now_s: float, call: Waiting, tokens: Sketch, service: Service, measure: Measure
) -> float:
    """Cost of a call's completion: what comes after the end of its siblings, at the tail.

    A workflow goes on when the last of the calls that run side by side has ended, so a call
    that ends before another of them costs nothing. One without siblings costs all its time.
    """
    first_s, token_s = service
    longest = call.workflow.longest
    if longest is None:
        return first_s + token_s * measure.of(tokens)
    if len(tokens) == 1:
        return longest.passed_s(now_s, first_s + token_s * tokens[0])
    return sum(
        weight * longest.passed_s(now_s, first_s + token_s * tokens[i])
        for i, weight in measure.terms
    )


@dataclass(frozen=True, slots=True)
class TailCompletion:
    """Seconds until the call ends on the replica, at the tail, beyond the end of its siblings.

    Attributes:
        measures: What a law costs, by service class.
    """

    measures: Measures
    name: str = "tail_completion"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Turn the law of its tokens into seconds in the batch that it would join."""
        model, measure = replica.pool.model.name, self.measures[call.request.service_class]
        service = service_on(now_s, call, replica)
        if not call.workflow.ends:
            return service.first_s + call.measured_tokens(model, measure) * service.token_s
        return cost_of(now_s, call, call.output_sketch(model), service, measure)


@dataclass(frozen=True, slots=True)
class OthersDelay:
    """What the call takes from those that run there: its prefill, and a longer step while it runs.

    Of its prefill only what the replica does not hold counts.
    Calls that leave meanwhile are taken to be replaced by as many.

    Attributes:
        measures: What a law costs, by service class.
        weight: What a second of theirs counts for.
    """

    measures: Measures
    weight: float = 1.0
    name: str = "others_delay"

    def cost_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        """Multiply the call's expected seconds of each kind by the calls that run."""
        running = len(replica.in_flight)
        if not running or not self.weight:
            return 0.0
        pool, request = replica.pool, call.request
        curve, held_tokens = pool.curve, replica.context_tokens
        tokens = call.measured_tokens(pool.model.name, self.measures[request.service_class])
        joined_s = curve.step_s(running + 1, held_tokens + request.prompt_tokens)
        growth_s = joined_s - curve.step_s(running, held_tokens)
        prefill_s = lacking_tokens(request, replica) * pool.prefill_token_s
        own_s = prefill_s + tokens * growth_s
        return self.weight * replica.pace * running * own_s


LIKELIEST = 4
"""Replicas of a pool that say what starting there would cost."""

MOST_COMPOSED = 2
"""Pools without room whose wait is composed: those where starting would cost least."""

UNKNOWN, IN_SECONDS = Service(0.0, 0.0), Service(0.0, 1.0)
"""Of a pool with room, and of a law that is one of seconds already."""


class Start(NamedTuple):
    """What starting in a pool would cost a call, if a place there were free at once.

    Attributes:
        crew: Whom it would have to wait for; ``None`` if a place is free, or nobody serves yet.
        service: How long it would take, had it a place; not told if one is free.
    """

    cost_s: float
    pool: Pool
    crew: Crew | None
    service: Service = UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class TailRouter:
    """Pools where the call would be done at the least tail cost if it started there at once.

    The best pool sets the bar: what starting in it costs, or waiting for it and then starting.
    A pool where the call would keep to the bar by starting at once may take it too; one where
    it would not is left to others. Calls are routed again while they wait.

    Attributes:
        measures: What a law costs, by service class.
        scorers: Costs of starting on a replica with room.
        others: What a second of delay to calls behind it in the line counts for.
        wait: "order" for the line's own order, "fifo" as if it had none.
        sum: How parts are composed.
        near: Share by which a pool may cost more than the best and still set the bar, by lot.
    """

    measures: Measures
    scorers: tuple[Scorer, ...]
    others: float = 1.0
    wait: Wait = "order"
    sum: Sum = "independent"
    near: float = 0.0

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Compose the wait of a pool unless starting there at once would be too dear already."""
        if len(pools) == 1:
            return (pools[0].pool_id,)
        starts = [self._start(call, pool, view) for pool in pools]
        bar_s, costs_s, composed = math.inf, [], 0
        for start in sorted(starts, key=attrgetter("cost_s")):
            cost_s = start.cost_s
            if start.crew is not None and cost_s < bar_s:
                if composed == MOST_COMPOSED:
                    continue
                composed += 1
                limit_s = bar_s * (1 + self.near)
                cost_s = self._waited_s(call, start, start.crew, view, limit_s)
            bar_s = min(bar_s, cost_s)
            costs_s.append(cost_s)
        if self.near:
            bar_s = rng.choice([cost_s for cost_s in costs_s if cost_s <= bar_s * (1 + self.near)])
        return tuple(start.pool.pool_id for start in starts if start.cost_s <= bar_s)

    def _start(self, call: Waiting, pool: Pool, view: View) -> Start:
        room = view.room(call, pool)
        if room:
            costs_s = (
                self._place_s(view.now_s, call, one)
                for one in shortlist(call, room, most=LIKELIEST)
            )
            return Start(min(costs_s), pool, None)
        ready_s = view.ready_s(pool)
        if math.isinf(ready_s):
            return Start(math.inf, pool, None)
        prompt_tokens, crew = call.request.prompt_tokens, view.crew(pool)
        fixed_s = ready_s + pool.curve.prefill_s(prompt_tokens, chunk_tokens=pool.max_batch_tokens)
        if crew is None:
            step_s = pool.curve.step_s(1, prompt_tokens)
        else:
            step_s = crew.step_s
            fixed_s += crew.network_s
        service, tokens = Service(fixed_s, step_s), call.output_sketch(pool.model.name)
        measure = self.measures[call.request.service_class]
        return Start(cost_of(view.now_s, call, tokens, service, measure), pool, crew, service)

    def _place_s(self, now_s: float, call: Waiting, replica: Replica) -> float:
        return sum(scorer.cost_s(now_s, call, replica) for scorer in self.scorers)

    def _waited_s(
        self, call: Waiting, start: Start, crew: Crew, view: View, limit_s: float
    ) -> float:
        """Cost of the wait for a pool and the service there; composed if it may keep the limit.

        One that would pass the limit by the least of its wait alone costs that.
        """
        model, (first_s, token_s) = start.pool.model.name, start.service
        wait = view.wait(call, crew, fifo=self.wait == "fifo")
        measure, tokens = self.measures[call.request.service_class], call.output_sketch(model)
        served_s = first_s + token_s * call.measured_tokens(model, measure)
        delay_s = self.others * wait.behind * served_s / max(1, crew.running)
        soonest = Service(first_s + wait.least_s, token_s)
        least_s = cost_of(view.now_s, call, tokens, soonest, measure) + delay_s
        if least_s > limit_s:
            return least_s
        law = reduce(SUMS[self.sum], wait.parts, start.service.law(tokens))
        cost_s = cost_of(view.now_s, call, law, IN_SECONDS, measure) + delay_s
        return max(start.cost_s, cost_s)  # a wait takes nothing off, whatever rounding says


@dataclass(frozen=True, slots=True)
class NearBest:
    """Any of the replicas that cost little more than the cheapest, with equal chance.

    Several gateways that decide on the same stale view would else all pick the same.

    Attributes:
        near: Share by which one may cost more.
    """

    near: float

    def pick(
        self,
        call: Waiting,
        replicas: Sequence[Replica],
        cost_s: Callable[[Replica], float],
        rng: random.Random,
    ) -> Replica:
        """Score a shortlist of each pool, and draw."""
        costs_s = [(cost_s(one), one) for one in shortlist(call, replicas)]
        most_s = min(cost for cost, _ in costs_s) * (1 + self.near)
        return rng.choice([one for cost, one in costs_s if cost <= most_s])


def swarmx(
    name: str = "swarmx",
    *,
    tail: float = 0.5,
    batch_tail: float = 0.5,
    cost: Cost = "quantile",
    others: float = 1.0,
    siblings: bool = True,
    near: float = 0.0,
    reroute_s: float = 0.5,
    order: Ordering | None = None,
    aging: float = 1.0,
    law: Law = "quantiles",
    wait: Wait = "order",
    sum: Sum = "independent",  # noqa: A002  # the word in its settings
) -> Policy:
    """Put the recipe together.

    Args:
        name: How it was called.
        tail: Level of the cost of interactive calls.
        batch_tail: Of batch calls.
        cost: Mean of the cases beyond the level, or the quantile at it.
        others: What a second of delay to calls that run counts for.
        siblings: Whether a call costs only what comes after the end of its siblings.
        near: Share by which a choice may cost more than the best and still be drawn.
        reroute_s: Wait after which a call is routed again.
        order: Another order than by the age of workflows.
        aging: Of the line.
        law: "mean" reduces every law to its mean, and every cost with it.
        wait: "fifo" composes the wait as if the line were first come, first served.
        sum: "comonotone" takes all parts to be large together.
    """
    measure = Measure.cvar if cost == "cvar" else Measure.quantile
    measures = {ServiceClass.INTERACTIVE: measure(tail), ServiceClass.BATCH: measure(batch_tail)}
    if law == "mean":
        measures = dict.fromkeys(ServiceClass, Measure.mean())
    scorers: tuple[Scorer, ...] = (TailCompletion(measures), OthersDelay(measures, others))
    return Policy(
        name=name,
        admission=BoundedLine(),
        router=TailRouter(
            measures=measures, scorers=scorers, others=others, wait=wait, sum=sum, near=near
        ),
        ordering=order or OldestWorkflow(),
        filters=(FitsKvCache(),),
        scorers=scorers,
        picker=NearBest(near) if near else LeastCost(),
        aging=aging,
        reroute_s=reroute_s,
        siblings=siblings,
        by_mean=law == "mean",
    )
