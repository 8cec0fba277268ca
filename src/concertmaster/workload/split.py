"""Which groups are kept back from training: the same ones wherever that is asked."""

from hashlib import sha1

from concertmaster.core.settings import Reader, choice

HELD_OUT_OF = 5
"""One group of so many is held out."""

PART: Reader = choice(all="all", test="test", train="train")
"""Reads which part of the groups is wanted."""


def held_out(key: str) -> bool:
    """Whether a group is kept back from training: one of five, by a hash of its key.

    >>> [key for key in "abcdefghij" if held_out(key)]
    ['h']
    """
    digest = sha1(key.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    return int(digest[:8], 16) % HELD_OUT_OF == 0


def in_part(key: str, part: str) -> bool:
    """Whether a group belongs to a part: ``test`` is what is held out, ``train`` the others.

    >>> [key for key in "fghij" if in_part(key, "train")], in_part("h", "all")
    (['f', 'g', 'i', 'j'], True)
    """
    return part == "all" or held_out(key) == (part == "test")
