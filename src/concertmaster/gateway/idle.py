"""Which workflows are over: their client said so, or they have been idle for long."""

from collections import OrderedDict

from concertmaster.core.request import WorkflowId

IDLE_S = 600.0
"""A workflow without an open call for this long is taken to be over."""

MAX_WORKFLOWS = 100_000


class _Life:
    """One workflow since it was last heard of."""

    __slots__ = ("is_final", "open_calls", "seen_s")

    def __init__(self, now_s: float) -> None:
        self.seen_s = now_s
        self.open_calls = 0
        self.is_final = False


class IdleWatch:
    """Notes calls by workflow and names each workflow once when it is over.

    Args:
        idle_s: After the last call of a workflow has its outcome.
        most: Beyond this many workflows, the longest idle ones are over earlier.
    """

    def __init__(self, *, idle_s: float = IDLE_S, most: int = MAX_WORKFLOWS) -> None:
        self._idle_s = idle_s
        self._most = most
        self._lives: OrderedDict[WorkflowId, _Life] = OrderedDict()
        self._final: dict[WorkflowId, None] = {}

    def __len__(self) -> int:
        return len(self._lives)

    def begin(self, now_s: float, workflow_id: WorkflowId, *, is_final: bool = False) -> None:
        """Note a call; ``is_final`` if its client says that no other will follow."""
        life = self._lives.get(workflow_id)
        if life is None:
            life = self._lives[workflow_id] = _Life(now_s)
        life.open_calls += 1
        life.is_final = is_final
        self._final.pop(workflow_id, None)

    def settle(self, now_s: float, workflow_id: WorkflowId) -> None:
        """Note that a call has its outcome."""
        life = self._lives[workflow_id]
        life.open_calls -= 1
        life.seen_s = now_s
        self._lives.move_to_end(workflow_id)
        if life.is_final and not life.open_calls:
            self._final[workflow_id] = None

    def end(self, workflow_id: WorkflowId) -> bool:
        """Take it from outside that a workflow is over; say whether it was live and is forgotten.

        One with an open call is over once that has its outcome.
        """
        life = self._lives.get(workflow_id)
        if life is None:
            return False
        if life.open_calls:
            life.is_final = True
            return False
        del self._lives[workflow_id]
        self._final.pop(workflow_id, None)
        return True

    def over(self, now_s: float) -> list[WorkflowId]:
        """Name the workflows that are over by now, and forget them; ask now and then."""
        found = list(self._final)
        self._final.clear()
        for workflow_id in found:
            del self._lives[workflow_id]
        for _ in range(len(self._lives)):
            workflow_id, life = next(iter(self._lives.items()))
            if life.seen_s + self._idle_s > now_s and len(self._lives) <= self._most:
                break
            if life.open_calls:
                life.seen_s = now_s
                self._lives.move_to_end(workflow_id)
            else:
                del self._lives[workflow_id]
                found.append(workflow_id)
        return found
