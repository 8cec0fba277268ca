"""Workflows of clients that send no identity, told from what their calls have in common.

A later turn repeats the earlier prompt and adds to it, and answers tool calls by their ids.
Both are looked for; what is found carries a confidence.
"""

import re
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import NamedTuple

from concertmaster.core.request import WorkflowId
from concertmaster.gateway.identity import Identity

_SHORTEST_OPENING = 32
_LONGEST_OPENING = 131_072
_TAILS_EACH = 16
_TOOL_CALL_ID = re.compile(rb'"tool_call_id"\s*:\s*"([^"]{1,128})"')

NEW, EXTENDS, ANSWERS_TOOL = 0.5, 0.9, 0.95
"""Confidence of a first call, of a prompt that extends another, of an answered tool call."""


class _Tail(NamedTuple):
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
        self._tails: OrderedDict[int, deque[_Tail]] = OrderedDict()
        self._tool_calls: OrderedDict[bytes, tuple[WorkflowId, int]] = OrderedDict()
        self._count = 0

    def infer(self, text: memoryview) -> Identity:
        """Return the workflow that this prompt most likely goes on with, else a fresh one."""
        openings = _openings(text)
        found = self._by_tool_call(text) or self._by_prefix(text, openings)
        workflow_id, stage, confidence = found or (self._fresh(), 0, NEW)
        if openings:
            self._remember(text, openings[-1], workflow_id, stage)
        return Identity(workflow_id, stage=stage, confidence=confidence, dialect="inferred")

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
        if not self._tool_calls:
            return None
        ids = _TOOL_CALL_ID.findall(text)
        known = self._tool_calls.get(ids[-1]) if ids else None
        return None if known is None else (known[0], known[1] + 1, ANSWERS_TOOL)

    def _by_prefix(
        self, text: memoryview, openings: list[int]
    ) -> tuple[WorkflowId, int, float] | None:
        """Find the longest remembered prompt that this one begins with and goes beyond."""
        best: _Tail | None = None
        longest = len(text) - 2
        for opening in openings:
            for tail in self._tails.get(opening, ()):
                if tail[0] > longest or (best is not None and tail[0] <= best[0]):
                    continue
                if zlib.crc32(text[: tail[0]]) == tail[1]:
                    best = tail
        return None if best is None else (best.workflow_id, best.stage + 1, EXTENDS)

    def _remember(self, text: memoryview, opening: int, workflow_id: WorkflowId, stage: int) -> None:
        """Keep where this prompt ends, without the bracket that closes its list."""
        length = len(text) - 1
        tail = _Tail(length, zlib.crc32(text[:length]), workflow_id, stage)
        tails = self._tails.get(opening)
        if tails is None:
            tails = self._tails[opening] = deque(maxlen=_TAILS_EACH)
            if len(self._tails) > self._max_openings:
                self._tails.popitem(last=False)
        elif tails[-1][:2] == tail[:2]:
            tails.pop()
        tails.append(tail)


def _openings(text: memoryview) -> list[int]:
    """Keys of the first 32, 128, 512, … bytes, as far as the prompt goes without its bracket.

    A prompt is remembered under its longest opening, which every extension of it shares.

    >>> len(_openings(memoryview(bytes(200))))
    2
    """
    found: list[int] = []
    last = min(len(text) - 1, _LONGEST_OPENING)
    size, start, checksum = _SHORTEST_OPENING, 0, 0
    while size <= last:
        checksum = zlib.crc32(text[start:size], checksum)
        found.append(checksum << 32 | size)
        start, size = size, 4 * size
    return found
