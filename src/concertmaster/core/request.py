"""Facts about one LLM call. Plain data: nothing here reads a clock or changes a value."""

from enum import StrEnum
from typing import NewType

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.facts import fact

RequestId = NewType("RequestId", str)
WorkflowId = NewType("WorkflowId", str)
ModelName = NewType("ModelName", str)

PREFIX_CHUNK_TOKENS = 256
"""Prompt tokens that one entry of ``Request.prefix_hashes`` stands for."""


class ServiceClass(StrEnum):
    """Who waits for the answer: a person (interactive) or a program (batch)."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@fact(frozen=True, slots=True, kw_only=True)
class Slo:
    """Times promised to the caller. ``None`` means that nothing was promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


NO_PROMISE = Slo()


@fact(frozen=True, slots=True, kw_only=True)
class Request:
    """One LLM call: a prompt in, a stream of tokens out.

    Every request is a stage of a workflow; a lone call is a workflow of one stage.

    Attributes:
        arrival_s: When the gateway accepted it, on the driver's clock.
        prompt_tokens: Tokens to prefill, before any prefix-cache hit.
        max_output_tokens: The caller's cap; engines never decode past it.
        models: Models that may serve it; empty means any model of the fleet.
        role: What the agent was doing, in its own words ("planner"); "" if unknown.
        app: The application the workflow belongs to; "" if unknown.
        template: The shape of the workflow, in the caller's words ("react-10-turns"); "" if
            unknown.
        step: What kind of step the role takes, where it takes several ("vote"); "" if unknown.
        stage: Position among the calls of its workflow, from 0; ``None`` if unknown.
        parents: Calls of the same workflow that it waited for, as far as known.
        prefix_hashes: Chained hashes of the prompt's leading chunks of
            ``PREFIX_CHUNK_TOKENS`` tokens; equal hashes mean an equal prefix up to there.
        deadline_s: Instant by which the last token is due; ``None`` if none was promised.
        tenant: Who pays for it, in the gateway's words; "" if nobody is told apart.
        tenant_weight: Share of its tenant beside those of others that wait; above 0.
        streams: Whether its answer is heard of from the first token on, not as a whole.
    """

    request_id: RequestId
    workflow_id: WorkflowId
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    models: tuple[ModelName, ...] = ()
    role: str = ""
    app: str = ""
    template: str = ""
    step: str = ""
    stage: int | None = None
    parents: tuple[RequestId, ...] = ()
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    prefix_hashes: tuple[int, ...] = ()
    deadline_s: float | None = None
    tenant: str = ""
    tenant_weight: float = 1.0
    streams: bool = True

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_output_tokens < 1:
            field = "prompt_tokens" if self.prompt_tokens < 1 else "max_output_tokens"
            raise InvalidRequestError(
                f"request {self.request_id!r}: {field} must be at least 1, "
                f"got {getattr(self, field)}"
            )
