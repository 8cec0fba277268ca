"""Rates of arrivals that change with time: bursts that come back, and a step that stays.

Arrivals drawn at an even rate are moved in time, so that the work and its order stay the same.
"""

from dataclasses import dataclass
from typing import TypeAlias

from concertmaster.core.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Quiet, then loud, again and again; the mean rate is what it would be without.

    Attributes:
        factor: Rate while loud over rate while quiet.
        on_s: How long it is loud.
        off_s: How long it is quiet before.
    """

    factor: float
    on_s: float
    off_s: float

    def instant_s(self, even_s: float) -> float:
        """When what would have come at ``even_s`` comes."""
        period_s = self.on_s + self.off_s
        quiet = period_s / (self.factor * self.on_s + self.off_s)
        periods, rest_s = divmod(even_s, period_s)
        quiet_part_s = quiet * self.off_s
        if rest_s <= quiet_part_s:
            return periods * period_s + rest_s / quiet
        loud_s = (rest_s - quiet_part_s) / (quiet * self.factor)
        return periods * period_s + self.off_s + loud_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rate, and from an instant on another.

    Attributes:
        factor: Rate after over rate before.
        at_s: When it changes.
    """

    factor: float
    at_s: float

    def instant_s(self, even_s: float) -> float:
        """When what would have come at ``even_s`` at the first rate comes."""
        return min(even_s, self.at_s) + max(0.0, even_s - self.at_s) / self.factor


Rhythm: TypeAlias = Bursts | Step

FORMS = {"burst": "burst:FACTOR:ON_S:OFF_S", "step": "step:FACTOR:AT_S"}
"""How each is written."""

_EXAMPLES = {"burst": "burst:5:30:270", "step": "step:2:600"}


def parse_rhythm(text: str) -> Rhythm:
    """Read ``burst:FACTOR:ON_S:OFF_S`` or ``step:FACTOR:AT_S``.

    >>> parse_rhythm("step:2:600")
    Step(factor=2.0, at_s=600.0)
    """
    kind, *parts = text.split(":")
    wanted = FORMS[kind].count(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != wanted or not all(0.0 < number < 1e9 for number in numbers):
        problem = f'expected {FORMS[kind]} with numbers > 0, found "{text}"'
        raise InputError("--arrivals", "", problem, f"for example {_EXAMPLES[kind]}")
    if kind == "step":
        return Step(factor=numbers[0], at_s=numbers[1])
    return Bursts(factor=numbers[0], on_s=numbers[1], off_s=numbers[2])
