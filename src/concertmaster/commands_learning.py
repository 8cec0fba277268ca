"""What ``train`` and ``evaluate`` do; ``cli`` says how they are called."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from concertmaster.core.errors import InputError
from concertmaster.learning.baselines import fit_baselines
from concertmaster.learning.datasets import Rows, read_rows, refuse_overlap, seen_hashes
from concertmaster.learning.evaluate import evaluate as measure
from concertmaster.learning.fit_success import FOLDS
from concertmaster.observe import console as show
from concertmaster.observe.forecast_plots import check_plot_folder, plot_evaluation
from concertmaster.observe.forecast_tables import show_evaluation
from concertmaster.predictors.encoder import Encoder
from concertmaster.predictors.manifest import EncoderFacts, Manifest, TrainedOn
from concertmaster.predictors.store import (
    DEFAULT,
    Store,
    check_place,
    encoder_named,
    read_store,
    write_store,
)

if TYPE_CHECKING:
    from concertmaster.learning.trainer import Trained

SHIPPED = "default"
"""What ``-m`` calls the store that ships in the package."""

_BAR_STEPS = 100


def train(
    *,
    workloads: list[str],
    routing: list[Path],
    out: Path,
    encoder: str,
    everything: bool,
    seed: int,
) -> None:
    """Train a store and write it."""
    from concertmaster.learning.trainer import train as fit  # noqa: PLC0415  # slow to import

    check_place(out)
    rows = read_rows(workloads, routing, seed=seed)
    kept = rows if everything else rows.keep(held_out_ones=False)
    _check_enough(kept)
    reads = encoder_named(encoder)
    with _progress() as tell:
        trained = fit(
            kept.plans,
            [question.labelled for question in kept.questions],
            encoder=reads,
            seed=seed,
            progress=tell,
        )
    about = TrainedOn(
        names=tuple(Path(name).name for name in (*workloads, *map(str, routing))),
        rows=sum(len(plan.calls) for plan in kept.plans),
        workflows=len(kept.plans),
        questions=len(kept.questions),
        groups=len(kept.keys),
        held_out=not everything,
        seed=seed,
    )
    parts = {"baselines": fit_baselines(kept.plans), **trained.parts}
    seen = seen_hashes(kept.plans, kept.questions)
    write_store(out, _manifest(about, reads, trained), parts, seen)
    _show_trained(out, about, rows, trained)


def _check_enough(rows: Rows) -> None:
    if not rows.plans:
        problem = "expected workflows to train on, found none"
        raise InputError("--workload", "", problem, "add a workload, or --all to hold none back")
    if 0 < len(rows.questions) < FOLDS:
        problem = f"expected at least {FOLDS} questions, found {len(rows.questions)}"
        raise InputError("--routing", "", problem, "add questions, or leave the folder out")


def _manifest(about: TrainedOn, encoder: Encoder, trained: "Trained") -> Manifest:
    used = bool(trained.parts.get("success"))
    return Manifest(
        made=datetime.now(tz=UTC).date().isoformat(),
        trained_on=about,
        figures=dict(trained.figures),
        notes=trained.notes,
        encoder=EncoderFacts(name=encoder.name, dims=encoder.dims) if used else EncoderFacts(),
    )


def _show_trained(out: Path, about: TrainedOn, rows: Rows, trained: "Trained") -> None:
    terminal = show.console()
    show.say(
        terminal,
        f"trained on        {about.workflows:,} workflows, {about.rows:,} calls, "
        f"{about.questions:,} questions, {about.groups:,} groups",
    )
    held = len(rows.keys) - about.groups
    show.say(terminal, f"held out          {held:,} groups")
    for name, figure in trained.figures.items():
        shown = show.number(figure) if isinstance(figure, float) else figure
        show.say(terminal, f"{name:<18}{shown}")
    show.say(terminal, f"store             {out}")
    _show_notes((*rows.notes, *trained.notes))


def evaluate(
    *,
    model: str,
    workloads: list[str],
    routing: list[Path],
    held_out: bool,
    online: bool,
    seed: int,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Measure a store and print how good its forecasts are."""
    if plot is not None:
        check_plot_folder(plot)
    store = read_store(DEFAULT if model == SHIPPED else Path(model))
    rows = read_rows(workloads, routing, seed=seed)
    rows = _checked(store, rows, held_out=held_out)
    with _progress() as tell:
        figures = measure(store, rows, online=online, seed=seed, progress=tell)
    about = {
        "store": model,
        "version": store.manifest.version,
        "made": store.manifest.made,
        "names": [*workloads, *map(str, routing)],
        "held_out": held_out,
    }
    report = about | figures
    out = show.console()
    show_evaluation(out, f"{model}{', groups held out' if held_out else ''}", report)
    _show_notes(rows.notes)
    if json is not None:
        show.write_json(report, json)
        show.say(out, f"report            {json}")
    if plot is not None:
        for path in plot_evaluation(report, plot):
            show.say(out, f"plot              {path}")


def _checked(store: Store, rows: Rows, *, held_out: bool) -> Rows:
    """Keep what is asked for, and refuse what was trained on."""
    remedy = "measure with --held-out, or on other data"
    if held_out:
        kept = rows.keep(held_out_ones=True)
        if not kept.keys:
            problem = f"expected groups that are held out, found none among {len(rows.keys):,}"
            raise InputError("--held-out", "", problem, "leave it out for data not trained on")
        rows, remedy = kept, "measure on other data, or train it without --all"
    refuse_overlap(store.seen, rows.plans, rows.questions, where=str(store.folder), remedy=remedy)
    return rows


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show a bar that starts over whenever something else is done."""
    with show.progress_bar(_BAR_STEPS) as bar:
        doing = ""

        def tell(what: str, share: float) -> None:
            nonlocal doing
            if what != doing:
                doing = what
                bar.begin(what)
            bar.update(int(_BAR_STEPS * share))

        yield tell


def _show_notes(notes: tuple[str, ...]) -> None:
    for note in dict.fromkeys(notes):
        show.say(show.console(stderr=True), f"note: {note}")
