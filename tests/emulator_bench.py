"""An emulator with a client, for tests."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from concertmaster.core.cost import RateCurve
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.emulator_api import EmulatorServer, serve
from concertmaster.physics.batching import EngineSettings

MODEL = "acme/small"
STEP_S = 0.02
CURVE = RateCurve(fixed_s=STEP_S, linear_tokens=(1, 1000), linear_s=(0.0, 0.1))
CHAT = "/v1/chat/completions"


@dataclass
class Bench:
    """An emulator, its server, and a client for it."""

    emulator: Emulator
    server: EmulatorServer
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(path) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith("{") else text

    async def post(
        self, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(path, data=raw, headers=headers) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else text

    async def chat(self, headers: dict[str, str] | None = None, **fields: object) -> Any:  # noqa: ANN401
        """Ask for a whole answer and return its body; the status must be 200."""
        status, body = await self.post(CHAT, a_body(**fields), headers)
        assert status == 200, body
        return body

    async def events(self, headers: dict[str, str] | None = None, **fields: object) -> list[str]:
        """Stream an answer; the payload of each event."""
        async with self.http.post(CHAT, json=a_body(stream=True, **fields), headers=headers) as r:
            assert r.status == 200
            assert r.headers["content-type"] == "text/event-stream; charset=utf-8"
            text = await r.text()
        assert text.endswith("\n\n")
        return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]

    async def metrics(self) -> dict[str, float]:
        """Values by sample name; of several with a name, the sum. Ends by reason alone."""
        _, text = await self.get("/metrics")
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.labels.get("finished_reason", sample.name)
                values[name] = values.get(name, 0.0) + sample.value
        return values


def a_body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Say it."}], **fields}


def exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True}


@asynccontextmanager
async def bench(settings: EngineSettings | None = None, **kwargs: Any) -> AsyncIterator[Bench]:  # noqa: ANN401
    emulator = Emulator(
        model_name=MODEL,
        curve=CURVE,
        settings=settings or EngineSettings(kv_blocks=1000),
        **{"speedup": 20.0, **kwargs},
    )
    server = await serve(emulator, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}"
    patience = aiohttp.ClientTimeout(total=5)
    async with server, aiohttp.ClientSession(url, timeout=patience) as http:
        yield Bench(emulator, server, http)


async def until(bench: Bench, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    for _ in range(300):
        if (await bench.metrics())[name] == value:
            return
        await asyncio.sleep(0.005)
    raise TimeoutError(f"{name} did not become {value}")


async def read_into(text: bytearray, response: aiohttp.ClientResponse) -> None:
    async for piece in response.content.iter_any():
        text += piece
