"""From tokens to seconds: how long a call takes on a replica, as a law that is kept honest.

Three things stand between a forecast of tokens and one of seconds. The rate curve at the
batch at hand, times the replica's pace, says what so many tokens should take. How far calls
of a pool are from that is followed as a law of ratios, within minutes. What is still wrong
for an app and role is moved until quantiles cover what they say.
"""

import math
from collections import deque
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.fleet import PoolId, Replica
from concertmaster.core.forecast import UNKNOWN_OUTPUT_TOKENS, Forecast, Quantiles
from concertmaster.core.request import Request
from concertmaster.predictors.evidence import group_of
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.laws import Path

Floats = npt.NDArray[np.float64]

WINDOW = 128
"""Ratios to remember of each pool."""

HALF_LIFE_S, HALF_LIFE_CALLS = 300.0, 16
"""A ratio counts for half after this long, but not before so many others have come."""

PRIOR_CALLS = 4.0
"""Calls that take what the curve says, as which a pool begins."""

MOST_RATIO = 8.0
"""Ratios beyond this, either way, are taken as this."""

FIRST_LABELS, LAST_LABELS = 40.0, 240.0
"""A label moves an offset as the next one of this many would: of few at first, of more later."""

MOST_STEP = 0.3
MOST_OFFSET = 4.0

SPREAD = 0.5
"""Standard deviation of log seconds that sets how far a label moves an offset."""

# every level of a forecast lies in the middle of a cell
_TAIL_EDGES = (0.88, 0.92, 0.94, 0.96, 0.97, 0.985, 0.995, 1.0)
_TOKEN_EDGES = (0.0, 0.03, 0.07, 0.13, 0.2, 0.3, 0.38, 0.46, 0.54, 0.62, 0.7, 0.8, 0.84)
_RATIO_EDGES = (0.0, 0.03, 0.07, 0.2, 0.3, 0.46, 0.54, 0.7, 0.8)


