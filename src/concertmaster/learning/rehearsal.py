"""Replays recorded workflows through the evidence, as they would have been served.

A call is looked at when all that it waited for has been answered, and learnt after; what
remained of a workflow is learnt when it is over. So each row holds what was known then,
and nothing else.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName, Request
from concertmaster.learning.prompts import prompt_of
from concertmaster.predictors.evidence import TARGETS, Evidence, Look
from concertmaster.predictors.interface import Completion, Predictor, Prompt
from concertmaster.workload.asking import request_of
from concertmaster.workload.plan import Call, WorkflowPlan

NOMINAL_TOKEN_S = 0.02
"""Seconds a token that stand for the service time that a recording lacks."""

NO_MODEL = ModelName("")


class Asked(NamedTuple):
    """A call as a driver would see it."""

    request: Request
    prompt: Prompt
    completion: Completion


class Row(NamedTuple):
    """One call as it looked at its arrival, and what came of it.

    Attributes:
        truth: What it turned out to need, by target.
    """

    plan: WorkflowPlan
    call: Call
    asked: Asked
    look: Look
    truth: dict[str, float]


def rehearse(
    plans: Iterable[WorkflowPlan], evidence: Evidence, *, learn: bool = True
) -> Iterator[Row]:
    """Yield each call of some workflows, one workflow after the other.

    Without ``learn`` finished calls add to the histories alone, not to the laws.
    """
    for plan in plans:
        truth = remaining(plan)
        ends_s: dict[int, float] = {}
        for wave in waves(plan):
            asked = [as_asked(plan, call, ends_s) for call in wave]
            for call, one in zip(wave, asked, strict=True):
                look = evidence.look(one.request, one.prompt)
                yield Row(plan, call, one, look, truth[call.stage])
            for call, one in zip(wave, asked, strict=True):
                ends_s[call.stage] = one.completion.finished_s
                evidence.learn(one.request, one.completion, one.prompt, keep=learn)
        evidence.close(plan.workflow_id, keep=learn)


def absorb(plans: Iterable[WorkflowPlan], evidence: Evidence) -> None:
    """Learn whole workflows without looking at their calls."""
    for plan in plans:
        ends_s: dict[int, float] = {}
        for wave in waves(plan):
            asked = [as_asked(plan, call, ends_s) for call in wave]
            for call, one in zip(wave, asked, strict=True):
                ends_s[call.stage] = one.completion.finished_s
                evidence.learn(one.request, one.completion, one.prompt)
        evidence.close(plan.workflow_id)


class Served(NamedTuple):
    """One call, what was forecast at its arrival, and what it turned out to need."""

    plan: WorkflowPlan
    call: Call
    forecast: Forecast
    truth: dict[str, float]


def serve(plan: WorkflowPlan, predictor: Predictor) -> Iterator[Served]:
    """Yield each call of a workflow as a driver would have forecast it; the predictor learns."""
    truth = remaining(plan)
    ends_s: dict[int, float] = {}
    for wave in waves(plan):
        asked = [as_asked(plan, call, ends_s) for call in wave]
        forecasts = [predictor.predict(one.request, one.prompt) for one in asked]
        for call, forecast in zip(wave, forecasts, strict=True):
            yield Served(plan, call, forecast, truth[call.stage])
        for call, one, forecast in zip(wave, asked, forecasts, strict=True):
            ends_s[call.stage] = one.completion.finished_s
            predictor.learn(one.request, one.completion, one.prompt, forecast)
    predictor.close(plan.workflow_id)


def waves(plan: WorkflowPlan) -> Iterator[list[Call]]:
    """Yield the calls of a workflow in groups that could be made together."""
    waiting = list(plan.calls)
    done: set[int] = set()
    while waiting:
        wave: list[Call] = []
        later: list[Call] = []
        for call in waiting:
            (wave if done.issuperset(call.parents) else later).append(call)
        assert wave, "a plan has no cycles"
        yield wave
        done.update(call.stage for call in wave)
        waiting = later


def remaining(plan: WorkflowPlan) -> dict[int, dict[str, float]]:
    """Return what each call needed, and what remained of the workflow at it, itself included."""
    truth: dict[int, dict[str, float]] = {}
    tokens, tool_s = 0, 0.0
    for calls, call in enumerate(reversed(plan.calls), start=1):
        tokens += call.output_tokens
        values = (call.output_tokens, tokens, calls, tool_s)
        truth[call.stage] = dict(zip(TARGETS, map(float, values), strict=True))
        tool_s += call.tool_s
    return truth


def as_asked(plan: WorkflowPlan, call: Call, ends_s: dict[int, float]) -> Asked:
    """Turn a recorded call into what a driver sees, at the instant it would be made."""
    ready_s = max((ends_s[parent] for parent in call.parents), default=plan.arrival_s)
    arrival_s = ready_s + call.tool_s
    models = () if call.model is None else (call.model,)
    request = request_of(plan, call, arrival_s, models=models)
    completion = Completion(
        model=call.model or NO_MODEL,
        output_tokens=call.output_tokens,
        finished_s=arrival_s + call.output_tokens * NOMINAL_TOKEN_S,
        tool_call=call.tool_call,
    )
    return Asked(request, prompt_of(call), completion)
