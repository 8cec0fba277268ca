"""Settings of a policy, as they are written after its name: ``chimera:tau=0.3,rule=paper``."""

from collections.abc import Mapping

from concertmaster.core import settings
from concertmaster.core.settings import Reader, choice, number

__all__ = ["Reader", "choice", "number", "read_settings"]


def read_settings(name: str, text: str, known: Mapping[str, Reader]) -> dict[str, object]:
    """Read ``KEY=VALUE,KEY=VALUE`` of a policy.

    Raises:
        InputError: A key is unknown or named twice, or its value is none.
    """
    return settings.read_settings(f"policy {name}", text, known)
