"""Many workflows at once over models that come and go, and a count of what became of each call."""

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

CONTENT = re.compile(rb'"content":"[^"]')


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the workflows do.

    Attributes:
        models: Asked for with odds of 1, 1/2, 1/3, ….
        calls: Fewest and most calls of a workflow, one after the other.
        tokens: Fewest and most tokens of an answer.
        pause_s: Longest pause between two calls.
        leaves: Share of calls whose caller hangs up while it waits, after at most ``pause_s``.
        patience_s: After which a call without an answer counts as lost.
    """

    models: Sequence[str]
    calls: tuple[int, int] = (1, 4)
    tokens: tuple[int, int] = (10, 80)
    pause_s: float = 1.0
    leaves: float = 0.02
    patience_s: float = 60.0


@dataclass
class Tally:
    """What became of calls. Every call is in exactly one of the first four.

    Attributes:
        refused: By reason.
        lost: What was wrong with each answer that was none, not all, or too much.
        held: Streams that were told that they wait.
        longest_s: Longest time from a call to the end of its answer.
    """

    served: int = 0
    left: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    workflows: int = 0
    held: int = 0
    longest_s: float = 0.0

    @property
    def calls(self) -> int:
        """All that were made."""
        return self.served + self.left + sum(self.refused.values()) + len(self.lost)

    def note(self, outcome: str) -> None:
        """Count what became of a call."""
        kind, _, reason = outcome.partition(": ")
        if kind == "refused":
            self.refused[reason] += 1
        elif kind == "served":
            self.served += 1
        elif kind == "left":
            self.left += 1
        else:
            self.lost.append(outcome)


class Agent:
    """Plays workflows one after the other on one connection, as long as that is kept."""

    def __init__(self, name: str, port: int, load: Load, tally: Tally, rng: random.Random) -> None:
        self._name, self._port = name, port
        self._load, self._tally, self._rng = load, tally, rng
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._number = 0

    async def work(self, until_s: float) -> None:
        """Play at least one workflow, and others while there is time."""
        await self._workflow()
        while asyncio.get_running_loop().time() < until_s:
            await self._workflow()
        await self._hang_up(expect_silence=True)

    async def _workflow(self) -> None:
        load, rng = self._load, self._rng
        workflow = f"{self._name}-{self._number}"
        for _ in range(rng.randint(*load.calls)):
            await asyncio.sleep(load.pause_s * rng.random())
            self._number += 1
            begun_s = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(load.patience_s):
                    outcome = await self._call(f"{self._name}-{self._number}", workflow)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                outcome = f"lost: {error!r}"
                await self._hang_up()
            took_s = asyncio.get_running_loop().time() - begun_s
            self._tally.longest_s = max(self._tally.longest_s, took_s)
            self._tally.note(outcome)
        self._tally.workflows += 1

    async def _call(self, request_id: str, workflow: str) -> str:
        rng, load = self._rng, self._load
        odds = [1 / rank for rank in range(1, len(load.models) + 1)]
        (model,), tokens = rng.choices(load.models, odds), rng.randint(*load.tokens)
        streams, leaves = rng.random() < 0.5, rng.random() < load.leaves
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"{request_id} says it."}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": streams,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nx-request-id: {request_id}\r\n"
            f"x-concertmaster-workflow-id: {workflow}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
        reader, writer = self._streams
        writer.write(head.encode() + body)
        if leaves:
            await asyncio.sleep(load.pause_s * rng.random())
            await self._hang_up()
            return "left"
        return self._judge(request_id, tokens, *await read_answer(reader))

    def _judge(self, request_id: str, tokens: int, head: bytes, body: bytes) -> str:
        """Say what an answer was."""
        if f"x-request-id: {request_id}\r\n".encode() not in head.lower() + b"\r\n":
            return f"lost: {request_id} got the answer of another call: {head!r}"
        self._tally.held += b"\n: waking" in b"\n" + body
        status = int(head.split(None, 2)[1])
        if status != 200:
            honest = status != 503 or b"\r\nretry-after: " in head
            code = json.loads(body)["error"]["code"]
            return f"refused: {code}" if honest and code else f"lost: {head!r} {body!r}"
        if b"event-stream" not in head:
            (choice,), usage = json.loads(body)["choices"], json.loads(body)["usage"]
            whole = (choice["finish_reason"], usage["completion_tokens"]) == ("length", tokens)
            return "served" if whole else f"lost: {choice['finish_reason']} {usage} of {tokens}"
        if b'data: {"error"' in body:
            code = json.loads(body.rpartition(b"data: ")[2])["error"]["code"]
            whole = not CONTENT.search(body) and b"\nretry: " in b"\n" + body
            return f"refused: {code}" if whole and code else f"lost: {body!r}"
        found = len(CONTENT.findall(body))
        whole = found == tokens and body.count(b"[DONE]") == 1 and b'"abort"' not in body
        return "served" if whole else f"lost: {found} of {tokens} tokens: {body[-300:]!r}"

    async def _hang_up(self, *, expect_silence: bool = False) -> None:
        if self._streams is None:
            return
        reader, writer = self._streams
        self._streams = None
        if expect_silence:
            try:
                more = await asyncio.wait_for(reader.read(1000), 0.05)
            except TimeoutError:
                more = b""
            if more:
                self._tally.lost.append(f"lost: nobody asked for {more!r}")
        writer.transport.abort()
        await asyncio.sleep(0)


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one response: its head, and its body without chunks."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    if length:
        return head, await reader.readexactly(int(length[1]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return head, body


async def play_load(port: int, load: Load, *, workflows: int, for_s: float, seed: int) -> Tally:
    """Keep so many workflows going for a while, and count; each is played to its end."""
    tally = Tally()
    until_s = asyncio.get_running_loop().time() + for_s
    agents = [
        Agent(f"a{i}", port, load, tally, random.Random(f"{seed} {i}")) for i in range(workflows)
    ]
    await asyncio.gather(*(agent.work(until_s) for agent in agents))
    return tally
