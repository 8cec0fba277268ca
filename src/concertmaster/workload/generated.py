"""Workloads that are drawn from a law rather than read from a file: ``research:workflows=100``.

Each is a set of workflows without arrivals, as a file would be; equal seeds draw equal sets.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from concertmaster.core.settings import Reader, read_settings
from concertmaster.workload import coding, nine_apps, research, video
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.sources import Source


class Generator(NamedTuple):
    """What draws a workload.

    Attributes:
        draw: Takes the settings by name, and ``rng``.
        settings: What may follow its name.
    """

    draw: Callable[..., Sequence[WorkflowPlan]]
    settings: Mapping[str, Reader]


GENERATORS: Mapping[str, Generator] = {
    "research": Generator(research.draw, research.SETTINGS),
    "video": Generator(video.draw, video.SETTINGS),
    "coding": Generator(coding.draw, coding.SETTINGS),
    "nine-apps": Generator(nine_apps.draw, nine_apps.SETTINGS),
}
"""Every generator by name."""


def is_generated(spec: str) -> bool:
    """Say whether a spec names a generator; a file of that name is ``./research``."""
    return spec.partition(":")[0] in GENERATORS


def generate(spec: str, *, seed: int) -> Source:
    """Draw what a spec says.

    Raises:
        InputError: A setting is unknown or wrong.
    """
    name, _, text = spec.partition(":")
    generator = GENERATORS[name]
    settings = read_settings(f"workload {name}", text, generator.settings)
    plans = generator.draw(**settings, rng=random.Random(f"{seed} {name}"))
    return Source(name=spec, plans=plans, timed=False)
