import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from builders import a_call, a_fleet, a_plan, a_policy, a_pool, a_workload, chains
from concertmaster import compose
from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName
from concertmaster.gateway import replay, retries
from concertmaster.gateway.openai_api import parse_call
from concertmaster.gateway.replay import Replay, call_body
from concertmaster.observe.report import build_report
from concertmaster.policies.admission import BoundedLine
from concertmaster.workload.agents import Agents
from concertmaster.workload.asking import request_of
from concertmaster.workload.plan import Workload
from concertmaster.workload.records import RunRecords
from gateway_rig import (
    STREAM_HEAD,
    Heard,
    Rig,
    Upstream,
    a_chunk,
    an_answer,
    events,
    hangs,
    over_engines,
    over_upstreams,
    play,
)

SPEEDUP = 50.0


def keys(report: Mapping[str, Any]) -> dict[str, Any]:
    return {k: keys(v) if isinstance(v, dict) else None for k, v in report.items()}


async def run(rig: Rig, workload: Workload, speedup: float = SPEEDUP) -> RunRecords:
    return await Replay(url=rig.url, workload=workload, speedup=speedup).run(policy="live", seed=0)


def test_a_replay_reports_what_a_simulation_reports() -> None:
    workload = chains(12, gap_s=1.0, seed=3)

    async def main() -> RunRecords:
        async with over_engines(2, speedup=SPEEDUP) as (rig, _):
            records = await run(rig, workload)
            await rig.idle()
            return records

    records = play(main())
    report = build_report(records)
    simulated = build_report(
        compose.simulate(a_fleet(replicas=2), workload, "least-tokens", seed=0)
    )
    assert keys(report) == keys(simulated)
    assert report["workflows"] == {"total": 12, "completed": 12, "rejected": 0, "failed": 0}
    assert report["requests"]["completed"] == workload.requests
    assert report["slo_attainment_ratio"] == 1.0
    planned = {
        f"{plan.workflow_id}/{call.stage}": call.output_tokens
        for plan in workload
        for call in plan.calls
    }
    assert {call.request_id: call.output_tokens for call in records.calls} == planned
    for call in records.calls:
        assert call.model == "m"
        assert call.replica_id in {"p-0", "p-1"}
        assert call.first_token_s is not None
        assert call.finished_s is not None
        assert call.dispatched_s is not None
        assert call.arrival_s <= call.dispatched_s <= call.first_token_s <= call.finished_s


def test_a_call_is_made_once_its_parents_are_answered_and_its_tool_is_done() -> None:
    plan = a_plan("w", a_call(0), a_call(1), a_call(2, parents=(0,), tool_s=2.0))

    async def main() -> RunRecords:
        async with over_engines(speedup=SPEEDUP) as (rig, _):
            return await run(rig, a_workload(plan))

    ends = {str(call.request_id): call for call in play(main()).calls}
    finished_s = ends["w/0"].finished_s
    assert finished_s is not None
    assert ends["w/1"].arrival_s >= finished_s
    assert ends["w/2"].arrival_s >= finished_s + 1.9


def test_what_the_gateway_is_told_of_a_call_is_what_the_plan_says() -> None:
    plan = a_plan(
        "flow",
        a_call(0, role="critic", step="vote", max_output_tokens=99),
        app="review",
        template="loop",
        deadline_s=30.0,
    )

    async def main() -> Heard:
        async def script(_: Heard, out: asyncio.StreamWriter) -> None:
            out.write(STREAM_HEAD + events({"choices": []}))

        async with over_upstreams(script) as (rig, upstream):
            await run(rig, a_workload(plan), 1.0)
            heard: Heard = upstream.heard[0]
            return heard

    heard = play(main())
    named = {k: v for k, v in heard.headers.items() if k.startswith("x-concertmaster")}
    left_ms = int(named.pop("x-concertmaster-deadline-ms"))
    assert 29_000 < left_ms <= 30_000
    assert named == {
        "x-concertmaster-workflow-id": "flow",
        "x-concertmaster-app": "review",
        "x-concertmaster-template": "loop",
        "x-concertmaster-role": "critic",
        "x-concertmaster-step": "vote",
        "x-concertmaster-stage": "0",
        "x-concertmaster-parent": "",
        "x-concertmaster-class": "interactive",
    }
    assert heard.headers["x-request-id"] == "flow/0"
    assert heard.headers["x-emulator-prompt-tokens"] == "200"
    assert heard.json["max_tokens"] == 99
    assert heard.json["stream"] is True


