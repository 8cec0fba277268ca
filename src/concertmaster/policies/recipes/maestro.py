"""Maestro: memory by forecast, weights by expected need, people before programs.

From what is known of the paper (arXiv 2606.12950): reservation by forecast with a margin that
follows under-prediction, states of readiness, workflow-aware order with preemption between
stages. Prices in seconds take the place of its normalised score.
"""

from dataclasses import replace
from typing import Any

from concertmaster.core.policy import Policy
from concertmaster.core.promise import KvKind, KvRule
from concertmaster.policies.admission import InTime
from concertmaster.policies.ordering import PeopleFirst
from concertmaster.policies.recipes.baselines import baseline
from concertmaster.policies.residency import Expected
from concertmaster.policies.scorers import (
    Decode,
    Distance,
    InFlightTokens,
    PrefillBacklog,
    PrefillMiss,
)

_KV = ("level", "margin", "eps", "returning")


def maestro(
    name: str = "maestro",
    *,
    people_s: float = 60.0,
    aging: float = 0.1,
    interactive: float = 4.0,
    kv: KvKind = "forecast",
    person_s: float | None = None,
    program_s: float | None = None,
    doubt: float = 2.0,
    admits: bool = True,
    **settings: Any,  # noqa: ANN401  # those of KvRule and of Expected
) -> Policy:
    """Put the recipe together.

    Args:
        name: How it was called.
        people_s: Seconds by which calls of programs give way.
        aging: Of the line.
        interactive: What a second of a person's wait counts for.
        kv: How KV is promised.
        person_s: Time granted to a workflow of people that names no deadline, as of ``InTime``.
        program_s: The same for one of programs.
        doubt: Of ``InTime``.
        admits: Whether workflows are refused that would miss their deadline.
        settings: Of ``KvRule`` and of ``Expected``.
    """
    rule = {key: value for key, value in settings.items() if key in _KV}
    needs = {key: value for key, value in settings.items() if key not in _KV}
    ordering = PeopleFirst(people_s)
    return replace(
        baseline(name, "prefix-affinity", ordering, aging=aging),
        filters=(),
        scorers=(
            PrefillBacklog(),
            PrefillMiss(),
            Decode(),
            InFlightTokens(),
            Distance(interactive),
        ),
        gate=InTime(person_s=person_s, program_s=program_s, doubt=doubt) if admits else None,
        kv=KvRule(kind=kv, **rule),
        residency=Expected(interactive=interactive, **needs),
    )
