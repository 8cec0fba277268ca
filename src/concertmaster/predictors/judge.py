"""Which model would solve a prompt, and what the grades of whole workflows say of that.

A grade is that of a workflow, and several models may have answered in it. Each of them learns
from the first prompt that it answered there, which states the task before answers and tools
have added to it; and as much as its share of the calls, so that a workflow is one label.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.encoder import Encoder
from concertmaster.predictors.kept import Kept
from concertmaster.predictors.success import SuccessHead
from concertmaster.predictors.trunk import Floats

MOST_OPEN = 10_000
"""Calls whose answer, and workflows whose grade, is awaited."""

MOST_UNREAD = 2_000
"""Prompts to hold as they are. One is read once so many have come after it, or let go of unread
where nobody has ever graded."""

_K = TypeVar("_K")
_V = TypeVar("_V")


class _Traits:
    """Traits of a prompt, read once somebody asks; its text is let go of then.

    Args:
        text: The prompt.
        read: Gives its traits, packed.
    """

    __slots__ = ("_found", "_read", "_text")

    def __init__(self, text: str, read: Callable[[str], bytes]) -> None:
        self._text = text
        self._read = read
        self._found: bytes | None = None

    @property
    def read(self) -> bool:
        """Whether anybody has asked."""
        return self._found is not None

    def packed(self) -> bytes:
        """Return the traits as bytes: a third of what an array takes."""
        text = self._text
        found = self._found
        if found is None:  # threads may meet here: who finds no traits has the text in hand
            found = self._found = self._read(text)
            self._text = ""
        return found

    def __call__(self) -> Floats:
        return _unpacked(self.packed())


class _Held:
    """A prompt that a grade may rest on.

    Attributes:
        traits: Gives its traits; ``None`` once no grade can rest on it.
    """

    __slots__ = ("traits",)

    def __init__(self, traits: _Traits) -> None:
        self.traits: _Traits | None = traits


class _Part(NamedTuple):
    """What a model did in a workflow: the first prompt that it answered there, and its calls."""

    model: ModelName
    held: _Held
    calls: int


class Judge:
    """Says how likely each model solves a prompt, and learns from grades.

    A prompt is read once somebody asks for a chance or grades its workflow; nothing is embedded
    twice. So it costs nothing where nobody does either. Of old prompts traits are kept until the
    grade, if they are known or grades come; where none ever came, others are let go of.

    Args:
        head: Knows prompts and models.
        encoder: Makes the vectors that the head was fitted on.
        at_once: Whether each prompt is read at its arrival, because the encoder may be slow
            or fail: whoever asks for the forecast is prepared for that.
    """

    def __init__(self, head: SuccessHead, encoder: Encoder, *, at_once: bool = False) -> None:
        self.head = head
        self._at_once = at_once
        self._encoder = encoder
        self._traits = Kept(self._read)
        self._asked: OrderedDict[RequestId, _Held] = OrderedDict()
        self._unread: deque[_Held] = deque()
        self._has_grades = False
        self._parts: OrderedDict[WorkflowId, tuple[_Part, ...]] = OrderedDict()

    def __call__(self, text: str, models: Sequence[ModelName]) -> dict[ModelName, float]:
        """Return the chance of each model that is known, or whose name tells something."""
        return self.head.predict_from(_unpacked(self._traits.of(text)), models)

    def foresee(
        self, request: Request, text: str, models: Sequence[ModelName]
    ) -> Mapping[ModelName, float]:
        """Answer, and keep hold of the prompt until its call is answered."""
        traits = _Traits(text, self._traits.of)
        if self._at_once:
            traits.packed()
        held = _Held(traits)
        _keep(self._asked, request.request_id, held)
        self._hold(held)
        return self.head.foresee(traits, models)

    def _hold(self, held: _Held) -> None:
        """Hold one more; the oldest is read if grades come, and let go of if they never did."""
        self._unread.append(held)
        if len(self._unread) > MOST_UNREAD:
            oldest = self._unread.popleft()
            traits = oldest.traits
            if traits is not None and not traits.read:
                if self._has_grades:
                    traits.packed()
                else:
                    oldest.traits = None

    def answered(self, request: Request, model: ModelName) -> None:
        """Take in which model answered a call; the grade of its workflow comes later."""
        held = self._asked.pop(request.request_id, None)
        if held is None:
            return
        parts = self._parts.get(request.workflow_id, ())
        if any(part.model == model for part in parts):
            held.traits = None
            parts = tuple([_counted(part) if part.model == model else part for part in parts])
        else:
            parts = (*parts, _Part(model, held, 1))
        _keep(self._parts, request.workflow_id, parts)

    def failed(self, request_id: RequestId) -> None:
        """Let go of the prompt of a call that no answer will come of."""
        held = self._asked.pop(request_id, None)
        if held is not None:
            held.traits = None

    def graded(self, workflow_id: WorkflowId, grade: float) -> None:
        """Teach every model that answered in a workflow, together as much as one label."""
        self._has_grades = True
        parts = self._parts.pop(workflow_id, ())
        calls = sum(part.calls for part in parts)
        for model, held, count in parts:
            if held.traits is not None:
                self.head.learn_from(held.traits(), model, grade, worth=count / calls)
                held.traits = None

    def _read(self, text: str) -> bytes:
        return self.head.traits(text, self._encoder.encode([text])[0]).tobytes()


def _counted(part: _Part) -> _Part:
    """Add a call."""
    return _Part(part.model, part.held, part.calls + 1)


def _unpacked(traits: bytes) -> Floats:
    return np.frombuffer(traits, np.float32)


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    """Put a value last, and let go of the first where there are too many."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > MOST_OPEN:
        kept.popitem(last=False)
