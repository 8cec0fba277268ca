"""An engine that computes nothing: the engine model, in real time or faster.

``Emulator`` keeps the clock and hands out tokens when they are due; ``emulator_api`` speaks
vLLM's API for it. Times named in engine seconds pass ``speedup`` times as fast.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Literal, Protocol

from concertmaster.core.cost import RateCurve
from concertmaster.core.fleet import Readiness
from concertmaster.engines.emulator_metrics import EmulatorMetrics
from concertmaster.engines.faults import AnswerFaults, Faults, draw_faults
from concertmaster.engines.residence import MoveTimes, Residence, Residency
from concertmaster.physics.batching import BatchingEngine, EngineCall, EngineSettings, Milestone
from concertmaster.physics.fast import FastEngine

FinishReason = Literal["stop", "length", "abort"]

_LEAST_GAP_S = 0.001
_MOST_MODEL_TOKENS = 131_072


class Sink(Protocol):
    """Where an answer goes."""

    streams: bool

    @property
    def congested(self) -> bool:
        """Whether to keep tokens back for a while."""

    def deliver(self, tokens: int, finish_reason: FinishReason | None) -> None:
        """Send what is new, given the tokens so far; a reason makes it the last time."""

    def cut(self) -> None:
        """Break off, so that the client notices."""


class Answer:
    """A call that is being answered."""

    __slots__ = (
        "call",
        "delivered",
        "faults",
        "finish_reason",
        "first_token_s",
        "produced",
        "sink",
        "stalled_until_s",
        "submitted_s",
    )

    def __init__(
        self,
        call: EngineCall,
        sink: Sink,
        finish_reason: FinishReason,
        faults: AnswerFaults,
        submitted_s: float,
    ) -> None:
        self.call = call
        self.sink = sink
        self.finish_reason: FinishReason = finish_reason
        self.faults = faults
        self.submitted_s = submitted_s
        self.first_token_s: float | None = None
        self.stalled_until_s: float | None = None
        self.produced = 0
        self.delivered = 0

    @property
    def complete(self) -> bool:
        """Whether the engine has generated all of it."""
        return self.produced == self.call.output_tokens

    def due(self, now_s: float) -> int:
        """Count the tokens that its faults let out by now."""
        tokens, faults = self.produced, self.faults
        if not faults.any:
            return tokens
        if faults.drip_s and self.first_token_s is not None:
            tokens = min(tokens, 1 + int((now_s - self.first_token_s) / faults.drip_s))
        stall = faults.stall_after_tokens
        if stall is not None and tokens > stall:
            if self.stalled_until_s is None:
                self.stalled_until_s = now_s + faults.stall_s
            if now_s < self.stalled_until_s:
                tokens = stall
        return tokens


class Emulator:
    """One replica of one model.

    Args:
        speedup: Engine seconds that pass in a second.
        seed: Decides answer lengths (with the prompt) and faults.
        load_s: Engine seconds until the weights are ready after ``start``.
        sleep_s: Engine seconds that falling asleep takes.
        wake_s: Engine seconds that waking takes while the weights are in RAM.
        reload_s: Engine seconds that reading them again takes where they were dropped.
        lies: Where they lie at the start: ``running``, or it begins asleep with them there.
        max_model_tokens: Longest prompt and answer together; ``None`` for what the KV cache
            holds, at most 131,072.
        median_output_tokens: Of the log-normal that answer lengths are drawn from.
        output_sigma: Of its logarithm.
        tick_s: Streams are written to this often, in wall-clock seconds.
    """

    def __init__(
        self,
        *,
        model_name: str,
        curve: RateCurve,
        settings: EngineSettings,
        speedup: float = 1.0,
        seed: int = 0,
        load_s: float = 0.0,
        sleep_s: float = 1.0,
        wake_s: float = 2.0,
        reload_s: float = 10.0,
        lies: Readiness = Readiness.RUNNING,
        max_model_tokens: int | None = None,
        median_output_tokens: float = 150.0,
        output_sigma: float = 0.8,
        faults: Faults | None = None,
        tick_s: float = 0.004,
    ) -> None:
        if speedup <= 0:
            raise ValueError(f"speedup must be above 0, got {speedup}")
        self.model_name = model_name
        self.settings = settings
        self.speedup = speedup
        self.seed = seed
        self.max_model_tokens = max_model_tokens or min(_MOST_MODEL_TOKENS, settings.kv_tokens)
        self.median_output_tokens = median_output_tokens
        self.output_sigma = output_sigma
        self.faults = faults or Faults()
        times = MoveTimes(load_s=load_s, sleep_s=sleep_s, wake_s=wake_s, reload_s=reload_s)
        self._residence = Residence(times, lies, speedup)
        self.metrics = EmulatorMetrics(model_name, self)
        self.rng = random.Random(seed)
        self._tick_s = tick_s
        self._engine = FastEngine(curve, settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._origin_s = self._driven_s = self._now_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._answers: dict[str, Answer] = {}
        self._flowing: dict[str, Answer] = {}  # streams with tokens to come
        self._lagging: dict[str, Answer] = {}  # generated, not delivered

    # Life.

    def start(self) -> None:
        """Start the clock, and load the weights unless it begins asleep."""
        self._loop = asyncio.get_running_loop()
        self._origin_s = self._loop.time()
        self._residence.start()

    def close(self) -> None:
        """Stop the clock and drop all calls without a word."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._residence.close()
        self._engine.clear()
        for answers in (self._answers, self._flowing, self._lagging):
            answers.clear()

    @property
    def residency(self) -> Residency:
        """Where its weights are, or are going."""
        return self._residence.state

    @property
    def asleep(self) -> bool:
        """Whether the weights are off the GPU, or on their way."""
        return self._residence.asleep

    @property
    def dropped(self) -> bool:
        """Whether its weights are gone: what it generates would be noise."""
        return self._residence.dropped

    def fall_asleep(self, then: Callable[[], None], lies: Readiness = Readiness.SLEEPING) -> bool:
        """Free the GPU and call back once that is done; calls under way are aborted.

        False if it loads or wakes right now; then nothing changes.
        """
        if self.residency == "awake":
            for answer in list(self._answers.values()):
                self._drop(answer)
                answer.sink.deliver(answer.delivered, "abort")
            self._engine.advance(self.now_s())
            self._engine.clear()
        return self._residence.fall_asleep(lies, then)

    def wake_up(self, then: Callable[[], None]) -> bool:
        """Bring the weights back from RAM and call back once that is done.

        False if it is just falling asleep; then nothing changes.
        """
        return self._residence.wake_up(then)

    def reload(self, then: Callable[[], None]) -> bool:
        """Read dropped weights again, asleep still. False unless it sleeps."""
        return self._residence.reload(then)

    def load(self, then: Callable[[], None]) -> bool:
        """Serve again from wherever the weights lie. False if it is just falling asleep."""
        return self._residence.load(then)

    # Calls.

    @property
    def engine(self) -> BatchingEngine:
        """The engine model, told what time it is."""
        self._advance()
        self._arm()
        return self._engine

    @property
    def renames_metrics(self) -> bool:
        """Whether that fault is on."""
        return self.faults.rename_metrics

    @property
    def live_calls(self) -> int:
        """Calls whose answer is not complete."""
        return len(self._answers)

    def now_s(self) -> float:
        """Engine seconds since ``start``; never decreases."""
        assert self._loop is not None, "the emulator has not started"
        self._now_s = max(self._now_s, (self._loop.time() - self._origin_s) * self.speedup)
        return self._now_s

    def answer(self, call: EngineCall, sink: Sink, finish_reason: FinishReason) -> Answer:
        """Take in a call; its tokens go to the sink as they come.

        Raises:
            InvalidRequestError: It can never fit.
        """
        now_s = self.now_s()
        self._engine.submit(now_s, call)
        faults = draw_faults(self.faults, call.output_tokens, self.rng)
        answer = Answer(call, sink, finish_reason, faults, now_s)
        self._answers[call.request_id] = answer
        self._arm()
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop generating; the client is gone."""
        if self._answers.get(answer.call.request_id) is answer:
            self._engine.cancel(self.now_s(), answer.call.request_id)
            self._drop(answer)
            self._arm()

    def _drop(self, answer: Answer) -> None:
        self._forget(answer)
        if not answer.complete:
            self.metrics.aborted()

    def _forget(self, answer: Answer) -> None:
        for answers in (self._answers, self._flowing, self._lagging):
            answers.pop(answer.call.request_id, None)

    # The clock.

    def _arm(self) -> None:
        """Set the timer for the next milestone, or for the next tick if streams are live."""
        assert self._loop is not None, "the emulator has not started"
        next_s = self._engine.next_milestone_s()
        when_s = None if next_s is None else self._origin_s + next_s / self.speedup
        if self._flowing or self._lagging:
            tick_s = self._driven_s + self._tick_s
            when_s = tick_s if when_s is None else min(when_s, tick_s)
        if when_s is None:
            return
        when_s = max(when_s, self._driven_s + _LEAST_GAP_S)
        if self._timer is not None:
            if self._timer_s <= when_s:
                return
            self._timer.cancel()
        self._timer_s = when_s
        self._timer = self._loop.call_at(when_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        # A timer may fire a little early; the milestone that it was set for is due all the same.
        self._now_s = max(self._now_s, (self._timer_s - self._origin_s) * self.speedup)
        self._advance()
        self._arm()

    def _advance(self) -> None:
        assert self._loop is not None, "the emulator has not started"
        now_s = self.now_s()
        self._driven_s = self._loop.time()
        for milestone in self._engine.advance(now_s):
            self._reach(milestone, now_s)
        if self._flowing:
            for request_id, tokens in self._engine.progress(now_s):
                answer = self._flowing.get(request_id)
                if answer is not None:
                    answer.produced = tokens
                    self._deliver(answer, now_s)
        for answer in list(self._lagging.values()):
            self._deliver(answer, now_s)

    def _reach(self, milestone: Milestone, now_s: float) -> None:
        answer = self._answers.get(milestone.request_id)
        if answer is None:
            return
        call = answer.call
        if milestone.kind == "first_token":
            answer.first_token_s = milestone.time_s
            ttft_s = milestone.time_s - answer.submitted_s
            self.metrics.prefilled(call.prompt_tokens, ttft_s / self.speedup)
            if answer.sink.streams:
                self._flowing[call.request_id] = answer
            return
        assert answer.first_token_s is not None, "a call finished before its first token"
        self._flowing.pop(call.request_id, None)
        answer.produced = call.output_tokens
        self.metrics.finished(
            answer.finish_reason,
            call.output_tokens,
            (milestone.time_s - answer.first_token_s) / self.speedup,
            (milestone.time_s - answer.submitted_s) / self.speedup,
        )
        self._deliver(answer, now_s)

    def _deliver(self, answer: Answer, now_s: float) -> None:
        tokens, sink = answer.due(now_s), answer.sink
        death = answer.faults.death_after_tokens
        if death is not None and tokens >= death:
            sink.deliver(death, None)
            sink.cut()
            self.cancel(answer)
        elif tokens == answer.call.output_tokens:
            self._forget(answer)
            sink.deliver(tokens, answer.finish_reason)
        else:
            if answer.complete:
                self._lagging[answer.call.request_id] = answer
            if tokens > answer.delivered and sink.streams and not sink.congested:
                answer.delivered = tokens
                sink.deliver(tokens, None)
