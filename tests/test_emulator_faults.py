import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

import aiohttp
import pytest

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.request import RequestId
from concertmaster.engines.faults import Faults
from concertmaster.physics.batching import EngineCall
from emulator_bench import CHAT, MODEL, a_body, bench, exactly, read_into, until

# Clients that go away, or hardly read.


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_kv_cache(*, stream: bool) -> None:
    async def main() -> None:
        async with bench(speedup=1.0) as b:
            call = asyncio.create_task(b.chat(**exactly(10_000), stream=stream))
            await until(b, "vllm:num_requests_running", 1)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            await until(b, "vllm:num_requests_running", 0)
            values = await b.metrics()
            assert values["vllm:kv_cache_usage_perc"] == 0
            assert values["abort"] == 1
            assert b.emulator.live_calls == 0

    asyncio.run(main())


@dataclass
class SlowReader:
    """A sink that is congested, and what it was given."""

    streams: bool = True
    congested: bool = True
    given: list[tuple[int, str | None]] = field(default_factory=list)

    def deliver(self, tokens: int, finish_reason: str | None) -> None:
        self.given.append((tokens, finish_reason))

    def cut(self) -> None:
        self.given.append((0, "cut"))


def test_a_client_that_hardly_reads_gets_its_tokens_at_the_end() -> None:
    async def main() -> None:
        async with bench() as b:
            sink = SlowReader()
            call = EngineCall(request_id=RequestId("a"), prompt_tokens=1, output_tokens=50)
            b.emulator.answer(call, sink, "stop")
            await until(b, "stop", 1)
            assert sink.given == [(50, "stop")]

    asyncio.run(main())


# Sleep.


def test_a_sleeping_engine_refuses_until_it_is_woken() -> None:
    async def main() -> None:
        async with bench(sleep_s=2.0, wake_s=4.0) as b:
            assert (await b.post("/wake_up"))[0] == 200
            begun_s = time.perf_counter()
            assert (await b.post("/sleep?level=1"))[0] == 200
            assert (await b.post("/sleep?level=1"))[0] == 200
            slept_s = time.perf_counter()
            assert 0.098 < slept_s - begun_s < 0.6
            assert await b.get("/is_sleeping") == (200, {"is_sleeping": True})
            assert await b.get("/health") == (200, "")
            status, body = await b.post(CHAT, a_body())
            assert status == 503
            assert body["error"]["message"] == (
                f"the engine of {MODEL} is asleep; POST /wake_up first"
            )
            woken = await asyncio.gather(b.post("/wake_up"), b.post("/wake_up"), b.post("/sleep"))
            assert sorted(status for status, _ in woken) == [200, 200, 503]
            assert 0.198 < time.perf_counter() - slept_s < 1.0
            await b.chat(**exactly(2))

    asyncio.run(main())


def test_falling_asleep_aborts_calls_under_way() -> None:
    async def main() -> None:
        async with bench() as b:
            calls = [
                asyncio.create_task(b.events(**exactly(10_000))),
                asyncio.create_task(b.chat(**exactly(10_000))),
            ]
            await until(b, "vllm:num_requests_running", 2)
            await asyncio.sleep(0.05)
            await b.post("/sleep")
            events, body = await asyncio.gather(*calls)
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"
            assert body["choices"][0]["finish_reason"] == "abort"
            values = await b.metrics()
            assert (values["abort"], values["vllm:num_requests_running"]) == (2, 0)

    asyncio.run(main())


def test_a_loading_engine_is_not_healthy_yet() -> None:
    async def main() -> None:
        async with bench(load_s=2.0) as b:
            status, body = await b.get("/health")
            assert (status, body["error"]["type"]) == (503, "ServiceUnavailableError")
            assert (await b.post(CHAT, a_body()))[0] == 503
            assert (await b.post("/wake_up"))[0] == 200
            assert (await b.get("/health"))[0] == 200

    asyncio.run(main())


# Faults.


def test_errors_on_request() -> None:
    async def main() -> None:
        async with bench(faults=Faults(error_ratio=0.5), speedup=1000.0) as b:
            statuses = [(await b.post(CHAT, a_body(**exactly(1))))[0] for _ in range(60)]
            assert set(statuses) == {200, 500}
            assert 15 <= statuses.count(500) <= 45

    asyncio.run(main())


def test_an_engine_that_is_full_says_so_on_request() -> None:
    async def main() -> None:
        async with bench(faults=Faults(full_ratio=1.0)) as b:
            status, body = await b.post(CHAT, a_body(**exactly(1)))
            assert (status, body["error"]["type"]) == (429, "RateLimitError")

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_stalls_on_request(*, stream: bool) -> None:
    async def main() -> None:
        async with bench(faults=Faults(stall_ratio=1.0, stall_s=4.0)) as b:
            begun_s = time.perf_counter()
            await (b.events(**exactly(5)) if stream else b.chat(**exactly(5)))
            assert 0.198 < time.perf_counter() - begun_s < 1.0
            assert (await b.metrics())["vllm:num_requests_running"] == 0

    asyncio.run(main())


def test_a_slow_drip_on_request() -> None:
    async def main() -> None:
        async with bench(faults=Faults(drip_s=0.4)) as b:
            begun_s = time.perf_counter()
            assert len(await b.events(**exactly(10))) == 12
            assert 9 * 0.02 < time.perf_counter() - begun_s < 1.0

    asyncio.run(main())


def test_death_in_the_middle_of_a_stream_on_request() -> None:
    async def main() -> None:
        async with bench(faults=Faults(death_ratio=1.0)) as b:
            text = bytearray()
            async with b.http.post(CHAT, json=a_body(stream=True, **exactly(50))) as response:
                with pytest.raises(aiohttp.ClientError):
                    await read_into(text, response)
            assert b"finish_reason" in text
            assert b"DONE" not in text
            with pytest.raises(aiohttp.ClientError):
                await b.chat(**exactly(5))
            assert b.emulator.live_calls == 0
            assert (await b.metrics())["vllm:kv_cache_usage_perc"] == 0

    asyncio.run(main())


def test_renamed_metrics_on_request() -> None:
    async def main() -> None:
        async with bench() as b:
            before = await b.metrics()
            assert (await b.post("/emulator/faults", {"rename_metrics": True}))[0] == 200
            after = await b.metrics()
            assert before.keys() - after.keys() == {
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
            }

    asyncio.run(main())


def test_faults_can_be_set_and_read_while_it_runs() -> None:
    async def main() -> None:
        async with bench() as b:
            status, faults = await b.post("/emulator/faults", {"stall_ratio": 1, "stall_s": 0.5})
            assert (status, faults["stall_ratio"], faults["stall_s"]) == (200, 1.0, 0.5)
            assert await b.get("/emulator/faults") == (200, faults)
            status, body = await b.post("/emulator/faults", {"eror_ratio": 1})
            assert status == 400
            assert body["error"]["message"] == (
                'faults: unknown key "eror_ratio" (did you mean "error_ratio"? known: '
                "death_ratio, drip_s, error_ratio, full_ratio, rename_metrics, stall_ratio, "
                "stall_s, wakes)"
            )
            status, body = await b.post("/emulator/faults", {"error_ratio": "x"})
            assert status == 400
            assert body["error"]["message"].startswith("faults: Expected `float`, got `str`")
            assert await b.get("/emulator/faults") == (200, faults)

    asyncio.run(main())


@pytest.mark.parametrize(
    "field", ["error_ratio", "full_ratio", "stall_ratio", "death_ratio", "drip_s"]
)
def test_faults_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"faults: {field} must .*, got -1"):
        Faults.from_json(b'{"%b": -1}' % field.encode())
