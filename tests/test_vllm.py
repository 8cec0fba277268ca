"""vLLM itself, on the CPU: what its adapter takes for granted, and the main job over it.

``make test-engines`` installs vLLM and runs this; elsewhere it is skipped.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import aiohttp
import openai
import pytest

from builders import a_fleet, a_pool
from concertmaster.core.fleet import ReplicaId
from concertmaster.engines.dialects import DIALECTS
from concertmaster.engines.discovery import served_models
from concertmaster.gateway.peers import Peer
from gateway_rig import Rig, a_rig, play
from tiny_vllm import CONTEXT_TOKENS, write_tiny_model

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-engines")

BLOCK_TOKENS, BLOCKS, SEATS = 32, 20, 8
START_S = 600.0


@dataclass
class Vllm:
    """A process of vLLM's server."""

    process: Popen[bytes]
    port: int
    model: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0)

    async def exposed(self) -> bytes:
        async with aiohttp.request("GET", f"{self.url}/metrics") as response:
            return await response.read()

    async def metric(self, name: str) -> float:
        lines = (await self.exposed()).decode().splitlines()
        return sum(float(one.split()[-1]) for one in lines if one.startswith(f"vllm:{name}{{"))


def start(folder: Path, model: str, *, layers: int) -> Vllm:
    path = write_tiny_model(folder / model, layers=layers)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)),
        *("--load-format", "dummy", "--served-model-name", model, "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
        *("--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(SEATS)),
        *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(BLOCKS)),
        *("--scheduling-policy", "priority", "--enable-prompt-tokens-details"),
    ]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    log = (folder / f"{model}.log").open("wb")
    process = Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log, stdin=DEVNULL)  # noqa: S603
    log.close()
    return Vllm(process, port, model)


def await_health(engine: Vllm, folder: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and engine.process.poll() is None:
        try:
            with urlopen(f"{engine.url}/health", timeout=5):  # noqa: S310  # loopback
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail((folder / f"{engine.model}.log").read_text()[-3000:])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Vllm]]:
    """A small and a large model."""
    folder = tmp_path_factory.mktemp("vllm")
    started = [start(folder, "small", layers=2), start(folder, "large", layers=8)]
    try:
        for engine in started:
            await_health(engine, folder)
        yield {engine.model: engine for engine in started}
    finally:
        for engine in started:
            engine.process.terminate()
        for engine in started:
            engine.process.wait(30)


@asynccontextmanager
async def over(*engines: Vllm, **settings: Any) -> AsyncIterator[Rig]:  # noqa: ANN401
    pools = [
        a_pool(
            one.model,
            model=one.model,
            max_sequences=SEATS,
            kv_blocks=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            priority_scheduling=True,
        )
        for one in engines
    ]
    urls = {f"{one.model}-0": one.url for one in engines}
    peers = {ReplicaId(name): Peer("vllm") for name in urls}
    async with a_rig(urls, fleet=a_fleet(*pools), peers=peers, **settings) as rig:
        yield rig


def asks(words: str, tokens: int, model: str = "small", **more: Any) -> dict[str, Any]:  # noqa: ANN401
    extra = {"ignore_eos": True, **more.pop("extra_body", {})}
    messages = [{"role": "user", "content": words}]
    return {
        "model": model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0.0,
        **more,
        "extra_body": extra,
    }


# What the adapter takes for granted.


def test_the_figures_have_the_names_that_we_read(engines: dict[str, Vllm]) -> None:
    reading = DIALECTS["vllm"].read(asyncio.run(engines["small"].exposed()))

    assert reading.missing == ()
    assert reading.values["running"] == 0.0


def test_models_and_limits_are_where_we_look(engines: dict[str, Vllm]) -> None:
    async def main() -> bytes:
        async with aiohttp.request("GET", f"{engines['small'].url}/v1/models") as response:
            return await response.read()

    assert served_models(asyncio.run(main())) == {"small": CONTEXT_TOKENS}


