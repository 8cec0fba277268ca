import asyncio
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from builders import a_fleet, a_pool
from concertmaster import __version__
from concertmaster.gateway import app
from gateway_rig import (
    CHAT,
    TEXT,
    a_call,
    a_message,
    a_rig,
    exactly,
    hangs,
    over_engines,
    over_upstreams,
    play,
    until,
)

FAMILIES = {
    "concertmaster_requests",
    "concertmaster_refusals",
    "concertmaster_output_tokens",
    "concertmaster_config_reloads",
    "concertmaster_grades",
    "concertmaster_hedges",
    "concertmaster_hedges_over_budget",
    "concertmaster_replica_resting",
    "concertmaster_retries",
    "concertmaster_request_duration_seconds",
    "concertmaster_time_to_first_token_seconds",
    "concertmaster_queue_wait_seconds",
    "concertmaster_gateway_overhead_seconds",
    "concertmaster_forecast_seconds",
    "concertmaster_forecasts",
    "concertmaster_forecast_budget",
    "concertmaster_forecast_coverage_ratio",
    "concertmaster_drift",
    "concertmaster_labels",
    "concertmaster_label_flush_failures",
    "concertmaster_trainings",
    "concertmaster_challengers",
    "concertmaster_calls",
    "concertmaster_decisions",
    "concertmaster_receipts",
    "concertmaster_queue_duration_seconds",
    "concertmaster_time_per_output_token_seconds",
    "concertmaster_output_tokens_forecast_ratio",
    "concertmaster_queue_size",
    "concertmaster_inflight_requests",
    "concertmaster_inflight_decode_tokens",
    "concertmaster_kv_reserved_ratio",
    "concertmaster_replica_alive",
    "concertmaster_replica_pace",
    "concertmaster_engine_requests",
    "concertmaster_engine_kv_ratio",
    "concertmaster_engine_foreign_requests",
    "concertmaster_engine_missing_metrics",
}


@pytest.mark.parametrize(
    "path", ["/livez", "/health", "/health/live", "/liveness", "/healthz", "/readyz"]
)
def test_a_gateway_with_engines_is_live_and_ready(path: str) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            reply = await rig.ask("GET", path)
            assert (reply.status, reply.body) == (200, b"")

    play(main())


@pytest.mark.parametrize("path", ["/readyz", "/health/ready", "/readiness"])
def test_a_gateway_without_a_live_engine_is_live_but_not_ready(path: str) -> None:
    async def main() -> None:
        async with over_upstreams(health_interval_s=0.02) as (rig, upstream):
            upstream.healthy = False
            await until(lambda: not rig.replica().alive)
            reply = await rig.ask("GET", path)
            assert reply.status == 503
            assert reply.error == {
                "message": "no replica is alive",
                "type": "overloaded_error",
                "param": None,
                "code": "no_replica",
            }
            assert (await rig.ask("GET", "/livez")).status == 200

    play(main())


def test_version_and_models_say_what_there_is() -> None:
    async def main() -> None:
        fleet = a_fleet(a_pool("p"), a_pool("q", model="other"))
        async with a_rig(
            {"p-0": "http://127.0.0.1:1", "q-0": "http://127.0.0.1:1"}, fleet=fleet
        ) as rig:
            assert (await rig.ask("GET", "/version")).json == {"version": __version__}
            models = (await rig.ask("GET", "/v1/models")).json
            assert models["object"] == "list"
            assert [one["id"] for one in models["data"]] == ["auto", "m", "other"]
            assert models["data"][0] == {
                "id": "auto",
                "object": "model",
                "created": 0,
                "owned_by": "concertmaster",
                "max_model_len": 32_768,
            }

    play(main())


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/nothing", "/metrics/x"])
def test_an_unknown_address_is_a_404_with_a_reason(method: str, path: str) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            reply = await rig.ask(method, path, b"{}")
            assert reply.status == 404
            assert reply.error["message"] == f"{method} {path}: no such address"
            assert (reply.error["type"], reply.error["code"]) == ("not_found_error", "not_found")
            assert not upstream.heard

    play(main())


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", TEXT, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_a_405_that_names_the_right_one(
    method: str, path: str, allowed: str
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            reply = await rig.ask(method, path)
            assert reply.status == 405
            assert sorted(reply.headers["allow"].split(", ")) == allowed.split(", ")
            assert reply.error["code"] == "method_not_allowed"
            assert reply.error["message"].startswith(f"{method} {path}: expected ")

    play(main())


