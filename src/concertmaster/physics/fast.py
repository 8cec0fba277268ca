"""Continuous batching in jumps: the same steps as the reference, most of them in closed form.

While a step computes prompt tokens, or a waiting call could be admitted at its end, steps are
taken one by one. Otherwise the batch stays as it is and each step lasts longer than the one
before by the same amount, since every sequence adds one token to the KV cache: a stretch,
which ends at the next finish or when blocks run out. An event costs O(log batch).
"""

from heapq import heappop, heappush

from concertmaster.core.cost import RateCurve
from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, RequestId
from concertmaster.physics.batching import EngineCall, EngineSettings, Milestone
from concertmaster.physics.prefix_cache import BlockPool
from concertmaster.physics.stretch import DecodeBatch, Stretch

_NOT_RUNNING = -1


class _Sequence:
    """A call and its state.

    ``known`` counts prompt and answer at the last admission or preemption; ``computed`` is
    right while it prefills, ``base`` while it decodes.
    """

    __slots__ = (
        "admission",
        "base",
        "chunks",
        "computed",
        "decoding",
        "gone",
        "hashes",
        "known",
        "order",
        "output_tokens",
        "priority",
        "prompt_tokens",
        "request_id",
        "seen",
    )

    def __init__(
        self, call: EngineCall, order: int, priority: int, hashes: tuple[int, ...]
    ) -> None:
        self.request_id = call.request_id
        self.prompt_tokens = self.known = call.prompt_tokens
        self.output_tokens = call.output_tokens
        self.order = order
        self.priority = priority
        self.hashes = hashes
        self.computed = self.base = 0
        self.admission = _NOT_RUNNING
        self.decoding = self.gone = self.seen = False
        self.chunks: list[int] = []