def test_a_body_has_the_size_of_its_prompt_and_repeats_where_its_prefix_does() -> None:
    plan = a_plan("w")
    agents = Agents(a_workload(plan))
    agents.begin(plan)
    for hashes in ((), (1, 2, 3)):
        call = a_call(0, prompt_tokens=1000, prefix_hashes=hashes)
        request, _ = agents.call(0.0, plan.workflow_id, call)
        body = json.loads(call_body(call, request))
        text = json.dumps(body["messages"], separators=(",", ":"))
        assert len(text) == 4000
    longer = a_call(0, prompt_tokens=2000, prefix_hashes=(1, 2, 3, 4))
    other = json.loads(call_body(longer, request))["messages"][0]["content"]
    assert other[: 3 * 1024] == body["messages"][0]["content"][: 3 * 1024]


@pytest.mark.parametrize("asked", [(), ("m",), ("m", "n")])
def test_a_body_names_the_models_that_may_answer(asked: tuple[ModelName, ...]) -> None:
    plan = a_plan("w", a_call(0, models=asked))
    body = call_body(plan.calls[0], request_of(plan, plan.calls[0], 0.0))

    assert parse_call(body, chat=True).models() == asked


def test_refused_and_broken_calls_end_their_workflow_with_a_reason() -> None:
    async def break_or_hang(heard: Heard, out: asyncio.StreamWriter) -> None:
        if heard.headers["x-request-id"] == "broken/0":
            out.write(STREAM_HEAD + a_chunk(b"data: {}\n\n"))
            await out.drain()
            await asyncio.sleep(0.01)
            out.transport.abort()
        elif heard.headers["x-request-id"] == "ill/0":
            out.write(an_answer(b'{"error":{}}', "500 Internal Server Error"))
        else:
            await hangs(heard, out)

    async def main() -> RunRecords:
        fleet = a_fleet(a_pool(max_sequences=1))
        policy = a_policy(admission=BoundedLine(max_wait_s=0.05))
        plans = [
            a_plan("broken", a_call(0), a_call(1)),
            a_plan("ill", arrival_s=0.2),
            a_plan("stuck", arrival_s=0.4),
            a_plan("waits", arrival_s=0.45),
        ]
        async with over_upstreams(break_or_hang, fleet=fleet, policy=policy) as (rig, _):
            return await run(rig, a_workload(*plans), 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ANSWER_TIMEOUT_S", 0.3)
        patch.setattr(retries, "BACKOFF_S", 0.0)  # longer than calls may wait here
        records = play(main())
    told = {call.request_id: (call.outcome, call.reason) for call in records.calls}
    assert told == {
        "broken/0": ("failed", "the engine closed the connection"),
        "ill/0": ("failed", "engine_error"),
        "stuck/0": ("failed", "timed out"),
        "waits/0": ("rejected", "waited_too_long"),
    }
    report = build_report(records)
    assert report["workflows"] == {"total": 4, "completed": 0, "rejected": 1, "failed": 3}
    assert report["slo_attainment_ratio"] == 0.0


def test_workflows_start_when_their_plan_says_whatever_became_of_others() -> None:
    async def main() -> list[float]:
        plans = [a_plan(f"w{i}", arrival_s=0.1 * i) for i in range(5)]
        async with over_upstreams(hangs) as (rig, _):
            records = await run(rig, a_workload(*plans), 1.0)
            return [call.arrival_s for call in records.calls]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ANSWER_TIMEOUT_S", 0.05)
        arrivals_s = play(main())
    assert arrivals_s == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=0.05)


def test_nobody_at_the_address_is_said_in_one_line() -> None:
    async def main() -> str:
        async with Upstream() as upstream:
            url = upstream.url
        with pytest.raises(InputError) as refusal:
            await Replay(url=url, workload=a_workload(a_plan())).run(policy="live", seed=0)
        return str(refusal.value).replace(url, "URL")

    assert play(main()) == (
        "--url: URL: nobody answers: [Errno 111] Connection refused "
        "(start one with concertmaster serve)"
    )


def test_an_address_that_never_answers_is_said_in_one_line() -> None:
    async def silent(_: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        out.close()

    async def main() -> str:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(InputError) as refusal:
            await Replay(url=url, workload=a_workload(a_plan())).run(policy="live", seed=0)
        server.close()
        await asyncio.sleep(0.3)
        return refusal.value.problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "CONNECT_TIMEOUT_S", 0.05)
        assert play(main()) == "nobody answers: no answer in time"
