"""Workflows of clients that send no identity, told from what their calls have in common.

A later turn repeats the earlier messages and adds to them. Where a client shortens what it
repeats, tool calls still carry the ids they had. Either is found with a confidence, which
docs/identity.md explains.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from concertmaster.core.request import WorkflowId
from concertmaster.gateway.identity import Identity

NEW, EXTENDS, ANSWERS_TOOL = 0.5, 0.9, 0.95
"""Confidence of a first call, of a prompt that extends another, of an answered tool call."""

_MAX_TWINS = 16
LATEST = 8
"""Messages at the end of a prompt whose tool calls are looked at."""

_TOOL_CALL_ID = re.compile(rb'"tool_call_id"\s*:\s*"([^"]{1,128})"')
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Place(NamedTuple):
    """A call that was seen: of which workflow, and its position there."""

    workflow_id: WorkflowId
    stage: int


class Trail(Protocol):
    """What is told of a prompt that names no workflow."""

    @property
    def ends(self) -> Sequence[int]:
        """Where each message ends, as a length and a checksum of all before."""

    def tool_calls(self, known: int) -> Sequence[bytes]:
        """Tool calls that the latest messages after the first ``known`` are about."""


class PromptTrail:
    """The trail of a prompt at hand.

    Args:
        text: Its raw JSON.
    """

    def __init__(self, text: memoryview) -> None:
        self._messages = _messages(text)
        self.ends: Sequence[int] = _ends(self._messages)

    def tool_calls(self, known: int) -> Sequence[bytes]:
        """Tool calls that the latest messages after the first ``known`` are about."""
        fresh = self._messages[known:][-LATEST:]
        return _TOOL_CALL_ID.findall(b"".join(map(bytes, fresh)))

    def by_message(self, latest: int) -> list[list[bytes]]:
        """Tool calls that each of the latest messages is about."""
        return [_TOOL_CALL_ID.findall(bytes(one)) for one in self._messages[-latest:]]


class WorkflowInference:
    """Remembers where recent prompts ended and which tool calls they were about.

    Args:
        max_prompts: Different prompts to remember.
        max_tool_calls: Tool-call ids to remember.
    """

    def __init__(self, *, max_prompts: int = 100_000, max_tool_calls: int = 100_000) -> None:
        self._max_prompts = max_prompts
        self._max_tool_calls = max_tool_calls
        self._ends: OrderedDict[int, list[_Place]] = OrderedDict()
        self._tool_calls: OrderedDict[bytes, _Place | None] = OrderedDict()
        self._count = 0

    def infer(self, text: memoryview) -> Identity:
        """Return the workflow that this prompt most likely goes on with, else a fresh one."""
        return self.follow(PromptTrail(text))

    def follow(self, trail: Trail) -> Identity:
        """Do so from what a prompt leaves of itself."""
        ends = trail.ends
        known = self._longest(ends[:-1])
        ids = trail.tool_calls(known)
        asked = self._by_tool_call(ids)
        if known:
            place, confidence = self._extend(ends[known - 1], asked), EXTENDS
        elif asked is not None:
            place, confidence = asked, ANSWERS_TOOL
        else:
            place, confidence = self._fresh(), NEW
        self._remember(ends[-1], place)
        self.note_tool_calls(ids, place.workflow_id, place.stage)
        return Identity(
            place.workflow_id, stage=place.stage, confidence=confidence, dialect="inferred"
        )

    def note_tool_calls(self, ids: Iterable[bytes], workflow_id: WorkflowId, stage: int) -> None:
        """Remember whose tool calls these are; an id that two workflows use tells nothing."""
        for tool_call_id in ids:
            known = self._tool_calls.pop(tool_call_id, _Place(workflow_id, stage))
            ours = known is not None and known.workflow_id == workflow_id
            self._tool_calls[tool_call_id] = _Place(workflow_id, stage) if ours else None
            if len(self._tool_calls) > self._max_tool_calls:
                self._tool_calls.popitem(last=False)

    def _fresh(self) -> _Place:
        self._count += 1
        return _Place(WorkflowId(f"inferred-{self._count}"), 0)

    def _by_tool_call(self, ids: Sequence[bytes]) -> _Place | None:
        for tool_call_id in reversed(ids):
            known = self._tool_calls.get(tool_call_id)
            if known is not None:
                return _Place(known.workflow_id, known.stage + 1)
        return None

    def _longest(self, ends: Sequence[int]) -> int:
        """Return how many leading messages are a prompt that was seen; 0 for none."""
        for count in range(len(ends), 0, -1):
            if ends[count - 1] in self._ends:
                return count
        return 0

    def _extend(self, end: int, asked: _Place | None) -> _Place:
        """Go on with the prompt that ended here; of twins, with the one whose tools answer.

        Where no tool call tells them apart, it is the one that has waited longest.
        """
        twins = self._ends[end]
        self._ends.move_to_end(end)
        ours = asked.workflow_id if asked else None
        chosen = next((i for i, twin in enumerate(twins) if twin.workflow_id == ours), 0)
        place = twins.pop(chosen) if len(twins) > 1 else twins[chosen]
        return _Place(place.workflow_id, place.stage + 1)

    def _remember(self, end: int, place: _Place) -> None:
        twins = self._ends.setdefault(end, [])
        self._ends.move_to_end(end)
        if place not in twins and len(twins) < _MAX_TWINS:
            twins.append(place)
        if len(self._ends) > self._max_prompts:
            self._ends.popitem(last=False)


def _messages(text: memoryview) -> Sequence[memoryview | msgspec.Raw]:
    """Split a prompt into its messages; a prompt that is no list is one message."""
    try:
        return _split(text) or (text,)
    except msgspec.ValidationError:
        return (text,)


def _ends(messages: Sequence[memoryview | msgspec.Raw]) -> list[int]:
    """Length and checksum of all up to each message's end, as one number.

    >>> [end >> 32 for end in _ends([memoryview(b"abc"), memoryview(b"de")])]
    [3, 5]
    """
    found: list[int] = []
    length = checksum = 0
    for message in messages:
        checksum = zlib.crc32(message, checksum)
        length += len(message)
        found.append(length << 32 | checksum)
    return found
