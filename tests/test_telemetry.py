"""Spans and metrics in the GenAI conventions, as a caller's own tracing sees them."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from concertmaster.core.errors import InputError
from concertmaster.gateway.telemetry import Telemetry
from gateway_rig import (
    Rig,
    a_call,
    an_answer,
    exactly,
    hangs,
    over_engines,
    over_upstreams,
    play,
    until,
)

MARKER = "zanzibar-7731"


class Seen(NamedTuple):
    """What a collector would have got."""

    spans: InMemorySpanExporter
    reader: InMemoryMetricReader

    def span(self) -> ReadableSpan:
        (span,) = self.spans.get_finished_spans()
        return span

    def points(self) -> dict[str, list[Any]]:
        found = self.reader.get_metrics_data()
        if found is None:
            return {}
        (resource,) = found.resource_metrics
        (scope,) = resource.scope_metrics
        return {one.name: list(one.data.data_points) for one in scope.metrics}


@asynccontextmanager
async def traced(rig: Rig) -> AsyncIterator[Seen]:
    """Let a gateway tell what it does."""
    seen = Seen(InMemorySpanExporter(), InMemoryMetricReader())
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(seen.spans))
    meters = MeterProvider([seen.reader])
    telemetry = Telemetry(
        tracers, meters, scheduler=rig.gateway.scheduler, host="127.0.0.1", port=rig.port
    )
    rig.gateway.metrics.witnesses += (telemetry,)
    listeners: Any = rig.gateway._observe
    listeners.add(telemetry.noticed)
    yield seen
    await telemetry.close()


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name.removeprefix("concertmaster.") for event in span.events]


def test_a_streamed_call_is_a_span_with_its_decision_and_first_token() -> None:
    async def main() -> None:
        async with over_engines(2) as (rig, _), traced(rig) as seen:
            reply = await rig.call(
                {**exactly(5), "stream": True},
                x_concertmaster_workflow_id="w1",
                x_concertmaster_role="coder",
                x_request_id="r1",
            )
            assert reply.status == 200
            span = seen.span()
            assert (span.name, span.kind.name, span.parent) == ("chat m", "SERVER", None)
            attributes = dict(span.attributes or {})
            assert {name: attributes[name] for name in attributes if "gen_ai" in name} == {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "concertmaster",
                "gen_ai.request.model": "m",
                "gen_ai.request.stream": True,
                "gen_ai.request.max_tokens": 5,
                "gen_ai.conversation.id": "w1",
                "gen_ai.agent.name": "coder",
                "gen_ai.response.model": "m",
                "gen_ai.usage.output_tokens": 5,
                "gen_ai.response.time_to_first_chunk": attributes[
                    "gen_ai.response.time_to_first_chunk"
                ],
            }
            assert attributes["concertmaster.request.id"] == "r1"
            assert attributes["server.port"] == rig.port
            assert events_of(span) == ["decision", "first_token"]
            decision = dict(span.events[0].attributes or {})
            assert decision["concertmaster.candidates"] == 2
            assert span.start_time is not None
            assert span.end_time is not None
            times = [span.start_time, *(one.timestamp for one in span.events), span.end_time]
            assert times == sorted(times)
            assert sorted(seen.points()) == [
                "gen_ai.server.request.duration",
                "gen_ai.server.time_per_output_token",
                "gen_ai.server.time_to_first_token",
            ]

    play(main())


def test_the_official_client_traces_through_the_gateway_to_the_engine() -> None:
    async def says(_: Any, out: Any) -> None:  # noqa: ANN401
        message = {"role": "assistant", "content": "Hi."}
        answer = {"id": "a", "object": "chat.completion", "created": 0, "model": "m"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        body = json.dumps({**answer, "choices": choices, "usage": usage}).encode()
        out.write(an_answer(body, headers=("content-type: application/json",)))

    async def main() -> None:
        async with over_upstreams(says) as (rig, upstream), traced(rig) as seen:
            propagator = TraceContextTextMapPropagator()
            outer = TracerProvider().get_tracer("agent").start_span("agent step")
            carried: dict[str, str] = {"tracestate": "vendor=1"}
            propagator.inject(carried, set_span_in_context(outer))
            async with rig.sdk(default_headers=carried) as client:
                await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": MARKER}]
                )
            span, mine = seen.span(), outer.get_span_context()
            assert span.parent is not None
            assert (span.parent.span_id, span.parent.trace_id) == (mine.span_id, mine.trace_id)
            context = span.get_span_context()
            assert context is not None
            heard = upstream.heard[0].headers
            named = f"00-{context.trace_id:032x}-{context.span_id:016x}"
            assert heard["traceparent"] == f"{named}-{context.trace_flags:02x}"
            assert heard["tracestate"] == "vendor=1"
            assert context.span_id != mine.span_id
            assert MARKER not in span.to_json()

    play(main())


def test_what_the_caller_does_not_sample_is_not_sent_but_passed_on() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream), traced(rig) as seen:
            trace = "0af7651916cd43dd8448eb211c80319c"
            await rig.call({}, traceparent=f"00-{trace}-b7ad6b7169203331-00")
            await rig.call({}, traceparent="00-nonsense")
            (span,) = seen.spans.get_finished_spans()
            assert span.parent is None
            first = upstream.heard[0].headers["traceparent"]
            assert first.startswith(f"00-{trace}-")
            assert first.endswith("-00")
            assert "nonsense" not in upstream.heard[1].headers["traceparent"]

    play(main())


def test_errors_and_waits_are_on_the_span() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, upstream), traced(rig) as seen:
            await rig.call({"model": "unknown" * 100})
            span = seen.span()
            attributes = dict(span.attributes or {})
            assert attributes["error.type"] == "model_not_found"
            assert len(span.name) <= 140
            assert span.status.status_code.name == "UNSET"
            seen.spans.clear()
            wire = await rig.wire()
            wire.send(a_call())
            await until(lambda: upstream.heard)
            await wire.close()
            await until(seen.spans.get_finished_spans)
            assert dict(seen.span().attributes or {})["error.type"] == "499"

    play(main())


def test_metrics_carry_no_id_and_no_name_that_a_caller_made_up() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _), traced(rig) as seen:
            for i in range(30):
                await rig.call({"model": f"hostile-{i}"}, x_concertmaster_workflow_id=f"w{i}")
                await rig.call({}, x_concertmaster_workflow_id=f"w{i}")
            points = seen.points()["gen_ai.server.request.duration"]
            labels = [dict(point.attributes) for point in points]
            assert sorted(one["gen_ai.request.model"] for one in labels) == ["m", "other"]
            assert "w1" not in repr(labels)
            assert not any("conversation" in name for one in labels for name in one)

    play(main())


def test_without_a_url_nothing_of_it_is_there() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, upstream):
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            await rig.call({}, traceparent=parent)
            assert upstream.heard[0].headers["traceparent"] == parent
            assert len(rig.gateway.metrics.witnesses) == 3

    play(main())


def test_spans_reach_a_collector_by_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")

    async def main() -> None:
        heard: dict[str, tuple[str | None, bytes]] = {}

        async def collect(request: web.Request) -> web.Response:
            heard[request.path] = request.headers.get("x-key"), await request.read()
            return web.Response()

        collector = web.Application()
        collector.router.add_post("/v1/{signal}", collect)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(TestServer(collector))
            url = str(server.make_url("/"))
            rig, _ = await stack.enter_async_context(over_upstreams(otel_url=url))
            await rig.call({}, x_concertmaster_workflow_id="the-workflow")
        assert sorted(heard) == ["/v1/metrics", "/v1/traces"]
        assert {key for key, _ in heard.values()} == {"secret"}
        assert b"the-workflow" in heard["/v1/traces"][1]
        assert b"the-workflow" not in heard["/v1/metrics"][1]

    play(main())


def test_a_missing_sdk_and_a_wrong_url_are_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(url: str) -> None:
        async with over_upstreams(otel_url=url):
            pass

    with pytest.raises(InputError, match=r"gateway.otel_url: expected http://HOST:PORT"):
        play(start("collector:4318"))
    monkeypatch.delitem(sys.modules, "concertmaster.gateway.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match=r"not installed \(pip install 'concertmaster\[otel\]'\)"):
        play(start("http://127.0.0.1:4318"))
