"""Claims, tables and plots of the study of model choice."""

from collections.abc import Mapping, Sequence

from concertmaster.observe.compare import mean
from concertmaster.observe.plot_kinds import Frontier, FrontierPlot, Line, LinePlot, Mark, Plot
from concertmaster.reproduce.chimera_arms import ARMS, BUSY, ORACLES, RIVALS, SLACKS, WITHOUT
from concertmaster.reproduce.study import (
    Claim,
    Estimate,
    Results,
    Summary,
    Table,
    TableCell,
)

PER_TOKEN, MEAN, P95, OK = "per_token_s", "makespan_s.mean", "makespan_s.p95", "success_ratio"
POINTS = 8.0
"""What choice by quality shall gain, where there is as much to gain."""

HIGH_LOAD = 0.5
"""Above it, the recipe must be dominated by no rival that looks at quality."""


def summary(results: Results) -> Summary:
    """Sum up all that was run."""
    capacities = ", ".join(f"{s} {_capacity_rps(results, s):.2g}" for s in results.settings)
    gaps = ", ".join(f"{s} {_gap_points(results, s):.2g}" for s in results.settings)
    return Summary(
        claims=(*_against_vllm(results), *_against_order(results), *_alone(results)),
        tables=(
            _gaps(results),
            *(_table(title, figure, results) for title, figure in _FIGURES),
            _parts(results),
            _overhead(results),
        ),
        plots=_plots(results),
        notes=(
            f"load 1, in workflows/s: {capacities}",
            f"points by which the strongest model alone is ahead of vllm at load {BUSY:g}: {gaps}",
        ),
    )


def _capacity_rps(results: Results, setting: str) -> float:
    return results.values("capacity_rps", setting=setting, arm="chimera", load=BUSY)[0]


_FIGURES = (
    ("Seconds by output token", PER_TOKEN),
    ("Mean makespan, seconds", MEAN),
    ("P95 makespan, seconds", P95),
    ("Share of workflows solved", OK),
    ("Longest wait of a call, seconds", "longest_wait_s"),
)


def _loads(results: Results) -> list[float]:
    return [
        load
        for load in results.loads
        if all(results.has(setting=s, arm=arm, load=load) for s in results.settings for arm in ARMS)
    ]


def _against_vllm(results: Results) -> tuple[Claim, ...]:
    settings, loads = results.settings, _loads(results)
    wide = [one for one in settings if _gap_points(results, one) >= POINTS] or settings
    gains = results.differences(OK, "chimera", "vllm", settings=wide, loads=loads)
    return (
        Claim.over_seeds(
            "vllm-per-token",
            "seconds by output token, vllm / chimera, mean of all fleets and loads",
            results.ratios(PER_TOKEN, "vllm", "chimera", settings=settings, loads=loads),
            "at least",
            1.2,
        ),
        Claim.over_seeds(
            "vllm-success",
            "workflows solved, chimera less vllm, points, "
            f"where the strongest model alone is {POINTS:g} ahead of vllm",
            [100 * gain for gain in gains],
            "at least",
            POINTS,
        ),
    )


def _gap_points(results: Results, setting: str) -> float:
    """Points by which the strongest model alone is ahead of the blind router."""
    strongest, blind = (
        results.values(figure, setting=setting, arm="vllm", load=BUSY)
        for figure in ("strongest_ratio", OK)
    )
    return 100 * (mean(strongest) - mean(blind))


def _against_order(results: Results) -> tuple[Claim, ...]:
    settings, loads = results.settings, _loads(results)
    claims: list[Claim] = []
    for rival in ("ltr", "vllm+mlfq"):
        claims += (
            Claim.over_seeds(
                f"{rival}-makespan",
                f"mean makespan, chimera / {rival}",
                results.ratios(MEAN, "chimera", rival, settings=settings, loads=loads),
                "at most",
                1.0,
                by_interval=True,
            ),
            Claim.over_seeds(
                f"{rival}-success",
                f"workflows solved, chimera less {rival}, points",
                [
                    100 * gain
                    for gain in results.differences(
                        OK, "chimera", rival, settings=settings, loads=loads
                    )
                ],
                "at least",
                0.0,
            ),
        )
    return tuple(claims)