def test_a_head_request_gets_the_head_alone_and_the_connection_goes_on() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            wire = await rig.wire()
            wire.send(a_message("HEAD", "/v1/models") + a_message("HEAD", "/nowhere"))
            wire.send(a_message("GET", "/version"))
            assert (await wire.head()).startswith(b"HTTP/1.1 200 OK\r\n")
            assert (await wire.head()).startswith(b"HTTP/1.1 404 Not Found\r\n")
            status, body = await wire.answer()
            assert (status, json.loads(body)) == (200, {"version": __version__})

    play(main())


def test_a_fault_in_a_side_route_is_a_500_and_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        monkeypatch.setattr(app, "exposition", broken)
        async with over_upstreams(may_log=True) as (rig, _):
            wire = await rig.wire()
            wire.send(a_message("GET", "/metrics") + a_message("GET", "/version"))
            status, body = await wire.answer()
            assert status == 500
            assert json.loads(body)["error"]["message"] == "internal error; the log says more"
            assert (await wire.answer())[0] == 200
        assert "b'GET' b'/metrics' failed" in caplog.text

    play(main())


# Metrics.


def test_metrics_have_their_names_and_count_what_happened() -> None:
    async def main() -> None:
        async with over_engines(2) as (rig, _):
            for number in range(3):
                await rig.call({**exactly(4), "stream": bool(number)})
            await rig.call({"model": "gpt"})
            await rig.ask("POST", CHAT, b"{")
            await rig.idle()
            reply = await rig.ask("GET", "/metrics")
            assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            families = {f.name: f for f in text_string_to_metric_families(reply.body.decode())}
            assert set(families) == FAMILIES
            values = {
                (sample.name, *sorted(sample.labels.values())): sample.value
                for family in families.values()
                for sample in family.samples
            }
            assert values["concertmaster_requests_total", "200"] == 3
            assert values["concertmaster_requests_total", "404"] == 1
            assert values["concertmaster_requests_total", "400"] == 1
            assert values["concertmaster_refusals_total", "model_not_found"] == 1
            assert values["concertmaster_output_tokens_total",] == 12
            assert values["concertmaster_time_to_first_token_seconds_count",] == 2
            assert values["concertmaster_queue_wait_seconds_count",] == 3
            assert values["concertmaster_gateway_overhead_seconds_count",] == 3
            assert values["concertmaster_replica_alive", "p", "p-1"] == 1
            assert values["concertmaster_inflight_requests", "p", "p-0"] == 0

    play(main())


def test_metrics_do_not_grow_with_calls_workflows_or_what_callers_send() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            await rig.call()
            await rig.call({"model": "auto"})
            await rig.call({"model": "first"})
            before = (await rig.ask("GET", "/metrics")).body.count(b"\n")
            for number in range(50):
                await rig.call(
                    {"model": ["auto", f"model-{number}"][number % 2], "user": f"user-{number}"},
                    x_request_id=f"r-{number}",
                    x_concertmaster_workflow_id=f"w-{number}",
                    x_concertmaster_role=f"role-{number}",
                )
            body = (await rig.ask("GET", "/metrics")).body
            assert body.count(b"\n") == before
            assert b"role-7" not in body
            assert b"model-7" not in body

    play(main())


# The page.


def test_the_page_its_state_and_its_events_show_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, _):
            page = await rig.ask("GET", "/")
            assert page.headers["content-type"].startswith("text/html")
            assert b"<html" in page.body
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: rig.gateway.open_exchanges)
            state = (await rig.ask("GET", "/state")).json
            assert state["waiting"] == 0
            assert state["workflows"] == 1
            (replica,) = state["replicas"]
            assert (replica["replica"], replica["state"], replica["running"]) == (
                "p-0",
                "running",
                1,
            )
            async with rig.http.get("/events") as response:
                for _ in range(3):
                    line = await response.content.readuntil(b"\n\n")
                    assert json.loads(line.removeprefix(b"data: ")) == state
            await wire.close()
            await rig.idle()

    monkeypatch.setattr(app, "PAGE_PERIOD_S", 0.01)
    play(main())


def test_a_page_that_is_closed_or_left_open_keeps_nothing_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            left, opened = await rig.wire(), await rig.wire()
            for wire in (left, opened):
                wire.send(a_message("GET", "/events"))
                await wire.head()
            await left.close()
            await asyncio.sleep(0.05)
            door = rig.gateway._side_door
            assert len(door._tasks) == 1  # type: ignore[attr-defined]

    monkeypatch.setattr(app, "PAGE_PERIOD_S", 0.01)
    play(main())
