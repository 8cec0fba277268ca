import asyncio
import json
import time
from collections.abc import Callable

import openai
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from concertmaster.physics.batching import EngineSettings
from emulator_bench import CHAT, MODEL, STEP_S, a_body, bench, exactly, until

# The API.


def test_it_says_who_and_how_it_is() -> None:
    async def main() -> None:
        async with bench() as b:
            assert await b.get("/health") == (200, "")
            assert await b.get("/ping") == (200, "")
            assert await b.get("/version") == (200, {"version": "0.33.0"})
            assert await b.get("/load") == (200, {"server_load": 0})
            assert await b.get("/is_sleeping") == (200, {"is_sleeping": False})
            _, models = await b.get("/v1/models")
            assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [(MODEL, 16_000)]
            counted = await b.post("/tokenize", {"model": MODEL, "prompt": "x" * 17})
            assert counted[1]["count"] == len(counted[1]["tokens"]) == 5
            messages = [{"role": "user", "content": "x" * 35}]
            counted = await b.post("/tokenize", {"model": MODEL, "messages": messages})
            assert counted[1]["count"] == 10

    asyncio.run(main())


def test_the_official_client_gets_whole_answers() -> None:
    async def main() -> None:
        async with bench() as b, openai.AsyncOpenAI(base_url=f"{b.url}/v1", api_key="-") as client:
            assert [m.id async for m in client.models.list()] == [MODEL]
            chat = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                max_tokens=7,
                extra_body={"ignore_eos": True},
            )
            assert chat.choices[0].finish_reason == "length"
            assert chat.choices[0].message.role == "assistant"
            assert len((chat.choices[0].message.content or "").split()) == 7
            assert chat.usage is not None
            assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (3, 7)
            text = await client.completions.create(model=MODEL, prompt="hello", max_tokens=2)
            assert text.object == "text_completion"
            assert len(text.choices[0].text.split()) == 2

    asyncio.run(main())


def test_the_official_client_gets_streams() -> None:
    async def main() -> None:
        async with bench() as b, openai.AsyncOpenAI(base_url=f"{b.url}/v1", api_key="-") as client:
            chat = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                stream_options={"include_usage": True},
                extra_headers={"x-emulator-output-tokens": "5"},
            )
            chunks = [chunk async for chunk in chat]
            assert chunks[0].choices[0].delta.role == "assistant"
            words = [c.choices[0].delta.content for c in chunks if c.choices]
            assert words == ["", " the", " plan", " is", " to", " read"]
            assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 5 + ["stop"]
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 5
            text = await client.completions.create(
                model=MODEL, prompt=["hello"], max_tokens=3, stream=True
            )
            assert [c.choices[0].text async for c in text] == [" the", " plan", " is"]

    asyncio.run(main())


def test_a_stream_is_one_event_a_token_and_done() -> None:
    async def main() -> None:
        async with bench() as b:
            events = await b.events(**exactly(40), stream_options={"include_usage": True})
            assert len(events) == 1 + 40 + 1 + 1
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["choices"] == []
            assert json.loads(events[-3])["choices"][0]["finish_reason"] == "length"
            plain = await b.events(**exactly(1))
            assert len(plain) == 1 + 1 + 1
            assert "usage" not in plain[-2]

    asyncio.run(main())


def test_several_engines_run_in_one_process() -> None:
    async def main() -> None:
        async with bench() as a, bench() as b:
            answers = await asyncio.gather(a.chat(**exactly(3)), b.chat(**exactly(4)))
            assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 4]

    asyncio.run(main())


# How long an answer is.


def test_the_length_is_the_header_s_the_cap_s_or_the_prompt_s() -> None:
    async def main() -> None:
        async with bench(speedup=500.0) as b:

            async def ask(headers: dict[str, str] | None = None, **fields: object) -> object:
                body = await b.chat(headers, **fields)
                reason = body["choices"][0]["finish_reason"]
                return body["usage"]["completion_tokens"], reason

            ten = {"x-emulator-output-tokens": "10"}
            assert await ask(ten) == (10, "stop")
            assert await ask(ten, max_tokens=10) == (10, "stop")
            assert await ask(ten, max_tokens=9) == (9, "length")
            assert await ask(ten, max_completion_tokens=9) == (9, "length")
            assert await ask(ten, min_tokens=12) == (12, "stop")
            assert await ask(ten, **exactly(12)) == (12, "length")
            drawn = await ask()
            assert drawn == await ask()
            assert drawn != await ask(messages=[{"role": "user", "content": "other"}])

    asyncio.run(main())


