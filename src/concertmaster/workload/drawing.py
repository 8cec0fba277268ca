"""What generators of workloads share: laws of lengths, and prompts that begin alike."""

import math
import random
from collections.abc import Sequence

from concertmaster.core.request import PREFIX_CHUNK_TOKENS
from concertmaster.workload.prefixes import chain, extend, salt_of

MOST_TOKENS = 4096
"""Longest answer that is drawn for a language model: the caller's cap."""


def around(median: float, spread: float, rng: random.Random) -> float:
    """Draw from a log-normal law; ``spread`` is the deviation of the logarithm."""
    return rng.lognormvariate(math.log(median), spread)


def tokens(median: float, spread: float, rng: random.Random, *, most: int = MOST_TOKENS) -> int:
    """Draw a length from a log-normal law, kept to 1…``most``."""
    return max(1, min(most, round(around(median, spread, rng))))


def hint(truth: str, choices: Sequence[str], share: float, rng: random.Random) -> str:
    """Return the truth with probability ``share``, else any of ``choices``."""
    return truth if rng.random() < share else rng.choice(choices)


def names(app: str, count: int, rng: random.Random) -> list[str]:
    """Name workflows so that those of another seed have other names."""
    tag = f"{rng.getrandbits(24):06x}"
    return [f"{app}-{tag}-{i}" for i in range(count)]


def hashes(system: str, system_tokens: int, prompt_tokens: int, own: str) -> tuple[int, ...]:
    """Hash a prompt that begins with a system text of so many tokens and goes on by itself.

    Args:
        system: Names the system text; all prompts with it begin alike.
        system_tokens: Its length.
        prompt_tokens: Length of the whole prompt.
        own: Names the rest, which nobody shares.
    """
    whole = chain(0, salt_of(f"system {system}"), system_tokens // PREFIX_CHUNK_TOKENS)
    return extend(
        whole, shared_tokens=system_tokens, prompt_tokens=prompt_tokens, salt=salt_of(own)
    )
