"""Orderings: how urgent a call is, in seconds; the line adds its age."""

from dataclasses import dataclass

from concertmaster.core.fleet import Pool
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import Request, ServiceClass
from concertmaster.core.workflow import Workflow


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served: nothing counts but age."""

    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Return 0: the line's aging does the rest."""
        return 0.0


@dataclass(frozen=True, slots=True)
class ShortestJob:
    """Shortest expected service of the single call first."""

    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Prefill and decode of the median answer, alone on the replica."""
        tokens = forecast.output_at(pool.model.name, 0.5, request.max_output_tokens)
        return pool.service_s(request.prompt_tokens, tokens, batch=1)


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Earliest deadline first.

    Attributes:
        default_slack_s: Time granted to a call without a deadline. Finite, since no aging
            wears down infinity.
    """

    default_slack_s: float = 300.0
    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Time from arrival to the deadline: with an aging of 1 the key is the deadline."""
        if request.deadline_s is None:
            return self.default_slack_s
        return request.deadline_s - request.arrival_s


@dataclass(frozen=True, slots=True)
class LeastAttained:
    """The workflow that was given least service so far goes first (Agentix, NSDI 26).

    Needs no forecast: a workflow that has had little is likely short.
    """

    drifts: bool = True

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Engine seconds that the workflow's calls have had, here or anywhere."""
        return workflow.attained_s


@dataclass(frozen=True, slots=True)
class FeedbackQueues:
    """Multi-level feedback: a workflow sinks a level each time its service doubles.

    Within a level first come, first served; a level is worth ``level_s`` of waiting, so that
    a call that waits climbs back.

    Attributes:
        quantum_s: Service of the top level; each level below has twice as much.
        level_s: Waiting that makes up for one level.
    """

    quantum_s: float = 2.0
    level_s: float = 20.0
    drifts: bool = True

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Level times its worth."""
        return self.level_s * self.level(workflow.attained_s)

    def level(self, attained_s: float) -> int:
        """Level of a workflow, from 0 at the top.

        >>> [FeedbackQueues(quantum_s=2.0).level(s) for s in (0.0, 1.9, 2.0, 5.9, 6.0)]
        [0, 0, 1, 1, 2]
        """
        return (int(attained_s / self.quantum_s) + 1).bit_length() - 1


@dataclass(frozen=True, slots=True)
class OldestWorkflow:
    """The workflow that began first goes first: what has come far is not held up by newcomers.

    Attributes:
        horizon_s: Age beyond which a workflow gains no more.
    """

    horizon_s: float = 3600.0
    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Time left to the horizon: with an aging of 1 the key is the workflow's beginning."""
        return self.horizon_s - (request.arrival_s - workflow.started_s)


@dataclass(frozen=True, slots=True)
class ShortestRemaining:
    """Shortest remaining workflow first (STJF in Chimera 1.2), by forecast.

    A call without a forecast of its workflow counts as long as its own answer.
    """

    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Decode seconds of the median remaining output tokens, this call's included."""
        law = forecast.remaining_on(pool.model.name)
        tokens = forecast.output_at(pool.model.name, 0.5, request.max_output_tokens)
        remaining_tokens = tokens if law is None else max(law.median, tokens)
        return pool.service_s(request.prompt_tokens, remaining_tokens, batch=1)


@dataclass(frozen=True, slots=True)
class PeopleFirst:
    """Calls that a person waits for first; among equals the shortest remaining workflow.

    Every call stands in line anew, so a workflow of programs gives way between two of its
    calls and never within one. What it has waited so far is taken off what it gives way by, so
    it is not held up at each of its stages. No call is overtaken by one that arrives later than
    ``2 * people_s / aging`` seconds after it.

    Attributes:
        people_s: Seconds by which calls of programs give way; remaining service counts to as
            much at the most.
    """

    people_s: float = 60.0
    drifts: bool = False

    def urgency_s(
        self, request: Request, forecast: Forecast, workflow: Workflow, pool: Pool
    ) -> float:
        """Remaining service, and for a program what is left of giving way."""
        remaining_s = ShortestRemaining().urgency_s(request, forecast, workflow, pool)
        urgency_s = min(remaining_s, self.people_s)
        if request.service_class is ServiceClass.BATCH:
            urgency_s += max(0.0, self.people_s - workflow.waited_s)
        return urgency_s