def test_prompt_length_and_prefix_come_from_headers_or_text() -> None:
    async def main() -> None:
        async with bench() as b:
            named = {"x-emulator-prompt-tokens": "600", "x-emulator-prefix": "11, 12"}
            body = await b.chat(named, **exactly(1))
            assert body["usage"]["prompt_tokens"] == 600
            await b.chat(named, **exactly(1))
            assert (await b.metrics())["vllm:prefix_cache_hits_total"] == 512
            parts = [{"type": "text", "text": "x" * 3000}, {"type": "image_url"}]
            for _ in range(2):
                await b.chat(**exactly(1), messages=[{"role": "user", "content": parts}])
            assert (await b.metrics())["vllm:prefix_cache_hits_total"] == 1024
            tools = [{"type": "function", "function": {"name": "f" * 400}}]
            body = await b.chat(**exactly(1), tools=tools)
            assert body["usage"]["prompt_tokens"] > 100

    asyncio.run(main())


def test_token_ids_are_a_prompt_too() -> None:
    async def main() -> None:
        async with bench() as b:
            body = {"model": MODEL, "prompt": [1, 2, 3], **exactly(1)}
            status, answer = await b.post("/v1/completions", body)
            assert (status, answer["usage"]["prompt_tokens"]) == (200, 3)
            body["prompt"] = ["two", "prompts"]
            status, answer = await b.post("/v1/completions", body)
            assert status == 400
            assert "a list of one string" in answer["error"]["message"]

    asyncio.run(main())


# What is refused.


@pytest.mark.parametrize(
    ("fields", "headers", "status", "message"),
    [
        ({"model": "other"}, {}, 404, "The model `other` does not exist."),
        ({"n": 2}, {}, 400, "n must be 1"),
        ({"priority": 1}, {}, 400, "Got priority 1 but Priority scheduling is not enabled."),
        ({"max_tokens": 0}, {}, 400, "max_tokens must be at least 1, got 0."),
        ({"max_tokens": 2, "min_tokens": 3}, {}, 400, "equal to max_tokens=2, got 3."),
        ({"max_tokens": 16_000}, {}, 400, "maximum context length is 16000 tokens"),
        ({"max_tokens": "many"}, {}, 400, "Expected `int | null`, got `str` - at `$.max_tokens`"),
        ({}, {"x-emulator-output-tokens": "few"}, 400, "expected an integer of at least 1"),
        ({}, {"x-emulator-prefix": "1,b"}, 400, "expected integers with commas between them"),
    ],
)
def test_a_bad_request_is_refused_in_one_clear_line(
    fields: dict[str, object], headers: dict[str, str], status: int, message: str
) -> None:
    async def main() -> None:
        async with bench() as b:
            answered, body = await b.post(CHAT, a_body(**fields), headers)
            assert (answered, body["error"]["code"]) == (status, status)
            assert message in body["error"]["message"]
            assert b.emulator.live_calls == 0

    asyncio.run(main())


def test_what_is_not_json_or_not_there_is_refused() -> None:
    async def main() -> None:
        async with bench() as b:
            status, body = await b.post(CHAT, b"{")
            assert status == 400
            assert body["error"]["message"].startswith("request body: ")
            assert (await b.get("/v2"))[0] == 404
            assert (await b.get(CHAT))[0] == 405
            assert (await b.post("/sleep?level=3"))[0] == 400

    asyncio.run(main())


# Time.


def test_answers_take_the_time_that_the_model_says_over_the_speedup() -> None:
    async def main() -> float:
        async with bench(speedup=4.0) as b:
            begun_s = time.perf_counter()
            await b.events(**exactly(40))
            return time.perf_counter() - begun_s

    expected_s = 40 * STEP_S / 4.0
    assert 0.98 * expected_s < asyncio.run(main()) < 5 * expected_s


