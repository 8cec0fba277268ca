"""Claims, tables and plots of the study of tails."""

from collections.abc import Mapping

from concertmaster.observe.compare import mean
from concertmaster.observe.console import number
from concertmaster.observe.plot_kinds import CdfPlot, Plot
from concertmaster.reproduce import swarmx_drift_summary as drift
from concertmaster.reproduce import swarmx_scaling_summary as scaling
from concertmaster.reproduce.study import (
    Cell,
    Claim,
    Estimate,
    Results,
    Summary,
    Table,
    interval,
)
from concertmaster.reproduce.swarmx_arms import (
    BLIND,
    LATE,
    LATE_TWO,
    MEANS,
    MEANS_OF,
    OURS,
    ROLES,
    TWO,
    WITHOUT,
)
from concertmaster.reproduce.swarmx_drift_summary import DRIFTS
from concertmaster.reproduce.swarmx_scaling_summary import P50, P90, P95, P99, SCALING
from concertmaster.reproduce.swarmx_world import DEEP

__all__ = ["DRIFTING", "DRIFTS", "RATES", "ROUTING", "SCALING", "note", "routers", "summary"]

ROUTING, RATES = "router", "rate"
RATE_RIVALS = (("round-robin", BLIND, LATE, 2.0), ("power-of-two", TWO, LATE_TWO, 1.3))
DRIFTING = "research/a100+a40/48"
"""Where drift is played."""

SHOWN = {"P50, s": P50, "P90, s": P90, "P95, s": P95, "P99, s": P99}


def summary(results: Results) -> Summary:
    """Sum up all that was run."""
    return Summary(
        claims=(
            *_routing(results),
            *_reach(results),
            *scaling.claims(results),
            *drift.claims(results),
        ),
        tables=(
            *(routers(results, setting) for setting in _settings(results, ROUTING)),
            _parts(results),
            _rates(results),
            *scaling.tables(results),
            drift.table(results, _settings(results, drift.DRIFTS)),
        ),
        plots={**_plots(results), **scaling.plots(results)},
        notes=tuple(note(results, setting) for setting in _settings(results, ROUTING)),
    )


def _settings(results: Results, question: str) -> list[str]:
    return [one for one in results.settings if one.startswith(f"{question}/")]


def note(results: Results, setting: str) -> str:
    """Say what load 1 and the promise are in one world."""
    cell = {"setting": setting, "arm": BLIND, "load": 1.0}
    rate_rps, slo_s = (results.values(name, **cell)[0] for name in ("rate_rps", "slo_s"))  # type: ignore[arg-type]
    return f"{setting}: load 1 is {rate_rps:.3g} workflows/s, the promise {slo_s:.3g} s"


# Claims.


def _routing(results: Results) -> tuple[Claim, ...]:
    deep = [f"{ROUTING}/{DEEP}"]
    worlds = _settings(results, ROUTING)
    tails = [setting for setting in worlds if _gains(results, setting)]
    return (
        *(
            Claim.over_seeds(
                name,
                f"P95 makespan of deep research, {OURS} / {known_as}",
                results.ratios(P95, OURS, rival, settings=deep, loads=[1.0]),
                "at most",
                most,
            )
            for name, rival, known_as, most in (
                ("router-round-robin-published", BLIND, f"{BLIND}, as published", 0.72),
                ("router-round-robin-best", LATE, f"{LATE} bound late, its best form", 0.72),
                ("router-murakkab", MEANS, MEANS, 0.8),
            )
        ),
        Claim(
            id="distribution-over-mean",
            statement=f"of {len(worlds)} worlds, where distributions gain on means at P95 and P99",
            measured=float(len(tails)),
            ci95=None,
            direction="at least",
            target=2.0,
            note="a gain counts if its 95 % interval over seeds leaves out 0",
        ),
    )


def _gains(results: Results, setting: str) -> bool:
    """Say whether distributions gain over their means beyond the interval."""
    ours = next(arm for arm in MEANS_OF if results.has(setting=setting, arm=arm, load=1.0))
    uppers = []
    for figure in (P95, P99):
        less = results.differences(figure, ours, MEANS_OF[ours], settings=[setting], loads=[1.0])
        bounds = interval(less)
        uppers.append(less[0] if bounds is None else bounds[1])
    return max(uppers) < 0.0


