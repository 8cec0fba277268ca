"""Pictures of a comparison, for where people would rather look."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from concertmaster.core.errors import InputError

SUFFIXES = (".png", ".svg")


def check_plot_path(path: Path, *, option: str = "--plot") -> None:
    """Refuse a picture that could not be written, before any long work.

    Raises:
        InputError: The suffix is not known, or matplotlib is not there.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            option, "", f'expected a file that ends in .png or .svg, found "{path.name}"'
        )
    try:
        import matplotlib as mpl  # noqa: PLC0415  # an optional extra
    except ImportError:
        raise InputError(
            option, "", "matplotlib is not installed", 'pip install "concertmaster[plots]"'
        ) from None
    mpl.use("agg")


def plot_makespans(makespans_s: Mapping[str, Sequence[float]], path: Path, *, title: str) -> None:
    """Draw the share of workflows done within a makespan, one line a policy.

    Args:
        makespans_s: Policy to the makespans of all its completed workflows, over all seeds.
        path: A ``.png`` or ``.svg`` file.
        title: Shown above.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  # an optional extra

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in makespans_s.items():
        ranked = sorted(values)
        shares = [100 * (i + 1) / len(ranked) for i in range(len(ranked))]
        axes.step(ranked, shares, where="post", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("makespan, seconds")
    axes.set_ylabel("workflows done, %")
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
