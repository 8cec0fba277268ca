"""What both drivers tell predictors: prompts, outcomes, and the end of workflows."""

import asyncio
import json
import random
from collections.abc import Iterable

import pytest

from builders import Notebook, a_call, a_fleet, a_plan, a_policy, a_pool, a_workload
from concertmaster.core.events import Event, PaceObserved, ReplicaDied, WorkflowClosed
from concertmaster.core.fleet import Fleet, ReplicaId
from concertmaster.core.request import ModelName
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import driver, reading
from concertmaster.gateway.idle import IdleWatch
from concertmaster.physics.fast import FastEngine
from concertmaster.predictors.interface import NO_PROMPT, Prompt
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import ModelOutcome, Workload
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    a_chunk,
    an_answer,
    events,
    exactly,
    hangs,
    over_engines,
    over_upstreams,
    play,
    until,
)

M = ModelName("m")


# The simulator.


def simulated(
    workload: Workload,
    notebook: Notebook,
    fleet: Fleet | None = None,
    incidents: Iterable[tuple[float, Event]] = (),
) -> Notebook:
    Simulation(
        Scheduler(fleet or a_fleet(), a_policy(max_waiting=1), random.Random(1)),
        workload,
        notebook,
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
        incidents=incidents,
    ).run(policy="least-tokens", seed=1)
    return notebook


def test_a_simulated_call_is_predicted_from_its_prompt_and_learnt_from_with_it() -> None:
    calls = (
        a_call(0, prompt_text="Go.", tool_call=True),
        a_call(1, prompt_text="Go on.", prompt_chars=900, after_tool=True, step="vote"),
    )

    notebook = simulated(a_workload(a_plan("w", *calls, template="loop")), Notebook())

    prompts = [Prompt(text="Go.", chars=3), Prompt(text="Go on.", chars=900, after_tool=True)]
    assert [prompt for _, prompt in notebook.asked] == prompts
    assert [prompt for _, _, prompt in notebook.learnt] == prompts
    assert [(r.template, r.step) for r, _ in notebook.asked] == [("loop", ""), ("loop", "vote")]
    assert [completion.tool_call for _, completion, _ in notebook.learnt] == [True, None]


def test_a_predictor_that_reads_no_prompts_is_handed_none() -> None:
    notebook = simulated(
        a_workload(a_plan("w", a_call(prompt_text="Go."))), Notebook(reads_prompts=False)
    )

    assert [prompt for _, prompt in notebook.asked] == [NO_PROMPT]
    assert [prompt for _, _, prompt in notebook.learnt] == [NO_PROMPT]


def test_a_simulated_workflow_is_closed_once_with_its_grade() -> None:
    graded = {M: ModelOutcome(correct=0.25, output_tokens=9)}
    workload = a_workload(
        a_plan("a", a_call(0), a_call(1, outcomes=graded)), a_plan("b", a_call(0), success=1.0)
    )

    notebook = simulated(workload, Notebook())

    assert sorted(notebook.closed) == [("a", 0.25), ("b", 1.0)]


def test_a_workflow_that_lost_a_call_is_closed_once_without_a_grade() -> None:
    """One call runs, one waits, the other four find the line full."""
    plans = [a_plan(f"w{i}", a_call(0), a_call(1), success=1.0) for i in range(6)]

    notebook = simulated(a_workload(*plans), Notebook(), a_fleet(a_pool(max_sequences=1)))

    grades = dict(notebook.closed)
    assert sorted(grades) == [f"w{i}" for i in range(6)]
    assert len(notebook.closed) == 6
    assert sorted(grades.values(), key=str) == [1.0, 1.0, None, None, None, None]


def test_a_workflow_whose_branches_go_on_is_closed_after_the_last_of_them() -> None:
    calls = (
        a_call(0, output_tokens=400),
        a_call(1, parents=(), prompt_tokens=40_000),
        a_call(2, parents=(0,)),
    )

    notebook = simulated(a_workload(a_plan("w", *calls)), Notebook())

    assert [request.stage for request, _, _ in notebook.learnt] == [0, 2]
    assert notebook.closed == [("w", None)]


def test_a_call_that_failed_closes_its_workflow_too() -> None:
    workload = a_workload(a_plan("w", a_call(0, output_tokens=200)))
    died = [(1.0, ReplicaDied(ReplicaId("p-0")))]

    assert simulated(workload, Notebook(), incidents=died).closed == [("w", None)]


