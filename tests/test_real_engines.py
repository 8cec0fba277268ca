"""The gateway over real engines: continuous batching with paged KV on this machine's CPU."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import aiohttp
import openai
import pytest

from builders import a_fleet, a_pool
from concertmaster.core.events import RequestFinished
from concertmaster.core.fleet import Fleet
from gateway_rig import Rig, a_rig, play

pytest.importorskip("openvino_genai", reason="needs openvino-genai, which has no wheel here")

from tiny_gguf import write_tiny_gguf

BLOCK_TOKENS = 32
SEATS = 4
ENGINE = Path(__file__).with_name("openvino_engine.py")


@dataclass
class RealEngine:
    """A process that serves a tiny model."""

    process: Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def metric(self, name: str) -> float:
        async with aiohttp.request("GET", f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def an_engine(folder: Path, *, kv_blocks: int = 256, seed: int = 0) -> RealEngine:
    model = write_tiny_gguf(folder / f"tiny-{seed}.gguf", seed=seed)
    command = [sys.executable, str(ENGINE), str(model), "m", "0", str(kv_blocks), str(SEATS)]
    paths = os.pathsep.join(sys.path)
    process = Popen(command, stdout=PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})  # noqa: S603
    assert process.stdout is not None
    word, _, port = process.stdout.readline().partition(" ")
    assert word == "ready"
    return RealEngine(process, int(port))


def end(engine: RealEngine) -> None:
    engine.process.terminate()
    engine.process.wait(10)
    assert engine.process.stdout is not None
    engine.process.stdout.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RealEngine]]:
    """Two engines of the same model, so that either gives the same answer."""
    folder = tmp_path_factory.mktemp("engines")
    engines = [an_engine(folder) for _ in range(2)]
    yield engines
    for engine in engines:
        end(engine)


def a_small_fleet(replicas: int, *, kv_blocks: int = 256) -> Fleet:
    pool = a_pool(max_sequences=SEATS, kv_blocks=kv_blocks, block_tokens=BLOCK_TOKENS)
    return a_fleet(pool, replicas=replicas)


@asynccontextmanager
async def over(*engines: RealEngine, **settings: Any) -> AsyncIterator[Rig]:  # noqa: ANN401
    urls = {f"p-{i}": engine.url for i, engine in enumerate(engines)}
    settings.setdefault("fleet", a_small_fleet(len(engines)))
    async with a_rig(urls, **settings) as rig:
        yield rig


def asks(words: str, tokens: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    messages = [{"role": "user", "content": words}]
    extra = {"ignore_eos": True}
    return {"model": "m", "messages": messages, "max_tokens": tokens, "extra_body": extra, **more}


def client_of(engine: RealEngine) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x", max_retries=0)


async def streamed(client: openai.AsyncOpenAI, words: str, tokens: int) -> tuple[str, int]:
    """Return the text of a stream, and how many tokens its usage says."""
    text, counted = "", 0
    stream = await client.chat.completions.create(
        **asks(words, tokens, stream=True, stream_options={"include_usage": True})
    )
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        counted = chunk.usage.completion_tokens if chunk.usage else counted
    return text, counted


def test_answers_are_those_of_the_engine(two: list[RealEngine]) -> None:
    async def main() -> None:
        async with over(*two) as rig, client_of(two[0]) as direct, rig.sdk() as through:
            plain = await direct.chat.completions.create(**asks("the hen", 40))
            whole = await through.chat.completions.create(**asks("the hen", 40))
            text, counted = await streamed(through, "the hen", 40)
            await rig.idle()

            assert plain.choices[0].message.content
            assert whole.choices == plain.choices
            assert (whole.usage, counted) == (plain.usage, 40)
            assert text == plain.choices[0].message.content
            told = [one.output_tokens for one in rig.history if isinstance(one, RequestFinished)]
            assert told == [40, 40]

    play(main())


def test_workflows_are_answered_once_by_both_engines_and_none_queues(
    two: list[RealEngine],
) -> None:
    most_waiting: list[float] = []

    async def watch() -> None:
        while True:
            most_waiting.extend([await engine.metric("num_requests_waiting") for engine in two])
            await asyncio.sleep(0.02)

    async def workflow(client: openai.AsyncOpenAI, name: str) -> list[str]:
        texts: list[str] = []
        for stage in range(3):
            header = {"x-workflow-id": name}
            reply = await client.chat.completions.create(
                **asks(f"{name} {stage} {''.join(texts)}", 24), extra_headers=header
            )
            texts.append(reply.choices[0].message.content or "")
        return texts

    async def main() -> None:
        async with over(*two) as rig, client_of(two[0]) as direct:
            before = [await engine.metric("generation_tokens_total") for engine in two]
            watcher = asyncio.create_task(watch())
            async with rig.sdk(timeout=25) as client:
                answers = await asyncio.gather(*(workflow(client, f"w{i}") for i in range(16)))
            watcher.cancel()
            await rig.idle()
            after = [await engine.metric("generation_tokens_total") for engine in two]
            alone = await workflow(direct, "w7")

        shares = [late - early for early, late in zip(before, after, strict=True)]
        assert sum(shares) == 16 * 3 * 24
        assert min(shares) > sum(shares) / 4
        assert max(most_waiting) == 0.0
        assert answers[7] == alone

    play(main())


def test_a_caller_that_leaves_frees_the_engine(two: list[RealEngine]) -> None:
    async def main() -> None:
        engine = two[0]
        async with over(engine) as rig:
            stream = await rig.sdk().chat.completions.create(**asks("on and on", 1500, stream=True))
            await anext(aiter(stream))
            before = await engine.metric("generation_tokens_total")
            await stream.close()
            await rig.idle()
            await asyncio.wait_for(runs_dry(engine), 10)

            assert await engine.metric("generation_tokens_total") - before < 1000

    play(main())


async def runs_dry(engine: RealEngine) -> None:
    running = 1.0
    while running:
        await asyncio.sleep(0.02)
        running = await engine.metric("num_requests_running")


def test_an_engine_that_dies_in_mid_stream_ends_it_with_an_error(tmp_path: Path) -> None:
    async def main(engine: RealEngine) -> None:
        async with over(engine) as rig:
            stream = await rig.sdk().chat.completions.create(**asks("on", 1500, stream=True))
            await anext(aiter(stream))
            os.kill(engine.process.pid, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="engine"):
                [_ async for _ in stream]
            await rig.idle()

    engine = an_engine(tmp_path)
    try:
        play(main(engine))
    finally:
        end(engine)


def test_calls_beyond_an_engines_memory_wait_in_line_and_are_all_answered(tmp_path: Path) -> None:
    async def main(engine: RealEngine) -> None:
        fleet = a_small_fleet(1, kv_blocks=16)
        async with over(engine, fleet=fleet) as rig, rig.sdk(timeout=25) as client:
            asked = [client.chat.completions.create(**asks(f"call {i}", 200)) for i in range(6)]
            answering = asyncio.gather(*asked)
            most_waiting = 0.0
            while not answering.done():  # a gauge has to be looked at
                most_waiting = max(most_waiting, await engine.metric("num_requests_waiting"))
                await asyncio.sleep(0.02)
            replies = await answering
            await rig.idle()

        assert most_waiting == 0.0
        assert [reply.usage and reply.usage.completion_tokens for reply in replies] == [200] * 6

    engine = an_engine(tmp_path, kv_blocks=16)
    try:
        play(main(engine))
    finally:
        end(engine)
