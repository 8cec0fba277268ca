"""What was worked out of a text, kept for when the text comes again."""

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, Self, TypeVar

KEPT_TEXTS = 4_096
"""An agent's steps begin alike, and calls are asked again."""

_V = TypeVar("_V")


class Kept(Generic[_V]):
    """Remembers a value a text; the one unused for longest goes first.

    Texts are told apart by a 16-byte hash; none is stored. Threads may share it: at worst a
    value is worked out twice.

    Args:
        make: Works the value out, never ``None``; it must depend on the text alone.
        entries: Values to keep.
    """

    def __init__(self, make: Callable[[str], _V], *, entries: int = KEPT_TEXTS) -> None:
        self._make = make
        self._entries = entries
        self._kept: OrderedDict[bytes, _V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Share what is kept: copies of a predictor read the same texts alike."""
        return self

    def of(self, text: str) -> _V:
        """Return the value of a text.

        >>> Kept(len).of("four")
        4
        """
        key = content_key(text)
        value = self._kept.pop(key, None)
        if value is None:
            value = self._make(text)
        self._kept[key] = value
        if len(self._kept) > self._entries:
            self._kept.popitem(last=False)
        return value


def content_key(text: str) -> bytes:
    """Sixteen bytes that tell texts apart, lone surrogates included."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
