"""Continuous batching, one iteration at a time: slow, plain, and easy to audit."""

from dataclasses import dataclass, field

from concertmaster.core.cost import RateCurve
from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId
from concertmaster.physics.batching import EngineCall, EngineSettings, Milestone
from concertmaster.physics.prefix_cache import BlockPool


@dataclass(eq=False, slots=True)
class _Sequence:
    """A call and its state. ``computed`` tokens are in the KV cache or will be at step end."""

    call: EngineCall
    order: int
    hashes: tuple[int, ...]
    output: int = 0
    computed: int = 0
    decoding: bool = False
    admitted_before: bool = False
    own_blocks: int = 0
    chunks: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Prompt and answer so far: what must be computed before the next token."""
        return self.call.prompt_tokens + self.output

    @property
    def rank(self) -> tuple[int, int]:
        """Position under priority scheduling; the smallest goes first."""
        return (self.call.priority, self.order)


class ReferenceEngine:
    """The engine model as a plain loop; see ``BatchingEngine``."""

    def __init__(self, curve: RateCurve, settings: EngineSettings) -> None:
        self._curve = curve
        self._settings = settings
        self._pool = BlockPool(settings)
        self._submitted = 0
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._scheduled: list[tuple[_Sequence, int]] = []
        self._step_end_s: float | None = None
        self._milestones: list[Milestone] = []
        self.slowdown = 1.0
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.generated_tokens = 0
        self.prefilled_tokens = 0

    @property
    def running_requests(self) -> int:
        """Calls that hold a place in the batch."""
        return len(self._running)

    @property
    def waiting_requests(self) -> int:
        """Calls in the line, preempted ones included."""
        return len(self._waiting)

    @property
    def kv_used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return self._pool.held_blocks

    def submit(self, now_s: float, call: EngineCall) -> None:
        """Take in a call; an idle engine starts a step at once."""
        self._settings.check_fits(call)
        self._run_to(now_s)
        if any(sequence.call.request_id == call.request_id for sequence in self._sequences()):
            raise InvalidRequestError(f"request {call.request_id!r} is in the engine already")
        sequence = _Sequence(call, self._submitted, self._settings.usable_hashes(call))
        self._submitted += 1
        self._waiting.append(sequence)
        self._sort_waiting()
        self._resume(now_s)

    def cancel(self, now_s: float, request_id: RequestId) -> bool:
        """Drop a call; the step under way still takes its time."""
        self._run_to(now_s)
        for sequence in self._sequences():
            if sequence.call.request_id == request_id:
                if sequence in self._running:
                    self._stop_running(sequence)
                else:
                    self._waiting.remove(sequence)
                self._resume(now_s)
                return True
        return False

    def resize(self, now_s: float, kv_blocks: int) -> None:
        """Change the KV blocks there are; what no longer fits is preempted."""
        self._run_to(now_s)
        self._pool.resize(kv_blocks)
        while self._pool.room_blocks < 0:
            self._preempt(self._victim())
        self._pool.evict()
        self._resume(now_s)

    def _resume(self, now_s: float) -> None:
        if self._step_end_s is None:
            self._start_step(now_s)

    def next_milestone_s(self) -> float | None:
        """Give the end of the step under way."""
        if self._milestones:
            return self._milestones[0].time_s
        return self._step_end_s if self._sequences() else None

    def advance(self, now_s: float) -> list[Milestone]:
        """Run all steps that end by ``now_s``."""
        self._run_to(now_s)
        milestones, self._milestones = self._milestones, []
        return milestones

    def progress(self, now_s: float) -> list[tuple[RequestId, int]]:
        """Count output tokens, in order of arrival."""
        self._run_to(now_s)
        by_arrival = sorted(self._sequences(), key=lambda sequence: sequence.order)
        return [(s.call.request_id, s.output) for s in by_arrival if s.output]

    def clear(self) -> None:
        """Forget all calls and all cached blocks."""
        self._pool.clear()
        self._waiting, self._running, self._scheduled = [], [], []
        self._step_end_s = None
        self._milestones = []

    def _sequences(self) -> list[_Sequence]:
        return self._running + self._waiting

    def _sort_waiting(self) -> None:
        if self._settings.scheduling == "priority":
            self._waiting.sort(key=lambda sequence: sequence.rank)

    def _run_to(self, now_s: float) -> None:
        while self._step_end_s is not None and self._step_end_s <= now_s:
            self._finish_step(self._step_end_s)
            self._start_step(self._step_end_s)

    def _start_step(self, now_s: float) -> None:
        self._scheduled = []
        if not (self._schedule_running() and self._running):
            self._admit_waiting()
        if not self._scheduled:
            self._step_end_s = None
            return
        batch = kv_tokens = prefill_tokens = pairs = 0
        for sequence, tokens in self._scheduled:
            context = sequence.computed
            if sequence.decoding:
                batch += 1
                kv_tokens += context
            else:
                prefill_tokens += tokens
                pairs += tokens * (2 * context - tokens + 1) // 2
        self.prefilled_tokens += prefill_tokens
        step_s = self._curve.step_s(batch, kv_tokens, prefill_tokens, pairs)
        self._step_end_s = now_s + self.slowdown * step_s

    def _finish_step(self, now_s: float) -> None:
        for sequence, _ in self._scheduled:
            if sequence.computed < sequence.known:
                continue
            sequence.decoding = True
            sequence.output += 1
            self.generated_tokens += 1
            request_id = sequence.call.request_id
            if sequence.output == 1:
                self._milestones.append(Milestone(now_s, request_id, "first_token"))
            if sequence.output == sequence.call.output_tokens:
                self._milestones.append(Milestone(now_s, request_id, "finished"))
                self._free(sequence)
                self._running.remove(sequence)

    def _budget(self) -> int:
        return self._settings.max_batch_tokens - sum(tokens for _, tokens in self._scheduled)

    def _schedule_running(self) -> bool:
        """Give each running sequence its tokens; True if any was preempted for want of blocks."""
        preemptions_before = self.preemptions
        for sequence in list(self._running):
            if sequence not in self._running:
                continue
            tokens = min(sequence.known - sequence.computed, self._budget())
            while self._new_blocks(sequence, tokens) > self._pool.room_blocks:
                victim = self._victim()
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                self._schedule(sequence, tokens)
        return self.preemptions > preemptions_before

    def _victim(self) -> _Sequence:
        if self._settings.scheduling == "fcfs":
            return self._running[-1]
        return max(self._running, key=lambda sequence: sequence.rank)

    def _preempt(self, sequence: _Sequence) -> None:
        self._stop_running(sequence)
        sequence.computed = 0
        sequence.decoding = False
        self.preemptions += 1
        self._waiting.insert(0, sequence)
        self._sort_waiting()

    def _admit_waiting(self) -> None:
        settings = self._settings
        while self._waiting and self._budget() and len(self._running) < settings.max_sequences:
            sequence = self._waiting[0]
            hits = self._hits(sequence)
            blocks = settings.blocks_for(sequence.known)
            if self._pool.blocks_to_admit(blocks, hits) > self._pool.room_blocks:
                break
            self._waiting.pop(0)
            self._running.append(sequence)
            self._pool.refer(hits)
            sequence.chunks = hits
            sequence.computed = len(hits) * PREFIX_CHUNK_TOKENS
            self._count_hits(sequence)
            tokens = min(sequence.known - sequence.computed, self._budget())
            self._schedule(sequence, tokens)

    def _hits(self, sequence: _Sequence) -> list[int]:
        """Find the leading chunks that are cached; at least one token is left to compute."""
        most = (sequence.known - 1) // PREFIX_CHUNK_TOKENS
        hashes = sequence.hashes[:most]
        return list(hashes[: self._pool.leading_hits(hashes)])

    def _count_hits(self, sequence: _Sequence) -> None:
        if self._settings.prefix_caching and not sequence.admitted_before:
            self.prefix_query_tokens += sequence.call.prompt_tokens
            self.prefix_hit_tokens += sequence.computed
        sequence.admitted_before = True

    def _new_blocks(self, sequence: _Sequence, tokens: int) -> int:
        blocks_for = self._settings.blocks_for
        return blocks_for(sequence.computed + tokens) - blocks_for(sequence.computed)

    def _schedule(self, sequence: _Sequence, tokens: int) -> None:
        """Take the blocks for ``tokens`` more; whole prompt chunks can be hit from here on."""
        blocks = self._new_blocks(sequence, tokens)
        self._pool.take(blocks)
        sequence.own_blocks += blocks
        chunk_before = sequence.computed // PREFIX_CHUNK_TOKENS
        sequence.computed += tokens
        chunk_after = sequence.computed // PREFIX_CHUNK_TOKENS
        for chunk in sequence.hashes[chunk_before:chunk_after]:
            if self._pool.share(chunk):
                sequence.chunks.append(chunk)
                sequence.own_blocks -= PREFIX_CHUNK_TOKENS // self._settings.block_tokens
        self._scheduled.append((sequence, tokens))

    def _stop_running(self, sequence: _Sequence) -> None:
        self._free(sequence)
        self._running.remove(sequence)
        self._scheduled = [(s, tokens) for s, tokens in self._scheduled if s is not sequence]

    def _free(self, sequence: _Sequence) -> None:
        self._pool.release(sequence.own_blocks, sequence.chunks)
        sequence.own_blocks = 0
        sequence.chunks = []
