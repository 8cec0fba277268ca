"""The waiting line: late binding, one order, and a wait that is finite by construction.

A call's key is ``urgency_s + aging * arrival_s``, smallest first. Urgency lies in
[0, ``MAX_URGENCY_S``], so a call is only ever overtaken by calls that arrived less than
``MAX_URGENCY_S / aging`` seconds after it: finitely many, hence a finite wait.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from concertmaster.core.fair_share import FairShare
from concertmaster.core.fleet import PoolId
from concertmaster.core.forecast import UNKNOWN_OUTPUT_TOKENS, Forecast, Quantiles
from concertmaster.core.ladder import NO_WORK, Ladder, Rank, Work
from concertmaster.core.request import ModelName, Request, RequestId
from concertmaster.core.sketch import Measure, Sketch, moments, sketch_of
from concertmaster.core.workflow import Workflow

MAX_URGENCY_S = 3600.0
"""Urgency is clamped to it: the bound in the proof above."""


def line_key(*, urgency_s: float, arrival_s: float, aging: float) -> float:
    """Sort key of the line, in seconds; the smallest goes first.

    >>> line_key(urgency_s=5.0, arrival_s=100.0, aging=0.5)
    55.0

    Args:
        urgency_s: What the ordering says; clamped to 0…``MAX_URGENCY_S``.
        arrival_s: When the call came.
        aging: Seconds of urgency that a second of waiting is worth; above 0.
    """
    return min(max(urgency_s, 0.0), MAX_URGENCY_S) + aging * arrival_s


def longest_overtaking_s(aging: float) -> float:
    """How long after a call another may arrive and still go before it.

    >>> longest_overtaking_s(2.0)
    1800.0
    """
    return MAX_URGENCY_S / aging


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    """A call in the line: all that a policy may know of it.

    Attributes:
        serial: Breaks ties of the key; calls are numbered as they arrive.
        attempt: The attempt that its dispatch will be.
        hedge: The attempt that went out beside another; 0 if none did.
        expires_s: When it is refused if still here.
        kv_level: Probability with which its answer shall fit the KV room promised to it.
        by_mean: Whether its output is taken to be the mean of the forecast, for certain.
        charged_tokens: Output tokens that its tenant was charged; ``None`` if nothing was.
        owed_tokens: What its workflow needs from here on where it is to go, by forecast.
    """

    request: Request
    forecast: Forecast
    workflow: Workflow
    pools: tuple[PoolId, ...]
    serial: int
    attempt: int
    expires_s: float
    kv_level: float
    by_mean: bool = False
    key: float = 0.0
    owed_tokens: int = 0
    hedge: int = 0
    charged_tokens: int | None = None
    _expected_tokens: dict[ModelName, int] = field(default_factory=dict)
    _kv_tokens: dict[ModelName, int] = field(default_factory=dict)
    _sketches: dict[ModelName, Sketch] = field(default_factory=dict)
    _work: dict[ModelName, Work] = field(default_factory=dict)
    _measured: dict[tuple[ModelName, str], float] = field(default_factory=dict)

    @property
    def latest_attempt(self) -> int:
        """Number of its latest attempt, beside another or not."""
        return max(self.attempt, self.hedge)

    @property
    def is_last(self) -> bool:
        """Whether no other call of its workflow is expected: by the median, once it has come."""
        calls = self.forecast.remaining_calls
        return calls is not None and calls.at(0.5) < 1.5

    def expected_tokens(self, model: ModelName) -> int:
        """Output tokens to expect on a model: the median of the forecast."""
        tokens = self._expected_tokens.get(model)
        if tokens is None:
            tokens = self.forecast.output_at(model, 0.5, self.request.max_output_tokens)
            self._expected_tokens[model] = tokens
        return tokens

    def kv_tokens(self, model: ModelName) -> int:
        """KV tokens to promise on a model: the prompt and a long answer."""
        tokens = self._kv_tokens.get(model)
        if tokens is None:
            request = self.request
            output = self.forecast.output_at(model, self.kv_level, request.max_output_tokens)
            tokens = self._kv_tokens[model] = request.prompt_tokens + output
        return tokens

    def output_sketch(self, model: ModelName) -> Sketch:
        """Output tokens on a model, as a distribution."""
        sketch = self._sketches.get(model)
        if sketch is None:
            law = self.forecast.output_law(model)
            if law is None:
                law = Quantiles.exactly(UNKNOWN_OUTPUT_TOKENS)
            elif self.by_mean:
                law = Quantiles.exactly(law.mean)
            sketch = self._sketches[model] = sketch_of(law, most=self.request.max_output_tokens)
        return sketch

    def work(self, model: ModelName) -> Work:
        """Return what it needs of a model, its mean and variance rounded to whole tokens."""
        found = self._work.get(model)
        if found is None:
            mean, variance = moments(self.output_sketch(model))
            found = Work(1, self.request.prompt_tokens, round(mean), round(variance))
            self._work[model] = found
        return found

    def rank(self, *, fifo: bool = False) -> Rank:
        """Return its place in the line, or in one that is first come, first served."""
        return (0.0 if fifo else self.key, self.serial)

    def measured_tokens(self, model: ModelName, measure: Measure) -> float:
        """Output tokens on a model, as one number."""
        key = (model, measure.name)
        tokens = self._measured.get(key)
        if tokens is None:
            tokens = self._measured[key] = measure.of(self.output_sketch(model))
        return tokens

    def remaining_tokens(self, model: ModelName) -> int:
        """Output tokens to expect of its workflow from here on, this call included: the mean."""
        law, tokens = self.forecast.remaining_on(model), self.expected_tokens(model)
        return tokens if law is None else max(1, round(law.mean))

    def owes_tokens(self, model: ModelName) -> int:
        """Return the same, less what calls bound to other models will need of those."""
        by = self.forecast.remaining_by
        if not by:
            return self.remaining_tokens(model)
        mean = by.get(model, 0.0) + by.get(ModelName(""), 0.0)
        return max(self.expected_tokens(model), round(mean))


_Heap: TypeAlias = list[tuple[float, int, Waiting]]
_Agenda: TypeAlias = list[tuple[float, int, int, Waiting]]
"""Instants with a call, its serial number and the attempt that it waited for."""


class Lane:
    """Waiting calls that may go to the same pools, in order; each tenant has a line of its own.

    Args:
        pools: Where they may go.
        shares: Says whose turn it is.

    Attributes:
        tokens: What the workflows of those calls need from here on, by forecast.
    """

    def __init__(self, pools: tuple[PoolId, ...], shares: FairShare | None = None) -> None:
        self.pools = pools
        self.tokens = 0
        self._shares = shares or FairShare()
        self._heaps: dict[str, _Heap] = {}
        self._waiting: dict[RequestId, Waiting] = {}
        self._ladders: dict[tuple[ModelName, bool], Ladder] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, call: Waiting) -> bool:
        return self._waiting.get(call.request.request_id) is call

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    def push(self, call: Waiting) -> None:
        """Put a call in its place."""
        self._waiting[call.request.request_id] = call
        self.tokens += call.owed_tokens
        self._climb(call)
        heap = self._heaps.setdefault(call.request.tenant, [])
        heapq.heappush(heap, (call.key, call.serial, call))

    def remove(self, call: Waiting) -> None:
        """Take a call out, wherever it stands."""
        del self._waiting[call.request.request_id]
        self.tokens -= call.owed_tokens
        self._step_off(call)
        tenant = call.request.tenant
        heap = self._heaps[tenant]
        if len(heap) > 64 and len(heap) > 2 * len(self._waiting):
            kept = self._heaps[tenant] = [entry for entry in heap if entry[2] in self]
            heapq.heapify(kept)

    def head(self, current_key: Callable[[Waiting], float] | None) -> Waiting | None:
        """Return the call that goes next; keys that have grown are put right on the way.

        Args:
            current_key: Recomputes a key that may have grown since; ``None`` if keys stay.
        """
        best: Waiting | None = None
        best_rank = (0, 0.0, 0)
        for tenant in list(self._heaps):
            call = self._first(self._heaps[tenant], current_key)
            if call is None:
                del self._heaps[tenant]
                continue
            rank = self.turn(call)
            if best is None or rank < best_rank:
                best, best_rank = call, rank
        return best

    def turn(self, call: Waiting) -> tuple[int, float, int]:
        """Return the place of a head among other heads; the smallest goes first."""
        return (self._shares.turn(self.pools, call.request.tenant), call.key, call.serial)

    def _first(self, heap: _Heap, current_key: Callable[[Waiting], float] | None) -> Waiting | None:
        while heap:
            key, serial, call = heap[0]
            if call not in self:
                heapq.heappop(heap)
                continue
            if current_key is not None:
                grown = current_key(call)
                if grown > key:
                    self._step_off(call)
                    call.key = grown
                    self._climb(call)
                    heapq.heapreplace(heap, (grown, serial, call))
                    continue
            return call
        return None

    def ahead(self, call: Waiting, key: float, model: ModelName, *, fifo: bool = False) -> Work:
        """Return the work of the calls that would go before another with that key.

        The sums are kept from the first question on, so that lines of which nobody asks cost
        nothing.

        Args:
            call: The call that asks; it never goes before itself.
            key: Its key among these.
            model: Where the work would be done.
            fifo: Take calls to go in the order of their arrival, whatever their keys.
        """
        ladder = self._ladders.get((model, fifo))
        if ladder is None:
            ladder = self._ladders[model, fifo] = Ladder()
            for other in self:
                ladder.add(other.rank(fifo=fifo), other.work(model))
        place = (0.0 if fifo else key, call.serial)
        mine = call.work(model) if call in self and call.rank(fifo=fifo) < place else NO_WORK
        return ladder.before(place).less(mine)

    def validate(self) -> None:
        """Check sums against the calls."""
        assert len(self), "an empty lane was kept"
        waiting_tokens = sum(call.owed_tokens for call in self)
        assert self.tokens == waiting_tokens, "a lane lost count of tokens"
        for (model, fifo), ladder in self._ladders.items():
            ladder.validate((call.rank(fifo=fifo), call.work(model)) for call in self)

    def _climb(self, call: Waiting) -> None:
        for (model, fifo), ladder in self._ladders.items():
            ladder.add(call.rank(fifo=fifo), call.work(model))

    def _step_off(self, call: Waiting) -> None:
        for (_, fifo), ladder in self._ladders.items():
            ladder.remove(call.rank(fifo=fifo))


class WaitingLine:
    """All lanes, when their calls expire, and how fast calls get through.

    Attributes:
        shares: What tenants were handed.
        since_s: Arrival of the call that first had to wait since nobody did; ``None`` if
            nobody ever has.
    """

    def __init__(self) -> None:
        self.shares = FairShare()
        self.since_s: float | None = None
        self.lanes: dict[tuple[PoolId, ...], Lane] = {}
        self._by_id: dict[RequestId, Waiting] = {}
        self._expiry: _Agenda = []
        self._reviews: _Agenda = []
        self._finish_times_s: deque[float] = deque(maxlen=64)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._by_id.values())

    def push(self, call: Waiting) -> None:
        """Let a call wait."""
        if not self._by_id:
            self.since_s = call.request.arrival_s
        self.enter(call)
        self._by_id[call.request.request_id] = call
        heapq.heappush(self._expiry, (call.expires_s, call.serial, call.attempt, call))

    def remove(self, request_id: RequestId) -> Waiting:
        """Take a call out: dispatched, refused or cancelled."""
        call = self._by_id.pop(request_id)
        self.leave(call)
        return call

    def enter(self, call: Waiting) -> None:
        """Put a call into the lane to its pools."""
        lane = self.lanes.get(call.pools)
        if lane is None:
            lane = self.lanes[call.pools] = Lane(call.pools, self.shares)
        lane.push(call)
        self.shares.enter(call.pools, call.request.tenant)

    def leave(self, call: Waiting) -> None:
        """Take a call out of its lane, which it must enter again if it waits on."""
        lane = self.lanes[call.pools]
        lane.remove(call)
        self.shares.leave(call.pools, call.request.tenant)
        if not lane:
            del self.lanes[call.pools]

    def review_at(self, time_s: float, call: Waiting) -> None:
        """Note when the pools of a call that waits are to be looked at again."""
        heapq.heappush(self._reviews, (time_s, call.serial, call.attempt, call))

    def next_review_s(self) -> float | None:
        """When the first call is due for review, if any is."""
        self._drop_stale(self._reviews)
        return self._reviews[0][0] if self._reviews else None

    def pop_review(self, now_s: float) -> Waiting | None:
        """Return a call that is due for review; it goes on waiting."""
        due_s = self.next_review_s()
        if due_s is None or due_s > now_s:
            return None
        return heapq.heappop(self._reviews)[3]

    def next_expiry_s(self) -> float | None:
        """When the first call expires, if any waits."""
        self._drop_stale(self._expiry)
        return self._expiry[0][0] if self._expiry else None

    def pop_expired(self, now_s: float) -> list[Waiting]:
        """Take out every call whose time has come."""
        expired = []
        while (expires_s := self.next_expiry_s()) is not None and expires_s <= now_s:
            expired.append(self.remove(self._expiry[0][3].request.request_id))
        return expired

    def note_finish(self, now_s: float) -> None:
        """Take in that a call has left the fleet with its answer."""
        self._finish_times_s.append(now_s)

    def drain_s(self, now_s: float) -> float:
        """Seconds until the line is through at the rate of the latest finishes; 1 to 120."""
        times_s = self._finish_times_s
        if not times_s:
            return 1.0
        seconds_each = (now_s - times_s[0]) / len(times_s)
        return min(max(1.0, seconds_each * len(self)), 120.0)

    def _drop_stale(self, agenda: _Agenda) -> None:
        """Take calls off the front of an agenda that wait no longer, or again."""
        while agenda:
            _, _, attempt, call = agenda[0]
            if call.attempt == attempt and self._by_id.get(call.request.request_id) is call:
                return
            heapq.heappop(agenda)

    def validate(self) -> None:
        """Check that lanes and index hold the same calls."""
        in_lanes = [call.request.request_id for lane in self.lanes.values() for call in lane]
        assert sorted(in_lanes) == sorted(self._by_id), "a lane and the index differ"
        for lane in self.lanes.values():
            lane.validate()
        self.shares.validate((call.pools, call.request.tenant) for call in self)
