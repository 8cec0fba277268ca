"""Spans and metrics in OpenTelemetry's GenAI conventions; imported only where they are wanted.

A span is the child of the caller's ``traceparent`` and the parent of what the engine makes of the
call. Ids of workflows are attributes of spans only: a metric never carries one.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from concertmaster import __version__
from concertmaster.core.actions import Action, Dispatch
from concertmaster.core.events import Event, RequestArrived
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import heads
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.tally import AUTO, bounded, labels_of

PROVIDER = "concertmaster"
SHUTDOWN_S = 5.0
_NAME_CHARS = 128
_OPERATIONS = {b"/v1/completions": "text_completion", b"/v1/embeddings": "embeddings"}
_DURATION_S = tuple(0.01 * 2**i for i in range(14))
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_FIRST_S = (0.001, 0.005, *(0.01 * 2**i for i in range(11)))

Attributes: TypeAlias = Mapping[str, str | int | float | bool]


class _Open(NamedTuple):
    span: Span
    operation: str
    began_ns: int
    arrived_s: float


class Telemetry:
    """A witness that makes a span of every call.

    Args:
        tracers: Where spans go.
        meters: Where metrics go.
        scheduler: Knows the models.
        host: Where the gateway listens.
        port: Likewise; 0 if it is not known.
        speedup: Seconds of the gateway's clock in one of the wall.
    """

    def __init__(
        self,
        tracers: TracerProvider,
        meters: MeterProvider,
        *,
        scheduler: Scheduler,
        host: str,
        port: int,
        speedup: float = 1.0,
    ) -> None:
        self._providers = (tracers, meters)
        self._tracer = tracers.get_tracer(PROVIDER, __version__)
        self._replicas = scheduler.replicas
        self._names = labels_of(pool.model.name for pool in scheduler.pools.values())
        self._place: Attributes = {
            "server.address": host,
            **({"server.port": port} if port else {}),
        }
        self._speedup = speedup
        self._context = TraceContextTextMapPropagator()
        self._open: dict[RequestId, _Open] = {}
        meter = meters.get_meter(PROVIDER, __version__)
        self._duration, self._first, self._token = (
            meter.create_histogram(
                f"gen_ai.server.{name}",
                unit="s",
                description=text,
                explicit_bucket_boundaries_advisory=bounds,
            )
            for name, text, bounds in (
                ("request.duration", "Arrival to the end of the answer.", _DURATION_S),
                ("time_to_first_token", "Arrival to the first token.", _FIRST_S),
                ("time_per_output_token", "Between tokens after the first.", _TOKEN_S),
            )
        )

    def opened(self, exchange: Exchange, message: Message) -> None:
        """Begin a span, and name it to the engine as the parent of its own."""
        carried = {
            name: message.headers[name.encode()].decode("latin-1")
            for name in self._context.fields
            if name.encode() in message.headers
        }
        context = self._context.extract(carried)
        operation = _OPERATIONS.get(message.target.partition(b"?")[0], "chat")
        asked, began_ns = _asked(exchange), time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {asked}",
            context=context,
            kind=SpanKind.SERVER,
            attributes={**self._place, **_of_call(exchange, operation, asked)},
            start_time=began_ns,
        )
        passed_on: dict[str, str] = {}
        self._context.inject(passed_on, set_span_in_context(span, context))
        exchange.head = heads.traced(exchange.head, heads.lines_of(passed_on))
        request = exchange.request
        self._open[request.request_id] = _Open(span, operation, began_ns, request.arrival_s)

    def noticed(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Note on spans that calls wait, and what was decided."""
        for action in actions:
            if isinstance(action, Dispatch):
                self._note(now_s, action.request_id, "decision", _of_decision(action))
        if isinstance(event, RequestArrived):
            request_id = event.request.request_id
            if not any(getattr(action, "request_id", None) == request_id for action in actions):
                self._note(now_s, request_id, "queued", {})

    def _note(self, now_s: float, request_id: RequestId, name: str, attributes: Attributes) -> None:
        entry = self._open.get(request_id)
        if entry is not None:
            instant_ns = self._instant_ns(entry, now_s)
            entry.span.add_event(f"concertmaster.{name}", dict(attributes), instant_ns)

    def _instant_ns(self, entry: _Open, now_s: float) -> int:
        return entry.began_ns + int((now_s - entry.arrived_s) / self._speedup * 1e9)

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """End the span, and measure."""
        entry = self._open.pop(exchange.request.request_id, None)
        if entry is None:
            return
        replica = self._replicas.get(ReplicaId(exchange.replica_id))
        model = "" if replica is None else replica.pool.model.name
        span, failed = entry.span, exchange.status != 200
        if exchange.first_token_s is not None:
            first_ns = self._instant_ns(entry, exchange.first_token_s)
            span.add_event("concertmaster.first_token", None, first_ns)
        error: Attributes = (
            {"error.type": exchange.reason or str(exchange.status)} if failed else {}
        )
        span.set_attributes({**_of_answer(exchange, model), **error})
        if exchange.status >= 500:
            span.set_status(Status(StatusCode.ERROR, exchange.reason or None))
        span.end(self._instant_ns(entry, now_s))
        self._measure(now_s, exchange, {**self._labels(exchange, entry, model), **error})

    def _labels(self, exchange: Exchange, entry: _Open, model: str) -> Attributes:
        asked = _asked(exchange)
        return {
            **self._place,
            "gen_ai.operation.name": entry.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": asked if asked == AUTO else bounded(asked, self._names),
            **({"gen_ai.response.model": bounded(model, self._names)} if model else {}),
        }

    def _measure(self, now_s: float, exchange: Exchange, labels: Attributes) -> None:
        self._duration.record(now_s - exchange.arrived_s, dict(labels))
        first_s = exchange.first_token_s
        if first_s is None:
            return
        self._first.record(first_s - exchange.arrived_s, dict(labels))
        if exchange.status == 200 and exchange.tokens > 1:
            self._token.record((now_s - first_s) / (exchange.tokens - 1), dict(labels))

    async def close(self) -> None:
        """Send what is left, for a while."""
        await asyncio.gather(*(asyncio.to_thread(one.shutdown) for one in self._providers))


