"""Several policies side by side: means, 95 % intervals over seeds, and paired ratios."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from concertmaster.observe.report import Report

_T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
)
"""Student's t at 97.5 % for 1 to 20 degrees of freedom."""

_Z_975 = 1.959964
"""What it falls to with ever more degrees of freedom: the normal law's."""

PAIRED = (("makespan_s", "mean"), ("makespan_s", "p50"), ("makespan_s", "p95"), ("ttft_s", "p50"))
"""Figures of which ``compare`` states the ratio between two policies, seed by seed."""


def compare_reports(reports: Mapping[str, Sequence[Report]]) -> Report:
    """Sum up the reports of each policy, one a seed, in the same order of seeds."""
    names = list(reports)
    return {
        "policies": {
            name: {"mean": _merge(runs, mean), "ci95": _merge(runs, half_width)}
            for name, runs in reports.items()
        },
        "pairs": {
            f"{name} / {names[0]}": {
                f"{group}.{figure}": _ratio(reports[name], reports[names[0]], group, figure)
                for group, figure in PAIRED
            }
            for name in names[1:]
        },
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean (Student); ``None`` for a single value.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    count = len(values)
    if count < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (count - 1)
    return student_t(count - 1) * math.sqrt(variance / count)


def student_t(degrees: int) -> float:
    """Student's t at 97.5 %: tabulated to 20 degrees, then Fisher's expansion, good to 1e-5.

    >>> student_t(4), round(student_t(21), 4), round(student_t(1000), 4)
    (2.776, 2.0796, 1.9623)
    """
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _merge(runs: Sequence[Any], summarise: Any) -> Any:  # noqa: ANN401  # JSON in, JSON out
    first = runs[0]
    if isinstance(first, dict):
        return {key: _merge([run[key] for run in runs], summarise) for key in first}
    if isinstance(first, str):
        return first
    numbers = [run for run in runs if run is not None]
    return summarise(numbers) if numbers else None


def _ratio(
    mine: Sequence[Report], theirs: Sequence[Report], group: str, figure: str
) -> dict[str, float | None]:
    ratios = [
        a[group][figure] / b[group][figure]
        for a, b in zip(mine, theirs, strict=True)
        if a[group][figure] is not None and b[group][figure]
    ]
    if not ratios:
        return {"mean": None, "ci95": None}
    return {"mean": mean(ratios), "ci95": half_width(ratios)}
