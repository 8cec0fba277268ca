"""Workflows of clients that send no identity, told from what their calls have in common.

A later turn repeats the earlier prompt and adds to it, and answers tool calls by their ids.
Both are looked for; what is found carries a confidence.
"""

import re
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from concertmaster.core.request import WorkflowId
from concertmaster.gateway.identity import Identity

_SHORTEST_OPENING = 32
_LONGEST_OPENING = 65_536
_TAILS_EACH = 16
_TOOL_CALL_ID = re.compile(rb'"tool_call_id"\s*:\s*"([^"]{1,128})"')

NEW, EXTENDS, ANSWERS_TOOL = 0.5, 0.9, 0.95
"""Confidence of a first call, of a prompt that extends another, of an answered tool call."""


@dataclass(slots=True)
class _Tail:
    """Where a prompt ended: a prompt that goes on from here is the next turn."""

    length: int
    checksum: int
    workflow_id: WorkflowId
    stage: int


class WorkflowInference:
    """Remembers the ends of recent prompts and the tool calls of recent answers.

    Args:
        max_openings: Different prompt openings to remember.
        max_tool_calls: Tool-call ids to remember.
    """

    def __init__(self, *, max_openings: int = 10_000, max_tool_calls: int = 100_000) -> None:
        self._max_openings = max_openings
        self._max_tool_calls = max_tool_calls
        self._tails: OrderedDict[tuple[int, int], deque[_Tail]] = OrderedDict()
        self._tool_calls: OrderedDict[bytes, tuple[WorkflowId, int]] = OrderedDict()
        self._count = 0

    def infer(self, text: memoryview) -> Identity:
        """Return the workflow that this prompt most likely goes on with, else a fresh one."""
        workflow_id, stage, confidence = (
            self._by_tool_call(text)
            or self._by_prefix(text)
            or (
                self._fresh(),
                0,
                NEW,
            )
        )
        self._remember(text, workflow_id, stage)
        return Identity(
            workflow_id=workflow_id, stage=stage, confidence=confidence, dialect="inferred"
        )

    def note_tool_calls(self, ids: Iterable[bytes], workflow_id: WorkflowId, stage: int) -> None:
        """Remember the tool calls that an answer asked for."""
        for tool_call_id in ids:
            self._tool_calls[tool_call_id] = (workflow_id, stage)
            if len(self._tool_calls) > self._max_tool_calls:
                self._tool_calls.popitem(last=False)

    def _fresh(self) -> WorkflowId:
        self._count += 1
        return WorkflowId(f"inferred-{self._count}")

    def _by_tool_call(self, text: memoryview) -> tuple[WorkflowId, int, float] | None:
        ids = _TOOL_CALL_ID.findall(text)
        known = self._tool_calls.get(ids[-1]) if ids else None
        return None if known is None else (known[0], known[1] + 1, ANSWERS_TOOL)

    def _by_prefix(self, text: memoryview) -> tuple[WorkflowId, int, float] | None:
        """Find the longest remembered prompt that this one begins with and goes beyond."""
        best: _Tail | None = None
        for opening in _openings(text):
            for tail in self._tails.get(opening, ()):
                longer = tail.length < len(text) - 1 and (best is None or tail.length > best.length)
                if longer and zlib.crc32(text[: tail.length]) == tail.checksum:
                    best = tail
        return None if best is None else (best.workflow_id, best.stage + 1, EXTENDS)

    def _remember(self, text: memoryview, workflow_id: WorkflowId, stage: int) -> None:
        """Keep where this prompt ends, without the bracket that closes its list."""
        length = max(0, len(text) - 1)
        openings = _openings(text[:length])
        if not openings:
            return
        tails = self._tails.get(openings[-1])
        if tails is None:
            tails = self._tails[openings[-1]] = deque(maxlen=_TAILS_EACH)
            if len(self._tails) > self._max_openings:
                self._tails.popitem(last=False)
        else:
            self._tails.move_to_end(openings[-1])
        tails.append(_Tail(length, zlib.crc32(text[:length]), workflow_id, stage))


def _openings(text: memoryview) -> list[tuple[int, int]]:
    """Length and checksum of the first 32, 64, 128, … bytes, as far as the prompt goes.

    A prompt is remembered under its longest opening, which every extension of it shares.

    >>> len(_openings(memoryview(bytes(100))))
    2
    """
    found: list[tuple[int, int]] = []
    size, start, checksum = _SHORTEST_OPENING, 0, 0
    while size <= min(len(text), _LONGEST_OPENING):
        checksum = zlib.crc32(text[start:size], checksum)
        found.append((size, checksum))
        start, size = size, 2 * size
    return found
