"""A workflow while it runs: which calls may be made next."""

from concertmaster.core.request import ModelName
from concertmaster.workload.plan import Call, WorkflowPlan


class WorkflowProgress:
    """Unfolds a plan call by call; a call is shown once all it waits for has finished."""

    def __init__(self, plan: WorkflowPlan) -> None:
        self.plan = plan
        self.served_by: dict[int, ModelName] = {}
        self._missing = {call.stage: len(call.parents) for call in plan.calls}
        self._children: dict[int, list[Call]] = {}
        for call in plan.calls:
            for parent in call.parents:
                self._children.setdefault(parent, []).append(call)
        self._left = len(plan.calls)

    def first(self) -> list[Call]:
        """Return the calls that wait for nothing."""
        return [call for call in self.plan.calls if not call.parents]

    def finish(self, stage: int, model: ModelName) -> list[Call]:
        """Note that a call was answered by a model; return the calls this sets free."""
        self.served_by[stage] = model
        return self._settle(stage)

    def _settle(self, stage: int) -> list[Call]:
        """Take a call as done; a call that nobody needs any more is done at once."""
        self._left -= 1
        freed = []
        for child in self._children.get(stage, ()):
            self._missing[child.stage] -= 1
            if not self._missing[child.stage]:
                needed = child.is_called_for(self.success() or 0.0)
                freed += [child] if needed else self._settle(child.stage)
        return freed

    @property
    def is_complete(self) -> bool:
        """True once every call has been answered."""
        return self._left == 0

    def success(self) -> float | None:
        """Grade of the last graded call under the models that served; else as recorded."""
        for call in reversed(self.plan.calls):
            model = self.served_by.get(call.stage)
            if model is not None and model in call.outcomes:
                return call.outcomes[model].correct
        return self.plan.success
