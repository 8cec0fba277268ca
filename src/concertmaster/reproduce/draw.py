"""Workloads for a study: workflows drawn from templates, at arrivals drawn from a process."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from concertmaster.core.request import WorkflowId
from concertmaster.workload.arrivals import POISSON, ArrivalSpec
from concertmaster.workload.plan import Call, WorkflowPlan, Workload
from concertmaster.workload.prefixes import chain


def draw(
    templates: Sequence[WorkflowPlan],
    *,
    workflows: int,
    rate_rps: float | None,
    seed: int,
    arrivals: ArrivalSpec = POISSON,
    name: str = "drawn",
) -> Workload:
    """Draw workflows from templates with replacement, under fresh ids.

    Equal seeds draw the same workflows and the same gaps in units of the mean gap, whatever
    the rate, so that loads and arms are compared on the same work. A template drawn again is
    another user's: only prefixes that it shares with other templates are shared.

    Args:
        templates: Workflows with their calls; their arrivals are not used.
        workflows: How many to draw.
        rate_rps: Mean workflows a second; ``None`` lets all arrive at once.
        seed: Fixes what is drawn.
        arrivals: The law of their gaps.
        name: Of the workload.
    """
    picked = random.Random(f"{seed} workflows").choices(templates, k=workflows)
    gaps = random.Random(f"{seed} gaps")
    instants_s = [0.0] * workflows
    if rate_rps:
        instants_s = arrivals.instants_s(workflows, rate_rps, gaps)
    common = _common_prefixes(templates)
    seen: Counter[WorkflowId] = Counter()
    drawn = []
    for at, (plan, arrival_s) in enumerate(zip(picked, instants_s, strict=True)):
        again = seen[plan.workflow_id]
        seen[plan.workflow_id] += 1
        drawn.append(
            replace(
                plan,
                workflow_id=WorkflowId(f"{at:05d}~{plan.workflow_id}"),
                arrival_s=arrival_s,
                calls=tuple(_of_another(call, again, common) for call in plan.calls),
            )
        )
    return Workload(name=name, workflows=tuple(drawn))


def _common_prefixes(templates: Sequence[WorkflowPlan]) -> frozenset[int]:
    """Hashes of prompt chunks that several templates begin with."""
    owners = Counter(
        one
        for plan in templates
        for one in {key for call in plan.calls for key in call.prefix_hashes}
    )
    return frozenset(key for key, count in owners.items() if count > 1)


def _of_another(call: Call, again: int, common: frozenset[int]) -> Call:
    """Give the prefixes that are a user's own other hashes, the same for all calls of a draw."""
    if not again or not call.prefix_hashes:
        return call
    hashes = (one if one in common else chain(one, again, 1)[0] for one in call.prefix_hashes)
    return replace(call, prefix_hashes=tuple(hashes))
