"""Whether enough workflows are done in time, known before a run is over.

A search for the highest rate asks only yes or no. The answer is certain once so many are done
in time that all others may be late, or so many are late that all others may be in time; what
would follow is not played.
"""

from collections.abc import Callable, Mapping, Sequence

from concertmaster.core.request import WorkflowId
from concertmaster.reproduce.window import middle_of
from concertmaster.workload.plan import WorkflowPlan, Workload
from concertmaster.workload.records import WorkflowRecord

Enough = Callable[[WorkflowRecord], bool]
"""Is shown each workflow that is over, and ends the run with a yes."""

Play = Callable[[Workload, int, Enough], object]
"""Plays a workload under a seed until it is enough."""


def attained(
    workloads: Mapping[int, Workload], play: Play, *, within_s: float, share: float
) -> bool:
    """Say whether of the middles of all workloads together a share is done in time.

    Args:
        workloads: By seed, played in this order as far as it takes.
        play: Plays one.
        within_s: From the arrival of a workflow to its end.
        share: Of 1; workflows that are lost are not done.
    """
    middles = {seed: middle_of(workload) for seed, workload in workloads.items()}
    asked = sum(map(len, middles.values()))
    needed = next(count for count in range(asked + 1) if count / asked >= share)
    tally = Tally(within_s=within_s, needed=needed, spare=asked - needed)
    for seed, workload in workloads.items():
        tally.begin(middles[seed])
        play(workload, seed, tally)
        tally.end()
        if tally.is_certain:
            break
    return tally.in_time >= needed


class Tally:
    """How many workflows were done in time, and how many can no longer be.

    Args:
        within_s: What counts as in time.
        needed: How many in time make a yes.
        spare: How many may be late; one more makes a no.
    """

    def __init__(self, *, within_s: float, needed: int, spare: int) -> None:
        self.in_time = 0
        self.late = 0
        self._within_s, self._needed, self._spare = within_s, needed, spare
        self._open: dict[WorkflowId, float] = {}

    @property
    def is_certain(self) -> bool:
        """Whether what follows changes nothing."""
        return self.in_time >= self._needed or self.late > self._spare

    def begin(self, asked: Sequence[WorkflowPlan]) -> None:
        """Watch for these, in order of arrival."""
        self._open = {plan.workflow_id: plan.arrival_s for plan in asked}

    def __call__(self, over: WorkflowRecord) -> bool:
        """Take in that a workflow is over; say whether the answer is certain."""
        assert over.finished_s is not None
        arrival_s = self._open.get(over.workflow_id)
        if arrival_s is not None and over.finished_s - arrival_s <= self._within_s:
            del self._open[over.workflow_id]
            self.in_time += 1
        self._give_up(over.finished_s)
        return self.is_certain

    def _give_up(self, now_s: float) -> None:
        """Count those as late whose time has passed."""
        for workflow_id, arrival_s in list(self._open.items()):
            if now_s - arrival_s <= self._within_s:
                return
            del self._open[workflow_id]
            self.late += 1

    def end(self) -> None:
        """Count those as late that were not seen to be in time."""
        self.late += len(self._open)
        self._open.clear()