def _alone(results: Results) -> tuple[Claim, ...]:
    settings, loads, busy = results.settings, _loads(results), [BUSY]
    promised = results.per_seed("promised_ratio", "chimera", settings=settings, loads=loads)
    solved = results.per_seed(OK, "chimera", settings=settings, loads=loads)
    return (
        Claim.over_seeds(
            "dominated",
            "fleets and loads above half at which quality-only or cascade is sooner and better",
            _dominations(results),
            "at most",
            0.0,
        ),
        Claim.over_seeds(
            "oracle-length",
            f"mean makespan at load {BUSY:g}, chimera / the same with true lengths",
            results.ratios(
                MEAN,
                "chimera",
                "chimera:knows=length",
                settings=_taken_apart(results),
                loads=busy,
            ),
            "at most",
            1.15,
        ),
        Claim.over_seeds(
            "promise",
            "success forecast of the chosen models less success, points, either way",
            [100 * abs(a - b) for a, b in zip(promised, solved, strict=True)],
            "at most",
            3.0,
        ),
    )


def _taken_apart(results: Results) -> list[str]:
    """Fleets on which parts were taken out and oracles asked."""
    arms = (*WITHOUT, *ORACLES)
    return [
        setting
        for setting in results.settings
        if all(results.has(setting=setting, arm=arm, load=BUSY) for arm in arms)
    ]


def _dominations(results: Results) -> list[float]:
    """Count, seed by seed, where a rival that looks at quality wins on both axes."""
    counts = [0.0] * len(results.seeds)
    for setting in results.settings:
        for load in _loads(results):
            for rival in ("quality-only", "cascade") if load > HIGH_LOAD else ():
                for at, (later, better) in enumerate(_beats(results, setting, load, rival)):
                    counts[at] += later and better
    return counts


def _beats(results: Results, setting: str, load: float, rival: str) -> list[tuple[bool, bool]]:
    def both(figure: str) -> list[tuple[float, float]]:
        mine = results.values(figure, setting=setting, arm="chimera", load=load)
        return list(
            zip(results.values(figure, setting=setting, arm=rival, load=load), mine, strict=True)
        )

    return [
        (theirs_s < mine_s, theirs_ok >= mine_ok)
        for (theirs_s, mine_s), (theirs_ok, mine_ok) in zip(both(MEAN), both(OK), strict=True)
    ]


def _gaps(results: Results) -> Table:
    """State what there is to gain by choosing a model, and how much of it was gained."""
    rows: list[tuple[TableCell, ...]] = []
    for setting in results.settings:
        weakest, strongest, best = (
            100 * mean(results.values(f"{name}_ratio", setting=setting, arm="chimera", load=BUSY))
            for name in ("weakest", "strongest", "best")
        )
        for load in _loads(results):
            blind, ours, fast = (
                [100 * one for one in results.values(OK, setting=setting, arm=arm, load=load)]
                for arm in ("vllm", "chimera", "quality-only")
            )
            share = [(b - a) / (best - a) for a, b in zip(blind, ours, strict=True)]
            estimates = map(Estimate.of, (blind, ours, fast, share))
            rows.append((setting, load, weakest, strongest, best, *estimates))
    return Table(
        title="What choice can gain: workflows solved, percent",
        columns=(
            "fleet/questions",
            "load",
            "weakest alone",
            "strongest alone",
            "any model",
            "vllm",
            "chimera",
            "quality-only",
            "share of vllm to any model",
        ),
        rows=tuple(rows),
    )


def _table(title: str, figure: str, results: Results) -> Table:
    return Table(
        title=title,
        columns=("fleet/questions", "load", *ARMS),
        rows=tuple(
            (
                setting,
                load,
                *(
                    Estimate.of(results.values(figure, setting=setting, arm=arm, load=load))
                    for arm in ARMS
                ),
            )
            for setting in results.settings
            for load in _loads(results)
        ),
    )


