"""Claims, table and plot of drift: how soon P90 is near what can be reached."""

from collections.abc import Sequence

from concertmaster.observe.plot_kinds import Line, LinePlot
from concertmaster.reproduce.study import Claim, Estimate, Results, Table, interval
from concertmaster.reproduce.swarmx_arms import ADAPTING, DRIFTERS, FROZEN, SETTLED
from concertmaster.reproduce.swarmx_drift import recovery_s

DRIFTS = "drift"


def claims(results: Results) -> tuple[Claim, ...]:
    """State how soon the recipe recovers, and that it does not without learning."""
    return (
        *(
            Claim.over_seeds(
                f"drift-{scenario}",
                f"until P90 is within 20 % of what can be reached, {scenario}",
                _recoveries(results, f"{DRIFTS}/{scenario}", ADAPTING),
                "at most",
                100.0,
                unit="s",
            )
            for scenario in ("loss", "throttle")
        ),
        Claim.over_seeds(
            "drift-frozen",
            "the same without adaptation, throttle",
            _recoveries(results, f"{DRIFTS}/throttle", FROZEN),
            "at least",
            100.0,
            unit="s",
        ),
    )


def _recoveries(results: Results, setting: str, arm: str) -> list[float]:
    """Seconds to recover, one a seed; P90 of the settled arm is what can be reached."""
    reachable = results.values("p90_after_s", setting=setting, arm=SETTLED, load=0.0)
    times = results.series("timeline_s", setting=setting, arm=arm, load=0.0)
    paths = results.series("timeline_p90_s", setting=setting, arm=arm, load=0.0)
    return [recovery_s(*seed) for seed in zip(times, paths, reachable, strict=True)]


def table(results: Results, settings: Sequence[str]) -> Table:
    """Show each arm of each scenario."""
    return Table(
        title="Drift",
        columns=("scenario", "arm", "P90 after, s", "recovery, s", "lost"),
        rows=tuple(
            (
                setting.removeprefix(f"{DRIFTS}/"),
                arm,
                _estimate(results, "p90_after_s", setting, arm),
                None if arm == SETTLED else Estimate.of(_recoveries(results, setting, arm)),
                _estimate(results, "lost_ratio", setting, arm),
            )
            for setting in settings
            for arm in (*_drifters(results, setting), SETTLED)
        ),
        note="a run that does not recover counts with the time to its last window",
    )


def _estimate(results: Results, figure: str, setting: str, arm: str) -> Estimate:
    return Estimate.of(results.values(figure, setting=setting, arm=arm, load=0.0))


def _drifters(results: Results, setting: str) -> list[str]:
    return [arm for arm in DRIFTERS if results.has(setting=setting, arm=arm, load=0.0)]


def plot(results: Results, settings: Sequence[str]) -> LinePlot:
    """Draw P90 through each scenario."""
    return LinePlot(
        title="P90 through drift",
        x_label="arrival, seconds",
        y_label="P90 makespan, seconds",
        panels={
            setting.removeprefix(f"{DRIFTS}/"): [
                _path(results, setting, arm) for arm in (*_drifters(results, setting), SETTLED)
            ]
            for setting in settings
        },
        log_y=True,
    )


def _path(results: Results, setting: str, arm: str) -> Line:
    """Mean over seeds of P90 in each window."""
    times_s = results.series("timeline_s", setting=setting, arm=arm, load=0.0)[0]
    paths = results.series("timeline_p90_s", setting=setting, arm=arm, load=0.0)
    windows = list(zip(*paths, strict=True))
    means = [sum(values) / len(values) for values in windows]
    return Line(label=arm, x=times_s, y=means, half=[_half(values) for values in windows])


def _half(values: Sequence[float]) -> float | None:
    bounds = interval(values)
    return None if bounds is None else (bounds[1] - bounds[0]) / 2
