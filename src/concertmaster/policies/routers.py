"""Routers: which pools may serve a call."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.policy import Router, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName
from concertmaster.core.workflow import Workflow

VERIFIERS = frozenset({"critic", "judge", "reviewer", "tester", "verifier"})
"""Roles that judge what another role made."""


def by_model(pools: Sequence[Pool]) -> dict[ModelName, list[Pool]]:
    """Group pools by their model, in the fleet's order."""
    groups: dict[ModelName, list[Pool]] = {}
    for pool in pools:
        groups.setdefault(pool.model.name, []).append(pool)
    return groups


def ids_of(pools: Sequence[Pool]) -> tuple[PoolId, ...]:
    """Names of pools, in order."""
    return tuple(pool.pool_id for pool in pools)


def sent_back(workflow: Workflow, role: str) -> bool:
    """Whether a role is asked again right after another role has judged its work."""
    return workflow.last_role in VERIFIERS and role in workflow.roles


@dataclass(frozen=True, slots=True)
class AnyPool:
    """Every pool that can hold the call; quality is not looked at."""

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Keep the fleet's order."""
        return ids_of(pools)


@dataclass(frozen=True, slots=True)
class SurestPools:
    """The pools whose model is most likely to solve the call.

    With a clairvoyant forecast these are the models that do solve it, or all of them if
    none does; with no forecast of success every pool is as good as another.
    """

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Compare the success forecast of each pool's model."""
        success = call.forecast.success
        best = max(success.get(pool.model.name, 0.0) for pool in pools)
        return ids_of([pool for pool in pools if success.get(pool.model.name, 0.0) == best])


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Any model, with a chance in proportion to the replicas that serve it.

    A model that no replica serves yet counts for one, so that it is woken now and then.
    """

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Draw a replica and take all pools of its model."""
        groups = list(by_model(pools).values())
        replicas = [max(1, sum(len(view.in_service(one)) for one in group)) for group in groups]
        return ids_of(rng.choices(groups, weights=replicas)[0])


@dataclass(frozen=True, slots=True)
class Cascade:
    """The cheapest model first, the next stronger one each time a verifier sends work back.

    Models are ranked by the weights that they read for each token.
    """

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Stay with the workflow's model, or go one up."""
        groups = by_model(pools)
        ranked = sorted(groups, key=lambda model: groups[model][0].model.weights_bytes)
        model, workflow = call.workflow.model, call.workflow
        at = ranked.index(model) if model in groups else 0
        if sent_back(workflow, call.request.role):
            at = min(at + 1, len(ranked) - 1)
        return ids_of(groups[ranked[at]])


@dataclass(frozen=True, slots=True)
class Sticky:
    """The choice made for the first call of a workflow holds for all of them.

    Attributes:
        inner: Makes the choice.
    """

    inner: Router

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Keep to the workflow's model while it can hold the call."""
        staying = by_model(pools).get(call.workflow.model)
        return ids_of(staying) if staying else self.inner.route(call, pools, view, rng)