def _reach(results: Results) -> tuple[Claim, ...]:
    setting = f"{RATES}/{DEEP}"
    first = Cell(setting=setting, arm=ROLES, load=0.0, seed=results.seeds[0])
    flat_out_rps = results.value("flat_out_rps", first)

    def claim(name: str, rival: str, known_as: str, target: float) -> Claim:
        return Claim.over_seeds(
            name,
            f"workflows/s with 95 % in time, {ROLES} / {known_as}",
            results.ratios("rate_rps", ROLES, rival, settings=[setting], loads=[0.0]),
            "at least",
            target,
            note=f"flat out the fleet finishes {number(flat_out_rps)} workflows/s",
        )

    def reach(arm: str) -> float:
        return mean(results.values("rate_rps", setting=setting, arm=arm, load=0.0))

    found = []
    for kind, published, late, target in RATE_RIVALS:
        found.append(
            claim(f"rate-{kind}-published", published, f"{published}, as published", target)
        )
        best = max((published, late), key=reach)
        known_as = f"the better form of {kind}: {best}"
        found.append(claim(f"rate-{kind}-best", best, known_as, target))
    return tuple(found)


# Tables.


def routers(results: Results, setting: str, load: float = 1.0) -> Table:
    """Makespans of every arm in one world, at one load."""
    columns = {"attained": "attained_ratio", **SHOWN, "GPU-seconds": "fleet.gpu_s"}
    return Table(
        title=f"Makespans at load {load:g}, {setting.removeprefix(f'{ROUTING}/')}",
        columns=("arm", *columns),
        rows=tuple(
            (arm, *(_estimate(results, figure, setting, arm, load) for figure in columns.values()))
            for arm in _arms(results, setting, load)
        ),
    )


def _arms(results: Results, setting: str, load: float) -> list[str]:
    return [arm for arm in results.arms if results.has(setting=setting, arm=arm, load=load)]


def _parts(results: Results) -> Table:
    setting = f"{ROUTING}/{DEEP}"
    return Table(
        title="Parts taken out, over the arm that has them, deep research",
        columns=("arm", "without", "over", "P50", "P95", "P99"),
        rows=tuple(
            (
                arm,
                what,
                whole,
                *(
                    Estimate.of(results.ratios(figure, arm, whole, settings=[setting], loads=[1.0]))
                    for figure in (P50, P95, P99)
                ),
            )
            for arm, (what, whole) in WITHOUT.items()
            if results.has(setting=setting, arm=arm, load=1.0)
        ),
    )


def _rates(results: Results) -> Table:
    setting = f"{RATES}/{DEEP}"
    return Table(
        title="Most workflows a second with 95 % in time, deep research",
        columns=("arm", "workflows/s"),
        rows=tuple(
            (arm, _estimate(results, "rate_rps", setting, arm, 0.0))
            for arm in _arms(results, setting, 0.0)
        ),
    )


def _estimate(results: Results, figure: str, setting: str, arm: str, load: float) -> Estimate:
    return Estimate.of(results.values(figure, setting=setting, arm=arm, load=load))


# Plots.


def _plots(results: Results) -> Mapping[str, Plot]:
    makespans = CdfPlot(
        title="Makespans at load 1",
        x_label="makespan, seconds",
        panels={
            setting.removeprefix(f"{ROUTING}/"): {
                arm: _pooled(results, "makespans_s", setting, arm, 1.0)
                for arm in _arms(results, setting, 1.0)
            }
            for setting in _settings(results, ROUTING)
        },
    )
    drifts = drift.plot(results, _settings(results, drift.DRIFTS))
    return {"swarmx-makespans": makespans, "swarmx-drift": drifts}


def _pooled(results: Results, figure: str, setting: str, arm: str, load: float) -> list[float]:
    found = results.series(figure, setting=setting, arm=arm, load=load)
    return [value for one in found for value in one]
