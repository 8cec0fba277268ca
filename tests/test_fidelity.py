"""Streams pass as they came: no byte dropped, doubled, moved, or mixed into another stream."""

import asyncio
import json
import random
from collections.abc import Iterator

import pytest

from builders import a_fleet, a_policy, a_pool
from concertmaster.core.hedging import Hedging
from concertmaster.gateway import stream as framing
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    Script,
    Upstream,
    a_body,
    a_chunk,
    a_message,
    a_rig,
    over_upstreams,
    play,
)

STREAMS = 500
LETTERS = 'aä字🎻 "\\\n\t{}[]:,\u2028 data: [DONE]'
MOST_PIECE_BYTES = 40
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")


def text_of(number: int) -> list[str]:
    """What a stream says, event by event: its number, and letters that are hard to cut."""
    rng = random.Random(f"text {number}")
    return [
        f"<{number}>",
        *("".join(rng.choices(LETTERS, k=rng.randint(1, 12))) for _ in range(12)),
    ]


def body_of(number: int, *, chat: bool) -> bytes:
    """The events of a stream as an engine writes them; every third ends lines as Windows does."""
    rng = random.Random(f"body {number}")
    end = b"\r\n" if number % 3 == 0 else b"\n"
    events = []
    for text in text_of(number):
        part: dict[str, object] = {"delta": {"content": text}} if chat else {"text": text}
        events.append(
            json.dumps({"choices": [{"index": 0, **part}]}, ensure_ascii=rng.random() < 0.5)
        )
    last: dict[str, object] = {"delta": {}} if chat else {"text": ""}
    events.append(json.dumps({"choices": [{"index": 0, **last, "finish_reason": "stop"}]}))
    lines = [b"data: " + one.encode() + 2 * end for one in [*events, "[DONE]"]]
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines)), b": a comment" + 2 * end)
    return b"".join(lines)


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """Cut bytes anywhere."""
    while data:
        size = rng.randint(1, MOST_PIECE_BYTES)
        yield data[:size]
        data = data[size:]


def sent_for(number: int, *, chat: bool) -> bytes:
    """The body with its framing: chunks end where no event does."""
    rng = random.Random(f"chunks {number}")
    return b"".join(map(a_chunk, pieces(rng, body_of(number, chat=chat)))) + b"0\r\n\r\n"


class Deaf(Upstream):
    """An upstream that does not look whether its caller is still there, which costs time."""

    async def _answer(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.script(heard, writer)


def number_in(heard: Heard) -> int:
    fields = heard.json
    asked = fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"]
    if not isinstance(asked, str):
        asked = asked[0]["text"]
    return int(asked.partition("#")[2])


def choppy(everyone: asyncio.Barrier) -> Script:
    """Answer once all are there, in pieces that have nothing to do with events or chunks."""

    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        number = number_in(heard)
        rng = random.Random(f"writes {number}")
        out.write(STREAM_HEAD)
        await everyone.wait()
        data = sent_for(number, chat="/chat/" in heard.line)
        while data:
            size = rng.choice((1, 2, 7, 50, 400))
            out.write(data[:size])
            data = data[size:]
            await asyncio.sleep(rng.choice((0, 0, 0.001)))

    return script


def a_request(number: int) -> tuple[str, bytes]:
    path, asked = PATHS[number % len(PATHS)], f"Say #{number}"
    messages = [{"role": "user", "content": asked}]
    fields = {
        "/v1/chat/completions": a_body(messages=messages, max_tokens=64),
        "/v1/completions": {"model": "m", "prompt": asked, "max_tokens": 64},
        "/v1/messages": {"model": "m", "messages": messages, "max_tokens": 64},
        "/v1/responses": {"model": "m", "input": asked, "max_output_tokens": 64},
    }[path]
    body = json.dumps({**fields, "stream": True}).encode()
    return path, a_message("POST", path, body, {"connection": "close"})


OTHER = 10_000
"""Added to the number of a call by the second of two upstreams, which says something else."""


async def listen(rig: Rig, number: int, *versions: int) -> None:
    """Ask, and hold what comes against what an upstream sent: of several, against one of them."""
    path, request = a_request(number)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(request)
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 OK"), head
    if path.endswith("completions"):
        assert body in [sent_for(one, chat="/chat/" in path) for one in versions or (number,)]
    else:
        assert body.endswith(framing.END)
        texts = ["".join(text_of(one)) for one in versions or (number,)]
        assert said(path, framing.unchunked(body)) in texts, number


def said(path: str, body: bytes) -> str:
    """Put together what a translated stream says."""
    texts, kinds = [], []
    for event in body.decode().split("\n\n")[:-1]:
        data = next((line for line in event.split("\n") if line.startswith("data: ")), "")
        if not data:
            continue  # a comment of the engine's
        fields = json.loads(data[6:])
        kinds.append(fields["type"])
        if fields["type"] == "content_block_delta":
            texts.append(fields["delta"]["text"])
        elif fields["type"] == "response.output_text.delta":
            texts.append(fields["delta"])
    ends = {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}
    assert kinds.count(ends[path]) == 1
    assert kinds[-1] == ends[path]
    return "".join(texts)


def test_five_hundred_streams_at_once_pass_byte_for_byte() -> None:
    async def main() -> None:
        pool = a_pool(max_sequences=STREAMS, kv_blocks=STREAMS * 16)
        async with (
            Deaf(choppy(asyncio.Barrier(STREAMS))) as upstream,
            a_rig({"p-0": upstream.url}, fleet=a_fleet(pool)) as rig,
        ):
            await asyncio.gather(*(listen(rig, number) for number in range(STREAMS)))
            await rig.idle()

    play(main())


def hesitant(added: int) -> Script:
    """Begin at once or late, and go on in pieces; each attempt draws for itself."""

    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        number = number_in(heard) + added
        rng = random.Random(f"hesitates {number}")
        out.write(STREAM_HEAD)
        await asyncio.sleep(rng.choice((0, 0.08, 0.12, 0.16, 0.3)))
        data = sent_for(number, chat="/chat/" in heard.line)
        while data and not out.transport.is_closing():  # else overtaken
            size = rng.choice((1, 7, 50, 400))
            out.write(data[:size])
            data = data[size:]
            await asyncio.sleep(rng.choice((0, 0, 0.001)))

    return script


def test_nothing_of_two_attempts_at_a_call_is_mixed() -> None:
    async def main() -> None:
        pool = a_pool(max_sequences=1000, kv_blocks=10_000)
        rule = Hedging(level=0.5, share=1.0, floor_s=0.05)
        async with over_upstreams(
            hesitant(0),
            hesitant(OTHER),
            fleet=a_fleet(pool, replicas=2),
            policy=a_policy("round-robin", hedge=rule),
            breaker_failures=0,
        ) as (rig, _):
            for start in range(0, 200, 25):
                numbers = range(start, start + 25)
                await asyncio.gather(*(listen(rig, one, one, one + OTHER) for one in numbers))
            await rig.idle()
            outcomes = rig.gateway.scheduler.races.outcomes
            assert min(outcomes["won"], outcomes["lost"]) > 10, outcomes

    play(main())


@pytest.mark.parametrize("number", range(4))
def test_a_stream_of_single_bytes_passes(number: int) -> None:
    async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
        out.write(STREAM_HEAD)
        for byte in sent_for(number, chat="/chat/" in heard.line):
            out.write(bytes([byte]))
            await asyncio.sleep(0)

    async def main() -> None:
        async with over_upstreams(script) as (rig, _):
            await listen(rig, number)
            await rig.idle()

    play(main())
