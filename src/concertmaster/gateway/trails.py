"""What a prompt leaves of itself, by which its workflow is told where it names none."""

import re
import zlib
from collections.abc import Sequence
from typing import Protocol

import msgspec

LATEST = 8
"""Messages at the end of a prompt whose tool calls are looked at."""

MOST_GROWING = 3
"""A prompt of more messages than this grows by messages, not within its last one."""

_TOOL_CALL_ID = re.compile(rb'"tool_call_id"\s*:\s*"([^"]{1,128})"')
_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Trail(Protocol):
    """What is told of a prompt that names no workflow."""

    @property
    def ends(self) -> Sequence[int]:
        """Where each message ends, as a length and a checksum of its tenant and all before."""

    @property
    def last(self) -> bytes:
        """The last message of a prompt that may grow within it; empty of one that does not."""

    def tool_calls(self, known: int) -> Sequence[bytes]:
        """Tool calls that the latest messages after the first ``known`` are about."""


class PromptTrail:
    """The trail of a prompt at hand.

    Args:
        text: Its raw JSON.
        tenant: Who sent it.
    """

    def __init__(self, text: memoryview, tenant: str = "") -> None:
        self._messages = _messages(text)
        self.ends: Sequence[int] = _ends(self._messages, root_of(tenant))

    @property
    def last(self) -> bytes:
        """The last message of a prompt that may grow within it; empty of one that does not."""
        return bytes(self._messages[-1]) if len(self._messages) <= MOST_GROWING else b""

    def tool_calls(self, known: int) -> Sequence[bytes]:
        """Tool calls that the latest messages after the first ``known`` are about."""
        fresh = self._messages[known:][-LATEST:]
        return _TOOL_CALL_ID.findall(b"".join(map(bytes, fresh)))

    def by_message(self, latest: int) -> list[list[bytes]]:
        """Tool calls that each of the latest messages is about."""
        return [_TOOL_CALL_ID.findall(bytes(one)) for one in self._messages[-latest:]]


def root_of(tenant: str) -> int:
    """Return the checksum of nothing yet: tenants have different ones."""
    return zlib.crc32(tenant.encode())


def _messages(text: memoryview) -> Sequence[memoryview | msgspec.Raw]:
    """Split a prompt into its messages; a prompt that is no list is one message."""
    try:
        return _split(text) or (text,)
    except msgspec.ValidationError:
        return (text,)


def _ends(messages: Sequence[memoryview | msgspec.Raw], root: int = 0) -> list[int]:
    """Length and checksum of all up to each message's end, as one number.

    >>> [end >> 32 for end in _ends([memoryview(b"abc"), memoryview(b"de")])]
    [3, 5]
    """
    found: list[int] = []
    length, checksum = 0, root
    for message in messages:
        checksum = zlib.crc32(message, checksum)
        length += len(message)
        found.append(length << 32 | checksum)
    return found
