import asyncio
from collections.abc import Callable

from concertmaster.engines.http_server import HttpExchange, HttpServer

OK = b"HTTP/1.1 200 OK\r\n"


def echo(exchange: HttpExchange) -> None:
    """Answer with what was asked; some paths misbehave."""
    match exchange.path:
        case "/stream":
            exchange.start(200, [("content-type", "text/plain")])
            exchange.write(b"one,")
            exchange.write(b"")
            exchange.end(b"two")
        case "/later":
            asyncio.get_running_loop().call_later(0.02, exchange.respond, 200, b"later")
        case "/broken":
            raise ZeroDivisionError
        case "/half":
            exchange.start(200, [])
            exchange.write(b"half")
            raise ZeroDivisionError
        case path:
            query = ";".join(f"{key}={value}" for key, value in exchange.query.items())
            exchange.respond(200, f"{exchange.method} {path} {query} ".encode() + exchange.body)


def talk(
    data: bytes,
    handler: Callable[[HttpExchange], None] = echo,
    reported: list[str] | None = None,
) -> bytes:
    """Send bytes, close the sending side after a while, return all that comes back."""

    async def main() -> bytes:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: None if reported is None else reported.append(context["message"])
        )
        async with HttpServer(handler, max_body_bytes=100) as server:
            await server.start("127.0.0.1", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(data)
            answer = b""
            try:
                async with asyncio.timeout(0.15):
                    while piece := await reader.read(65_536):
                        answer += piece
            except (TimeoutError, ConnectionError):
                pass
            writer.close()
        return answer

    return asyncio.run(main())


def a_request(method: str, target: str, body: bytes = b"", headers: str = "") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def test_requests_in_one_packet_are_answered_in_order() -> None:
    data = a_request("GET", "/later") + a_request("POST", "/b?x=1&y=", b"body") * 20
    answer = talk(data)
    assert answer.count(OK) == 21
    assert answer.index(b"later") < answer.index(b"POST /b x=1;y= body")


def test_a_client_that_sends_far_ahead_is_read_again_later() -> None:
    async def main() -> bytes:
        async with HttpServer(echo) as server:
            await server.start("127.0.0.1", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(a_request("GET", "/later") + a_request("GET", "/next") * 20)
            answer = await reader.readuntil(b"later")
            writer.write(a_request("GET", "/last", headers="connection: close\r\n"))
            async with asyncio.timeout(2):
                answer += await reader.read()
            writer.close()
            return answer

    assert asyncio.run(main()).count(OK) == 22


def test_a_request_in_many_packets_is_one_request() -> None:
    async def main() -> bytes:
        async with HttpServer(echo) as server:
            await server.start("127.0.0.1", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for byte in a_request("POST", "/slow", b"body", "connection: close\r\n"):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            answer = await reader.read()
            writer.close()
            return answer

    assert b"\r\nconnection: close\r\n" in (answer := asyncio.run(main()))
    assert answer.endswith(b"POST /slow  body")


def test_streams_are_chunked_but_not_for_http_1_0() -> None:
    assert talk(a_request("GET", "/stream")).endswith(
        b"transfer-encoding: chunked\r\n\r\n4\r\none,\r\n3\r\ntwo\r\n0\r\n\r\n"
    )
    answer = talk(b"GET /stream HTTP/1.0\r\n\r\n")
    assert answer.endswith(b"connection: close\r\n\r\none,two")


def test_a_chunked_body_is_read_and_head_gets_no_body() -> None:
    chunked = (
        b"POST /c HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    assert talk(chunked).endswith(b"POST /c  abcde")
    assert talk(a_request("HEAD", "/h")).endswith(b"content-length: 9\r\n\r\n")


def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    data = a_request("POST", "/e", b"abc", "expect: 100-continue\r\n")
    assert talk(data).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_an_offer_of_another_protocol_is_ignored() -> None:
    data = a_request("GET", "/u", headers="connection: upgrade\r\nupgrade: h2c\r\n")
    assert talk(data).startswith(OK)


def test_large_bodies_and_garbage_are_refused() -> None:
    assert talk(a_request("POST", "/", b"x" * 101)).startswith(b"HTTP/1.1 413 ")
    chunk = b"40\r\n" + b"x" * 64 + b"\r\n"
    chunked = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + 2 * chunk
    assert b'"the body is larger than 100 bytes"' in talk(chunked)
    assert talk(b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_handler_that_raises_costs_one_request_only() -> None:
    reported: list[str] = []
    answer = talk(a_request("GET", "/broken") + a_request("GET", "/fine"), reported=reported)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert answer.endswith(b"GET /fine  ")
    assert not talk(a_request("GET", "/half"), reported=reported).endswith(b"0\r\n\r\n")
    assert reported == ["GET /broken failed", "GET /half failed"]


def test_the_handler_learns_of_a_client_that_went_away_and_may_talk_on() -> None:
    async def main() -> list[str]:
        gone: list[str] = []

        def handler(exchange: HttpExchange) -> None:
            exchange.start(200, [])

            def lost() -> None:
                gone.append(exchange.path)
                exchange.write(b"to nobody")
                exchange.end()
                exchange.respond(200)

            exchange.on_disconnect = lost

        async with HttpServer(handler) as server:
            await server.start("127.0.0.1", 0)
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(a_request("GET", "/a") + a_request("GET", "/b"))
            await asyncio.sleep(0.02)
            writer.close()
            await asyncio.sleep(0.02)
        return gone

    assert asyncio.run(main()) == ["/a"]


def test_a_slow_reader_is_noticed() -> None:
    async def main() -> list[bool]:
        seen: list[HttpExchange] = []

        def handler(exchange: HttpExchange) -> None:
            exchange.start(200, [])
            exchange.write(b"x" * 20_000_000)
            seen.append(exchange)

        async with HttpServer(handler) as server:
            await server.start("127.0.0.1", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(a_request("GET", "/"))
            await asyncio.sleep(0.05)
            before = seen[0].congested
            while seen[0].congested:
                await reader.read(2**20)
            writer.close()
            return [before, seen[0].congested]

    assert asyncio.run(main()) == [True, False]
