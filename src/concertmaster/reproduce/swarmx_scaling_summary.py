"""Claims, tables and plots of scaling: makespans beside the GPU-seconds that they took."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from concertmaster.observe.compare import mean
from concertmaster.observe.console import number
from concertmaster.observe.plot_kinds import Line, Plot, TimelinePlot
from concertmaster.reproduce.study import Claim, Estimate, Results, Table
from concertmaster.reproduce.swarmx_arms import (
    FORESEEN,
    MORE_SCALED,
    REACTIVE,
    SAME_ROUTER,
    SCALED,
    STATIC,
)

SCALING = "scaling"
CLAIMED = f"{SCALING}/bursts"

P50, P90, P95, P99 = (f"makespan_s.{level}" for level in ("p50", "p90", "p95", "p99"))
GPU_S = "fleet.gpu_s"
FORMS = {
    "published": "round robin on arrival, as published",
    "best": "round robin bound late, its best form",
}
PLOTTED = (STATIC[0], REACTIVE[0][0], FORESEEN)


def claims(results: Results) -> tuple[Claim, ...]:
    """State what router and scaling are worth together, and scaling alone."""
    return (
        *(
            _against(results, f"end-to-end-static-{kind}", f"{form} + static", (rival,), 0.385)
            for (kind, form), rival in zip(FORMS.items(), STATIC, strict=True)
        ),
        *(
            _against(
                results,
                f"end-to-end-reactive-{kind}",
                f"{form} + reactive at equal GPU-seconds",
                ladder,
                0.7,
            )
            for (kind, form), ladder in zip(FORMS.items(), REACTIVE, strict=True)
        ),
    )


def _against(results: Results, name: str, rival: str, ladder: Sequence[str], most: float) -> Claim:
    """Compare P95; several arms of a rival are read off at the GPU-seconds of ours."""
    ours = _both(results, FORESEEN)
    steps = [_both(results, arm) for arm in ladder]
    ratios = [
        p95_s / frontier_s([step[at] for step in steps], gpu_s)
        for at, (gpu_s, p95_s) in enumerate(ours)
    ]
    return Claim.over_seeds(
        name,
        f"P95 makespan of deep research in bursts, {FORESEEN} / {rival}",
        ratios,
        "at most",
        most,
        note=_spent(ladder, steps, ours),
    )


def _both(results: Results, arm: str) -> list[tuple[float, float]]:
    """GPU-seconds and P95 of each seed."""
    columns = (results.values(one, setting=CLAIMED, arm=arm, load=0.0) for one in (GPU_S, P95))
    return list(zip(*columns, strict=True))


def _spent(
    ladder: Sequence[str],
    steps: Sequence[Sequence[tuple[float, float]]],
    ours: Sequence[tuple[float, float]],
) -> str:
    def shown(arm: str, seeds: Sequence[tuple[float, float]]) -> str:
        return f"{arm} {number(mean([gpu_s for gpu_s, _ in seeds]))}"

    pairs = [(FORESEEN, ours), *zip(ladder, steps, strict=True)]
    return "GPU-seconds: " + ", ".join(shown(*pair) for pair in pairs)


def frontier_s(steps: Sequence[tuple[float, float]], gpu_s: float) -> float:
    """Return the P95 that a rival has for these GPU-seconds, on straight lines between its arms.

    Beyond its cheapest and its dearest arm it has that of the arm.

    >>> frontier_s([(10.0, 300.0), (20.0, 200.0)], 15.0), frontier_s([(10.0, 300.0)], 99.0)
    (250.0, 300.0)
    """
    ranked = sorted(steps)
    for (low, slow_s), (high, fast_s) in pairwise(ranked):
        if low < gpu_s <= high:
            return slow_s + (fast_s - slow_s) * (gpu_s - low) / (high - low)
    return ranked[0][1] if gpu_s <= ranked[0][0] else ranked[-1][1]


def tables(results: Results) -> tuple[Table, ...]:
    """Return makespans of every arm beside what it took, and scaling under one router."""
    return (
        *(_arms(results, setting) for setting in settings(results)),
        *(_alone(results, setting) for setting in settings(results) if _has_all(results, setting)),
    )


def settings(results: Results) -> list[str]:
    """Return the settings of scaling that were run."""
    return [one for one in results.settings if one.startswith(f"{SCALING}/")]


def _arms(results: Results, setting: str) -> Table:
    columns = {
        "P50, s": P50,
        "P90, s": P90,
        "P95, s": P95,
        "P99, s": P99,
        "GPU-seconds": GPU_S,
        "starts": "fleet.replica_starts",
    }
    return Table(
        title=f"Router and scaling, deep research, {_shape(setting)}",
        columns=("arm", *columns),
        rows=tuple(
            (
                arm,
                *(
                    Estimate.of(results.values(one, setting=setting, arm=arm, load=0.0))
                    for one in columns.values()
                ),
            )
            for arm in (*SCALED, *MORE_SCALED)
            if results.has(setting=setting, arm=arm, load=0.0)
        ),
    )


def _has_all(results: Results, setting: str) -> bool:
    return all(results.has(setting=setting, arm=arm, load=0.0) for arm in SAME_ROUTER)


def _alone(results: Results, setting: str) -> Table:
    static, *others = SAME_ROUTER

    def share(figure: str, arm: str) -> Estimate:
        return Estimate.of(results.ratios(figure, arm, static, settings=[setting], loads=[0.0]))

    return Table(
        title=f"Scaling alone, over {static}, {_shape(setting)}",
        columns=("arm", "P50", "P95", "P99", "GPU-seconds"),
        rows=tuple(
            (arm, *(share(figure, arm) for figure in (P50, P95, P99, GPU_S))) for arm in others
        ),
    )


def _shape(setting: str) -> str:
    return setting.removeprefix(f"{SCALING}/")


def plots(results: Results) -> Mapping[str, Plot]:
    """Draw GPUs and P90 over time, of the first seed: mean lines would blur what was done."""
    return {
        f"swarmx-scaling-{_shape(setting)}": TimelinePlot(
            title=f"GPUs and P90, {_shape(setting)}, seed {results.seeds[0]}",
            bands={
                "GPUs that run or start": _lines(results, setting, "timeline_gpus"),
                "P90 makespan, s, by arrival": _lines(results, setting, "timeline_p90_s"),
            },
        )
        for setting in settings(results)
    }


def _lines(results: Results, setting: str, figure: str) -> list[Line]:
    def first(name: str, arm: str) -> list[float]:
        return results.series(name, setting=setting, arm=arm, load=0.0)[0]

    return [Line(label=arm, x=first("timeline_s", arm), y=first(figure, arm)) for arm in PLOTTED]
