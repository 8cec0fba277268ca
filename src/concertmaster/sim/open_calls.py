"""Calls of a simulation that have no outcome yet, and what engines were given of them."""

from dataclasses import dataclass, field

from concertmaster.core.fleet import Replica, ReplicaId
from concertmaster.core.request import Request
from concertmaster.workload.plan import Call
from concertmaster.workload.records import CallRecord


@dataclass(slots=True, kw_only=True)
class OpenCall:
    """One call and its attempts.

    Attributes:
        sent: Latest attempt on each replica that it was sent to.
    """

    request: Request
    call: Call
    record: CallRecord
    sent: dict[ReplicaId, int] = field(default_factory=dict)

    def output_tokens_on(self, replica: Replica) -> int:
        """Tokens that its answer has on a replica, which may have to end it early."""
        model = replica.pool.model
        room_tokens = min(model.context_tokens, replica.pool.kv_tokens)
        truth_tokens = min(
            self.call.output_tokens_by(model.name),
            self.request.max_output_tokens,
            room_tokens - self.request.prompt_tokens,
        )
        return max(1, truth_tokens)

    def note_server(self, replica: Replica) -> None:
        """Write down which replica serves it."""
        record = self.record
        record.replica_id, record.model = replica.replica_id, replica.pool.model.name
        record.output_tokens = self.output_tokens_on(replica)
