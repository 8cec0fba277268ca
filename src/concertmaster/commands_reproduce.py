"""What ``reproduce`` does; ``cli`` says how it is called."""

from collections.abc import Sequence
from pathlib import Path

from concertmaster.core.errors import InputError
from concertmaster.observe import console as show
from concertmaster.observe.draw_plots import draw_plots
from concertmaster.observe.forecast_plots import check_plot_folder
from concertmaster.reproduce.data import use_data_folder
from concertmaster.reproduce.registry import available, study_named
from concertmaster.reproduce.report import Finding, as_json
from concertmaster.reproduce.results import Cell, Results
from concertmaster.reproduce.runner import ledger_of, run_study
from concertmaster.reproduce.show import show_finding, write_markdown
from concertmaster.reproduce.study import Study
from concertmaster.workload.routing import QUESTIONS_FILE

__all__ = ["available", "reproduce"]


def reproduce(
    *,
    name: str,
    seeds: int,
    full: bool,
    jobs: int | None,
    json: Path | None,
    plots: Path | None,
    markdown: Path | None,
    fresh: bool,
    data: Path | None = None,
) -> bool:
    """Run a study and print what came of it; return whether every claim is met."""
    if data is not None:
        _name_data(data)
    study = study_named(name)
    for option, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            raise InputError(option, "", f"expected at least 1, found {value}")
    if plots is not None:
        check_plot_folder(plots, option="--plots")
    cells = study.cells(seeds=seeds, full=full)
    results = _run(study, cells, jobs, fresh=fresh)
    summary = study.summarise(results)
    finding = Finding(study=study, summary=summary, seeds=seeds, full=full, cells=len(cells))
    out = show.console()
    show_finding(out, finding)
    if json is not None:
        show.write_json(as_json(finding), json)
        show.say(out, f"report            {json}")
    drawn = _draw(finding, plots)
    if markdown is not None:
        write_markdown(finding, drawn, markdown)
        show.say(out, f"page              {markdown}")
    return summary.met


def _name_data(folder: Path) -> None:
    """Tell this process and those of the study where the routing sets are."""
    if not (folder / QUESTIONS_FILE).is_file():
        problem = f"expected a folder with {QUESTIONS_FILE}, found none at {folder}"
        raise InputError("--data", "", problem, "docs/workloads.md says what belongs in it")
    use_data_folder(folder)


def _run(study: Study, cells: Sequence[Cell], jobs: int | None, *, fresh: bool) -> Results:
    ledger = ledger_of(study)
    if fresh:
        ledger.clear()
    try:
        with show.progress_bar(len(cells)) as bar:
            bar.begin(study.name)
            return run_study(study, cells, ledger, jobs=jobs, progress=bar.update)
    except KeyboardInterrupt:
        kept = len(ledger.read().keys() & {*cells})
        line = f"{kept} of {len(cells)} runs are kept: the same command goes on from there"
        show.say(show.console(stderr=True), line)
        raise


def _draw(finding: Finding, folder: Path | None) -> dict[str, Path]:
    """Return the files of all plots by title."""
    plots = finding.summary.plots
    if folder is None or not plots:
        return {}
    paths = draw_plots(plots, folder)
    for path in paths:
        show.say(show.console(), f"plot              {path}")
    return {plot.title: path for plot, path in zip(plots.values(), paths, strict=True)}
