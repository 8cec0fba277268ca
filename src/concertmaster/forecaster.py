"""Which predictor a run or a gateway gets: by its name, or from the folder of its store."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from concertmaster.config import GatewaySection
from concertmaster.core.fleet import Fleet
from concertmaster.core.request import ModelName
from concertmaster.predictors.interface import Predictor
from concertmaster.predictors.recent import RecentLengths

if TYPE_CHECKING:
    from concertmaster.learning.upkeep import School

RECENT, SHIPPED = "recent", "default"
"""Names of the two predictors that need no folder: lengths seen lately, and the shipped store."""


def predictor_of(models: str, fleet: Fleet) -> Predictor:
    """Return the predictor of that name, or of the store in that folder.

    Raises:
        InputError: The folder holds no store that this version reads.
    """
    if models == RECENT:
        return RecentLengths()
    from concertmaster.predictors.store import load_predictor  # noqa: PLC0415  # numpy is slow

    folder = None if models == SHIPPED else Path(models)
    return load_predictor(folder, models=fleet.models)


def serving_predictor(
    settings: GatewaySection,
    fleet: Fleet,
    *,
    trains: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Predictor:
    """Return the predictor of a gateway: kept to its budget, and learning as it serves.

    A challenger that was installed over the same store, beside the same labels, is taken up.

    Args:
        settings: Which predictor, its budget, and where labels are kept.
        fleet: Whose models get forecasts of their own.
        trains: Whether challengers may be trained in a process beside this one.
        clock: Seconds of the wall.

    Raises:
        InputError: As for ``predictor_of``, or ``feedback`` names another kind of file.
    """
    from concertmaster.learning.feedback import FeedbackStore  # noqa: PLC0415  # numpy is slow
    from concertmaster.learning.loop import LearningLoop  # noqa: PLC0415

    labels = Path(settings.feedback) if settings.feedback else None
    school = None
    if labels is not None and trains and settings.models != RECENT:
        school = _school(settings, labels, fleet.models)
    return LearningLoop(
        predictor_of(settings.models, fleet) if school is None else school.take_up(),
        clock,
        budget_s=settings.forecast_budget_ms / 1000,
        store=None if labels is None else FeedbackStore(labels, redacts=settings.redact_labels),
        school=school,
        run=uuid4().hex[:8],
    )


def _school(settings: GatewaySection, labels: Path, names: tuple[ModelName, ...]) -> "School":
    """Challengers are trained from the champion's store, and kept beside the labels."""
    from concertmaster.learning.background import BackgroundTrainer  # noqa: PLC0415
    from concertmaster.learning.installed import fingerprint  # noqa: PLC0415
    from concertmaster.learning.refit import refit  # noqa: PLC0415
    from concertmaster.learning.upkeep import School  # noqa: PLC0415
    from concertmaster.predictors.store import DEFAULT, load_predictor  # noqa: PLC0415

    told = DEFAULT if settings.models == SHIPPED else Path(settings.models)
    return School(
        trainer=BackgroundTrainer(),
        train=refit,
        load=partial(load_predictor, models=names),
        champion=told,
        labels=labels,
        folder=labels.with_name(f"{labels.name}.challengers"),
        over=fingerprint(told),
        seed=settings.seed,
    )
