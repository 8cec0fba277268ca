"""Server-sent events, taken apart and put together; how they were cut into pieces never matters."""

from typing import NamedTuple

import msgspec


class ServerEvent(NamedTuple):
    """One event of a stream, or what stood between two.

    Attributes:
        payload: The lines of data, joined; empty for what is no event.
        aside: A comment or a reconnection time, as it is to be sent on.
    """

    payload: bytes = b""
    aside: bytes = b""


class EventReader:
    r"""Splits the pieces of a stream into its events.

    >>> reader = EventReader()
    >>> reader.feed(b": wait\n\ndata: {"), reader.feed(b"}\r\n\r\n")
    ([ServerEvent(payload=b'', aside=b': wait\n\n')], [ServerEvent(payload=b'{}', aside=b'')])
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._lines: list[bytes] = []

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """Return what is whole by now."""
        if b"\n" not in piece:
            self._pieces.append(piece)
            return []
        *lines, rest = b"".join((*self._pieces, piece)).split(b"\n")
        self._pieces = [rest]
        found = (self._line(line.removesuffix(b"\r")) for line in lines)
        return [event for event in found if event is not None]

    def _line(self, line: bytes) -> ServerEvent | None:
        if not line:
            payload, self._lines = b"\n".join(self._lines), []
            return ServerEvent(payload) if payload else None
        name, _, value = line.partition(b":")
        if not name:
            return ServerEvent(aside=line + b"\n\n")
        if name == b"retry":
            return ServerEvent(aside=line + b"\n")
        if name == b"data":
            self._lines.append(value.removeprefix(b" "))
        return None


def named_event(fields: dict[str, object]) -> bytes:
    r"""Frame an event under the name that is its type.

    >>> named_event({"type": "ping"})
    b'event: ping\ndata: {"type":"ping"}\n\n'
    """
    return b"event: %b\ndata: %b\n\n" % (
        str(fields["type"]).encode(),
        msgspec.json.encode(fields),
    )