# The gateway.


async def told(rig: Rig, **headers: str) -> None:
    fields = {"messages": [{"role": "tool", "content": "42"}], "tools": [{}, {}]}
    assert (await rig.call({**fields, "reasoning_effort": "low"}, **headers)).status == 200
    await rig.idle()


def test_a_gateway_call_is_predicted_from_its_prompt_and_learnt_from_with_it() -> None:
    async def asks_for_a_tool(_: Heard, out: asyncio.StreamWriter) -> None:
        out.write(an_answer(json.dumps({"tool_calls": [{"id": "call_1"}]}).encode()))

    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, upstream):
            await told(rig)
            upstream.script = asks_for_a_tool
            await told(rig)
        prompt = Prompt(text="42", chars=2, tools=2, thinking=True, after_tool=True)
        assert [one for _, one in notebook.asked] == [prompt] * 2
        assert [one for _, _, one in notebook.learnt] == [prompt] * 2
        assert [completion.tool_call for _, completion, _ in notebook.learnt] == [False, True]

    play(main())


def test_no_prompt_is_read_for_a_predictor_that_reads_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "read_prompt", None)

    async def main() -> None:
        notebook = Notebook(reads_prompts=False)
        async with over_upstreams(predictor=notebook) as (rig, _):
            await told(rig)
        assert [prompt for _, prompt in notebook.asked] == [NO_PROMPT]

    play(main())


def closings(rig: Rig) -> list[str]:
    return [event.workflow_id for event in rig.history if isinstance(event, WorkflowClosed)]


def test_a_workflow_is_closed_once_when_its_client_says_so_or_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "PROGRESS_S", 0.01)

    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            rig.gateway._idle = IdleWatch(idle_s=0.4)
            await told(rig, x_dynamo_session_id="told")
            await told(rig, x_dynamo_session_id="told", x_dynamo_session_final="true")
            await told(rig, x_concertmaster_workflow_id="idle")
            await until(lambda: closings(rig), "one is closed")
            assert closings(rig) == ["told"]
            await until(lambda: len(closings(rig)) == 2, "the other is closed")
            await asyncio.sleep(0.05)
            assert notebook.closed == [("told", None), ("idle", None)]
            assert closings(rig) == ["told", "idle"]
            assert len(rig.gateway.scheduler.workflows) == 0

    play(main())


def test_a_workflow_whose_caller_left_is_closed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PROGRESS_S", 0.01)

    async def main() -> None:
        async with over_upstreams(hangs) as (rig, upstream):
            rig.gateway._idle = IdleWatch(idle_s=0.1)
            call = asyncio.ensure_future(rig.call({}, x_concertmaster_workflow_id="left"))
            await until(lambda: upstream.heard)
            await asyncio.sleep(0.2)
            assert closings(rig) == []
            call.cancel()
            await until(lambda: closings(rig) == ["left"], "closed")

    play(main())


def test_the_gateway_tells_the_core_of_an_engine_that_is_slower_than_its_curve() -> None:
    async def main() -> None:
        async with over_engines(speedup=20.0) as (rig, (emulator,)):
            emulator.engine.slowdown = 2.0
            for _ in range(5):
                await asyncio.gather(*(rig.call({**exactly(40), "stream": True}) for _ in range(4)))
            await until(lambda: rig.replica().pace != 1.0, "a pace")
            assert 1.5 < rig.replica().pace < 2.5
            assert any(isinstance(event, PaceObserved) for event in rig.history)

    play(main())


def test_answers_that_are_not_streamed_are_part_of_the_batch_and_no_observation() -> None:
    async def main() -> None:
        async def script(heard: Heard, out: asyncio.StreamWriter) -> None:
            if heard.json.get("stream"):
                out.write(STREAM_HEAD + a_chunk(b"data: {}\n\n"))
                await asyncio.sleep(0.05)
                out.write(events())
            else:
                await asyncio.sleep(0.1)
                out.write(an_answer(b'{"usage":{"completion_tokens":30}}'))

        async with over_upstreams(script) as (rig, _):
            watch = rig.gateway._pace
            assert watch is not None
            call = asyncio.ensure_future(rig.call())
            await until(lambda: len(watch._unheard) == 1, "a call that is not heard of")
            await rig.call({"stream": True})
            assert (await call).status == 200
            await rig.idle()
            assert not watch._calls
            assert not watch._unheard
            assert rig.replica().pace == 1.0

    play(main())
