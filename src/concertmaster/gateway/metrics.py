"""What the gateway counts: plain numbers on the hot path, Prometheus only when it is scraped."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from concertmaster.core.fleet import ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.engine_watch import EngineWatch
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.forecast_metrics import families
from concertmaster.learning.figures import LoopFigures

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_MICRO = (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.1)


class Histogram:
    """Counts by bucket; observing costs an append, counting is done in bulk."""

    __slots__ = ("_bounds", "_counts", "_fresh", "observe", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._fresh: list[float] = []
        self.observe = self._fresh.append
        self.total = 0.0

    def fold(self) -> None:
        """Count what was observed since the last time; call it now and then."""
        for value in self._fresh:
            self._counts[bisect_left(self._bounds, value)] += 1
            self.total += value
        self._fresh.clear()

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts as Prometheus wants them."""
        self.fold()
        running, out = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            running += count
            out.append((bound, float(running)))
        return out


class Counted(Protocol):
    """Whoever keeps figures of learning."""

    @property
    def figures(self) -> LoopFigures:
        """What was counted so far."""


class Guarded(Protocol):
    """Whoever tries calls again and lets failing replicas rest."""

    @property
    def retries(self) -> int:
        """Attempts after the first, of calls that failed."""

    def rests(self, replica_id: ReplicaId) -> bool:
        """Whether a replica is let be because it kept failing."""


class GatewayMetrics:
    """Counters and histograms of one gateway; docs/metrics.md describes each.

    Attributes:
        learner: Asked for its figures at a scrape; ``None`` if nothing learns.
        guarded: Asked for its own.
    """

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self.refusals: Counter[str] = Counter()
        self.output_tokens = 0
        self.grades = 0
        self.forecasts: Counter[str] = Counter()
        self.forecast_s = Histogram(_MICRO)
        self.learner: Counted | None = None
        self.guarded: Guarded | None = None
        self.duration_s = Histogram(_SECONDS)
        self.ttft_s = Histogram(_SECONDS)
        self.queue_wait_s = Histogram(_SECONDS)
        self.overhead_s = Histogram(_MICRO)

    def fold(self) -> None:
        """Bring the histograms up to date, so that they hold little back."""
        for histogram in (
            self.duration_s,
            self.ttft_s,
            self.queue_wait_s,
            self.overhead_s,
            self.forecast_s,
        ):
            histogram.fold()

    def answered(self, status: int, duration_s: float) -> None:
        """Count an answer of any kind."""
        self.by_status[status] += 1
        self.duration_s.observe(duration_s)

    def refused(self, reason: str) -> None:
        """Count a call that was rejected or failed."""
        self.refusals[reason] += 1

    def dispatched(self, queue_wait_s: float, overhead_s: float) -> None:
        """Count a dispatch: its wait in line, and the time spent deciding and writing."""
        self.queue_wait_s.observe(queue_wait_s)
        self.overhead_s.observe(overhead_s)

    def forecast(self, source: str, took_s: float) -> None:
        """Count a forecast: which step of the fallback answered, and how fast."""
        self.forecasts[source] += 1
        self.forecast_s.observe(took_s)

    def finished(self, now_s: float, exchange: Exchange, output_tokens: int) -> None:
        """Count a complete answer."""
        self.output_tokens += output_tokens
        if exchange.first_token_s is not None:
            self.ttft_s.observe(exchange.first_token_s - exchange.arrived_s)


class _Exposition(Collector):
    """Reads the plain numbers when a scrape comes."""

    def __init__(self, metrics: GatewayMetrics, scheduler: Scheduler, engines: EngineWatch) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        metrics = self._metrics
        requests = CounterMetricFamily(
            "concertmaster_requests", "Answers by HTTP status.", labels=["code"]
        )
        for status, count in sorted(metrics.by_status.items()):
            requests.add_metric([str(status)], count)
        yield requests
        refusals = CounterMetricFamily(
            "concertmaster_refusals", "Calls rejected or failed, by reason.", labels=["reason"]
        )
        for reason, count in sorted(metrics.refusals.items()):
            refusals.add_metric([reason], count)
        yield refusals
        yield CounterMetricFamily(
            "concertmaster_output_tokens", "Output tokens served.", value=metrics.output_tokens
        )
        yield CounterMetricFamily(
            "concertmaster_grades", "Workflows that callers ended or graded.", value=metrics.grades
        )
        guarded = metrics.guarded
        yield CounterMetricFamily(
            "concertmaster_retries",
            "Attempts after the first, of calls that failed.",
            value=0 if guarded is None else guarded.retries,
        )
        for name, text, histogram in (
            ("request_duration_seconds", "Acceptance to last byte.", metrics.duration_s),
            ("time_to_first_token_seconds", "Acceptance to first token.", metrics.ttft_s),
            ("queue_wait_seconds", "Acceptance to dispatch.", metrics.queue_wait_s),
            ("gateway_overhead_seconds", "Deciding and writing, per call.", metrics.overhead_s),
            ("forecast_seconds", "Making the forecast of a call.", metrics.forecast_s),
        ):
            yield HistogramMetricFamily(
                f"concertmaster_{name}", text, histogram.buckets(), histogram.total
            )
        learner = metrics.learner
        figures = LoopFigures() if learner is None else learner.figures
        yield from families(metrics.forecasts, figures)
        yield from self._fleet()
        yield from self._engines.families()

    def _fleet(self) -> Iterator[Metric]:
        scheduler, guarded = self._scheduler, self._metrics.guarded
        yield GaugeMetricFamily(
            "concertmaster_queue_size", "Calls in the line.", value=len(scheduler.line)
        )
        gauges = {
            name: GaugeMetricFamily(f"concertmaster_{name}", text, labels=["pool", "replica"])
            for name, text in (
                ("inflight_requests", "Calls on the replica."),
                ("inflight_decode_tokens", "Output tokens still predicted."),
                ("kv_reserved_ratio", "KV promised to calls, of all."),
                ("replica_alive", "1 if the replica serves."),
                ("replica_resting", "1 if it kept failing and is let be, or on trial."),
                ("replica_pace", "Seconds it takes over seconds by its rate curve."),
            )
        }
        for replica in scheduler.replicas.values():
            labels = [replica.pool.pool_id, replica.replica_id]
            ledger = replica.kv
            values = (
                len(replica.in_flight),
                replica.decode_tokens,
                ledger.reserved_blocks / ledger.capacity_blocks,
                int(replica.alive),
                int(guarded is not None and guarded.rests(replica.replica_id)),
                replica.pace,
            )
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric(labels, value)
        yield from gauges.values()


def exposition(metrics: GatewayMetrics, scheduler: Scheduler, engines: EngineWatch) -> bytes:
    """Return everything in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Exposition(metrics, scheduler, engines))
    return generate_latest(registry)
