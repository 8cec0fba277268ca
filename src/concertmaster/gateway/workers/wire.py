"""Frames over a local socket: all that is told within one turn of the event loop goes as one."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from concertmaster.gateway.workers.frames import Frame

_log = logging.getLogger(__name__)

_LENGTH_BYTES = 4
_encode = msgspec.msgpack.Encoder().encode
Heard = TypeVar("Heard", bound=Frame)


class Wire(asyncio.Protocol, Generic[Heard]):
    """One end of a connection.

    Args:
        kind: The frames that the other end tells.
        hear: Told of each; what it raises is logged, and ends nothing but that frame.
        lost: Told when the other end is gone.
        greeting: Told to the other end first.

    ``hear`` and ``lost`` may be changed meanwhile.
    """

    def __init__(
        self,
        kind: object,
        hear: Callable[["Wire[Heard]", Heard], None],
        lost: Callable[["Wire[Heard]"], None],
        greeting: Frame | None = None,
    ) -> None:
        self._decode = msgspec.msgpack.Decoder(cast("type[list[Any]]", kind)).decode
        self._greeting = greeting
        self.hear = hear
        self.lost = lost
        self._told: list[Frame] = []
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and greet."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        if self._greeting is not None:
            self.tell(self._greeting)

    def tell(self, frame: Frame) -> None:
        """Send a frame at the end of this turn; nothing if the other end is gone."""
        if self._transport is None:
            return
        if not self._told:
            asyncio.get_running_loop().call_soon(self._flush)
        self._told.append(frame)

    def _flush(self) -> None:
        told, self._told = self._told, []
        if self._transport is not None and not self._transport.is_closing():
            body = _encode(told)
            self._transport.write(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    def data_received(self, data: bytes) -> None:
        """Take in whole batches."""
        self._unread += data
        at, end = 0, len(self._unread)
        while end - at >= _LENGTH_BYTES:
            begin = at + _LENGTH_BYTES
            length = int.from_bytes(self._unread[at:begin], "big")
            if end - begin < length:
                break
            at = begin + length
            self._take(bytes(self._unread[begin:at]))
        del self._unread[:at]

    def _take(self, body: bytes) -> None:
        try:
            frames = self._decode(body)
        except msgspec.MsgspecError:
            _log.exception("a local process speaks another language")
            self.close()
            return
        for frame in frames:
            try:
                self.hear(self, frame)
            except Exception:  # noqa: BLE001  # one call must not end the others
                _log.exception("%s failed", type(frame).__name__)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell that the other end is gone."""
        self._transport = None
        self.lost(self)

    def close(self) -> None:
        """Send what was told, and hang up."""
        if self._transport is not None:
            if self._told:
                self._flush()
            self._transport.close()
