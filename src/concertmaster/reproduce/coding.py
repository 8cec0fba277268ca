"""Coding agents: recorded sessions, whose prompts outgrow the caches of a fleet.

The worlds, arms and load are those of the study of tails, whose full grid has them too. A
second load is four times the first, at which routers that look for prefixes are busy as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from concertmaster.observe.compare import mean
from concertmaster.observe.plot_kinds import CdfPlot
from concertmaster.reproduce.study import Cell, Claim, Figures, Results, Summary
from concertmaster.reproduce.swarmx import route
from concertmaster.reproduce.swarmx_arms import (
    AFFINE,
    BLIND,
    LATE,
    LATE_AFFINE,
    MEANS,
    POINT_ROLES,
    ROLES,
)
from concertmaster.reproduce.swarmx_scaling_summary import P95
from concertmaster.reproduce.swarmx_summary import ROUTING, note, routers
from concertmaster.reproduce.swarmx_world import CODING, CODING_ONE, WORLDS

SETTINGS = tuple(f"{ROUTING}/{name}" for name in (CODING, CODING_ONE))
CALM, CROWDED = 1.0, 4.0
SEEKERS = (AFFINE, LATE_AFFINE, POINT_ROLES, ROLES)
"""Whom prefixes matter to: compared when crowded too."""

ARMS = (BLIND, LATE, MEANS, *SEEKERS)


@dataclass(frozen=True, slots=True)
class Coding:
    """The recipe against routers that are blind to prefixes, and routers that seek them."""

    name: str = "coding"
    title: str = "Coding agents: recorded sessions that outgrow caches"
    modules: tuple[str, ...] = (
        "coding",
        "search",
        "swarmx",
        "swarmx_arms",
        "swarmx_world",
    )

    @property
    def settings(self) -> Mapping[str, object]:
        """How many sessions a run has."""
        return {"workflows": WORLDS[CODING].workflows}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Two models, and one; there is no larger grid."""
        loads = [(CALM, arm) for arm in ARMS] + [(CROWDED, arm) for arm in SEEKERS]
        return [
            Cell(setting=setting, arm=arm, load=load, seed=seed)
            for seed, setting, (load, arm) in product(range(seeds), SETTINGS, loads)
        ]

    def run(self, cell: Cell) -> Figures:
        """Route recorded sessions."""
        return route(cell.setting.removeprefix(f"{ROUTING}/"), cell)

    def summarise(self, results: Results) -> Summary:
        """Compare with the blind when calm, and with those that seek prefixes when crowded."""
        return Summary(
            claims=tuple(_claims(results)),
            tables=tuple(
                routers(results, setting, load)
                for setting, load in product(results.settings, (CALM, CROWDED))
            ),
            plots={"coding-makespans": _plot(results)},
            notes=tuple(note(results, setting) for setting in results.settings),
        )


def _claims(results: Results) -> Iterator[Claim]:
    for setting in results.settings:
        best = min((AFFINE, LATE_AFFINE), key=lambda arm: _p95_s(results, setting, arm))
        for name, rival, load, most in (
            ("calm", BLIND, CALM, 0.7),
            ("crowded", best, CROWDED, 1.0),
        ):
            yield Claim.over_seeds(
                f"{setting}-{name}",
                f"P95 makespan, {setting.removeprefix(f'{ROUTING}/')}, load {load:g}, "
                f"{ROLES} / {rival}",
                results.ratios(P95, ROLES, rival, settings=[setting], loads=[load]),
                "at most",
                most,
            )


def _p95_s(results: Results, setting: str, arm: str) -> float:
    return mean(results.values(P95, setting=setting, arm=arm, load=CROWDED))


def _plot(results: Results) -> CdfPlot:
    def pooled(setting: str, load: float, arm: str) -> list[float]:
        found = results.series("makespans_s", setting=setting, arm=arm, load=load)
        return [makespan_s for one in found for makespan_s in one]

    return CdfPlot(
        title="Makespans of coding sessions",
        x_label="makespan, seconds",
        panels={
            f"{setting.removeprefix(f'{ROUTING}/')}, load {load:g}": {
                arm: pooled(setting, load, arm)
                for arm in results.arms
                if results.has(setting=setting, arm=arm, load=load)
            }
            for setting, load in product(results.settings, (CALM, CROWDED))
        },
    )


STUDY = Coding()