class FastEngine:
    """The engine model for speed; see ``BatchingEngine``."""

    def __init__(self, curve: RateCurve, settings: EngineSettings) -> None:
        self._curve = curve
        self._settings = settings
        self._block_tokens = settings.block_tokens
        self._chunk_blocks = PREFIX_CHUNK_TOKENS // settings.block_tokens
        self._pool = BlockPool(settings)
        self._slowdown = 1.0
        self._now_s = 0.0
        self._submitted = self._admitted = 0
        self._generated_tokens = 0
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.prefilled_tokens = 0
        self._reset()

    def _reset(self) -> None:
        self._calls: dict[RequestId, _Sequence] = {}
        self._waiting: list[tuple[int, int, _Sequence]] = []
        self._running: dict[int, _Sequence] = {}
        self._partial: _Sequence | None = None
        self._prefilled: list[_Sequence] = []
        self._batch = DecodeBatch(self._block_tokens)
        self._stretch = Stretch()
        self._step = 0  # number of the step under way, the first of the stretch
        self._milestones: list[Milestone] = []
        self._blocked = (-1, -1)

    # What a driver calls.

    @property
    def slowdown(self) -> float:
        """Factor on step times, from the next step on."""
        return self._slowdown

    @slowdown.setter
    def slowdown(self, factor: float) -> None:
        self._slowdown = factor
        self._cut()

    @property
    def running_requests(self) -> int:
        """Calls that hold a place in the batch."""
        return len(self._running)

    @property
    def waiting_requests(self) -> int:
        """Calls in the line, preempted ones included."""
        return len(self._calls) - len(self._running)

    @property
    def kv_used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        steps = self._stretch.steps_done(self._now_s)
        return self._pool.held_blocks + self._batch.blocks_after(self._step, steps)

    @property
    def generated_tokens(self) -> int:
        """Output tokens; total."""
        return self._generated_tokens + self._stretch.steps_done(self._now_s) * self._batch.count

    def submit(self, now_s: float, call: EngineCall) -> None:
        """Take in a call; an idle engine starts a step at once."""
        self._settings.check_fits(call)
        self._run_to(now_s)
        if call.request_id in self._calls:
            raise InvalidRequestError(f"request {call.request_id!r} is in the engine already")
        priority = call.priority if self._settings.scheduling == "priority" else 0
        hashes = self._settings.usable_hashes(call)
        sequence = _Sequence(call, self._submitted, priority, hashes)
        self._submitted += 1
        self._calls[call.request_id] = sequence
        heappush(self._waiting, (priority, sequence.order, sequence))
        if not self._stretch.steps:
            self._resume(now_s)
        elif self._head() is sequence and len(self._running) < self._settings.max_sequences:
            self._cut()

    def cancel(self, now_s: float, request_id: RequestId) -> bool:
        """Drop a call; the step under way still takes its time."""
        self._run_to(now_s)
        sequence = self._calls.pop(request_id, None)
        if sequence is None:
            return False
        self._cut()
        if sequence.admission == _NOT_RUNNING:
            sequence.gone = True
        else:
            if sequence is self._partial:
                self._partial = None
            elif not sequence.decoding:
                self._prefilled.remove(sequence)
            kv_tokens = sequence.base + self._step if sequence.decoding else sequence.computed
            self._leave(sequence, kv_tokens)
        self._resume(now_s)
        return True

    def resize(self, now_s: float, kv_blocks: int) -> None:
        """Change the KV blocks there are; what no longer fits is preempted."""
        self._run_to(now_s)
        self._cut()
        self._pool.resize(kv_blocks)
        while self._pool.room_blocks < 0:
            self._preempt(set(self._running))
        self._pool.evict()
        self._resume(now_s)

    def _resume(self, now_s: float) -> None:
        """Begin a step if none is under way."""
        if not self._stretch.steps:
            self._begin(now_s)

    def next_milestone_s(self) -> float | None:
        """Give the end of the stretch."""
        if self._milestones:
            return self._milestones[0].time_s
        return self._stretch.end_s if self._calls and self._stretch.steps else None

    def advance(self, now_s: float) -> list[Milestone]:
        """Run all steps that end by ``now_s``."""
        self._run_to(now_s)
        milestones = self._milestones
        if milestones:
            self._milestones = []
        return milestones

    def progress(self, now_s: float) -> list[tuple[RequestId, int]]:
        """Count output tokens, in order of arrival."""
        self._run_to(now_s)
        step = self._step + self._stretch.steps_done(now_s)
        counts = []
        for request_id, s in self._calls.items():
            output_tokens = (s.base + step if s.decoding else s.known) - s.prompt_tokens
            if output_tokens:
                counts.append((request_id, output_tokens))
        return counts

    def clear(self) -> None:
        """Forget all calls and all cached blocks."""
        self._generated_tokens = self.generated_tokens
        self._pool.clear()
        self._reset()

    # Many steps.

    def _run_to(self, now_s: float) -> None:
        self._now_s = now_s
        stretch = self._stretch
        while stretch.steps and stretch.end_s <= now_s:
            self._skip(stretch.steps - 1)
            self._finish_step()
            self._begin(stretch.end_s)

    def _skip(self, steps: int) -> None:
        """Make the step that follows ``steps`` steps the one under way."""
        if steps:
            self._pool.take(self._batch.blocks_after(self._step, steps))
            self._step += steps
            self._generated_tokens += steps * self._batch.count
            self._stretch.skip(steps)

    def _cut(self) -> None:
        """End the stretch with the step under way."""
        if self._stretch.steps > 1:
            self._skip(self._stretch.steps_done(self._now_s))
            self._stretch.cut()

    # The end of a step.

    def _finish_step(self) -> None:
        self._generated_tokens += self._batch.count + len(self._prefilled)
        for admission in self._batch.pop_finishes(self._step):
            if admission in self._running:
                sequence = self._running[admission]
                self._finish(sequence, sequence.base + self._step)
        for sequence in self._prefilled:
            self._start_decoding(sequence)
        self._prefilled.clear()

    def _start_decoding(self, sequence: _Sequence) -> None:
        output_tokens = sequence.known - sequence.prompt_tokens + 1
        if output_tokens == 1:
            end_s = self._stretch.end_s
            self._milestones.append(Milestone(end_s, sequence.request_id, "first_token"))
        if output_tokens == sequence.output_tokens:
            self._finish(sequence, sequence.known)
            return
        sequence.decoding = True
        sequence.base = sequence.known - self._step
        last_step = self._step + sequence.output_tokens - output_tokens
        self._batch.add(sequence.base, last_step, sequence.admission)

    def _finish(self, sequence: _Sequence, kv_tokens: int) -> None:
        self._leave(sequence, kv_tokens)
        del self._calls[sequence.request_id]
        self._milestones.append(Milestone(self._stretch.end_s, sequence.request_id, "finished"))

    def _leave(self, sequence: _Sequence, kv_tokens: int) -> None:
        """Take a sequence that holds ``kv_tokens`` out of those that run."""
        blocks = -(-kv_tokens // self._block_tokens)
        self._pool.release(blocks - len(sequence.chunks) * self._chunk_blocks, sequence.chunks)
        sequence.chunks = []
        del self._running[sequence.admission]
        sequence.admission = _NOT_RUNNING
        if sequence.decoding:
            self._batch.remove(sequence.base)
            sequence.decoding = False

    # The start of a step.

    def _begin(self, now_s: float) -> None:
        """Plan the step that starts now, and how many more will be like it."""
        if not self._calls:
            self._stretch.steps = 0
            return
        self._step += 1
        preempted = self._grow_batch()
        prefill_tokens = 0
        pairs = 0.0
        if self._partial is not None:
            more_preempted, prefill_tokens, pairs = self._continue_prefill(self._partial)
            preempted = preempted or more_preempted
        batch = self._batch.count
        if self._waiting and not (preempted and self._running):
            budget = self._settings.max_batch_tokens - batch - prefill_tokens
            admitted_tokens, admitted_pairs = self._admit(budget)
            prefill_tokens += admitted_tokens
            pairs += admitted_pairs
        if not self._running:
            self._stretch.steps = 0
            return
        self.prefilled_tokens += prefill_tokens
        step_s = self._curve.step_s(batch, self._batch.kv_tokens(self._step), prefill_tokens, pairs)
        steps, growth_s = 1, 0.0
        if not prefill_tokens and not preempted:
            growth_s = self._slowdown * self._curve.kv_token_s * batch
            steps = self._batch.steps_alike(self._step, self._pool.room_blocks, self._running)
        self._stretch.begin(now_s, steps, self._slowdown * step_s, growth_s)

    def _grow_batch(self) -> bool:
        """Take the blocks that decoding needs in this step; True if one had to go for it."""
        pool = self._pool
        blocks = self._batch.blocks_at(self._step)
        if blocks <= pool.room_blocks:
            pool.take(blocks)
            return False
        grown: set[int] = set()
        for admission, sequence in list(self._running.items()):
            if sequence.admission != admission or not sequence.decoding:
                continue
            if (sequence.base + self._step - 1) % self._block_tokens == 0:
                while not pool.room_blocks and self._preempt(grown) is not sequence:
                    pass
                if sequence.admission != admission:
                    continue
                pool.take(1)
            grown.add(admission)
        return True

    def _preempt(self, grown: set[int]) -> _Sequence:
        """Send the last or worst sequence back; ``grown`` are those with this step's token."""
        running = self._running
        if self._settings.scheduling == "fcfs":
            sequence = running[next(reversed(running))]
        else:
            sequence = max(running.values(), key=lambda s: (s.priority, s.order))
        if sequence.decoding:
            sequence.known = sequence.base + self._step
            self._leave(sequence, sequence.known - (sequence.admission not in grown))
        else:
            self._leave(sequence, sequence.computed)
            if sequence is self._partial:
                self._partial = None
            else:
                self._prefilled.remove(sequence)
        self.preemptions += 1
        heappush(self._waiting, (sequence.priority, sequence.order, sequence))
        return sequence

    def _continue_prefill(self, sequence: _Sequence) -> tuple[bool, int, float]:
        """Compute the next chunk; preempted or not, its tokens and their context."""
        preempted = False
        budget = self._settings.max_batch_tokens - self._batch.count
        tokens = min(sequence.known - sequence.computed, budget)
        blocks = self._new_blocks(sequence, tokens)
        while blocks > self._pool.room_blocks:
            preempted = True
            if self._preempt(set(self._running)) is sequence:
                return True, 0, 0.0
        return preempted, tokens, self._prefill(sequence, tokens)

    def _new_blocks(self, sequence: _Sequence, tokens: int) -> int:
        held = -(-sequence.computed // self._block_tokens)
        return -(-(sequence.computed + tokens) // self._block_tokens) - held

    def _prefill(self, sequence: _Sequence, tokens: int) -> float:
        """Take the blocks for ``tokens`` more and return the context they attend to, summed."""
        before = sequence.computed
        self._pool.take(self._new_blocks(sequence, tokens))
        sequence.computed = after = before + tokens
        if sequence.hashes:
            chunk = before // PREFIX_CHUNK_TOKENS
            for chunk_hash in sequence.hashes[chunk : after // PREFIX_CHUNK_TOKENS]:
                if self._pool.share(chunk_hash):
                    sequence.chunks.append(chunk_hash)
        if after == sequence.known:
            self._partial = None
            self._prefilled.append(sequence)
        else:
            self._partial = sequence
        return tokens * (before + after + 1) / 2

    def _head(self) -> _Sequence | None:
        waiting = self._waiting
        while waiting and waiting[0][2].gone:
            heappop(waiting)
        return waiting[0][2] if waiting else None

    def _admit(self, budget: int) -> tuple[int, float]:
        """Let waiting calls in, while there is room; their tokens and the context of these."""
        most_running, pool = self._settings.max_sequences, self._pool
        prefill_tokens, pairs = 0, 0.0
        while budget and len(self._running) < most_running:
            sequence = self._head()
            if sequence is None or self._blocked == (sequence.order, pool.version):
                break
            chunks: list[int] = []
            if sequence.hashes:
                hashes = sequence.hashes[: (sequence.known - 1) // PREFIX_CHUNK_TOKENS]
                chunks = list(hashes[: pool.leading_hits(hashes)])
            blocks = -(-sequence.known // self._block_tokens)
            if pool.blocks_to_admit(blocks, chunks) > pool.room_blocks:
                self._blocked = (sequence.order, pool.version)
                break
            heappop(self._waiting)
            self._enter(sequence, chunks)
            tokens = min(sequence.known - sequence.computed, budget)
            pairs += self._prefill(sequence, tokens)
            prefill_tokens += tokens
            budget -= tokens
        return prefill_tokens, pairs

    def _enter(self, sequence: _Sequence, chunks: list[int]) -> None:
        self._pool.refer(chunks)
        sequence.chunks = chunks
        sequence.computed = len(chunks) * PREFIX_CHUNK_TOKENS
        sequence.admission = self._admitted
        self._running[self._admitted] = sequence
        self._admitted += 1
        if not sequence.seen and self._settings.prefix_caching:
            self.prefix_query_tokens += sequence.prompt_tokens
            self.prefix_hit_tokens += sequence.computed
        sequence.seen = True
