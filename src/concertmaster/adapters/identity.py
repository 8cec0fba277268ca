"""What a workflow says of itself to the gateway: the headers of docs/identity.md."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """One goal of a user, and all the calls that serve it.

    Attributes:
        workflow_id: Alike in all its calls, and in no other's.
        app: The application it belongs to.
        template: Its shape, alike in all workflows of that shape.
        service_class: Whether a person waits.
        deadline_ms: Milliseconds from each call's arrival by which its last token is due.
    """

    workflow_id: str
    app: str = ""
    template: str = ""
    service_class: Literal["", "interactive", "batch"] = ""
    deadline_ms: int | None = None

    def headers(self, *, agent: str = "", role: str = "", step: str = "") -> dict[str, str]:
        """Return the headers of its calls, or of those of one agent in one role.

        >>> Workflow(workflow_id="trip-7").headers(role="planner")
        {'x-concertmaster-workflow-id': 'trip-7', 'x-concertmaster-role': 'planner'}
        """
        found = {
            "workflow-id": self.workflow_id,
            "app": self.app,
            "template": self.template,
            "class": self.service_class,
            "deadline-ms": "" if self.deadline_ms is None else str(self.deadline_ms),
            "agent": agent,
            "role": role,
            "step": step,
        }
        return {f"x-concertmaster-{name}": value for name, value in found.items() if value}
