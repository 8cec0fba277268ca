"""A small HTTP client for what is not in the hot path: health, discovery, control."""

import asyncio

import httptools

from concertmaster.engines.address import Address

_READ_BYTES = 65_536


class _Answer:
    """Collects one response."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.done = False

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.done = True


async def fetch(
    method: str, url: str, path: str, *, body: bytes = b"", api_key: str = "", timeout_s: float
) -> tuple[int, bytes]:
    """Make one request on a connection of its own; return status and body.

    The path is taken to begin where the URL ends.

    Raises:
        OSError: Nobody answers, or not in HTTP.
        TimeoutError: The answer takes longer than ``timeout_s``.
    """
    address = Address.of(url)
    credentials = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    answer = _Answer()
    parser = httptools.HttpResponseParser(answer)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
        try:
            writer.write(
                f"{method} {address.prefix}{path} HTTP/1.1\r\nhost: {address.authority}\r\n"
                f"connection: close\r\n{credentials}"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            while not answer.done and (data := await reader.read(_READ_BYTES)):
                parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionError(f"{url}{path} does not speak HTTP: {error}") from None
        finally:
            writer.close()
    if not answer.done:
        raise ConnectionError(f"{url}{path} closed the connection early")
    return parser.get_status_code(), b"".join(answer.parts)
