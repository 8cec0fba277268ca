"""Streams that the gateway writes to itself: a head before there is an answer, comments, errors."""

import msgspec

from concertmaster.gateway.openai_api import error_body

END = b"0\r\n\r\n"
"""Last chunk of an answer."""

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n"
)


def head(headers: bytes) -> bytes:
    """Begin a stream; the headers end in a line break each."""
    return _HEAD + headers + b"\r\n"


def chunk(data: bytes) -> bytes:
    r"""Frame a piece of a body as HTTP/1.1 does; nothing for nothing.

    >>> chunk(b"data")
    b'4\r\ndata\r\n'
    """
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def unchunked(body: bytes) -> bytes:
    """Return what is framed in chunks.

    >>> unchunked(chunk(b"da") + chunk(b"ta") + END)
    b'data'
    """
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            break
        parts.append(rest[:length])
        body = rest[length + 2 :]
    return b"".join(parts)


def comment(*lines: str) -> bytes:
    r"""Frame lines that clients of a stream skip.

    >>> comment("waking small, about 3 s")
    b': waking small, about 3 s\n\n'
    """
    return "".join(f": {line}\n" for line in lines).encode() + b"\n"


def error_event(body: bytes, *, retry_after_s: float | None = None) -> bytes:
    """Frame the body of an error; what is not JSON with an error in it is put into one.

    Args:
        body: What would have been answered.
        retry_after_s: When it is worth trying again; told as the stream's reconnection time.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or "error" not in fields:
        body = error_body(body[:1000].decode(errors="replace"), "server_error", code="engine_error")
    else:
        body = msgspec.json.encode(fields)
    wait = b"" if retry_after_s is None else b"retry: %d\n" % round(1000 * retry_after_s)
    return wait + b"data: " + body + b"\n\n"
