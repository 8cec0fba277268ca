"""How many workflows a second a fleet can finish, which loads are shares of.

A crowd arrives at once under one policy. Between 20 % and 80 % of the run's output the fleet
is full, and what it puts out there, in workflows' worth of output tokens, is its capacity.
Whole workflows are not counted: first come, first served goes through a crowd stage by
stage, so that they finish in a bunch and their rate is up to a third too high.
"""

from collections.abc import Sequence
from pathlib import Path

from concertmaster import compose, forecaster
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.kept import kept
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.records import RunRecords

FEWEST, MOST = 600, 9_600
"""Workflows of the first crowd, and of the largest."""

TOLERANCE = 0.05
"""A crowd is large enough if half of it gives the same capacity to this share."""


def capacity_rps(
    fleet: Fleet,
    templates: Sequence[WorkflowPlan],
    *,
    policy: str = "fcfs",
    models: str = forecaster.RECENT,
    seed: int = 0,
    keep_in: Path | None = None,
) -> float:
    """Measure the capacity of a fleet, in workflows a second.

    Crowds double until the fleet is full: one that is too small for a large fleet ends
    before it is.

    Args:
        fleet: What serves.
        templates: What is asked, as for ``draw``.
        policy: Name in the catalog.
        models: Forecasts, as for ``compose.simulate``.
        seed: Fixes the crowd; equal seeds give equal capacities.
        keep_in: Folder to keep the result in and to look it up from first, by all that it
            depends on; ``None`` measures always.
    """
    key = fleet, tuple(templates), policy, models, seed
    return kept(
        keep_in,
        "capacity",
        key,
        lambda: _measured(fleet, templates, policy=policy, models=models, seed=seed),
    )


def _measured(
    fleet: Fleet, templates: Sequence[WorkflowPlan], *, policy: str, models: str, seed: int
) -> float:
    last_rps, workflows = 0.0, FEWEST
    while True:
        crowd = draw(templates, workflows=workflows, rate_rps=None, seed=seed)
        run = compose.simulate(fleet, crowd, policy, seed=seed, models=models)
        rate_rps = full_rate_rps(run)
        if rate_rps <= last_rps * (1 + TOLERANCE) or workflows >= MOST:
            return rate_rps
        last_rps, workflows = rate_rps, 2 * workflows


def full_rate_rps(run: RunRecords) -> float:
    """Return workflows' worth of output a second between 20 % and 80 % of a run's output.

    Raises:
        InputError: Nothing was served, or all at one instant.
    """
    served = sorted(
        (call.finished_s, call.request_id, call.output_tokens)
        for call in run.calls
        if call.finished_s is not None
    )
    total_tokens = sum(tokens for _, _, tokens in served)
    ends_s: list[float] = []
    so_far_tokens = 0
    for finished_s, _, tokens in served:
        so_far_tokens += tokens
        while len(ends_s) < 2 and so_far_tokens >= (0.2, 0.8)[len(ends_s)] * total_tokens:
            ends_s.append(finished_s)
    if len(ends_s) < 2 or ends_s[0] == ends_s[1]:
        raise InputError("capacity", run.policy, "the fleet served too little to measure it")
    return 0.6 * len(run.workflows) / (ends_s[1] - ends_s[0])
