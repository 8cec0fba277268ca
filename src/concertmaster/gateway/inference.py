"""Workflows of clients that send no identity, told from what their calls have in common.

A later turn repeats the earlier messages and adds to them. Where a client shortens what it
repeats, tool calls still carry the ids they had. Where it keeps all in one message, that one
grows. Each is found with a confidence, which docs/identity.md explains.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.gateway.growth import Growth, Place, add_twin
from concertmaster.gateway.identity import Identity

NEW, GROWS, EXTENDS, ANSWERS_TOOL = 0.5, 0.7, 0.9, 0.95
"""Confidence of a first call, of a text that goes on with another, of a prompt that extends
another, of an answered tool call; shared out where several workflows sent the same prompt."""

SILENT_S = 600.0
"""A call that nobody went on with for so long is no candidate beside one that is fresher."""

_LATEST = 8
"""Messages at the end of a prompt whose tool calls are looked at."""

_MOST_GROWING = 3
"""A prompt of more messages than this grows by messages, not within its last one."""

_TOOL_CALL_ID = re.compile(rb'"tool_call_id"\s*:\s*"([^"]{1,128})"')
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


class WorkflowInference:
    """Remembers where recent prompts ended and which tool calls they were about.

    Calls of different tenants are never put together.

    Args:
        max_prompts: Different prompts to remember.
        max_tool_calls: Tool-call ids to remember.
    """

    def __init__(self, *, max_prompts: int = 100_000, max_tool_calls: int = 100_000) -> None:
        self._max_prompts = max_prompts
        self._max_tool_calls = max_tool_calls
        self._ends: OrderedDict[int, list[Place]] = OrderedDict()
        self._growth = Growth(max_prompts)
        self._tool_calls: OrderedDict[tuple[str, bytes], Place | None] = OrderedDict()
        self._count = 0

    def infer(
        self, text: memoryview, *, request_id: str = "", tenant: str = "", now_s: float = 0.0
    ) -> Identity:
        """Return the workflow that this prompt most likely goes on with, else a fresh one.

        Args:
            text: Raw JSON of the messages.
            request_id: What the call is named; later ones find it as their parent.
            tenant: Who sent it.
            now_s: The instant.
        """
        messages = _messages(text)
        root = zlib.crc32(tenant.encode())
        ends = _ends(messages, root)
        known = self._longest(ends[:-1])
        fresh = messages[known:][-_LATEST:]
        ids = _TOOL_CALL_ID.findall(b"".join(map(bytes, fresh)))
        asked = self._by_tool_call(ids, tenant)
        before = ends[-2] if len(ends) > 1 else root
        may_grow = len(messages) <= _MOST_GROWING
        last = bytes(messages[-1]) if may_grow else b""
        parent: Place | None = None
        if known:
            self._ends.move_to_end(ends[known - 1])
            parent, odds = _next_of(self._ends[ends[known - 1]], asked, now_s)
            confidence = EXTENDS * odds
        elif asked is not None:
            parent, confidence = asked, ANSWERS_TOOL
        elif may_grow and (grown := self._growth.find(before, last)):
            parent, odds = _next_of(grown, None, now_s)
            confidence = GROWS * odds
        else:
            confidence = NEW
        place = self._after(parent, RequestId(request_id), now_s)
        self._remember(ends[-1], place)
        if may_grow:
            self._growth.add(before, last, place)
        self._note(ids, tenant, place)
        parents = (parent.request_id,) if parent is not None and parent.request_id else ()
        return Identity(
            place.workflow_id,
            stage=place.stage,
            parents=parents,
            confidence=confidence,
            dialect="inferred",
        )

    def note_tool_calls(
        self,
        ids: Iterable[bytes],
        workflow_id: WorkflowId,
        stage: int,
        *,
        request_id: str = "",
        tenant: str = "",
    ) -> None:
        """Remember whose tool calls these are; an id that two workflows use tells nothing."""
        self._note(ids, tenant, Place(workflow_id, stage, RequestId(request_id)))

    def _note(self, ids: Iterable[bytes], tenant: str, place: Place) -> None:
        for tool_call_id in ids:
            key = (tenant, tool_call_id)
            known = self._tool_calls.pop(key, place)
            ours = known is not None and known.workflow_id == place.workflow_id
            self._tool_calls[key] = place if ours else None
            if len(self._tool_calls) > self._max_tool_calls:
                self._tool_calls.popitem(last=False)

    def _after(self, parent: Place | None, request_id: RequestId, now_s: float) -> Place:
        """Return the place after a parent; without one, the first of another workflow."""
        if parent is not None:
            return Place(parent.workflow_id, parent.stage + 1, request_id, now_s)
        self._count += 1
        return Place(WorkflowId(f"inferred-{self._count}"), 0, request_id, now_s)

    def _by_tool_call(self, ids: Sequence[bytes], tenant: str) -> Place | None:
        for tool_call_id in reversed(ids):
            known = self._tool_calls.get((tenant, tool_call_id))
            if known is not None:
                return known
        return None

    def _longest(self, ends: Sequence[int]) -> int:
        """Return how many leading messages are a prompt that was seen; 0 for none."""
        for count in range(len(ends), 0, -1):
            if ends[count - 1] in self._ends:
                return count
        return 0

    def _remember(self, end: int, place: Place) -> None:
        add_twin(self._ends.setdefault(end, []), place)
        self._ends.move_to_end(end)
        if len(self._ends) > self._max_prompts:
            self._ends.popitem(last=False)


def _next_of(twins: list[Place], asked: Place | None, now_s: float) -> tuple[Place, float]:
    """Choose whom a prompt goes on with, of those that sent the same one before; and its odds.

    That is the one whose tool call it answers, else of those still awake the one that has
    waited longest, as likely as any of their workflows; where all are silent, the latest.
    Others may branch off, so the last one stays until the same prompt is sent again.
    """
    ours = asked.workflow_id if asked else None
    awake = [i for i, twin in enumerate(twins) if now_s - twin.seen_s <= SILENT_S]
    likely = awake[0] if awake else len(twins) - 1
    told = next((i for i, twin in enumerate(twins) if twin.workflow_id == ours), None)
    chosen = likely if told is None else told
    rivals = len({twins[i].workflow_id for i in awake}) if told is None else 1
    place = twins.pop(chosen)
    if not twins:
        twins.append(place._replace(followed=True))
    return place, 1 / max(1, rivals)


def _messages(text: memoryview) -> Sequence[memoryview | msgspec.Raw]:
    """Split a prompt into its messages; a prompt that is no list is one message."""
    try:
        return _split(text) or (text,)
    except msgspec.ValidationError:
        return (text,)


def _ends(messages: Sequence[memoryview | msgspec.Raw], root: int = 0) -> list[int]:
    """Length and checksum of all up to each message's end, as one number.

    >>> [end >> 32 for end in _ends([memoryview(b"abc"), memoryview(b"de")])]
    [3, 5]
    """
    found: list[int] = []
    length, checksum = 0, root
    for message in messages:
        checksum = zlib.crc32(message, checksum)
        length += len(message)
        found.append(length << 32 | checksum)
    return found
