"""Forecasts and outcomes as rows: what is kept of a call, what is refused, and how it is packed.

No prompt is kept unless the operator asks for it: an embedding and numbers are enough to
train on, and hold less of what a user wrote. Names and prompts are redacted before they are
written (SwarmX 2.1 redacts prompt fields too).
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.redaction import Redactor
from concertmaster.predictors.interface import Completion

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
"""Levels at which a forecast is kept; part of the file format."""

MOST_TOKENS = 10_000_000
"""A count beyond this is a fault of whoever counted."""

MOST_TEXT_CHARS = 8_000
MOST_NAME_CHARS = 256
MOST_VECTOR_BYTES = 65_536
_SAID = len(LEVELS) + 1
"""Floats kept per model: quantiles of its answer, then its probability of success."""

Vector = NDArray[np.floating[Any]]
Floats = tuple[float, ...]
_NOTHING: Floats = (math.nan,) * len(LEVELS)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was known and predicted when a call arrived."""

    request: Request
    forecast: Forecast
    features: Vector | None
    embedding: Vector | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call; without a completion it failed, and there is nothing to learn.

    Attributes:
        flushes: For how many flushes it has waited for its forecast.
    """

    completion: Completion | None
    gpu: str = ""
    success: float | None = None
    flushes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A call whose outcome is known, as it is read back for training.

    Attributes:
        serial: Position in the order of outcomes, rising; answers to "what is fresh since?".
        max_output_tokens: The caller's cap: an answer that long was cut.
        success: Grade of the call itself in 0…1; ``None`` if nobody graded it.
        workflow_success: Grade of its workflow in 0…1; ``None`` if open or not graded.
        source: Which step of the fallback had answered.
        said_output: What was predicted of the answer of this model at ``LEVELS``, in tokens.
        said_success: What was predicted for the success of this model.
        text: The prompt, where the store was told to keep it.
        remaining_tokens: Output tokens of its workflow from this call on, itself included;
            ``None`` until the workflow is closed and all its calls have come back.
        remaining_calls: Calls that came back from this one on, itself included.
    """

    serial: int
    request_id: RequestId
    workflow_id: WorkflowId
    app: str
    template: str
    role: str
    step: str
    stage: int | None
    arrival_s: float
    finished_s: float
    model: ModelName
    gpu: str
    prompt_tokens: int
    max_output_tokens: int
    output_tokens: int
    tool_call: bool | None
    success: float | None
    workflow_success: float | None
    source: str
    said_output: Floats | None
    said_success: float | None
    said_remaining_tokens: Floats | None
    said_remaining_calls: Floats | None
    said_tool_call: float | None
    features: Vector | None
    embedding: Vector | None
    text: str | None
    remaining_tokens: int | None
    remaining_calls: int | None


def clean(name: str) -> str:
    """Make a name of any caller fit for a file: short, and without broken characters."""
    if len(name) <= MOST_NAME_CHARS and name.isascii():
        return name
    return name[:MOST_NAME_CHARS].encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class Names:
    """Makes what callers write fit for a file.

    Attributes:
        redactor: Takes out what no file shall hold; ``None`` leaves it.
    """

    redactor: Redactor | None

    def identity(self, name: str) -> str:
        """Return the id of a request or workflow as it is in the file."""
        return clean(name if self.redactor is None else self.redactor.identity(name))

    def word(self, name: str) -> str:
        """Return a name that says what kind of call it is."""
        return clean(name if self.redactor is None else self.redactor.word(name))

    def text(self, text: str) -> str:
        """Return what is kept of a prompt."""
        most = MOST_TEXT_CHARS
        kept = text[:most] if self.redactor is None else self.redactor.excerpt(text, most)
        return kept.encode("utf-8", "replace").decode("utf-8")


def absurd(answer: Answer) -> str:
    """Say what is wrong with an outcome; "" if nothing is.

    >>> absurd(Answer(Completion(model=ModelName("m"), output_tokens=-1)))
    'output_tokens=-1'
    """
    if answer.success is not None and not 0.0 <= answer.success <= 1.0:
        return f"success={answer.success}"
    completion = answer.completion
    if completion is None:
        return ""
    if not 0 <= completion.output_tokens <= MOST_TOKENS:
        return f"output_tokens={completion.output_tokens}"
    if not math.isfinite(completion.finished_s):
        return f"finished_s={completion.finished_s}"
    return ""


# Packing.


