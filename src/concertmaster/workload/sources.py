"""One selected part of a file, before arrivals are settled and parts are merged."""

from collections.abc import Sequence
from dataclasses import dataclass

from concertmaster.core.errors import InputError
from concertmaster.core.request import ServiceClass
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Workflows of one ``-w``.

    Attributes:
        timed: Whether ``arrival_s`` of its plans was recorded; if not, all are 0.
    """

    name: str
    plans: Sequence[WorkflowPlan]
    timed: bool
    notes: tuple[str, ...] = ()


def service_classes(table: Table) -> list[ServiceClass]:
    """Read the column ``service_class``: interactive where nothing is said."""
    known = {member.value: member for member in ServiceClass}
    classes = []
    for row, text in enumerate(table.texts("service_class")):
        if text and text not in known:
            raise table.error(row, "service_class", " or ".join(known))
        classes.append(known[text or ServiceClass.INTERACTIVE])
    return classes


def all_or_none_timed(table: Table, arrivals_s: Sequence[float | None], column: str) -> bool:
    """Tell whether arrivals are recorded; raise if only some of them are."""
    missing = [row for row, arrival_s in enumerate(arrivals_s) if arrival_s is None]
    if not missing:
        return True
    if len(missing) == len(arrivals_s):
        return False
    raise table.error(missing[0], column, "an arrival in every row or in none")


def bad_stage(table: Table, row: int, workflow_id: str, problem: str, remedy: str) -> InputError:
    """Build the complaint about one call of a workflow."""
    where = f'{table.where(row)}, workflow "{workflow_id}"'
    return InputError(table.file, where, problem, remedy)
