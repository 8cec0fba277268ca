"""What the gateway counts: plain numbers on the hot path, Prometheus only when it is scraped."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from concertmaster.core.fleet import ReplicaId
from concertmaster.core.races import HedgeOutcome
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.agent import Message
from concertmaster.gateway.engine_watch import EngineWatch
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.forecast_metrics import families
from concertmaster.gateway.histogram import MICRO, SECONDS, Histogram
from concertmaster.gateway.tally import Tally
from concertmaster.gateway.witness import Witness
from concertmaster.gateway.workers.figures import CrewMember, worker_families
from concertmaster.learning.figures import LoopFigures


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


class Crew(Protocol):
    """Whoever knows the processes that move bytes."""

    @property
    def lines(self) -> Mapping[int, CrewMember]:
        """Those that are there, by name."""


class GatewayMetrics:
    """Counters and histograms of one gateway; docs/metrics.md describes each.

    Attributes:
        learner: Asked for its figures at a scrape; ``None`` if nothing learns.
        tally: Counts calls and decisions by label; ``None`` until the fleet is known.
        witnesses: Shown every call at its beginning and its end.
        guarded: Asked for its own.
        workers: The processes that move bytes; ``None`` if that is this one.
    """

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self.refusals: Counter[str] = Counter()
        self.output_tokens = 0
        self.grades = 0
        self.reloads: Counter[str] = Counter()
        self.forecasts: Counter[str] = Counter()
        self.forecast_s = Histogram(MICRO)
        self.learner: Counted | None = None
        self.tally: Tally | None = None
        self.witnesses: tuple[Witness, ...] = ()
        self.guarded: Guarded | None = None
        self.workers: Crew | None = None
        self.duration_s = Histogram(SECONDS)
        self.ttft_s = Histogram(SECONDS)
        self.queue_wait_s = Histogram(SECONDS)
        self.overhead_s = Histogram(MICRO)

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
        if self.tally is not None:
            self.tally.fold()

    def opened(self, exchange: Exchange, message: Message) -> None:
        """Show the witnesses a call that begins."""
        for witness in self.witnesses:
            witness.opened(exchange, message)

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """Count a call that is over, and show it to the witnesses."""
        self.answered(exchange.status, now_s - exchange.arrived_s)
        for witness in self.witnesses:
            witness.ended(now_s, exchange)

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
        reloads = CounterMetricFamily(
            "concertmaster_config_reloads", "Readings of the fleet file.", labels=["outcome"]
        )
        for outcome in ("taken_up", "partly", "refused"):
            reloads.add_metric([outcome], metrics.reloads[outcome])
        yield reloads
        guarded = metrics.guarded
        yield CounterMetricFamily(
            "concertmaster_retries",
            "Attempts after the first, of calls that failed.",
            value=0 if guarded is None else guarded.retries,
        )
        hedges = CounterMetricFamily(
            "concertmaster_hedges",
            "Second attempts of late calls, by what came of them.",
            labels=["outcome"],
        )
        for outcome in get_args(HedgeOutcome):
            hedges.add_metric([outcome], self._scheduler.races.outcomes[outcome])
        yield hedges
        yield CounterMetricFamily(
            "concertmaster_hedges_over_budget",
            "Late calls for which no hedge was left in the budget.",
            value=self._scheduler.races.short,
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
        yield from (metrics.tally or Tally(self._scheduler)).families()
        yield from self._fleet()
        if metrics.workers is not None:
            yield from worker_families(metrics.workers.lines)
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
