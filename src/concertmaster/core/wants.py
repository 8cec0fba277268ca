"""What models are asked for, now and soon: from the line, live workflows and arrivals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from concertmaster.core.fleet import Pool, PoolId, Replica
from concertmaster.core.queue import Waiting, WaitingLine
from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.core.tenancy import Want
from concertmaster.core.workflow import Workflows

MEMORY_S = 120.0
"""An arrival counts towards the rate of its model with e^-1 of its weight after this long."""


CALL_TOKENS = 16
"""Output tokens that make a call: what a workflow owes beside its whole calls is rounding, and
one token each is what they owe until they ask again."""


@dataclass(slots=True)
class _Rate:
    """Arrivals of one model: all that ever were, and the same fading."""

    ever: int = 0
    calls: float = 0.0
    interactive: float = 0.0
    at_s: float = 0.0

    def fade(self, now_s: float) -> None:
        factor = math.exp((self.at_s - now_s) / MEMORY_S)
        self.calls *= factor
        self.interactive *= factor
        self.at_s = now_s


class Wants:
    """Counts arrivals, and adds up what waits.

    Args:
        by_pool: Replicas of each pool, whatever their state.
        line: Calls that wait.
        workflows: Live workflows; they tell what models will be asked for.
    """

    def __init__(
        self,
        by_pool: Mapping[PoolId, Sequence[Replica]],
        line: WaitingLine,
        workflows: Workflows,
    ) -> None:
        self._by_pool = by_pool
        self._line = line
        self._workflows = workflows
        self._rates: dict[ModelName, _Rate] = {}
        self._held: dict[ModelName, list[int]] = {}

    def note_arrival(self, now_s: float, call: Waiting, pool: Pool) -> None:
        """Count a call that arrived for a model."""
        rate = self._rates.setdefault(pool.model.name, _Rate(at_s=now_s))
        rate.fade(now_s)
        rate.ever += 1
        rate.calls += 1
        rate.interactive += call.request.service_class is ServiceClass.INTERACTIVE

    def note_held(self, lanes: Iterable[tuple[PoolId, ...]]) -> None:
        """Take in which lanes nobody serves: their workflows ask for nothing else meanwhile."""
        self._held = {}
        for pools in lanes:
            model = self._by_pool[pools[0]][0].pool.model.name
            for workflow in {
                call.workflow.workflow_id: call.workflow for call in self._line.lanes[pools]
            }.values():
                for other in workflow.owed:
                    if other != model:
                        held = self._held.setdefault(other, [0, 0])
                        held[0] += 1
                        held[1] += workflow.interactive

    def soon(self, now_s: float, model: ModelName) -> Want:
        """Return what will be asked of a model."""
        rate, owed = self._rates.get(model), self._workflows.owed(model)
        held, held_people = self._held.get(model, (0, 0))
        owing = min(owed.workflows, (owed.tokens - owed.workflows) // CALL_TOKENS)
        people = max(0, min(owed.people - held_people, owing))
        if rate is None:
            return Want(
                model=model,
                owing_workflows=owing,
                owing_people=people,
                held_workflows=min(held, owing),
            )
        rate.fade(now_s)
        return Want(
            model=model,
            owing_workflows=owing,
            owing_people=people,
            held_workflows=min(held, owing),
            calls=rate.ever,
            calls_per_s=rate.calls / MEMORY_S,
            interactive_ratio=rate.interactive / rate.calls if rate.calls else 0.0,
        )

    def of_lane(self, now_s: float, pools: tuple[PoolId, ...]) -> Want:
        """Return the same of the model of a lane, and add up the calls that wait there."""
        soon = self.soon(now_s, self._by_pool[pools[0]][0].pool.model.name)
        calls = [call.request for call in self._line.lanes[pools]]
        waits_s = [(now_s - request.arrival_s, request) for request in calls]
        persons = [s for s, one in waits_s if one.service_class is ServiceClass.INTERACTIVE]
        return replace(
            soon,
            waiting_calls=len(calls),
            waited_s=sum(waited_s for waited_s, _ in waits_s),
            interactive_calls=len(persons),
            interactive_waited_s=sum(persons),
            oldest_s=max(waited_s for waited_s, _ in waits_s),
            first_due_s=min(
                (one.deadline_s for one in calls if one.deadline_s is not None), default=math.inf
            ),
        )
