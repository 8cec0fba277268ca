"""What has happened so far in each workflow, kept small and bounded.

Only finished calls count: a call sees what its caller saw when it asked.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from concertmaster.core.forecast import Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.interface import Completion
from concertmaster.predictors.laws import Path

MOST_TRACKS = 64
"""Roles to tell apart in one workflow."""

MOST_ENDS = 64
"""Calls of one workflow whose end is remembered."""

MOST_CALLS = 4096
"""Calls of one workflow whose remaining work becomes a label."""

_WEIGHT_OF_LAST = 0.3


class Track:
    """The finished calls of one role (or of all) of a workflow, as running figures.

    Ranks are levels inside the law of a call's group, see ``laws``.
    """

    __slots__ = (
        "calls",
        "high",
        "last_hashes",
        "last_ranks",
        "last_tokens",
        "low",
        "prompt_tokens",
        "repeats",
        "smooth",
        "squares",
        "streak",
        "tokens",
        "total",
    )

    def __init__(self) -> None:
        self.calls = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.last_tokens = 0
        self.last_ranks: tuple[float, ...] = ()
        self.last_hashes: tuple[int, ...] = ()
        self.total = self.squares = self.smooth = 0.0
        self.low, self.high = 1.0, 0.0
        self.repeats = self.streak = 0

    def add(self, request: Request, output_tokens: int, rank: float) -> None:
        """Take in a finished call."""
        same = self.calls > 0 and output_tokens == self.last_tokens
        self.repeats += same
        self.streak = self.streak + 1 if same else 0
        keep = 1 - _WEIGHT_OF_LAST
        self.smooth = keep * self.smooth + _WEIGHT_OF_LAST * rank if self.calls else rank
        self.calls += 1
        self.tokens += output_tokens
        self.prompt_tokens = request.prompt_tokens
        self.last_tokens = output_tokens
        self.last_ranks = (rank, *self.last_ranks[:2])
        self.last_hashes = request.prefix_hashes
        self.total += rank
        self.squares += rank * rank
        self.low, self.high = min(self.low, rank), max(self.high, rank)

    @property
    def mean(self) -> float:
        """Mean rank; -1 before the first call."""
        return self.total / self.calls if self.calls else -1.0

    @property
    def spread(self) -> float:
        """Standard deviation of ranks; -1 before the second call."""
        if self.calls < 2:
            return -1.0
        return float(max(0.0, self.squares / self.calls - self.mean**2) ** 0.5)


NO_TRACK = Track()


class Finished(NamedTuple):
    """A finished call, and what was forecast to remain of its workflow.

    Attributes:
        path: Its group in the laws of what remains.
        group: Its group in the calibration.
        pause_s: Time of tools and people before it.
    """

    path: Path
    group: Path
    output_tokens: int
    pause_s: float
    stated: Mapping[str, Quantiles]


class Closed(NamedTuple):
    """A finished call of a workflow that is over: what was forecast to remain, and what did.

    Attributes:
        worth: What the label adds to the evidence, in workflows.
        share: How much it moves the calibration: labels of one workflow resemble each other.
    """

    path: Path
    group: Path
    stated: Mapping[str, Quantiles]
    truth: Mapping[str, float]
    worth: float
    share: float


class History:
    """One workflow so far.

    Attributes:
        model: Which model answered last; "" before the first answer.
        first_prompt_tokens: Of the first call that finished.
        finished: Its finished calls, in their order.
        ends_s: When the last of its calls ended, by call.
        fresh_tokens: What the last call's prompt had beyond the one before and its answer.
        turns: Calls whose prompt ended with a person's words.
        since_turn: Calls since the last of those.
        tool_calls: Share of the last calls that asked for a tool; -1 if unknown.
        tool_s: Time of tools and people between calls so far.
    """

    __slots__ = (
        "all",
        "by_role",
        "ends_s",
        "finished",
        "first_prompt_tokens",
        "fresh_tokens",
        "model",
        "pauses",
        "since_turn",
        "smooth_pause",
        "tool_calls",
        "tool_s",
        "turns",
    )

    def __init__(self) -> None:
        self.all = Track()
        self.by_role: dict[tuple[str, str], Track] = {}
        self.model = ModelName("")
        self.first_prompt_tokens = 0
        self.finished: list[Finished] = []
        self.ends_s: dict[RequestId, float] = {}
        self.fresh_tokens = 0
        self.turns = self.since_turn = self.pauses = 0
        self.tool_calls = -1.0
        self.tool_s = 0.0
        self.smooth_pause = -1.0

    def track(self, request: Request) -> Track:
        """Return the finished calls of the same role and step."""
        return self.by_role.get((request.role, request.step), NO_TRACK)

    def pause_s(self, request: Request) -> float:
        """Return how long the caller took since the answers it waited for; 0 for a first call.

        Where nobody says what it waited for, that is the last answer before it.
        """
        arrival_s = request.arrival_s
        awaited = [self.ends_s[parent] for parent in request.parents if parent in self.ends_s]
        ends_s = awaited or [end_s for end_s in self.ends_s.values() if end_s <= arrival_s]
        return max(0.0, arrival_s - max(ends_s)) if ends_s else 0.0

    def add(
        self, request: Request, completion: Completion, rank: float, *, after_tool: bool | None
    ) -> None:
        """Take in a finished call."""
        output_tokens, tool_call = completion.output_tokens, completion.tool_call
        self.model = completion.model
        self._pause(request)
        if self.all.calls:
            grown = request.prompt_tokens - self.all.prompt_tokens
            self.fresh_tokens = grown - self.all.last_tokens
        else:
            self.first_prompt_tokens = request.prompt_tokens
        self.all.add(request, output_tokens, rank)
        track = self.by_role.get((request.role, request.step))
        if track is None and len(self.by_role) < MOST_TRACKS:
            track = self.by_role[request.role, request.step] = Track()
        if track is not None:
            track.add(request, output_tokens, rank)
        by_person = after_tool is False
        self.turns += by_person
        self.since_turn = 0 if by_person else self.since_turn + 1
        if tool_call is not None:
            before = tool_call if self.tool_calls < 0 else self.tool_calls
            self.tool_calls = 0.8 * before + 0.2 * tool_call
        self.ends_s[request.request_id] = completion.finished_s
        if len(self.ends_s) > MOST_ENDS:
            del self.ends_s[next(iter(self.ends_s))]

    def _pause(self, request: Request) -> None:
        pause_s = self.pause_s(request)
        if pause_s > 0:
            self.tool_s += pause_s
            self.pauses += 1
            before = pause_s if self.smooth_pause < 0 else self.smooth_pause
            self.smooth_pause = 0.7 * before + 0.3 * pause_s


class Histories:
    """The histories of the workflows that were active last.

    Args:
        most_workflows: How many to keep; the one that was quiet longest goes first.
    """

    def __init__(self, *, most_workflows: int = 20_000) -> None:
        self._most = most_workflows
        self._by_workflow: OrderedDict[WorkflowId, History] = OrderedDict()

    def __len__(self) -> int:
        """Count of workflows kept."""
        return len(self._by_workflow)

    def seen(self, workflow_id: WorkflowId) -> History | None:
        """Return a workflow's history; ``None`` if none of its calls has finished."""
        return self._by_workflow.get(workflow_id)

    def of(self, workflow_id: WorkflowId) -> History:
        """Return a workflow's history to add to."""
        history = self._by_workflow.get(workflow_id)
        if history is None:
            history = self._by_workflow[workflow_id] = History()
            if len(self._by_workflow) > self._most:
                self._by_workflow.popitem(last=False)
        else:
            self._by_workflow.move_to_end(workflow_id)
        return history

    def drop(self, workflow_id: WorkflowId) -> History | None:
        """Forget a workflow that is over; return what was known of it."""
        return self._by_workflow.pop(workflow_id, None)
