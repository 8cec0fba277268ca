"""Is a workflow's graph sound, and in which order can its calls be made?"""

import heapq
from collections.abc import Mapping, Sequence


class GraphError(ValueError):
    """Stages that cannot all be reached.

    Attributes:
        stage: The stage to look at.
        remedy: What would mend it.
    """

    def __init__(self, stage: int, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.stage = stage
        self.remedy = remedy


def topological(parents: Mapping[int, Sequence[int]]) -> list[int]:
    """Order stages so that parents come first; the smallest stage number goes first.

    >>> topological({0: (), 3: (0,), 1: (3,), 2: (0,)})
    [0, 2, 3, 1]
    """
    waiting = {stage: len(set(waits)) for stage, waits in parents.items()}
    children: dict[int, list[int]] = {stage: [] for stage in parents}
    for stage, waits in parents.items():
        for parent in dict.fromkeys(waits):
            if parent not in children:
                raise _no_such_parent(stage, parent, sorted(parents))
            children[parent].append(stage)
    ready = [stage for stage, count in waiting.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        stage = heapq.heappop(ready)
        order.append(stage)
        for child in children[stage]:
            waiting[child] -= 1
            if not waiting[child]:
                heapq.heappush(ready, child)
    if len(order) < len(parents):
        raise _cycle(parents, set(order))
    return order


def _no_such_parent(stage: int, parent: int, stages: Sequence[int]) -> GraphError:
    known = ", ".join(map(str, stages[:8])) + (", …" if len(stages) > 8 else "")
    return GraphError(
        stage,
        f"expected stage {stage} to wait for stages of its workflow ({known}), found {parent}",
        "mend parents, or add that stage",
    )


def _cycle(parents: Mapping[int, Sequence[int]], done: set[int]) -> GraphError:
    """Name one cycle: walk up from a stuck stage until one comes twice."""
    stage = min(stage for stage in parents if stage not in done)
    path: list[int] = []
    while stage not in path:
        path.append(stage)
        stage = min(parent for parent in parents[stage] if parent not in done)
    ring = [*path[path.index(stage) :], stage]
    return GraphError(
        min(ring),
        f"expected parents without a cycle, found {' waits for '.join(map(str, ring))}",
        "remove one of these dependencies",
    )
