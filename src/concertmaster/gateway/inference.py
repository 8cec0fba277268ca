"""Workflows of clients that send no identity, told from what their calls have in common.

A later turn repeats the earlier messages and adds to them. Where a client shortens what it
repeats, tool calls still carry the ids they had. Where it keeps all in one message, that one
grows. Each is found with a confidence, which docs/identity.md explains.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from concertmaster.core.request import RequestId, WorkflowId
from concertmaster.gateway.growth import Growth, Place, add_twin
from concertmaster.gateway.identity import Identity
from concertmaster.gateway.trails import PromptTrail, Trail, root_of

NEW, GROWS, EXTENDS, ANSWERS_TOOL = 0.5, 0.7, 0.9, 0.95
"""Confidence of a first call, of a text that goes on with another, of a prompt that extends
another, of an answered tool call; shared out where several workflows sent the same prompt."""

SILENT_S = 600.0
"""A call that nobody went on with for so long is no candidate beside one that is fresher."""


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
        trail = PromptTrail(text, tenant)
        return self.follow(trail, request_id=request_id, tenant=tenant, now_s=now_s)

    def follow(self, trail: Trail, *, request_id: str, tenant: str, now_s: float) -> Identity:
        """Do so from what a prompt leaves of itself."""
        ends, last = trail.ends, trail.last
        known = self._longest(ends[:-1])
        ids = trail.tool_calls(known)
        asked = self._by_tool_call(ids, tenant)
        before = ends[-2] if len(ends) > 1 else root_of(tenant)
        parent: Place | None = None
        if known:
            self._ends.move_to_end(ends[known - 1])
            parent, odds = _next_of(self._ends[ends[known - 1]], asked, now_s)
            confidence = EXTENDS * odds
        elif asked is not None:
            parent, confidence = asked, ANSWERS_TOOL
        elif last and (grown := self._growth.find(before, last)):
            parent, odds = _next_of(grown, None, now_s)
            confidence = GROWS * odds
        else:
            confidence = NEW
        place = self._after(parent, RequestId(request_id), now_s)
        self._remember(ends[-1], place)
        if last:
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
