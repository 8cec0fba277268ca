"""What the gateway itself answers in JSON, as types; those of engines pass through."""

from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec


class ErrorDetail(TypedDict):
    """What is wrong; ``code`` is what programs may go by."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """An error in OpenAI's words."""

    error: ErrorDetail


class MessagesErrorDetail(TypedDict):
    """What is wrong."""

    type: str
    message: str


class MessagesError(TypedDict):
    """An error in Anthropic's words."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: NotRequired[str]


class Version(TypedDict):
    """The version of the gateway."""

    version: str


class Model(TypedDict):
    """A model that may be asked for; ``auto`` is any of them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class Grade(TypedDict):
    """How well a workflow went; ``null`` if nobody graded it."""

    success: Annotated[float, msgspec.Meta(ge=0, le=1)] | None


class Graded(TypedDict):
    """What was taken in."""

    workflow_id: str
    success: float | None


class ForgottenResponse(TypedDict):
    """A response that is kept no more."""

    id: str
    object: Literal["response.deleted"]
    deleted: bool


class ReplicaState(TypedDict):
    """A replica by its ledgers."""

    replica: str
    model: str
    gpu: str
    state: str
    running: int
    decode_tokens: int
    kv_reserved_ratio: float


class State(TypedDict):
    """The fleet at this moment."""

    policy: str
    waiting: int
    workflows: int
    answered: int
    output_tokens: int
    replicas: list[ReplicaState]


class Reloaded(TypedDict):
    """Keys of the fleet file that were taken up, and those that need a restart."""

    changed: list[str]
    needs_restart: list[str]


class Draining(TypedDict):
    """Whether calls are taken, and how many are open."""

    draining: bool
    open_calls: int


# Receipts: docs/seeing.md tells what each field means.


class Law(TypedDict):
    """A forecast."""

    p50: float
    p90: float
    p99: float


class ModelForecast(TypedDict):
    """What was forecast of a call on one model."""

    model: str
    output_tokens: Law | None
    success: float | None


class ReceiptForecast(TypedDict):
    """What was forecast of a call."""

    source: str
    tool_call: float | None
    remaining_calls: Law | None
    models: list[ModelForecast]


class CandidateShown(TypedDict):
    """A replica that was weighed."""

    replica: str
    model: str
    chosen: bool
    cost_s: float | None
    costs_s: dict[str, float]
    service_s: Law | None


class AttemptShown(TypedDict):
    """One dispatch."""

    attempt: int
    hedge: bool
    decided_s: float
    queue_wait_s: float
    replica: str
    model: str
    cost_s: float | None
    with_room: int
    pools: list[str]
    reserved_kv_tokens: int | None
    candidates: list[CandidateShown]


class OutcomeShown(TypedDict):
    """What came of a call."""

    status: int
    reason: str | None
    attempt: int
    first_token_s: float | None
    output_tokens: int
    duration_s: float


class Regret(TypedDict):
    """What came, held against what was forecast."""

    service_s: float
    forecast_s: float
    best_forecast_s: float
    best_replica: str
    surprise_s: float
    forgone_s: float
    regret_s: float


Receipt = TypedDict(
    "Receipt",
    {
        "id": str,
        "workflow_id": str,
        "arrived_at": str,
        "policy": str,
        "app": str,
        "role": str,
        "stage": int | None,
        "class": str,
        "models": list[str],
        "streams": bool,
        "prompt_tokens": int,
        "max_output_tokens": int,
        "deadline_s": float | None,
        "forecast": ReceiptForecast,
        "attempts": list[AttemptShown],
        "outcome": OutcomeShown | None,
        "regret": Regret | None,
    },
)
"""What was decided for a call and why, what came of it, and the regret."""


class ReceiptList(TypedDict):
    """Receipts of a workflow, newest first."""

    object: Literal["list"]
    data: list[Receipt]
