"""The fast clock: how far completions show each replica to be from its rate curve.

A rate curve is fitted before a replica serves. A card that throttles, a neighbour on the same
host or another version of the engine make it slower or faster than that, and this is seen
within minutes. ``PaceWatch`` finds pairs of expected and actual seconds among the events that
a driver feeds to the core; ``PaceTracker`` turns them into a factor.
"""

import math

from concertmaster.core.events import (
    Event,
    PaceObserved,
    ReplicaDemoted,
    ReplicaDied,
    ReplicaReady,
    RequestCancelled,
    RequestFailed,
    RequestFinished,
    TokensStreamed,
)
from concertmaster.core.fleet import Replica, ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.predictors.pace import PaceTracker

MIN_STEPS = 8
"""Steps that a call must have decoded to say anything; below, the ends of steps are noise."""

STRETCH_S, SURPRISING_RATIO = 5.0, 1.5
"""A call that has decoded for so long and is so far off the pace that was told says so at once:
a replica that turned slow is known before what it holds is done."""

TOLD_RATIO = 1.03
"""The core is told of a pace once it has moved by more than this factor."""

TRUSTED_RATIO = 1.05
"""A curve is taken to be right until its replica is further off than this."""


class _Watched:
    """A call that decodes, and where it and its replica stood when its stretch began."""

    __slots__ = (
        "attempt",
        "begun_s",
        "begun_tokens",
        "meter",
        "prefill_steps",
        "prompt_tokens",
        "steps",
        "tokens",
    )

    def __init__(self, meter: "_Meter", now_s: float, attempt: int, prompt_tokens: int) -> None:
        self.meter = meter
        self.attempt = attempt
        self.prompt_tokens = prompt_tokens
        self.tokens = 1
        self.mark(now_s)

    def mark(self, now_s: float) -> None:
        """Begin a stretch."""
        self.begun_s = now_s
        self.begun_tokens = self.tokens
        self.steps = self.meter.steps
        self.prefill_steps = self.meter.prefill_steps

    def sample(self, now_s: float, steps: float) -> tuple[float, float] | None:
        """Return expected and actual seconds of the stretch that ends now, if it took any."""
        actual_s, curve_steps = now_s - self.begun_s, steps - self.steps
        work = self.tokens - self.begun_tokens + self.meter.prefill_steps - self.prefill_steps
        return (actual_s * work / curve_steps, actual_s) if actual_s > 0 < curve_steps else None