def pack_call(asked: Asked, names: Names) -> tuple[object, ...]:
    """Return the columns of ``CALL_COLUMNS``; raise ``ValueError`` where one makes no sense."""
    request, forecast = asked.request, asked.forecast
    if not math.isfinite(request.arrival_s):
        raise ValueError(f"arrival_s={request.arrival_s}")
    models = sorted({*forecast.output_tokens_on, *forecast.success})
    return (
        names.identity(request.request_id),
        names.identity(request.workflow_id),
        names.word(request.app),
        names.word(request.template),
        names.word(request.role),
        names.word(request.step),
        None if request.stage is None else _count(request.stage, "stage"),
        float(request.arrival_s),
        _count(request.prompt_tokens, "prompt_tokens"),
        _count(request.max_output_tokens, "max_output_tokens"),
        clean(forecast.source),
        json.dumps([clean(model) for model in models]),
        _pack_said(forecast, models),
        _pack_law(forecast.remaining_tokens),
        _pack_law(forecast.remaining_calls),
        _ratio(forecast.tool_call),
        _pack_vector(asked.features, "<f4"),
        _pack_vector(asked.embedding, "<f2"),
        None if asked.text is None else names.text(asked.text),
    )


CALL_COLUMNS = (
    *("request_id", "workflow_id", "app", "template", "role", "step", "stage", "arrival_s"),
    *("prompt_tokens", "max_output_tokens", "source", "said_models", "said"),
    *("said_remaining_tokens", "said_remaining_calls", "said_tool_call"),
    *("features", "embedding", "prompt_text"),
)


def pack_answer(answer: Answer) -> tuple[object, ...]:
    """Return the columns of ``ANSWER_COLUMNS``; all but the first two are null if it failed."""
    done = answer.completion
    success = None if answer.success is None else float(answer.success)
    if done is None:
        return (success, None, None, None, None, None)
    tool_call = None if done.tool_call is None else int(done.tool_call)
    gpu, model = clean(answer.gpu), clean(done.model)
    return (success, gpu, model, int(done.output_tokens), tool_call, float(done.finished_s))


ANSWER_COLUMNS = ("success", "gpu", "model", "output_tokens", "tool_call", "finished_s")


def _count(value: float, name: str) -> int:
    if not 0 <= value <= MOST_TOKENS:
        raise ValueError(f"{name}={value}")
    return int(value)


def _ratio(value: float | None) -> float | None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"probability={value}")
    return value


def _floats_of(law: Quantiles | None) -> Floats:
    if law is None:
        return _NOTHING
    same = law.levels == LEVELS
    values = law.values if same else tuple(law.at(level) for level in LEVELS)
    if not all(0.0 <= value < math.inf for value in values):
        raise ValueError("a forecast is negative or not a number")
    return values


def _pack_floats(values: Floats) -> bytes:
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except OverflowError:
        raise ValueError("a forecast is out of range") from None


def _pack_law(law: Quantiles | None) -> bytes | None:
    return None if law is None else _pack_floats(_floats_of(law))


def _pack_said(forecast: Forecast, models: list[ModelName]) -> bytes | None:
    """Pack what holds for any model, then a line per model with an entry of its own.

    Which of them will serve is not known yet.
    """
    if forecast.output_tokens is None and not models:
        return None
    values = [*_floats_of(forecast.output_tokens), math.nan]
    for model in models:
        success = _ratio(forecast.success.get(model))
        values.extend(_floats_of(forecast.output_tokens_on.get(model)))
        values.append(math.nan if success is None else success)
    return _pack_floats(tuple(values))


def _pack_vector(vector: Vector | None, kind: str) -> bytes | None:
    if vector is None:
        return None
    with np.errstate(over="ignore"):
        packed = np.asarray(vector).astype(kind)
    if packed.nbytes > MOST_VECTOR_BYTES or not np.isfinite(packed).all():
        raise ValueError("a vector is too long or holds no numbers")
    return packed.tobytes()


# Unpacking.


def unpack_floats(packed: bytes | None) -> Floats | None:
    """Read what ``pack_call`` wrote of a law; ``None`` where none had been predicted."""
    if packed is None:
        return None
    values = struct.unpack(f"<{len(packed) // 4}f", packed)
    return None if math.isnan(values[0]) else values


def unpack_said(
    packed: bytes | None, models: str, model: str
) -> tuple[Floats | None, float | None]:
    """Read what had been predicted of the model that served: its answer, its success."""
    if packed is None:
        return None, None
    names = json.loads(models)
    width = 4 * _SAID
    lines = [packed[i : i + width] for i in range(0, len(packed), width)]
    own = lines[1 + names.index(model)] if model in names else lines[0]
    (success,) = struct.unpack("<f", own[-4:])
    law = unpack_floats(own[:-4]) or unpack_floats(lines[0][:-4])
    return law, None if math.isnan(success) else success


def unpack_vector(packed: bytes | None, kind: str) -> Vector | None:
    """Read a vector, as float32."""
    return None if packed is None else np.frombuffer(packed, dtype=kind).astype(np.float32)