def test_tokens_come_as_they_are_generated_and_those_of_one_tick_together() -> None:
    async def main(speedup: float) -> int:
        async with bench(speedup=speedup, tick_s=0.02) as b:
            body = a_body(stream=True, **exactly(30))
            async with b.http.post(CHAT, json=body) as response:
                return len([piece async for piece, _ in response.content.iter_chunks()])

    assert asyncio.run(main(1.0)) >= 10
    assert asyncio.run(main(50.0)) <= 5


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_hundreds_of_calls_at_once_are_answered_on_either_event_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> list[int]:
        async with bench(speedup=1000.0) as b:
            calls = [b.chat(**exactly(1 + number % 3)) for number in range(200)]
            return [body["usage"]["completion_tokens"] for body in await asyncio.gather(*calls)]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(main()) == [1 + number % 3 for number in range(200)]


def test_priority_decides_who_goes_first() -> None:
    async def main() -> list[str]:
        settings = EngineSettings(kv_blocks=1000, max_sequences=1, scheduling="priority")
        ended: list[str] = []
        async with bench(settings) as b:

            async def ask(name: str, priority: int, tokens: int = 10) -> None:
                await b.chat(**exactly(tokens), priority=priority)
                ended.append(name)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ask("a", 0, tokens=400))
                await until(b, "vllm:num_requests_running", 1)
                tasks.create_task(ask("low", 5))
                await until(b, "vllm:num_requests_waiting", 1)
                tasks.create_task(ask("high", -5))
        return ended

    assert asyncio.run(main()) == ["a", "high", "low"]


# Metrics.


def test_metrics_have_vllm_s_names() -> None:
    async def main() -> None:
        async with bench() as b:
            await asyncio.gather(*(b.chat(**exactly(5)) for _ in range(3)))
            _, text = await b.get("/metrics")
            families = {f.name: f for f in text_string_to_metric_families(text)}
            assert families.keys() == {
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
                "vllm:cache_config_info",
                "vllm:engine_sleep_state",
                "vllm:prefix_cache_queries",
                "vllm:prefix_cache_hits",
                "vllm:num_preemptions",
                "vllm:prompt_tokens",
                "vllm:generation_tokens",
                "vllm:request_success",
                "vllm:time_to_first_token_seconds",
                "vllm:inter_token_latency_seconds",
                "vllm:request_time_per_output_token_seconds",
                "vllm:e2e_request_latency_seconds",
            }
            assert "\nvllm:prompt_tokens_total{" in text
            labels = families["vllm:num_requests_running"].samples[0].labels
            assert labels == {"model_name": MODEL, "engine": "0"}
            labels = families["vllm:cache_config_info"].samples[0].labels
            assert (labels["block_size"], labels["num_gpu_blocks"]) == ("16", "1000")
            values = await b.metrics()
            assert values["vllm:generation_tokens_total"] == 15
            assert (values["length"], values["stop"], values["abort"]) == (3, 0, 0)
            assert values["vllm:time_to_first_token_seconds_count"] == 3
            assert values["vllm:inter_token_latency_seconds_count"] == 12
            itl_s = values["vllm:inter_token_latency_seconds_sum"] / 12
            assert STEP_S / 20 <= itl_s < 1.5 * STEP_S / 20

    asyncio.run(main())


def test_gauges_show_the_engine_while_it_works() -> None:
    async def main() -> None:
        settings = EngineSettings(kv_blocks=100, max_sequences=2)
        async with bench(settings, speedup=2.0) as b:
            named = {"x-emulator-prompt-tokens": "320"}
            calls = [asyncio.create_task(b.chat(named, **exactly(n))) for n in (40, 40, 1)]
            await until(b, "vllm:num_requests_running", 2)
            values = await b.metrics()
            assert values["vllm:num_requests_waiting"] == 1
            assert 0.4 <= values["vllm:kv_cache_usage_perc"] < 0.5
            assert await b.get("/load") == (200, {"server_load": 3})
            await asyncio.gather(*calls)
            assert (await b.metrics())["vllm:kv_cache_usage_perc"] == 0

    asyncio.run(main())
