"""The emulated engine's /metrics, under the names that vLLM gives them."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from concertmaster.physics.batching import BatchingEngine, EngineSettings

_LABELS = ("model_name", "engine")
_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_E2E_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_RENAMED = {
    "vllm:num_requests_running": "vllm:running_requests",
    "vllm:num_requests_waiting": "vllm:queued_requests",
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
}


class Histogram:
    """Counts of values by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, labels: Sequence[str]) -> Metric:
        """Give it as a metric."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        metric = HistogramMetricFamily(name, text, labels=_LABELS)
        metric.add_metric(labels, buckets, self._sum)
        return metric


class Observed(Protocol):
    """What the metrics look at."""

    @property
    def engine(self) -> BatchingEngine:
        """The engine model, as of this instant."""

    @property
    def settings(self) -> EngineSettings:
        """Its size."""

    @property
    def asleep(self) -> bool:
        """Whether the weights are off the GPU."""

    @property
    def renames_metrics(self) -> bool:
        """Whether gauges appear under other names."""


class EmulatorMetrics(Collector):
    """Counts answers, and renders all metrics. Times are wall clock, as a client sees them."""

    def __init__(self, model_name: str, observed: Observed) -> None:
        self._labels = (model_name, "0")
        self._observed = observed
        self._prompt_tokens = 0
        self._finished = {"stop": 0, "length": 0, "abort": 0}
        self._ttft_s = Histogram(_TTFT_BUCKETS_S)
        self._itl_s = Histogram(_ITL_BUCKETS_S)
        self._tpot_s = Histogram(_ITL_BUCKETS_S)
        self._e2e_s = Histogram(_E2E_BUCKETS_S)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def prefilled(self, prompt_tokens: int, ttft_s: float) -> None:
        """Count a first token."""
        self._prompt_tokens += prompt_tokens
        self._ttft_s.observe(ttft_s)

    def finished(self, reason: str, output_tokens: int, decode_s: float, e2e_s: float) -> None:
        """Count a last token; the gaps between its tokens count as equal."""
        self._finished[reason] += 1
        self._e2e_s.observe(e2e_s)
        if output_tokens > 1:
            gap_s = decode_s / (output_tokens - 1)
            self._itl_s.observe(gap_s, output_tokens - 1)
            self._tpot_s.observe(gap_s)

    def aborted(self) -> None:
        """Count an answer that was given up."""
        self._finished["abort"] += 1

    def render(self) -> bytes:
        """Give the text that a scraper reads."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Name nothing ahead: the names may change while it runs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Give all metrics, as of this instant."""
        yield from self._gauges()
        yield from self._counters()
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Time to first token.", self._ttft_s),
            ("inter_token_latency_seconds", "Gap between tokens.", self._itl_s),
            ("request_time_per_output_token_seconds", "Mean gap of a request.", self._tpot_s),
            ("e2e_request_latency_seconds", "Time to last token.", self._e2e_s),
        ):
            yield histogram.family(f"vllm:{name}", text, self._labels)

    def _gauges(self) -> Iterator[Metric]:
        engine, settings = self._observed.engine, self._observed.settings
        usage_ratio = engine.kv_used_blocks / settings.kv_blocks
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", engine.running_requests),
            ("num_requests_waiting", "Requests in the line.", engine.waiting_requests),
            ("kv_cache_usage_perc", "KV cache in use; 1 is all of it.", usage_ratio),
        ):
            full = f"vllm:{name}"
            shown = _RENAMED.get(full, full) if self._observed.renames_metrics else full
            gauge = GaugeMetricFamily(shown, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Size of the KV cache.",
            labels=("block_size", "num_gpu_blocks", "enable_prefix_caching", *_LABELS),
        )
        sizes = (settings.block_tokens, settings.kv_blocks, settings.prefix_caching)
        config.add_metric((*map(str, sizes), *self._labels), 1)
        yield config
        state = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 for the state.", labels=("sleep_state", *_LABELS)
        )
        state.add_metric(("awake", *self._labels), int(not self._observed.asleep))
        state.add_metric(("weights_offloaded", *self._labels), int(self._observed.asleep))
        yield state

    def _counters(self) -> Iterator[Metric]:
        engine = self._observed.engine
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up.", engine.prefix_query_tokens),
            ("prefix_cache_hits", "Prompt tokens found.", engine.prefix_hit_tokens),
            ("num_preemptions", "Requests taken off the batch.", engine.preemptions),
            ("prompt_tokens", "Prompt tokens of started requests.", self._prompt_tokens),
            ("generation_tokens", "Output tokens.", engine.generated_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by end.", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in self._finished.items():
            success.add_metric((*self._labels, reason), count)
        yield success
