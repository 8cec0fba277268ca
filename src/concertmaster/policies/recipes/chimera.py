"""Chimera: a surer model where that is worth the time; the shortest workflow goes first.

A model may finish the workflow later than the fastest by what it gains in success; it is
kept until a verifier sends its work back (Chimera, arXiv 2603.22206, algorithm 1). What is
repaired: time is granted by gain rather than as a share; load is what live workflows still
need, so it neither vanishes between two calls nor counts twice; time includes the call's
own prefill and decode; an idle model does not shut all others out.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.policy import Ordering, Policy, Truth, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName
from concertmaster.policies.ordering import ShortestRemaining
from concertmaster.policies.recipes.baselines import baseline
from concertmaster.policies.routers import by_model, ids_of, sent_back

Rule: TypeAlias = Literal["earned", "slack", "paper"]
Load: TypeAlias = Literal["owed", "open"]


def finish_s(
    call: Waiting, pools: Sequence[Pool], view: View, *, switch_cost: bool = True
) -> float:
    """Seconds until the call's workflow is done if one model serves the rest of it.

    Wait, prefill of what the model's engines do not hold of the prompt, and the remaining
    tokens at the pace of the batch that the model's live workflows make. The wait is for the
    whole line, also for workflows that this one would overtake: they pay for it.

    Args:
        call: The call that asks where to go.
        pools: Those of the model.
        view: The fleet as it stands.
        switch_cost: Whether a model that served the workflow before has less to prefill.
    """
    held_tokens = 0
    if switch_cost and pools[0].model.name == call.workflow.model:
        held_tokens = call.workflow.context_tokens
    return min(_finish_s(call, pool, pools, view, held_tokens) for pool in pools)


def _finish_s(
    call: Waiting, pool: Pool, siblings: Sequence[Pool], view: View, held_tokens: int
) -> float:
    model, curve = pool.model.name, pool.curve
    replicas = max(1, sum(len(view.in_service(one)) for one in siblings))
    batch = 1 + min(view.owed(model).workflows // replicas, pool.max_sequences - 1)
    tokens = call.remaining_tokens(model)
    prompt_tokens = call.request.prompt_tokens
    step_s = curve.step_s(batch, batch * (prompt_tokens + tokens // 2))
    wait_s = 0.0
    if not view.has_room(call, pool):
        wait_s = view.waiting_tokens(pool) * step_s / (batch * replicas)
    prefill_s = curve.prefill_s(
        prompt_tokens, cached_tokens=held_tokens, chunk_tokens=pool.max_batch_tokens
    )
    return view.ready_s(pool) + wait_s + prefill_s + tokens * step_s


def queued_s(_call: Waiting, pools: Sequence[Pool], view: View) -> float:
    """Load of a model as published: what open calls' workflows need, at a full batch's rate."""
    pool = pools[0]
    replicas = max(1, sum(len(view.in_service(one)) for one in pools))
    tokens = sum(other.owed_tokens for other in view.open_calls(pool.model.name))
    token_s = pool.curve.step_s(pool.max_sequences, 0) / pool.max_sequences
    return tokens * token_s / replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodEnough:
    """A surer model than the fastest, if what it gains is worth the time.

    A workflow keeps its model. When a verifier sends work back, the choice is made anew among
    models that are at least as likely to succeed (``escalate``); without a forecast of success
    there is no telling which are, and it stays.

    Attributes:
        worth_s: Seconds that a right answer in place of a wrong one is worth: a model that is
            a tenth likelier to be right may take a tenth of that longer than the fastest.
        min_gain: Success by which it must beat the fastest.
        rule: "earned" grants time by gain; "slack" the same time whatever the gain, as a
            share of the fastest's or in seconds; "paper" as a share, as published.
        load: "owed" is ``finish_s``, "open" is ``queued_s``; ``None`` is what the rule was
            made for: the latter for "paper".
        switch_cost: Whether leaving a model costs the prefill of what it holds.
        tau: Of "slack" and "paper": how much longer than the fastest, as a share.
        tau_s: Of "slack": seconds longer in any case.
    """

    worth_s: float = 30.0
    min_gain: float = 0.02
    escalate: bool = True
    rule: Rule = "earned"
    load: Load | None = None
    switch_cost: bool = True
    tau: float = 0.3
    tau_s: float = 1.0

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        """Keep to the workflow's model unless its work was sent back."""
        groups = by_model(pools)
        success = {model: call.forecast.success.get(model, 0.0) for model in groups}
        staying = call.workflow.model
        if staying in groups:
            may_leave = self.escalate and staying in call.forecast.success
            if not (may_leave and sent_back(call.workflow, call.request.role)):
                return ids_of(groups[staying])
            groups = {m: own for m, own in groups.items() if success[m] >= success[staying]}
        loads_s = {model: self._load_s(call, own, view) for model, own in groups.items()}
        return ids_of(groups[self.pick(loads_s, success)])

    def pick(
        self, loads_s: Mapping[ModelName, float], success: Mapping[ModelName, float]
    ) -> ModelName:
        """Choose among models by seconds and success; ties go to the faster, then the first."""
        ranked = sorted(loads_s, key=lambda model: loads_s[model])
        fastest = ranked[0]
        good = [
            model
            for model in ranked
            if (gain := success[model] - success[fastest]) >= self.min_gain
            and loads_s[model] <= self._latest_s(loads_s[fastest], gain)
        ]
        price = 1 / self.worth_s if self.rule == "earned" and self.worth_s else 0.0
        return max(good, key=lambda m: success[m] - price * loads_s[m], default=fastest)

    def _load_s(self, call: Waiting, pools: Sequence[Pool], view: View) -> float:
        load = self.load or ("open" if self.rule == "paper" else "owed")
        if load == "open":
            return queued_s(call, pools, view)
        return finish_s(call, pools, view, switch_cost=self.switch_cost)

    def _latest_s(self, least_s: float, gain: float) -> float:
        """When a model that gains so much must be done."""
        if self.rule == "earned":
            return least_s + self.worth_s * gain
        share_s = least_s * (1 + self.tau)
        return share_s if self.rule == "paper" else max(share_s, least_s + self.tau_s)


def chimera(
    name: str = "chimera",
    *,
    aging: float = 0.1,
    order: Ordering | None = None,
    knows: frozenset[Truth] = frozenset(),
    **settings: Any,  # noqa: ANN401  # those of GoodEnough
) -> Policy:
    """Put the recipe together.

    Args:
        name: How it was called.
        aging: Of the line, and of the engines that take a priority.
        order: Another order than by remaining tokens.
        knows: What an oracle tells it.
        settings: Of ``GoodEnough``.
    """
    return baseline(
        name,
        "prefix-affinity",
        order or ShortestRemaining(),
        router=GoodEnough(**settings),
        aging=aging,
        clairvoyant=knows,
    )
