"""Admission: who may join the line, and for how long; and which workflows may begin."""

from collections.abc import Sequence
from dataclasses import dataclass

from concertmaster.core.events import RejectReason
from concertmaster.core.fleet import Pool
from concertmaster.core.policy import Refusal, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, Request, ServiceClass

LEFT_OPEN = ModelName("")

LEAST_RETRY_S, MOST_RETRY_S = 1.0, 120.0
"""Bounds of what a refused caller is told to wait."""


@dataclass(frozen=True, slots=True)
class BoundedLine:
    """Refuse newcomers while the line is full, and calls that have waited too long.

    The newest is turned away: it has waited least, and its caller can still go elsewhere.

    Attributes:
        max_waiting: Calls that may wait.
        max_wait_s: Longest time in the line.
    """

    max_waiting: int = 100_000
    max_wait_s: float = 3600.0

    def refuses(self, request: Request, waiting_requests: int) -> RejectReason | None:
        """Compare the line with its bound."""
        return "queue_full" if waiting_requests >= self.max_waiting else None

    def expires_s(self, request: Request) -> float:
        """Count from arrival."""
        return request.arrival_s + self.max_wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class InTime:
    """Let a workflow begin unless it is a lost cause, if need be on a quicker model.

    What it will need is judged once, at its first call: waits in the order of the line, loads,
    the tokens of all its calls, and its tools. Where that call allows several models, the
    workflow is kept to the surest that is quick enough, or to the quickest if none is; without
    a forecast of success the one with the heaviest weights counts as the surest.

    Attributes:
        person_s: Seconds granted to a workflow of people that names no deadline; ``None`` for
            as long as it takes.
        program_s: The same for one of programs.
        doubt: Share of the time granted by which the forecast must pass it before a workflow
            is refused: one refused in error is lost for certain.
    """

    person_s: float | None = None
    program_s: float | None = None
    doubt: float = 2.0

    def judge(self, call: Waiting, pools: Sequence[Pool], view: View) -> ModelName | Refusal:
        """Compare the time granted with the forecast on each model."""
        granted_s = self._granted_s(call.request, view.now_s)
        if granted_s is None:
            return LEFT_OPEN
        limit_s = granted_s * (1 + self.doubt)
        needs_s = {one: needed_s(call, one, view) for one in _surest_first(call, pools)}
        quickest = min(needs_s, key=lambda model: needs_s[model])
        busy_s = needs_s[quickest][0]
        if busy_s > limit_s:
            hopeless = min(idle_s for _, idle_s in needs_s.values()) > limit_s
            retry_s = min(max(LEAST_RETRY_S, busy_s - granted_s), MOST_RETRY_S)
            return Refusal("too_late", None if hopeless else retry_s)
        if len(needs_s) == 1:
            return LEFT_OPEN
        return next((one for one in needs_s if needs_s[one][0] <= granted_s), quickest)

    def _granted_s(self, request: Request, now_s: float) -> float | None:
        if request.deadline_s is not None:
            return max(0.0, request.deadline_s - now_s)
        person = request.service_class is ServiceClass.INTERACTIVE
        return self.person_s if person else self.program_s


def _surest_first(call: Waiting, pools: Sequence[Pool]) -> list[ModelName]:
    """Return the models of pools by forecast of success, then by their weights."""
    weights = {pool.model.name: pool.model.weights_bytes for pool in pools}
    success = call.forecast.success
    return sorted(weights, key=lambda model: (-success.get(model, 0.0), -weights[model]))


def needed_s(call: Waiting, model: ModelName, view: View) -> tuple[float, float]:
    """Seconds until a workflow is done that begins with a model, and the same on an idle fleet.

    Its calls are shared out over the models that it will need in proportion to their tokens;
    each call waits as this one would if it came there. Branches count as if they came one
    after another.
    """
    tokens = {model: call.owes_tokens(model), **call.forecast.elsewhere(model)}
    calls = call.forecast.remaining_calls
    each = (1.0 if calls is None else max(1.0, calls.mean)) / sum(tokens.values())
    tools = call.forecast.remaining_tool_s
    busy_s = idle_s = 0.0 if tools is None else tools.mean
    for one, owed in tokens.items():
        pools, share = view.pools_of(one), max(1.0, each * owed)
        busy_s += min((_busy_s(call, pool, view, share, owed) for pool in pools), default=0.0)
        idle_s += min((owed * pool.decode_token_s for pool in pools), default=0.0)
    return busy_s, idle_s


def _busy_s(call: Waiting, pool: Pool, view: View, calls: float, tokens: int) -> float:
    """Seconds that so many calls with so many output tokens take on a pool as it stands."""
    crew = view.crew(pool)
    if crew is None:
        full = pool.max_sequences
        queued_s = view.waiting_tokens(pool) * pool.curve.step_s(full, 0) / full
        wait_s, step_s = view.ready_s(pool) + queued_s, pool.decode_token_s
    else:
        step_s = crew.step_s
        wait_s = 0.0 if view.has_room(call, pool) else calls * view.wait(call, crew).mean_s
    return wait_s + call.request.prompt_tokens * pool.prefill_token_s + tokens * step_s