def _cells(edges: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Return the middle rank and the mass of each cell."""
    ranks = [(low + high) / 2 for low, high in pairwise(edges)]
    return np.array(ranks), np.diff(np.array(edges))


_TOKEN_RANKS, _TOKEN_MASS = _cells((*_TOKEN_EDGES, *_TAIL_EDGES))
_RATIO_RANKS, _RATIO_MASS = _cells((*_RATIO_EDGES, *_TAIL_EDGES))
_MASS: Floats = np.outer(_TOKEN_MASS, _RATIO_MASS).ravel()
_LEVELS = np.array(LEVELS)
_READ_AT: Floats = _LEVELS + 1e-9  # sums of masses that are a level come out alike in any order
# standard normal density at each level: where it is low, quantiles take many labels to learn
_DENSITY = np.array([0.1031, 0.1755, 0.3178, 0.3989, 0.3178, 0.1755, 0.1031, 0.0267])


class Work(NamedTuple):
    """What a call would take on a replica by its curve and pace.

    Attributes:
        first_s: Seconds from dispatch to the first token: network, prefills ahead of it, its own.
        token_s: Seconds of every further token, in the batch at hand.
    """

    first_s: float
    token_s: float

    def seconds(self, output_tokens: float) -> float:
        """Seconds from dispatch to the last of so many tokens.

        >>> Work(0.5, 0.02).seconds(101)
        2.5
        """
        return self.first_s + max(0.0, output_tokens - 1) * self.token_s


def work_of(request: Request, replica: Replica) -> Work:
    """Say what a call takes on a replica, whether it was dispatched there yet or not."""
    pool = replica.pool
    own = replica.in_flight.get(request.request_id)
    batch, held_tokens = replica.running_requests, replica.context_tokens
    ahead_tokens = replica.prefill_tokens
    if own is None:
        batch += 1
        held_tokens += request.prompt_tokens
        cached_tokens = replica.prefixes.hit_tokens(pool.cacheable(request))
    else:
        held_tokens -= own.expected_tokens
        ahead_tokens -= own.prefill_tokens
        cached_tokens = request.prompt_tokens - own.prefill_tokens
    prefill_s = ahead_tokens * pool.prefill_token_s + pool.curve.prefill_s(
        request.prompt_tokens, cached_tokens=cached_tokens, chunk_tokens=pool.max_batch_tokens
    )
    step_s = pool.curve.step_s(batch, held_tokens)
    return Work(replica.network_s + replica.pace * prefill_s, replica.pace * step_s)


class ServiceTimes:
    """Laws of the seconds from the dispatch of a call to its last token.

    Attributes:
        adapt: Whether labels move ratios and offsets.

    Args:
        most_groups: Apps and roles to keep offsets of; those beyond use what is coarser.
    """

    def __init__(self, *, adapt: bool = True, most_groups: int = 5000) -> None:
        self.adapt = adapt
        self._most_groups = most_groups
        self._ratios: dict[PoolId, _Ratios] = {}
        self._offsets: dict[Path, _Offsets] = {(): _Offsets(np.zeros(len(LEVELS)))}

    def predict(self, request: Request, forecast: Forecast, replica: Replica) -> Quantiles:
        """Return the law of a call's seconds on a replica, as the replica is at this instant."""
        law = forecast.output_law(replica.pool.model.name) or _UNKNOWN
        tokens = np.interp(_TOKEN_RANKS, law.levels, law.values)
        work = work_of(request, replica)
        further = np.clip(tokens, 1.0, request.max_output_tokens) - 1
        ratios = self._ratios.get(replica.pool.pool_id)
        atoms = np.outer(
            work.first_s + further * work.token_s, _AS_CURVE if ratios is None else ratios.atoms
        ).ravel()
        offsets = self._offsets[self._known(group_of(request))]
        values = np.maximum.accumulate(_read(atoms) * offsets.factors)
        return Quantiles(LEVELS, tuple(values.tolist()))

    def learn(
        self,
        now_s: float,
        request: Request,
        pool_id: PoolId,
        *,
        work: Work,
        stated: Quantiles,
        output_tokens: int,
        actual_s: float,
    ) -> None:
        """Take in how long a call took.

        Args:
            now_s: When its last token was out; never earlier than of the call before.
            request: The call.
            pool_id: Where it was served.
            work: Of ``work_of`` at its dispatch.
            stated: What was predicted at its dispatch.
            output_tokens: How many came, at least 1.
            actual_s: From its dispatch to its last token; a label is ignored unless above 0.
        """
        if not self.adapt or not 0 < actual_s < math.inf:
            return
        ratios = self._ratios.get(pool_id)
        if ratios is None:
            ratios = self._ratios[pool_id] = _Ratios()
        ratios.add(now_s, actual_s / work.seconds(output_tokens))
        self._settle(group_of(request), stated, actual_s)

    def _settle(self, path: Path, stated: Quantiles, actual_s: float) -> None:
        missed = actual_s > np.array([stated.at(level) for level in LEVELS])
        for end in range(len(path) + 1):
            offsets = self._offsets.get(path[:end])
            if offsets is None:
                if len(self._offsets) >= self._most_groups:
                    return
                parent = self._offsets[path[: end - 1]]
                offsets = self._offsets[path[:end]] = _Offsets(parent.logs)
            offsets.add(missed)

    def _known(self, path: Path) -> Path:
        """Return the finest group of a path that has offsets."""
        while path not in self._offsets:
            path = path[:-1]
        return path


_UNKNOWN = Quantiles.exactly(float(UNKNOWN_OUTPUT_TOKENS))
_AS_CURVE: Floats = np.ones(len(_RATIO_RANKS))


def _read(atoms: Floats) -> Floats:
    """Return the quantiles of a discrete law whose masses are ``_MASS``.

    Nothing is read between atoms, so that a law whose every atom is larger is never below.
    """
    order = np.argsort(atoms)
    found: Floats = atoms[order[np.searchsorted(np.cumsum(_MASS[order]), _READ_AT)]]
    return found


class _Ratios:
    """Actual over expected seconds of a pool's latest calls, and the law they make.

    It moves with what is seen, not with time: a pool that rested is taken to be as it was.
    """

    __slots__ = ("_seen", "atoms")

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.atoms = _AS_CURVE

    def add(self, now_s: float, ratio: float) -> None:
        self._seen.append((now_s, min(max(ratio, 1 / MOST_RATIO), MOST_RATIO)))
        seen = np.array(self._seen)
        count = len(seen)
        ages = np.minimum(
            (now_s - seen[:, 0]) / HALF_LIFE_S, np.arange(count)[::-1] / HALF_LIFE_CALLS
        )
        values = np.append(seen[:, 1], 1.0)
        worths = np.append(0.5**ages, PRIOR_CALLS * 0.5 ** (count / HALF_LIFE_CALLS))
        order = np.argsort(values, kind="stable")
        below = np.cumsum(worths[order]) - worths[order] / 2
        self.atoms = np.interp(_RATIO_RANKS * worths.sum(), below, values[order])


class _Offsets:
    """What to add to the log seconds of one group, by level: adaptive conformal inference.

    Each label moves a level up if it was missed and down if it was covered, so that the
    share covered tends to the level whatever the labels do (Gibbs and Candès, 2021).
    """

    __slots__ = ("_labels", "factors", "logs")

    def __init__(self, logs: Floats) -> None:
        self._labels = 0.0
        self.logs = logs
        self.factors: Floats = np.exp(logs)

    def add(self, missed: npt.NDArray[np.bool_]) -> None:
        known = min(FIRST_LABELS + self._labels, LAST_LABELS)
        step = np.minimum(MOST_STEP, SPREAD / (known * _DENSITY))
        moved = self.logs + step * (missed - (1 - _LEVELS))
        self.logs = np.clip(moved, -MOST_OFFSET, MOST_OFFSET)
        self.factors = np.exp(self.logs)
        self._labels += 1
