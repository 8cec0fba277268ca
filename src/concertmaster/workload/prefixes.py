"""Chained hashes of prompt prefixes, made up where nobody recorded the tokens themselves.

Two prompts share their leading chunks if and only if their leading hashes are equal; the
values mean nothing else. They fit in 63 bits, so that every JSON reader keeps them whole.
"""

import hashlib
from collections.abc import Sequence

from concertmaster.core.request import PREFIX_CHUNK_TOKENS

_MASK = (1 << 63) - 1
_MULTIPLIER = 6364136223846793005


def salt_of(text: str) -> int:
    """Return a number that stands for ``text``, the same in every process.

    >>> salt_of("planner") == salt_of("planner") != salt_of("coder")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK


def chain(previous: int, salt: int, chunks: int) -> list[int]:
    """Hash ``chunks`` further chunks of a text that ``salt`` stands for."""
    hashes = []
    for _ in range(chunks):
        mixed = (previous * _MULTIPLIER + salt) & _MASK
        previous = mixed ^ (mixed >> 29)
        hashes.append(previous)
    return hashes


def extend(
    base: Sequence[int], *, shared_tokens: int, prompt_tokens: int, salt: int
) -> tuple[int, ...]:
    """Hash a prompt that begins with ``shared_tokens`` of another one and goes on differently.

    Only whole chunks count: a chunk that is shared in part is not shared.

    >>> first = extend((), shared_tokens=0, prompt_tokens=1000, salt=1)
    >>> later = extend(first, shared_tokens=600, prompt_tokens=1300, salt=2)
    >>> len(first), len(later), [a == b for a, b in zip(first, later)]
    (3, 5, [True, True, False])
    """
    whole = prompt_tokens // PREFIX_CHUNK_TOKENS
    kept = min(shared_tokens // PREFIX_CHUNK_TOKENS, whole, len(base))
    head = tuple(base[:kept])
    if kept == whole:
        return head
    return head + tuple(chain(head[-1] if head else 0, salt, whole - kept))


def common_chars(first: str, second: str) -> int:
    """Count the leading characters that two texts share.

    >>> common_chars("planner: go", "planner: stop")
    9
    """
    longest = min(len(first), len(second))
    if first[:longest] == second[:longest]:
        return longest
    low, high = 0, longest  # equal up to low, different somewhere before high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
