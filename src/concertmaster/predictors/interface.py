"""Predictors: they answer now and learn later, when the outcome is known."""

from typing import Protocol, runtime_checkable

from concertmaster.core.facts import fact
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId


@fact(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a predictor may read of a call beside the facts that reach the core.

    Attributes:
        text: What is asked, as text; long ones may lack their middle. Never stored as it is.
        chars: Characters of the whole prompt.
        tools: How many tools the model may call.
        thinking: Whether the caller asked the model to reason at length.
        after_tool: Whether the last message is the result of a tool; ``None`` if unknown.
    """

    text: str = ""
    chars: int = 0
    tools: int = 0
    thinking: bool = False
    after_tool: bool | None = None


NO_PROMPT = Prompt()


@fact(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of a call.

    Attributes:
        finished_s: When its last token was out, on the driver's clock.
        tool_call: Whether the answer asked for a tool; ``None`` if unknown.
    """

    model: ModelName
    output_tokens: int
    finished_s: float = 0.0
    tool_call: bool | None = None


class Predictor(Protocol):
    """What will a call, and the rest of its workflow, need?

    Attributes:
        reads_prompts: Whether it looks at prompts; if not, drivers hand it ``NO_PROMPT``.
    """

    reads_prompts: bool

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Answer from what is known at arrival. Must not change any later answer."""

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Take in one outcome with what was forecast; they come in the order of finishing."""

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Take in that a workflow is over, and its grade in 0…1 where someone graded it."""


@runtime_checkable
class Awaiting(Protocol):
    """A predictor that keeps something of a call until its outcome."""

    def failed(self, request_id: RequestId) -> None:
        """Take in that no answer will come: let go of the call. Must not change any answer."""
