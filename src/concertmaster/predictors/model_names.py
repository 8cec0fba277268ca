"""What the name of a model says about it: size, tier, tuning."""

import math
import re

import numpy as np
from numpy.typing import NDArray

from concertmaster.core.model_names import canonical

_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)b(?![a-z0-9])")
_SMALL = ("mini", "flash", "haiku", "lite", "nano", "small", "tiny")
_LARGE = ("opus", "pro", "large", "max", "ultra", "plus")
_TUNED = ("instruct", "chat", "it", "inst")

TRAITS = ("one", "size known", "log of size", "tier", "tier known", "tuned")
"""What `name_traits` says, in order."""


def billions(name: str) -> float | None:
    """Parameters in billions, if the name gives them; experts are added up.

    >>> billions("Qwen2.5-7B-Instruct"), billions("Mixtral-8x7B-v0.1"), billions("gpt-4o")
    (7.0, 56.0, None)
    """
    found = _SIZE.search(canonical(name))
    if found is None:
        return None
    size = float(found[1] or 1) * float(found[2])
    return size if size > 0 else None


def name_traits(name: str) -> NDArray[np.float64]:
    """Numbers of `TRAITS`; the logarithm is to base ten, of billions over ten."""
    words = set(re.split(r"[^a-z0-9.]+", canonical(name)))
    size = billions(name)
    tier = float(any(word in words for word in _LARGE)) - any(word in words for word in _SMALL)
    log_size = 0.0 if size is None else math.log10(size / 10)
    tuned = float(any(word in words for word in _TUNED))
    return np.array([1.0, float(size is not None), log_size, tier, float(tier != 0), tuned])


def tells_strength(name: str) -> bool:
    """Whether the name gives a size or a tier, so that a guess from it means something.

    >>> tells_strength("our-70b"), tells_strength("our-model")
    (True, False)
    """
    return bool(name_traits(name)[[1, 4]].any())
