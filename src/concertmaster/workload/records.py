"""What came of every call and workflow of a run: the rows that a report is made of."""

from dataclasses import dataclass, field
from typing import Literal

from concertmaster.core.request import RequestId, ServiceClass, WorkflowId

CallOutcome = Literal["served", "rejected", "failed"]


@dataclass(slots=True, kw_only=True)
class CallRecord:
    """One call, from acceptance to its outcome; instants on the clock of the run.

    Attributes:
        dispatched_s: First dispatch; ``None`` if it never was.
        reason: Why it was refused or failed; "" if it was served.
    """

    request_id: RequestId
    workflow_id: WorkflowId
    role: str
    service_class: ServiceClass
    arrival_s: float
    prompt_tokens: int
    deadline_s: float | None
    model: str = ""
    replica_id: str = ""
    dispatched_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    output_tokens: int = 0
    outcome: CallOutcome = "failed"
    reason: str = ""

    @property
    def met(self) -> bool:
        """Served, and in time if a time was promised."""
        if self.outcome != "served" or self.finished_s is None:
            return False
        return self.deadline_s is None or self.finished_s <= self.deadline_s


@dataclass(slots=True, kw_only=True)
class WorkflowRecord:
    """One workflow: it is as good as its last answer.

    Attributes:
        finished_s: When the last call was answered; ``None`` if one of them was not.
        success: Grade in 0…1, ``None`` if nobody graded it.
    """

    workflow_id: WorkflowId
    app: str
    service_class: ServiceClass
    arrival_s: float
    deadline_s: float | None
    finished_s: float | None = None
    outcome: Literal["completed", "rejected", "failed"] = "failed"
    success: float | None = None

    @property
    def met(self) -> bool:
        """Completed, and in time if a time was promised."""
        if self.outcome != "completed" or self.finished_s is None:
            return False
        return self.deadline_s is None or self.finished_s <= self.deadline_s


@dataclass(slots=True, kw_only=True)
class Gauges:
    """Integrals and counts of a driver that sees into its fleet.

    Attributes:
        kv_reserved_gb_s_by: The integral of promised KV, by class of the calls.
        kv_samples: Instant, promised GB and used GB, in the order of time.
        served_spans: Replica, and from when to when it was in service.
    """

    kv_reserved_gb_s: float = 0.0
    kv_used_gb_s: float = 0.0
    kv_reserved_peak_gb: float = 0.0
    preemptions: int = 0
    cold_starts: int = 0
    wakes: int = 0
    ready_wait_s: float = 0.0
    gpu_s: float = 0.0
    replica_starts: int = 0
    replica_stops: int = 0
    kv_reserved_gb_s_by: dict[ServiceClass, float] = field(default_factory=dict)
    kv_samples: list[tuple[float, float, float]] = field(default_factory=list)
    served_spans: list[tuple[str, float, float]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class RunRecords:
    """Everything a run leaves behind.

    Attributes:
        gauges: ``None`` if the driver could not see into the fleet.
    """

    policy: str
    seed: int
    calls: list[CallRecord]
    workflows: list[WorkflowRecord]
    gauges: Gauges | None
    decision_s: list[float]
    duration_s: float
    wall_s: float
