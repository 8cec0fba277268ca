"""A fast upstream for proxies to stand in front of: a small JSON answer, or 16 SSE events."""

import argparse
import asyncio

import httptools
import uvloop

EVENTS = 16
_JSON = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"qwen2.5-7b-instruct",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"'
    + b"word "
    * 60
    + b'"},"finish_reason":"stop"}],"usage":{"prompt_tokens":100,"completion_tokens":60,'
    b'"total_tokens":160}}'
)
_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_JSON)
    + _JSON
)
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,'
    b'"model":"qwen2.5-7b-instruct","choices":[{"index":0,"delta":{"content":"word "},'
    b'"finish_reason":null}]}\n\n'
)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_MODELS = b'{"object":"list","data":[{"id":"qwen2.5-7b-instruct","object":"model"}]}'


class Upstream(asyncio.Protocol):
    """Answers at once; a stream's events leave in writes of their own."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._url = b""

    def on_url(self, url: bytes) -> None:
        """Collect the target."""
        self._url += url

    def on_body(self, part: bytes) -> None:
        """Collect the body."""
        self._body += part

    def on_message_complete(self) -> None:
        """Answer."""
        body, url = self._body, self._url
        self._body = self._url = b""
        if b'"stream":true' in body or b'"stream": true' in body:
            self._write(_HEAD + _CHUNK)
            self._loop.call_soon(self._next, 1)
        elif url.startswith((b"/v1/chat", b"/v1/completions")):
            self._write(_ANSWER)
        else:
            self._write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                % len(_MODELS)
                + _MODELS
            )

    def _next(self, sent: int) -> None:
        if sent == EVENTS:
            self._write(_DONE)
            return
        self._write(_CHUNK)
        self._loop.call_soon(self._next, sent + 1)

    def _write(self, data: bytes) -> None:
        assert isinstance(self._transport, asyncio.Transport) or hasattr(self._transport, "write")
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._parser.feed_data(data)


async def main(port: int) -> None:
    """Serve for ever."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    uvloop.run(main(parser.parse_args().port))