class _Meter:
    """How many steps the curve would have let one replica do.

    ``steps`` is the integral of time over the seconds of a step that decodes the batch at
    hand; ``prefill_steps`` counts what prefills added to steps, in steps of that kind. A
    call that decodes ``n`` tokens while they grow by ``a`` and ``b`` saw ``n + b`` steps'
    worth of work in the time of ``a``, so the replica's pace was ``a / (n + b)``, whatever
    came and went meanwhile.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica_id = replica.replica_id
        self.replica = replica
        self._batch = 0
        self._kv_tokens = 0
        self._grown_tokens = 0.0  # since the latest news of how far calls have come
        self._now_s = 0.0
        self._step_s = replica.pool.decode_token_s
        self.steps = self.prefill_steps = 0.0
        self._fresh: list[_Watched] = []  # began with the latest step that ended a prefill
        self._fresh_s = -math.inf
        self._step_tokens = 0  # that this step has computed, as far as is known
        self.ended: list[tuple[float, float, _Watched]] = []
        self._samples: list[tuple[float, float]] = []

    def begin(
        self, now_s: float, attempt: int, prompt_tokens: int, prefill_tokens: int
    ) -> _Watched:
        """Let a call into the batch; its prefill was part of the step that ends now."""
        self._run_to(now_s)
        self._charge(now_s, prompt_tokens, prefill_tokens)
        watched = _Watched(self, now_s, attempt, prompt_tokens)
        self._fresh.append(watched)
        self._batch += 1
        self._kv_tokens += prompt_tokens + 1
        return watched

    def progress(self, now_s: float, watched: _Watched, tokens: int) -> None:
        """Take in how far a call has come."""
        self._run_to(now_s)
        self._kv_tokens += tokens - watched.tokens
        self._grown_tokens = 0.0
        watched.tokens = tokens
        if now_s - watched.begun_s >= STRETCH_S and tokens - watched.begun_tokens > MIN_STEPS:
            self._keep_surprise(now_s, watched)

    def end(self, now_s: float, watched: _Watched, output_tokens: int) -> None:
        """Let a call out; 0 output tokens if how many there were says nothing."""
        self._run_to(now_s)
        self._batch -= 1
        self._kv_tokens -= watched.prompt_tokens + watched.tokens
        if not self._batch:
            self._grown_tokens = 0.0
        if output_tokens - watched.begun_tokens >= MIN_STEPS:
            watched.tokens = output_tokens
            self.ended.append((now_s, self.steps, watched))

    @property
    def has_samples(self) -> bool:
        """Whether calls said something since the last time."""
        return bool(self._samples)

    def take(self, now_s: float) -> list[tuple[float, float]]:
        """Return expected and actual seconds of the stretches that ended since the last time."""
        self._settle(now_s)
        samples, self._samples = self._samples, []
        return samples

    def _settle(self, now_s: float) -> None:
        """Evaluate the calls that ended with an earlier step.

        A call that ends with a step may be heard of before those whose prefill was part of it.
        """
        late = []
        for ended in self.ended:
            ended_s, steps, watched = ended
            if now_s - ended_s <= self._step_s / 2:
                late.append(ended)
                continue
            self._keep(watched.sample(ended_s, steps))
        self.ended = late

    def _keep_surprise(self, now_s: float, watched: _Watched) -> None:
        sample = watched.sample(now_s, self.steps)
        if sample is None:
            return
        expected_s, actual_s = sample
        if _differ(actual_s, self.replica.pace * expected_s, SURPRISING_RATIO):
            self._keep(sample)
            watched.mark(now_s)

    def _keep(self, sample: tuple[float, float] | None) -> None:
        if sample is not None:
            self._samples.append(sample)

    def _run_to(self, now_s: float) -> None:
        span_s = now_s - self._now_s
        if span_s <= 0:
            return
        self._now_s = now_s
        if self._batch:
            grown_tokens = self._batch * span_s / (self._step_s * self.replica.pace)
            kv_tokens = self._kv_tokens + self._grown_tokens + grown_tokens / 2
            self._step_s = self.replica.pool.curve.step_s(self._batch, round(kv_tokens))
            self.steps += span_s / self._step_s
            self._grown_tokens += grown_tokens

    def _charge(self, now_s: float, prompt_tokens: int, prefill_tokens: int) -> None:
        """Count what a prefill added to steps; prefills that end at once shared the last one."""
        pool, curve = self.replica.pool, self.replica.pool.curve
        if now_s - self._fresh_s > self._step_s / 2:
            self._settle(now_s)
            self._fresh = []
            self._fresh_s = now_s
            self._step_tokens = self._batch + len(self.ended)
        batch, shared = self._batch - len(self._fresh) + len(self.ended), self._step_tokens
        chunk = max(1, pool.max_batch_tokens - batch)
        full, rest = divmod(prefill_tokens, chunk)
        pairs = prefill_tokens * (prompt_tokens - prefill_tokens + (prefill_tokens + 1) / 2)
        extra_s = curve.prefill_pair_s * pairs
        extra_s += full * (curve.linear_at_s(batch + chunk) - curve.linear_at_s(batch))
        extra_s += curve.linear_at_s(shared + rest) - curve.linear_at_s(shared)
        self._step_tokens += rest
        added = extra_s / self._step_s
        self.prefill_steps += added
        for watched in self._fresh:
            watched.prefill_steps += added


class PaceWatch:
    """Measures replicas by the events that a driver feeds to the core.

    A call is measured in stretches from its first token to its last: what goes before depends
    on what else its engine was handed.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        replicas = scheduler.replicas
        self._scheduler = scheduler
        self._tracker = PaceTracker({r.replica_id: r.pool.pool_id for r in replicas.values()})
        self._meters = {replica_id: _Meter(replica) for replica_id, replica in replicas.items()}
        self._calls: dict[RequestId, _Watched] = {}
        self._unheard: dict[RequestId, list[_Watched]] = {}
        self._heard: dict[ReplicaId, None] = {}
        self._off_curve: dict[ReplicaId, None] = {}

    def note(self, now_s: float, event: Event) -> None:
        """Take in an event; call it before the core is told, whose ledgers it reads."""
        match event:
            case TokensStreamed(progress):
                for request_id, attempt, tokens in progress:
                    self._stream(now_s, request_id, attempt, tokens)
            case RequestFinished(request_id, attempt, output_tokens):
                self._leave(now_s, request_id)
                self._end(now_s, request_id, attempt, output_tokens)
            case RequestFailed(request_id, attempt):
                self._leave(now_s, request_id, only=attempt)
                self._end(now_s, request_id, attempt, 0)
            case RequestCancelled(request_id):
                self._leave(now_s, request_id)
                self._end(now_s, request_id, None, 0)
            case ReplicaDied(replica_id) | ReplicaDemoted(replica_id):
                self._restart(replica_id)
            case ReplicaReady(replica_id):
                self._meet(replica_id)
            case _:
                pass

    def unheard(self, now_s: float, request_id: RequestId, attempt: int) -> None:
        """Note that an attempt that was sent will not be heard of before its answer is there.

        It is taken to decode at once and to hold half of the answer that is expected of it. Of
        two attempts each is part of the batch of its own replica until one begins to answer.
        """
        replica_id = self._scheduler.in_flight(request_id, attempt)
        if replica_id is None:
            return
        call = self._scheduler.replicas[replica_id].in_flight[request_id]
        kv_tokens = call.request.prompt_tokens + call.expected_tokens // 2
        meter = self._meters[replica_id]
        watched = meter.begin(now_s, attempt, kv_tokens, call.prefill_tokens)
        self._unheard.setdefault(request_id, []).append(watched)

    def due(self, now_s: float) -> PaceObserved | None:
        """Return what the core is to be told, if a pace has moved enough; ask once a second."""
        self._observe(now_s)
        paces: list[tuple[ReplicaId, float]] = []
        for replica_id in {**self._heard, **self._off_curve}:
            told = self._scheduler.replicas[replica_id].pace
            pace = round(self._tracker.pace(now_s, replica_id), 4)
            if not _differ(pace, 1.0, TRUSTED_RATIO if told == 1.0 else TOLD_RATIO):
                pace = 1.0
            if pace == 1.0:
                self._off_curve.pop(replica_id, None)
            else:
                self._off_curve[replica_id] = None
            if pace != told and (pace == 1.0 or _differ(pace, told, TOLD_RATIO)):
                paces.append((replica_id, pace))
        self._heard = {r: None for r in self._heard if self._meters[r].ended}
        return PaceObserved(tuple(paces)) if paces else None

    def _observe(self, now_s: float) -> None:
        for replica_id in self._heard:
            for expected_s, actual_s in self._meters[replica_id].take(now_s):
                self._tracker.observe(now_s, replica_id, expected_s, actual_s)

    def _stream(self, now_s: float, request_id: RequestId, attempt: int, tokens: int) -> None:
        watched = self._calls.get(request_id)
        if watched is not None:
            if watched.attempt == attempt and tokens > watched.tokens:
                watched.meter.progress(now_s, watched, tokens)
                if watched.meter.has_samples:
                    self._heard[watched.meter.replica_id] = None
        elif request_id in self._unheard:
            self._leave(now_s, request_id, but=attempt)
        elif tokens == 1:
            replica_id = self._scheduler.in_flight(request_id, attempt)
            if replica_id is not None:
                call = self._scheduler.replicas[replica_id].in_flight[request_id]
                self._calls[request_id] = self._meters[replica_id].begin(
                    now_s, attempt, call.request.prompt_tokens, call.prefill_tokens
                )

    def _end(
        self, now_s: float, request_id: RequestId, attempt: int | None, output_tokens: int
    ) -> None:
        """Strike a call; ``None`` for whatever attempt it is at."""
        watched = self._calls.get(request_id)
        if watched is None:
            return
        if attempt not in (watched.attempt, None):
            return
        del self._calls[request_id]
        self._let_out(now_s, watched, output_tokens)

    def _leave(
        self,
        now_s: float,
        request_id: RequestId,
        *,
        only: int | None = None,
        but: int | None = None,
    ) -> None:
        """Strike attempts that were not heard of: all, only one, or all but one."""
        stay = []
        for watched in self._unheard.pop(request_id, ()):
            if watched.attempt == but or only not in (None, watched.attempt):
                stay.append(watched)
            else:
                self._let_out(now_s, watched, 0)
        if stay:
            self._unheard[request_id] = stay

    def _let_out(self, now_s: float, watched: _Watched, output_tokens: int) -> None:
        watched.meter.end(now_s, watched, output_tokens)
        self._heard[watched.meter.replica_id] = None

    def _meet(self, replica_id: ReplicaId) -> None:
        """Begin with a replica that joined the fleet, if it did."""
        replica, meter = self._scheduler.replicas[replica_id], self._meters.get(replica_id)
        if meter is None or meter.replica is not replica:
            self._meters[replica_id] = _Meter(replica)
            self._tracker.add(replica_id, replica.pool.pool_id)
            self._tracker.forget(replica_id)

    def _restart(self, replica_id: ReplicaId) -> None:
        """Begin anew with a replica that is gone; its calls are not watched any more."""
        replica, meter = self._scheduler.replicas[replica_id], self._meters[replica_id]
        for request_id in replica.in_flight:
            self._calls.pop(request_id, None)
            unheard = self._unheard.pop(request_id, ())
            if stay := [watched for watched in unheard if watched.meter is not meter]:
                self._unheard[request_id] = stay
        self._meters[replica_id] = _Meter(replica)
        self._tracker.forget(replica_id)


def _differ(pace: float, other: float, ratio: float) -> bool:
    return not other / ratio <= pace <= other * ratio
