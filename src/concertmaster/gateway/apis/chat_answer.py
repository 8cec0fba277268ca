"""An engine's chat completion, whole or in chunks, read as parts that open, grow and close.

Anthropic's content blocks and OpenAI's output items have this same life, so both are written
from it.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

PartKind = Literal["text", "reasoning", "tool"]
DONE = b"[DONE]"


class BrokenAnswerError(ValueError):
    """The engine's answer failed, or is not what a chat completion looks like."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Reasoned(msgspec.Struct):
    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """Tokens as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: _Reasoned | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that needed no prefill, at most all."""
        details = self.prompt_tokens_details
        return min(self.prompt_tokens, (details and details.cached_tokens) or 0)

    @property
    def reasoning_tokens(self) -> int:
        """Output tokens that were thought."""
        details = self.completion_tokens_details
        return (details and details.reasoning_tokens) or 0


class _Chunk(msgspec.Struct):
    created: float | None = None
    model: str | None = None
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: object = None


@dataclass(eq=False)
class Part:
    """A stretch of an answer of one kind."""

    kind: PartKind
    position: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Everything so far; the arguments, of a tool call."""
        return "".join(self.pieces)

    def emptied(self) -> "Part":
        """Return it as it began: a chunk may hold its first piece too."""
        return Part(self.kind, self.position, self.call_id, self.name)


class Step(NamedTuple):
    """What happened to a part; ``text`` is what it grew by."""

    act: Literal["open", "grow", "close"]
    part: Part
    text: str = ""


_decode = msgspec.json.Decoder(_Chunk).decode


class ChatAnswer:
    """Reads one answer.

    Attributes:
        parts: In the order in which they began.
        finish_reason: Why it ended; empty until the engine has said so.
        stopped_by: The stop sequence that ended it, where the engine names it.
        created_s: Unix time that the engine gave it; 0.0 if it gave none.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.finish_reason = ""
        self.stopped_by: str | None = None
        self.usage = Usage()
        self.model = ""
        self.created_s = 0.0
        self._open: Part | None = None
        self._tools: dict[int, Part] = {}

    def feed(self, payload: bytes) -> list[Step]:
        """Take in a chunk, or a whole completion.

        Raises:
            BrokenAnswerError: It is an error, or no chunk.
        """
        try:
            chunk = _decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise BrokenAnswerError(f"the engine sent no chat completion: {error}") from None
        if chunk.error is not None:
            raise BrokenAnswerError(_problem(chunk.error))
        self._note(chunk)
        return [step for choice in chunk.choices or () for step in self._choice(choice)]

    def end(self) -> list[Step]:
        """Take in that nothing follows.

        Raises:
            BrokenAnswerError: The engine gave no reason for its end.
        """
        if not self.finish_reason:
            raise BrokenAnswerError("the engine ended its answer without a reason")
        return self._close()

    @property
    def asks_for_tools(self) -> bool:
        """Whether the caller is to run tools."""
        return bool(self._tools)

    def _note(self, chunk: _Chunk) -> None:
        self.model = self.model or chunk.model or ""
        self.created_s = self.created_s or chunk.created or 0.0
        self.usage = chunk.usage or self.usage

    def _choice(self, choice: _Choice) -> list[Step]:
        if choice.index:
            return []
        delta = choice.message or choice.delta
        steps = self._delta(delta) if delta is not None else []
        if choice.finish_reason:
            self.finish_reason = choice.finish_reason
            self.stopped_by = choice.stop_reason if isinstance(choice.stop_reason, str) else None
        return steps

    def _delta(self, delta: _Delta) -> list[Step]:
        steps: list[Step] = []
        if thought := delta.reasoning_content or delta.reasoning:
            steps += self._say("reasoning", thought)
        if text := delta.content or delta.refusal:
            steps += self._say("text", text)
        for at, call in enumerate(delta.tool_calls or ()):
            steps += self._tool(at if call.index is None else call.index, call)
        return steps

    def _say(self, kind: PartKind, text: str) -> list[Step]:
        steps: list[Step] = []
        if self._open is None or self._open.kind != kind:
            steps = self._begin(Part(kind, len(self.parts)))
        return [*steps, self._grow(text)]

    def _tool(self, index: int, call: _ToolCall) -> list[Step]:
        function = call.function or _Function()
        steps: list[Step] = []
        part = self._tools.get(index)
        if part is None:
            at = len(self.parts)
            part = Part("tool", at, call.id or f"call_{at}", function.name or "")
            self._tools[index] = part
            steps = self._begin(part)
        if not function.arguments:
            return steps
        if part is not self._open:
            raise BrokenAnswerError(f"the engine went back to tool call {index}")
        return [*steps, self._grow(function.arguments)]

    def _begin(self, part: Part) -> list[Step]:
        steps = self._close()
        self.parts.append(part)
        self._open = part
        return [*steps, Step("open", part)]

    def _grow(self, text: str) -> Step:
        assert self._open is not None
        self._open.pieces.append(text)
        return Step("grow", self._open, text)

    def _close(self) -> list[Step]:
        part, self._open = self._open, None
        return [] if part is None else [Step("close", part)]


def _problem(error: object) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or "the engine failed")[:1000]
