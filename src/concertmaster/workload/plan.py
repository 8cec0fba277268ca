"""What is going to be asked, and when: workflows as recorded or generated, before any run.

Plain data. Times inside a plan are seconds on the workload's own clock, which starts at 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from concertmaster.core.request import ModelName, ServiceClass, WorkflowId

DEFAULT_CAP_TOKENS = 4096
"""``max_output_tokens`` of a call whose cap nobody recorded."""

CAUGHT, FALSE_ALARMS = 0.8, 0.1
"""Shares of wrong and of right answers that a verifier rejects: assumed, not measured."""

NO_OUTCOMES: Mapping[ModelName, "ModelOutcome"] = MappingProxyType({})


def cap_tokens(output_tokens: int) -> int:
    """Guess the caller's cap: 4,096 tokens, or the next power of two that holds the answer.

    A power of two tells a scheduler little about the true length.

    >>> cap_tokens(120), cap_tokens(5000)
    (4096, 8192)
    """
    return max(DEFAULT_CAP_TOKENS, 1 << (output_tokens - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutcome:
    """What one model would answer to one call.

    Attributes:
        correct: Probability or grade in 0…1 that the answer is right.
        output_tokens: Length of this model's answer.
    """

    correct: float
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One LLM call of a workflow, known in full before it is made.

    Attributes:
        stage: Unique number within the workflow; gaps are allowed.
        parents: Stages that must have finished before this call can be made.
        role: What the agent does here, in the workload's own words; "" if unknown.
        step: What kind of step the role takes; "" if unknown.
        output_tokens: Length of the answer of any model without an entry in ``outcomes``.
        tool_s: Tool or human time between the last parent's end and this call.
        prompt_text: The prompt, or its head and tail; "" if it was not recorded.
        prompt_chars: Characters of the whole prompt; 0 if unknown.
        after_tool: Whether the last message is the result of a tool; ``None`` if unknown.
        tool_call: Whether the recorded answer asked for a tool; ``None`` if unknown. Known
            to nobody before the call is answered.
        prefix_hashes: As in ``Request``: chained hashes of the leading prompt chunks of
            ``PREFIX_CHUNK_TOKENS`` tokens; equal hashes mean an equal prefix up to there.
        outcomes: What each model would answer, where that is known.
        model: The model that answered when this was recorded; ``None`` if unknown.
        models: Models that may answer, as in ``Request``; empty means any model of the fleet.
        doubt: A number in 0…1; the call is made only if the verifier before it rejects the last
            answer, and it does so if this is below ``CAUGHT`` for a wrong one, or below
            ``FALSE_ALARMS`` for a right one. ``None`` makes the call in any case.
    """

    stage: int
    prompt_tokens: int
    output_tokens: int
    max_output_tokens: int
    parents: tuple[int, ...] = ()
    role: str = ""
    step: str = ""
    tool_s: float = 0.0
    prompt_text: str = ""
    prompt_chars: int = 0
    after_tool: bool | None = None
    tool_call: bool | None = None
    prefix_hashes: tuple[int, ...] = ()
    outcomes: Mapping[ModelName, ModelOutcome] = field(default_factory=lambda: NO_OUTCOMES)
    model: ModelName | None = None
    models: tuple[ModelName, ...] = ()
    doubt: float | None = None

    def is_called_for(self, grade: float) -> bool:
        """Say whether the call is made after an answer of this grade, 0…1."""
        if self.doubt is None:
            return True
        return self.doubt < FALSE_ALARMS + (1 - grade) * (CAUGHT - FALSE_ALARMS)

    def output_tokens_by(self, model: ModelName) -> int:
        """Tokens that ``model`` would produce: its own length if known, else the shared one."""
        outcome = self.outcomes.get(model)
        return self.output_tokens if outcome is None else outcome.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowPlan:
    """One user goal: the calls it takes, in an order in which parents come first.

    Attributes:
        arrival_s: When the user asks, on the workload's clock.
        deadline_s: Seconds after ``arrival_s`` by which the last answer is due, or ``None``.
        success: Grade in 0…1 that was recorded; ``None`` if nobody graded it.
        task: What several workflows are attempts at; "" if it is this one's alone.
        template: The shape of the workflow, in the workload's own words; "" if unknown.
    """

    workflow_id: WorkflowId
    arrival_s: float
    calls: tuple[Call, ...]
    app: str = ""
    template: str = ""
    task: str = ""
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    deadline_s: float | None = None
    success: float | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens of all calls."""
        return sum(call.prompt_tokens + call.output_tokens for call in self.calls)

    @property
    def deciding_call(self) -> Call | None:
        """The last call with outcomes: its model's ``correct`` grades the whole workflow."""
        return next((call for call in reversed(self.calls) if call.outcomes), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """All that will be asked of a fleet, sorted by ``(arrival_s, workflow_id)``.

    Attributes:
        notes: What was cut, skipped or made up while reading, for the user to see.
    """

    name: str
    workflows: tuple[WorkflowPlan, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[WorkflowPlan]:
        """Workflows in the order of their arrival."""
        return iter(self.workflows)

    def __len__(self) -> int:
        """Count of workflows."""
        return len(self.workflows)

    @property
    def requests(self) -> int:
        """Count of LLM calls in all workflows."""
        return sum(len(plan.calls) for plan in self.workflows)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last one; 0.0 when there are fewer than two."""
        if not self.workflows:
            return 0.0
        return self.workflows[-1].arrival_s - self.workflows[0].arrival_s

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all calls, before any prefix hit."""
        return sum(call.prompt_tokens for plan in self.workflows for call in plan.calls)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all calls."""
        return sum(call.output_tokens for plan in self.workflows for call in plan.calls)

    @property
    def total_tokens(self) -> int:
        """Prompt and output tokens of all calls."""
        return self.prompt_tokens + self.output_tokens

    @property
    def rate_rps(self) -> float | None:
        """Workflows a second between the first and the last; ``None`` if all come at once."""
        return (len(self.workflows) - 1) / self.duration_s if self.duration_s else None

    @property
    def apps(self) -> tuple[str, ...]:
        """Names of the applications, sorted."""
        return tuple(sorted({plan.app for plan in self.workflows}))

    @property
    def models_asked(self) -> tuple[tuple[ModelName, ...], ...]:
        """What calls name as models that may answer, each list once, first come first."""
        asked = (call.models for plan in self.workflows for call in plan.calls if call.models)
        return tuple(dict.fromkeys(asked))
