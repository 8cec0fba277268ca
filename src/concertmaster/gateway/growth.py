"""Prompts that grow within their last message, as those of agents with a scratchpad do.

Such a prompt begins with all of an earlier one and goes on in the same text, so no message of
the earlier one is whole in it. Texts are remembered as lengths and checksums.
"""

import re
import zlib
from collections import OrderedDict
from typing import NamedTuple, TypeAlias

from concertmaster.core.request import RequestId, WorkflowId

HEADS = (160, 48)
"""Leading bytes by which texts are filed: the first that an earlier text has."""

MOST_TWINS = 16
_MOST_TEXTS = 512
_CLOSERS = b'"}] \t\n\r\f\v'
_KIND = re.compile(rb'"\s*,\s*"(?:role|type)"\s*:\s*"\w+\Z')
_KIND_BYTES = 64

_Folder: TypeAlias = tuple[int, int, int]


class Place(NamedTuple):
    """A call that was seen: of which workflow, its position there, and when.

    Attributes:
        followed: Whether another call has gone on with it.
    """

    workflow_id: WorkflowId
    stage: int
    request_id: RequestId = RequestId("")
    seen_s: float = 0.0
    followed: bool = False


class Growth:
    """Remembers where the last messages of recent prompts ended.

    Args:
        most: Texts to remember.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._folders: OrderedDict[_Folder, dict[tuple[int, int], list[Place]]] = OrderedDict()

    def find(self, before: int, message: bytes) -> list[Place]:
        """Return who sent the longest text that this one goes on with; empty if nobody did.

        Args:
            before: Checksum of all messages before this one.
            message: The last one, as JSON.
        """
        for size in HEADS:
            folder = self._folders.get((before, size, zlib.crc32(message[:size])))
            found = _longest(folder, message) if folder and len(message) > size else []
            if found:
                return found
        return []

    def add(self, before: int, message: bytes, place: Place) -> None:
        """Remember a prompt by its last message, without what closes it."""
        text = unclosed(message)
        size = next((one for one in HEADS if len(text) >= one), 0)
        if not size:
            return
        key = (before, size, zlib.crc32(text[:size]))
        folder = self._folders.setdefault(key, {})
        self._folders.move_to_end(key)
        if len(folder) >= _MOST_TEXTS:
            del folder[next(iter(folder))]
            self._count -= 1
        end = (len(text), zlib.crc32(text))
        self._count += end not in folder
        add_twin(folder.setdefault(end, []), place)
        while self._count > self._most:
            _, oldest = self._folders.popitem(last=False)
            self._count -= len(oldest)

    def __len__(self) -> int:
        return self._count


def unclosed(message: bytes) -> bytes:
    """Return a message without what closes it, in time that grows with its length at most.

    >>> unclosed(b'{"content": "so far", "role": "user"}')
    b'{"content": "so far'
    """
    text = message.rstrip(_CLOSERS)
    kind = _KIND.search(text, max(0, len(text) - _KIND_BYTES))
    return text if kind is None else text[: kind.start()]


def add_twin(twins: list[Place], place: Place) -> None:
    """Add a place to those of the same text, for those that were gone on with and for itself."""
    twins[:] = [twin for twin in twins if not twin.followed and twin[:2] != place[:2]]
    if len(twins) < MOST_TWINS:
        twins.append(place)


def _longest(folder: dict[tuple[int, int], list[Place]], message: bytes) -> list[Place]:
    """Return the longest text of a folder that a message goes on with after a whole word."""
    best: list[Place] = []
    checksum = done = 0
    for length in sorted({length for length, _ in folder if length < len(message)}):
        checksum = zlib.crc32(message[done:length], checksum)
        done = length
        found = folder.get((length, checksum))
        if found and not message[length : length + 1].isalnum():
            best = found
    return best