def _parts(results: Results) -> Table:
    """Compare the recipe with what is left without a part, and with what a truth would add."""
    variants = {**WITHOUT, **ORACLES, **{arm: f"worth {worth} s" for arm, worth in SLACKS.items()}}
    return Table(
        title=f"Without a part, with a truth, with another worth: over chimera, at load {BUSY:g}",
        columns=("variant", "seconds by token", "mean makespan", "P95 makespan", "solved, points"),
        rows=tuple(
            (label, *(_over_chimera(results, figure, arm) for figure in (PER_TOKEN, MEAN, P95, OK)))
            for arm, label in variants.items()
            if arm != "chimera"
        ),
        note=f"on {', '.join(_taken_apart(results))}",
    )


def _over_chimera(results: Results, figure: str, arm: str) -> Estimate:
    join = results.differences if figure == OK else results.ratios
    found = join(figure, arm, "chimera", settings=_taken_apart(results), loads=[BUSY])
    return Estimate.of([100 * one for one in found] if figure == OK else found)


def _overhead(results: Results) -> Table:
    """State what deciding costs beside what is decided about; forecasts are not in it."""
    rows = []
    for setting in results.settings:
        each, decision_s, workflows, makespan_s = (
            mean(results.values(figure, setting=setting, arm="chimera", load=BUSY))
            for figure in (
                "scheduler.decisions",
                "scheduler.decision_s_p50",
                "workflows.total",
                MEAN,
            )
        )
        share = each / workflows * decision_s / makespan_s
        rows.append((setting, each / workflows, 1e6 * decision_s, 100 * share))
    return Table(
        title=f"What deciding costs, at load {BUSY:g}",
        columns=("fleet/questions", "decisions a workflow", "microseconds each", "% of makespan"),
        rows=tuple(rows),
        note="decisions of the whole run over the workflows of its middle: an upper bound",
    )


def _plots(results: Results) -> Mapping[str, Plot]:
    return {
        "chimera-frontier": FrontierPlot(
            title=f"What quality costs, at load {BUSY:g}",
            x_label="mean makespan, seconds",
            y_label="workflows solved",
            panels={setting: _frontier(results, setting) for setting in results.settings},
            log_x=True,
        ),
        "chimera-per-token": _over_load(results, PER_TOKEN, "seconds by output token"),
        "chimera-success": _over_load(results, OK, "workflows solved"),
    }


def _frontier(results: Results, setting: str) -> Frontier:
    return Frontier(
        label="chimera, by worth_s",
        curve=[_mark(results, setting, arm, worth) for arm, worth in SLACKS.items()],
        others=[
            _mark(results, setting, arm, arm)
            for arm in (*RIVALS, *ORACLES)
            if results.has(setting=setting, arm=arm, load=BUSY)
        ],
    )


def _mark(results: Results, setting: str, arm: str, label: str) -> Mark:
    x, y = (
        Estimate.of(results.values(figure, setting=setting, arm=arm, load=BUSY))
        for figure in (MEAN, OK)
    )
    return Mark(label=label, x=x.mean, y=y.mean, x_half=x.half, y_half=y.half)


def _over_load(results: Results, figure: str, label: str) -> LinePlot:
    loads = _loads(results)
    return LinePlot(
        title=f"{label.capitalize()} by load",
        x_label="load, share of what vllm can finish",
        y_label=label,
        panels={
            setting: [_line(results, setting, arm, figure, loads) for arm in ARMS]
            for setting in results.settings
        },
    )


def _line(results: Results, setting: str, arm: str, figure: str, loads: Sequence[float]) -> Line:
    points = [
        Estimate.of(results.values(figure, setting=setting, arm=arm, load=load)) for load in loads
    ]
    means, halves = [one.mean for one in points], [one.half for one in points]
    return Line(label=arm, x=loads, y=means, half=halves)
