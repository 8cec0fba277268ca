"""Every way of controlling engines keeps the same promises, against an engine that speaks it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from concertmaster.core.fleet import Readiness
from concertmaster.engines import control
from concertmaster.engines.control import CONTROLS, ControlError, ControlKind, EngineControl
from concertmaster.engines.faults import Faults
from emulator_bench import CHAT, MODEL, Bench, a_body, bench, exactly
from gateway_rig import Heard, Upstream, an_answer, until

SPEEDUP = 50.0
SLEEP_S, WAKE_S, RELOAD_S = 2.0, 5.0, 10.0
HTTP_KINDS: list[ControlKind] = ["vllm", "llama.cpp", "ollama"]
BY_NAME: list[ControlKind] = ["llama.cpp", "ollama"]


@pytest.fixture(params=HTTP_KINDS)
def way(request: pytest.FixtureRequest) -> EngineControl:
    return CONTROLS[request.param]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.005)
    monkeypatch.setattr(control, "RETRY_S", 0.005)


@asynccontextmanager
async def an_engine(lies: Readiness = Readiness.RUNNING, **faults: object) -> AsyncIterator[Bench]:
    async with bench(
        speedup=SPEEDUP,
        sleep_s=SLEEP_S,
        wake_s=WAKE_S,
        reload_s=RELOAD_S,
        lies=lies,
        faults=Faults(**faults),  # type: ignore[arg-type]
    ) as b:
        yield b


async def seconds(errand: object) -> float:
    """How long it takes, in engine seconds."""
    begun_s = time.perf_counter()
    await errand  # type: ignore[misc]
    return SPEEDUP * (time.perf_counter() - begun_s)


def test_a_model_goes_and_comes_back_and_answers(way: EngineControl) -> None:
    async def main() -> None:
        async with an_engine() as b:
            assert await way.resident(b.url, MODEL)
            lies = await way.unload(b.url, MODEL, Readiness.DISK)
            assert lies is Readiness.DISK
            assert (b.emulator.residency, await way.resident(b.url, MODEL)) == ("asleep", False)
            assert (await b.post(CHAT, a_body()))[0] == 503
            took_s = await seconds(way.load(b.url, MODEL, lies))
            assert took_s >= RELOAD_S - 0.1
            assert await way.resident(b.url, MODEL)
            await b.chat(**exactly(2))

    asyncio.run(main())


def test_to_load_what_is_loaded_changes_nothing(way: EngineControl) -> None:
    async def main() -> None:
        async with an_engine() as b:
            await way.load(b.url, MODEL, Readiness.RUNNING)
            await b.chat(**exactly(2))

    asyncio.run(main())


def test_a_load_that_fails_says_so(way: EngineControl) -> None:
    async def main() -> None:
        async with an_engine(Readiness.DISK, wakes="fails") as b:
            with pytest.raises(ControlError, match=r"answered 500|unloaded after POST"):
                await way.load(b.url, MODEL, Readiness.DISK)
            assert not await way.resident(b.url, MODEL)

    asyncio.run(main())


def test_a_load_that_never_ends_is_for_the_caller_to_limit(way: EngineControl) -> None:
    async def main() -> None:
        async with an_engine(Readiness.DISK, wakes="never") as b:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(way.load(b.url, MODEL, Readiness.DISK), 0.3)

    asyncio.run(main())


def test_an_engine_that_is_not_there_is_an_error(way: EngineControl) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="onnect"):
            await way.load("http://127.0.0.1:9", MODEL, Readiness.DISK)

    asyncio.run(main())


@pytest.mark.parametrize("kind", BY_NAME)
def test_a_model_that_the_engine_does_not_have_cannot_be_loaded(kind: ControlKind) -> None:
    async def main() -> None:
        async with an_engine() as b:
            with pytest.raises(ControlError, match="not found"):
                await CONTROLS[kind].load(b.url, "other", Readiness.DISK)

    asyncio.run(main())


@pytest.mark.parametrize("kind", BY_NAME)
def test_to_unload_what_is_gone_changes_nothing(kind: ControlKind) -> None:
    async def main() -> None:
        async with an_engine(Readiness.DISK) as b:
            assert await CONTROLS[kind].unload(b.url, MODEL, Readiness.DISK) is Readiness.DISK

    asyncio.run(main())


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize("body", [b"hello", b'{"data":7,"models":7}', b"[]"])
def test_an_answer_without_a_list_is_an_error(kind: ControlKind, body: bytes) -> None:
    class Odd(Upstream):
        def _control(self, _: Heard) -> bytes:
            return an_answer(body)

    async def main() -> None:
        async with Odd() as odd:
            with pytest.raises(ControlError, match="without a list"):
                await CONTROLS[kind].resident(odd.url, MODEL)

    asyncio.run(main())


# vLLM


def test_level_1_keeps_the_weights_near() -> None:
    async def main() -> None:
        way = CONTROLS["vllm"]
        async with an_engine() as b:
            lies = await way.unload(b.url, MODEL, Readiness.HOST)
            assert lies is Readiness.SLEEPING
            assert WAKE_S - 0.1 <= await seconds(way.load(b.url, MODEL, lies)) < RELOAD_S
            await b.chat(**exactly(2))

    asyncio.run(main())


def test_weights_that_were_dropped_are_noise_until_they_are_read_again() -> None:
    async def main() -> None:
        way = CONTROLS["vllm"]
        async with an_engine() as b:
            await way.unload(b.url, MODEL, Readiness.DISK)
            assert (await b.post("/wake_up"))[0] == 200
            status, body = await b.post(CHAT, a_body())
            assert (status, body["error"]["message"]) == (
                500,
                "the weights were dropped by sleep and not reloaded",
            )

    asyncio.run(main())


def test_an_engine_without_control_is_taken_as_it_is() -> None:
    async def main() -> None:
        way = CONTROLS["none"]
        async with an_engine() as b:
            await way.load(b.url, MODEL, Readiness.RUNNING)
            assert await way.resident(b.url, MODEL)
            with pytest.raises(ControlError, match="control is none"):
                await way.unload(b.url, MODEL, Readiness.DISK)
            await b.chat(**exactly(2))

    asyncio.run(main())


def test_an_engine_that_is_still_falling_asleep_is_woken_once_it_can() -> None:
    async def main() -> None:
        way = CONTROLS["vllm"]
        async with an_engine() as b:
            going = asyncio.create_task(way.unload(b.url, MODEL, Readiness.SLEEPING))
            await until(lambda: b.emulator.asleep)
            await way.load(b.url, MODEL, Readiness.SLEEPING)
            await going
            await b.chat(**exactly(2))

    asyncio.run(main())
