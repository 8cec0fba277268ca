"""What an engine model is told and what it answers; two models share these types.

An engine computes in steps (iterations). A step is planned at its start: sequences that run
come first, in order of admission; then calls that wait are admitted while the token budget,
the number of sequences and the KV blocks allow. Tokens appear at the step's end.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId

Scheduling = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How one engine process batches; the names in brackets are vLLM's.

    Attributes:
        kv_blocks: Blocks of KV cache (``num_gpu_blocks``).
        max_batch_tokens: Tokens computed in one step (``max_num_batched_tokens``).
        max_sequences: Sequences that run at once (``max_num_seqs``).
        block_tokens: Tokens in a KV block (``block_size``); divides a prefix chunk.
        scheduling: Order of the waiting line and of preemption (``scheduling_policy``).
        prefix_caching: Whether equal leading chunks are computed once.
    """

    kv_blocks: int
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    block_tokens: int = 16
    scheduling: Scheduling = "fcfs"
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.kv_blocks < 1 or self.max_sequences < 1 or self.block_tokens < 1:
            raise ValueError("kv_blocks, max_sequences and block_tokens must be at least 1")
        if self.max_batch_tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least "
                f"max_sequences ({self.max_sequences}): each sequence decodes a token a step"
            )
        if PREFIX_CHUNK_TOKENS % self.block_tokens:
            raise ValueError(
                f"block_tokens must divide {PREFIX_CHUNK_TOKENS}, got {self.block_tokens}"
            )

    @property
    def kv_tokens(self) -> int:
        """Room for KV entries, in tokens."""
        return self.kv_blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` KV entries."""
        return -(-tokens // self.block_tokens)

    def check_fits(self, call: "EngineCall") -> None:
        """Refuse a call whose prompt and answer need more blocks than there are."""
        needed_blocks = self.blocks_for(call.prompt_tokens + call.output_tokens - 1)
        if needed_blocks > self.kv_blocks:
            raise InvalidRequestError(
                f"request {call.request_id!r}: {call.prompt_tokens} prompt and "
                f"{call.output_tokens} output tokens need {needed_blocks} KV blocks of "
                f"{self.block_tokens} tokens, the engine has {self.kv_blocks}"
            )

    def usable_hashes(self, call: "EngineCall") -> tuple[int, ...]:
        """Give the hashes of the prompt's whole chunks; none if nothing is cached."""
        if not self.prefix_caching:
            return ()
        return call.prefix_hashes[: call.prompt_tokens // PREFIX_CHUNK_TOKENS]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCall:
    """One call as the engine sees it, and the truth about its answer.

    Attributes:
        output_tokens: How many it will generate; the engine learns of it at the last one.
        prefix_hashes: Each stands for ``PREFIX_CHUNK_TOKENS`` leading prompt tokens.
        priority: Lower goes first; looked at only under priority scheduling.
    """

    request_id: RequestId
    prompt_tokens: int
    output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    priority: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            field = "prompt_tokens" if self.prompt_tokens < 1 else "output_tokens"
            raise InvalidRequestError(
                f"request {self.request_id!r}: {field} must be at least 1, "
                f"got {getattr(self, field)}"
            )


@dataclass(frozen=True, slots=True)
class Milestone:
    """A call's first token came out, or its last."""

    time_s: float
    request_id: RequestId
    kind: Literal["first_token", "finished"]


class BatchingEngine(Protocol):
    """What happens to calls inside one engine, and when?

    Instants passed in never decrease. Counts are as of the last instant passed in; totals
    run over the life of the object, through ``clear``.
    """

    slowdown: float
    """Factor on step times, from the next step on."""

    def submit(self, now_s: float, call: EngineCall) -> None:
        """Take in a call; it waits for the end of the step under way.

        Raises:
            InvalidRequestError: It can never fit, or its id is in the engine already.
        """

    def cancel(self, now_s: float, request_id: RequestId) -> bool:
        """Drop a call and free its blocks; False if it is not in the engine."""

    def resize(self, now_s: float, kv_blocks: int) -> None:
        """Have so many KV blocks from now on, at most as many as the settings say.

        What no longer fits is preempted at once. A call too long for what there is waits for
        more, and may leave the engine without a milestone until it gets some.
        """

    def next_milestone_s(self) -> float | None:
        """Give an instant not later than the next milestone; ``None`` if none will come.

        Advancing to it makes progress, so a driver that always does so gets to the end.
        """

    def advance(self, now_s: float) -> list[Milestone]:
        """Return the milestones up to and including ``now_s`` not yet returned, in order."""

    def progress(self, now_s: float) -> list[tuple[RequestId, int]]:
        """Count the output tokens so far of every call in the engine that has any."""

    def clear(self) -> None:
        """Forget all calls and all cached blocks: the process died."""

    @property
    def running_requests(self) -> int:
        """Calls that hold a place in the batch."""

    @property
    def waiting_requests(self) -> int:
        """Calls in the line, preempted ones included."""

    @property
    def kv_used_blocks(self) -> int:
        """Blocks that running sequences hold; idle cached blocks count as free."""

    @property
    def preemptions(self) -> int:
        """Times that a running sequence lost its blocks; total."""

    @property
    def prefix_query_tokens(self) -> int:
        """Prompt tokens looked up in the prefix cache at first admission; total."""

    @property
    def prefix_hit_tokens(self) -> int:
        """Those found there; total."""

    @property
    def generated_tokens(self) -> int:
        """Output tokens; total."""

    @property
    def prefilled_tokens(self) -> int:
        """Tokens computed in prefill, recomputation included; total."""