def _asked(exchange: Exchange) -> str:
    models = exchange.request.models
    return models[0][:_NAME_CHARS] if models else AUTO


def _of_call(exchange: Exchange, operation: str, asked: str) -> Attributes:
    request = exchange.request
    known: dict[str, str | int | bool] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": asked,
        "gen_ai.request.stream": exchange.streams,
        "gen_ai.request.max_tokens": request.max_output_tokens,
        "gen_ai.conversation.id": request.workflow_id,
        "gen_ai.workflow.name": request.app,
        "gen_ai.agent.name": request.role,
        "concertmaster.request.id": request.request_id[:_NAME_CHARS],
        "concertmaster.request.class": request.service_class.value,
        "concertmaster.forecast.prompt_tokens": request.prompt_tokens,
    }
    return {name: value for name, value in known.items() if value != ""}


def _of_decision(action: Dispatch) -> Attributes:
    cost: Attributes = {} if action.cost_s is None else {"concertmaster.cost_s": action.cost_s}
    return {
        "concertmaster.replica": action.replica_id,
        "concertmaster.attempt": action.attempt,
        "concertmaster.hedge": action.hedge,
        "concertmaster.candidates": action.candidates,
        "concertmaster.queue_wait_s": action.waited_s,
        **cost,
    }


def _of_answer(exchange: Exchange, model: str) -> Attributes:
    first_s = exchange.first_token_s
    known: dict[str, str | int | float] = {"http.response.status_code": exchange.status}
    if model:
        known["gen_ai.response.model"] = model
        known["concertmaster.replica"] = exchange.replica_id
    if exchange.status == 200:
        known["gen_ai.usage.output_tokens"] = exchange.tokens
    if first_s is not None:
        known["gen_ai.response.time_to_first_chunk"] = first_s - exchange.arrived_s
    return known


def exporting(url: str, *, scheduler: Scheduler, host: str, port: int, speedup: float) -> Telemetry:
    """Send spans and metrics to a collector, by OTLP over HTTP, in batches off the event loop.

    Headers that it wants stand in ``OTEL_EXPORTER_OTLP_HEADERS``, and what ``OTEL_TRACES_SAMPLER``
    leaves out is left out.
    """
    resource = Resource.create({"service.name": PROVIDER, "service.version": __version__})
    base = url.rstrip("/")
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
    spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=SHUTDOWN_S)
    tracers.add_span_processor(BatchSpanProcessor(spans))
    metrics = OTLPMetricExporter(f"{base}/v1/metrics", timeout=SHUTDOWN_S)
    reader = PeriodicExportingMetricReader(metrics)
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    return Telemetry(tracers, meters, scheduler=scheduler, host=host, port=port, speedup=speedup)
