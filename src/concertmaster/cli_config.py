"""``concertmaster check`` and ``schema``: how they are called."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from concertmaster import commands_config


def check(
    files: Annotated[list[Path], typer.Argument(help="Fleet or engine files (TOML).")],
    *,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Ask the engines whether they are there and serve the models."
        ),
    ] = False,
) -> None:
    """Say all that is wrong with fleet and engine files, a line each; exit code 1 if anything is.

    Example: concertmaster check examples/fleets/local.toml examples/engine.toml
    """
    if not commands_config.check(files=files, probe=probe):
        raise typer.Exit(code=1)


def schema(
    kind: Annotated[
        Literal["fleet", "engine"], typer.Argument(help="Which kind of file.")
    ] = "fleet",
) -> None:
    """Print the JSON Schema of fleet files or engine files, for editors and other tools.

    Example: concertmaster schema engine
    """
    commands_config.print_schema(kind)
