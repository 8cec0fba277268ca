"""The emulated engine's embeddings, alone and behind the gateway."""

import asyncio
import math
from typing import Any

import aiohttp
import openai
import pytest

from builders import a_fleet, a_pool
from concertmaster.core.fleet import ReplicaId
from concertmaster.gateway.peers import Peer
from emulator_bench import MODEL, bench
from gateway_rig import over_engines, play

PATH = "/v1/embeddings"


def test_the_official_client_gets_vectors_in_the_order_of_its_texts() -> None:
    async def main() -> None:
        async with bench() as b, openai.AsyncOpenAI(base_url=f"{b.url}/v1", api_key="-") as client:
            made = await client.embeddings.create(model=MODEL, input=["a", "bb", "a"])
            assert [one.index for one in made.data] == [0, 1, 2]
            first, second, third = (one.embedding for one in made.data)
            assert len(first) == 384
            assert math.hypot(*first) == pytest.approx(1.0, abs=1e-5)
            assert first == third != second
            assert made.usage.prompt_tokens == made.usage.total_tokens == 3
            short = await client.embeddings.create(
                model=MODEL, input="a", dimensions=8, encoding_format="float"
            )
            assert len(short.data[0].embedding) == 8
            tokens = await client.embeddings.create(model=MODEL, input=[[1, 2], [3]])
            assert len(tokens.data) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"input": "x" * 100_000}, 400, "input"),
        ({"input": "x", "dimensions": 0}, 400, "dimensions"),
        ({"input": "x", "model": "other"}, 404, "model"),
        ({"input": {"no": "text"}}, 400, None),
        ({"input": "x", "encoding_format": "hex"}, 400, None),
    ],
)
def test_what_cannot_be_embedded_is_refused(
    fields: dict[str, Any], status: int, param: str | None
) -> None:
    async def main() -> None:
        async with bench() as b:
            found, body = await b.post(PATH, {"model": MODEL, **fields})
            assert (found, body["error"]["param"]) == (status, param)

    asyncio.run(main())


def test_embeddings_of_an_emulated_engine_come_through_the_gateway() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool("p"), a_pool("q", model="e"))
        peers = {ReplicaId("q-0"): Peer(serves="embeddings")}
        async with over_engines(fleet=fleet, peers=peers) as (rig, _), rig.sdk() as client:
            made = await client.embeddings.create(model="auto", input=["one", "two"])
            assert (made.model, len(made.data)) == ("e", 2)
            await rig.idle()

    play(main())


def test_an_engine_that_falls_asleep_breaks_the_answer_off() -> None:
    async def main() -> None:
        async with bench(speedup=0.001) as b:
            asked = asyncio.create_task(b.post(PATH, {"model": MODEL, "input": "x" * 400}))
            while not b.emulator.live_calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert b.emulator.fall_asleep(lambda: None)
            with pytest.raises(aiohttp.ClientError):
                await asked

    asyncio.run(main())
