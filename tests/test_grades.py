"""Callers tell the gateway that a workflow is over, and how well it went."""

import asyncio
import random
from dataclasses import replace

import pytest

from builders import Notebook, a_call, a_fleet, a_plan, a_pool, a_workload, chains
from concertmaster.core.events import WorkflowClosed
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import replay
from concertmaster.gateway.replay import Replay
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import Workload
from gateway_rig import Reply, Rig, cuts, hangs, over_engines, over_upstreams, play, until

SPEEDUP = 50.0


async def grade(rig: Rig, workflow: str, body: str) -> Reply:
    return await rig.ask("POST", f"/v1/workflows/{workflow}/grade", body.encode())


def ends(rig: Rig) -> list[str]:
    return [one.workflow_id for one in rig.history if isinstance(one, WorkflowClosed)]


def test_a_grade_ends_its_workflow_and_reaches_the_predictor() -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            await rig.call(x_concertmaster_workflow_id="trip-7")
            reply = await grade(rig, "trip-7", '{"success": 0.8}')
            assert (reply.status, reply.json) == (200, {"workflow_id": "trip-7", "success": 0.8})
            assert notebook.closed == [("trip-7", 0.8)]
            assert ends(rig) == ["trip-7"]
            assert len(rig.gateway.scheduler.workflows) == 0
            assert await rig.metric("concertmaster_grades_total") == 1

    play(main())


def test_a_workflow_may_be_over_without_a_grade() -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            await rig.call(x_concertmaster_workflow_id="w")
            assert (await grade(rig, "w", '{"success": null}')).json["success"] is None
            assert notebook.closed == [("w", None)]
            assert ends(rig) == ["w"]

    play(main())


def test_a_late_grade_teaches_and_ends_nothing() -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            assert (await grade(rig, "nobody", '{"success": 1}')).status == 200
            assert notebook.closed == [("nobody", 1.0)]
            assert ends(rig) == []
            assert await rig.metric("concertmaster_grades_total") == 1

    play(main())


def test_a_workflow_with_an_open_call_ends_with_that_call() -> None:
    async def main() -> None:
        async with over_upstreams(hangs, speedup=50.0) as (rig, upstream):
            call = asyncio.create_task(rig.call(x_concertmaster_workflow_id="w"))
            await until(lambda: upstream.heard)
            await grade(rig, "w", '{"success": 1}')
            assert ends(rig) == []
            call.cancel()
            await until(lambda: ends(rig) == ["w"], "the workflow is closed")

    play(main())


@pytest.mark.parametrize(
    ("named", "workflow"), [("a%2Fb%3Ac~d", "a/b:c~d"), ("a/grade", "a/grade")]
)
def test_any_id_may_be_graded(named: str, workflow: str) -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            await rig.call(x_concertmaster_workflow_id=workflow)
            wire = await rig.wire()
            body = b'{"success": 1}'
            wire.send(
                f"POST /v1/workflows/{named}/grade HTTP/1.1\r\nhost: g\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            status, _ = await wire.answer()
            assert status == 200
            assert notebook.closed == [(workflow, 1.0)]
            assert ends(rig) == [workflow]

    play(main())


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("", "nothing"),
        ("no", "nothing"),
        ("[1]", "nothing"),
        ("{}", "nothing"),
        ("[" * 10_000, "nothing"),
        ('{"success": 1.01}', "1.01"),
        ('{"success": -1}', "-1"),
        ('{"success": true}', "true"),
        ('{"success": "1"}', '"1"'),
        ('{"success": [0.5]}', "[0.5]"),
    ],
)
def test_what_is_no_grade_is_refused(body: str, found: str) -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(predictor=notebook) as (rig, _):
            reply = await grade(rig, "w", body)
            assert reply.status == 400
            assert reply.error == {
                "message": f"success: expected a number from 0 to 1, or null, found {found}",
                "type": "invalid_request_error",
                "param": "success",
                "code": "invalid_request",
            }
            assert notebook.closed == []
            assert await rig.metric("concertmaster_grades_total") == 0

    play(main())


def test_a_grade_is_posted() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            reply = await rig.ask("GET", "/v1/workflows/w/grade")
            assert (reply.status, reply.headers["allow"]) == (405, "POST")

    play(main())


# Replay.


def graded_chains() -> Workload:
    """Workflows whose calls say something, as long as their prompt allows."""
    plans = []
    for plan in chains(8, gap_s=0.5, seed=3):
        calls = tuple(
            replace(
                call,
                prompt_text=f'Why "{plan.workflow_id}"?\n' + "é" * 40 * call.stage,
                after_tool=False,
            )
            for call in plan.calls
        )
        plans.append(replace(plan, calls=calls, template="chain"))
    return a_workload(*plans)


def simulated(workload: Workload) -> Notebook:
    notebook = Notebook()
    Simulation(
        Scheduler(a_fleet(a_pool()), policy("fcfs"), random.Random(0)),
        workload,
        notebook,
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
    ).run(policy="fcfs", seed=0)
    return notebook


def replayed(workload: Workload) -> Notebook:
    notebook = Notebook()

    async def main() -> None:
        async with over_engines(speedup=SPEEDUP, predictor=notebook) as (rig, _):
            player = Replay(url=rig.url, workload=workload, speedup=SPEEDUP, bare_prompts=True)
            await player.run(policy="fcfs", seed=0)
            assert sorted(ends(rig)) == [plan.workflow_id for plan in workload]

    play(main())
    return notebook


def test_a_replay_tells_a_predictor_what_a_simulation_does() -> None:
    workload = graded_chains()
    there, here = simulated(workload), replayed(workload)
    asked = {request.request_id: (request, prompt) for request, prompt in here.asked}
    assert len(asked) == len(there.asked) == workload.requests
    for request, prompt in there.asked:
        live, live_prompt = asked[request.request_id]
        assert live_prompt == prompt
        known = replace(live, arrival_s=request.arrival_s, prefix_hashes=request.prefix_hashes)
        assert known == request
        assert len(live.prefix_hashes) >= len(request.prefix_hashes)
    assert sorted(here.closed) == sorted(there.closed)
    assert {success for _, success in here.closed} == {1.0}


def test_a_replayed_workflow_that_lost_a_call_is_over_without_a_grade() -> None:
    async def main() -> None:
        notebook = Notebook()
        async with over_upstreams(cuts, predictor=notebook, may_log=True) as (rig, _):
            workload = a_workload(a_plan("w", a_call(0), a_call(1)))
            await Replay(url=rig.url, workload=workload).run(policy="fcfs", seed=0)
            assert notebook.closed == [("w", None)]

    play(main())


def test_a_replay_goes_on_where_nobody_takes_grades() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(replay, "fetch", refuse)
                records = await Replay(url=rig.url, workload=a_workload(a_plan("w"))).run(
                    policy="fcfs", seed=0
                )
            assert [one.outcome for one in records.workflows] == ["completed"]

    play(main())


async def refuse(_: str, __: str, path: str, **___: object) -> tuple[int, bytes]:
    if path.endswith("/grade"):
        raise ConnectionError
    return 200, b""