def test_of_two_that_wait_the_smaller_priority_goes_first(engines: dict[str, Vllm]) -> None:
    ended: list[str] = []

    async def ask(client: openai.AsyncOpenAI, name: str, priority: int, tokens: int) -> None:
        await client.chat.completions.create(
            **asks(f"call {name}", tokens, extra_body={"priority": priority})
        )
        ended.append(name)

    async def main() -> None:
        async with engines["small"].client as client:
            busy = [asyncio.create_task(ask(client, "busy", 0, 200)) for _ in range(SEATS)]
            await asyncio.sleep(0.5)
            late = asyncio.create_task(ask(client, "late", 9, 8))
            await asyncio.sleep(0.1)
            soon = asyncio.create_task(ask(client, "soon", 1, 8))
            await asyncio.gather(*busy, late, soon)

    asyncio.run(main())
    assert ended.index("soon") < ended.index("late")


def test_a_prefix_that_comes_again_is_found_in_the_cache(engines: dict[str, Vllm]) -> None:
    engine, words = engines["small"], "the same beginning, " * 8

    async def main() -> float:
        async with engine.client as client:
            await client.chat.completions.create(**asks(words, 4))
            before = await engine.metric("prefix_cache_hits_total")
            await client.chat.completions.create(**asks(words, 4))
            return await engine.metric("prefix_cache_hits_total") - before

    assert asyncio.run(main()) >= BLOCK_TOKENS


# Through the gateway.


def test_a_caller_that_leaves_frees_the_engine(engines: dict[str, Vllm]) -> None:
    engine = engines["large"]

    async def main() -> None:
        async with over(engine) as rig:
            stream = await rig.sdk(timeout=30).chat.completions.create(
                **asks("on and on", 400, "large", stream=True)
            )
            await anext(aiter(stream))
            assert await engine.metric("num_requests_running") == 1.0
            await stream.close()
            await rig.idle()
            running = 1.0
            while running:
                await asyncio.sleep(0.1)
                running = await engine.metric("num_requests_running")

    play(main())


def test_an_engine_preempts_by_itself_and_not_behind_the_gateway(
    engines: dict[str, Vllm],
) -> None:
    engine = engines["small"]

    async def preemptions(client: openai.AsyncOpenAI) -> float:
        before = await engine.metric("num_preemptions_total")
        calls = [client.chat.completions.create(**asks(f"call {i}", 250)) for i in range(6)]
        replies = await asyncio.gather(*calls)
        assert [one.usage and one.usage.completion_tokens for one in replies] == [250] * 6
        return await engine.metric("num_preemptions_total") - before

    async def main() -> tuple[float, float]:
        async with engine.client as direct:
            alone = await preemptions(direct)
        async with over(engine) as rig, rig.sdk(timeout=30) as through:
            behind = await preemptions(through)
            await rig.idle()
        return alone, behind

    alone, behind = play(main())
    assert alone > 0
    assert behind == 0


def test_workflows_over_two_models_are_all_answered(engines: dict[str, Vllm]) -> None:
    async def workflow(client: openai.AsyncOpenAI, name: str) -> list[str]:
        served: list[str] = []
        for stage, model in enumerate(("large", "auto", "small")):
            raw = await client.chat.completions.with_raw_response.create(
                **asks(f"{name} {stage}", 16, model), extra_headers={"x-workflow-id": name}
            )
            served.append(raw.headers["x-concertmaster-model"])
            assert raw.parse().usage.completion_tokens == 16
        return served

    async def main() -> list[list[str]]:
        async with over(*engines.values()) as rig, rig.sdk(timeout=30) as client:
            served = await asyncio.gather(*(workflow(client, f"w{i}") for i in range(12)))
            await rig.idle()
        return served

    for first, middle, last in play(main()):
        assert (first, last) == ("large", "small")
        assert middle in {"small", "large"}
