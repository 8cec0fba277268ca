"""What a learning loop counts, as plain numbers for whoever shows them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

BUDGET = ("in_time", "late", "skipped", "failed", "senseless")
"""How a call was answered: by the predictor in time or late, else by the fallback, and why."""

LABELS = ("labels", "duplicates", "refused", "unknown", "overflowed", "trimmed")
"""What becomes of outcomes, see ``FeedbackStore.counts``."""

TRAININGS = ("done", "failed")
VERDICTS = ("install", "discard")
KINDS = ("higher", "lower", "wider", "narrower", "heavier_tail", "lighter_tail")
"""Kinds of drift, see ``drift.Change``."""

DRIFTING = ("output_tokens", "remaining_tokens", "success")
"""Forecasts that are watched for drift, see ``watching.Watching``."""

TARGETS = ("output_tokens", "remaining_tokens", "remaining_calls")
COVERED = (0.5, 0.95)
"""Levels whose coverage is watched."""

Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFigures:
    """What was counted so far.

    Attributes:
        budget: Calls, by ``BUDGET``.
        drift: Alarms, by ``DRIFTING`` and ``KINDS``.
        labels: Outcomes, by ``LABELS``.
        failed_flushes: Times that labels could not be written.
        trainings: By ``TRAININGS``.
        challengers: By ``VERDICTS``.
        coverage: Share of outcomes at or below a level, by target and level.
    """

    budget: Counts = field(default_factory=dict)
    drift: Mapping[tuple[str, str], int] = field(default_factory=dict)
    labels: Counts = field(default_factory=dict)
    failed_flushes: int = 0
    trainings: Counts = field(default_factory=dict)
    challengers: Counts = field(default_factory=dict)
    coverage: Mapping[tuple[str, float], float] = field(default_factory=dict)
