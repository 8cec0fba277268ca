"""Where studies find recorded data."""

import os
from pathlib import Path

VARIABLE = "CONCERTMASTER_DATA"
"""Environment variable with the folder; the processes of a study inherit it."""


def data_folder() -> Path:
    """Return the folder of the routing sets, as the environment says."""
    return Path(os.environ.get(VARIABLE, "../shared/data/public"))


def use_data_folder(folder: Path) -> None:
    """Let this process and those that it starts read from a folder."""
    os.environ[VARIABLE] = str(folder)
