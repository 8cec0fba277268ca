"""When workflows arrive: as recorded, or drawn from a process with a seed.

Arrivals are an open loop: they do not wait for the fleet.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

from concertmaster.core.errors import InputError, unknown_name
from concertmaster.workload.rhythms import FORMS, Rhythm, parse_rhythm

ArrivalKind = Literal["trace", "poisson", "gamma", "burst", "step"]
KINDS: tuple[str, ...] = get_args(ArrivalKind)
MAX_CV = 100.0
"""Burstiness beyond which a gamma gap is 0 in all but one of ten thousand draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalSpec:
    """How gaps between arrivals come about.

    Attributes:
        cv: Standard deviation of the gaps over their mean, for ``gamma`` only: 0 is a
            metronome, 1 is Poisson, more is bursty.
        rhythm: How the rate changes, for ``burst`` and ``step``: Poisson otherwise.
    """

    kind: ArrivalKind
    cv: float = 1.0
    rhythm: Rhythm | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("--arrivals", "", "kind of arrivals", self.kind, KINDS)
        if not 0.0 <= self.cv <= MAX_CV:
            problem = f"expected a burstiness of 0 to {MAX_CV:g}, found {self.cv:g}"
            raise InputError("--arrivals", "cv", problem, "1 is Poisson, 3 is bursty")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``trace``, ``poisson``, ``gamma``, ``gamma:CV``, or a rhythm.

        >>> ArrivalSpec.parse("gamma:3")
        ArrivalSpec(kind='gamma', cv=3.0, rhythm=None)
        """
        kind, _, cv_text = text.partition(":")
        if kind in FORMS:
            return cls(kind=cast("ArrivalKind", kind), rhythm=parse_rhythm(text))
        if cv_text and kind in KINDS and kind != "gamma":
            problem = f'expected "{kind}" without a burstiness, found "{text}"'
            raise InputError("--arrivals", "", problem, f"write gamma:{cv_text}")
        try:
            cv = float(cv_text) if cv_text else 1.0
        except ValueError:
            problem = f'expected a number after "gamma:", found "{cv_text}"'
            raise InputError("--arrivals", "", problem, "for example gamma:3") from None
        return cls(kind=cast("ArrivalKind", kind), cv=cv)

    @property
    def gap_cv(self) -> float:
        """Burstiness that the draws have: 1 for Poisson, whatever ``cv`` says."""
        return self.cv if self.kind == "gamma" else 1.0

    def instants_s(self, count: int, rate_rps: float, rng: random.Random) -> list[float]:
        """Draw ``count`` arrivals; the first one is at 0.0."""
        even_s = arrivals_s(count, rate_rps, self.gap_cv, rng)
        rhythm = self.rhythm
        return even_s if rhythm is None else [rhythm.instant_s(one) for one in even_s]


POISSON = ArrivalSpec(kind="poisson")


def gap_s(rate_rps: float, cv: float, rng: random.Random) -> float:
    """Draw one gap, of mean ``1 / rate_rps`` and coefficient of variation ``cv``."""
    if cv == 0.0:
        return 1.0 / rate_rps
    if cv == 1.0:
        return rng.expovariate(rate_rps)
    return rng.gammavariate(1.0 / cv**2, cv**2 / rate_rps)


def arrivals_s(count: int, rate_rps: float, cv: float, rng: random.Random) -> list[float]:
    """Draw ``count`` arrivals; the first one is at 0.0."""
    instants, now_s = [], 0.0
    for _ in range(count):
        instants.append(now_s)
        now_s += gap_s(rate_rps, cv, rng)
    return instants


def window_arrivals_s(
    start_s: float, length_s: float, rate_rps: float, cv: float, rng: random.Random
) -> Iterator[float]:
    """Draw the arrivals of one window of a process that has been running for long.

    The first gap is what is left of a gap under way, so that the expected count is
    ``rate_rps * length_s`` however bursty the process is.
    """
    now_s = _first_s(rate_rps, cv, rng)
    while now_s < length_s:
        yield start_s + now_s
        now_s += gap_s(rate_rps, cv, rng)


def _first_s(rate_rps: float, cv: float, rng: random.Random) -> float:
    """Draw the rest of the gap that the window begins in: longer gaps are likelier."""
    whole_s = 1.0 / rate_rps if cv == 0.0 else rng.gammavariate(1.0 + 1.0 / cv**2, cv**2 / rate_rps)
    return rng.uniform(0.0, 1.0) * whole_s


def checked_rate(name: str, rate: float | None) -> None:
    """Raise unless ``rate`` is a number above 0 or absent."""
    if rate is not None and not (0.0 < rate < math.inf):
        problem = f"expected a number > 0, found {rate:g}"
        raise InputError(name, "", problem, f"for example {name} 2.5")
