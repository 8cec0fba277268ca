"""Calls and decisions by label; every label has few values, whatever callers send."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from concertmaster.core.actions import Action, Dispatch, Fail, Reject
from concertmaster.core.events import Event, FailReason, RejectReason
from concertmaster.core.fleet import Replica, ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.agent import Message
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.histogram import SECONDS, Histogram

MOST_NAMES = 1000
"""Values of one label; the rest is ``other``."""

OTHER, AUTO, NOWHERE = "other", "auto", "none"
Outcome = Literal["served", "rejected", "failed", "cancelled"]
Choice = Literal["hedged", "retried", "only_choice", "least_cost", "picked"]
DECISIONS: tuple[str, ...] = (
    *get_args(Choice),
    *get_args(RejectReason),
    *get_args(FailReason),
)
RECEIPTS = ("taken", "written", "dropped")
STOOD = ("dispatched", "rejected", "failed", "cancelled")
_REJECTS = frozenset(get_args(RejectReason))
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5, 2.0, 4.0, 10.0)


def bounded(name: str, known: Mapping[str, str]) -> str:
    """Return a name that may be a label.

    >>> bounded("m", {"m": "m"}), bounded("x" * 9999, {"m": "m"})
    ('m', 'other')
    """
    return known.get(name, OTHER)


def labels_of(names: Iterable[str], *, most: int = MOST_NAMES) -> dict[str, str]:
    """Return the label of each name; those beyond the bound share one.

    >>> labels_of(["a", "b", "a", "c"], most=2)
    {'a': 'a', 'b': 'b', 'c': 'other'}
    """
    unique = dict.fromkeys(names)
    return {name: name if i < most else OTHER for i, name in enumerate(unique)}


def outcome_of(exchange: Exchange) -> Outcome:
    """Say what came of a call that is over."""
    if exchange.status == 200:
        return "served"
    if exchange.status == 499:
        return "cancelled"
    return "rejected" if exchange.reason in _REJECTS or exchange.status == 503 else "failed"


def choice_of(action: Dispatch) -> Choice:
    """Say why a replica was chosen.

    >>> choice_of(Dispatch("r1", "p-0", 1, 0, 0.0, 1))
    'only_choice'
    """
    if action.hedge:
        return "hedged"
    if action.attempt > 1:
        return "retried"
    if action.candidates == 1:
        return "only_choice"
    return "picked" if action.cost_s is None else "least_cost"


class Tally:
    """A witness that counts.

    Args:
        scheduler: Knows the models.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._replicas: Mapping[ReplicaId, Replica] = scheduler.replicas
        self._names = labels_of(pool.model.name for pool in scheduler.pools.values())
        self._calls: Counter[tuple[str, str, str, str]] = Counter()
        self._decisions: Counter[str] = Counter()
        self._stood_s = {outcome: Histogram(SECONDS) for outcome in STOOD}
        self._token_s = Histogram(_TOKEN_S)
        self._ratio = Histogram(_RATIOS)
        self.receipts: Mapping[str, int] = {}

    def opened(self, exchange: Exchange, message: Message) -> None:
        """Wait until it is over."""

    def noticed(self, now_s: float, event: Event, actions: list[Action]) -> None:
        """Count decisions."""
        for action in actions:
            if isinstance(action, Dispatch):
                self._decisions[choice_of(action)] += 1
            elif isinstance(action, Reject | Fail):
                self._decisions[action.reason] += 1

    def ended(self, now_s: float, exchange: Exchange) -> None:
        """Count a call."""
        request, outcome = exchange.request, outcome_of(exchange)
        replica = self._replicas.get(ReplicaId(exchange.replica_id))
        target = NOWHERE if replica is None else bounded(replica.pool.model.name, self._names)
        asked = bounded(request.models[0], self._names) if request.models else AUTO
        self._calls[asked, target, request.service_class.value, outcome] += 1
        dispatched_s = exchange.dispatched_s
        if dispatched_s is None:
            stood = "failed" if outcome == "served" else outcome
            self._stood_s[stood].observe(now_s - exchange.arrived_s)
        else:
            self._stood_s["dispatched"].observe(dispatched_s - exchange.arrived_s)
        if outcome == "served" and replica is not None:
            self._served(now_s, exchange, replica)

    def _served(self, now_s: float, exchange: Exchange, replica: Replica) -> None:
        tokens, first_s = exchange.tokens, exchange.first_token_s
        if first_s is not None and tokens > 1:
            self._token_s.observe((now_s - first_s) / (tokens - 1))
        law = exchange.forecast.output_law(replica.pool.model.name)
        if law is not None:
            median = min(law.at(0.5), exchange.request.max_output_tokens)
            self._ratio.observe(tokens / max(1.0, median))

    def fold(self) -> None:
        """Bring the histograms up to date, so that they hold little back."""
        for histogram in (*self._stood_s.values(), self._token_s, self._ratio):
            histogram.fold()

    def families(self) -> Iterator[Metric]:
        """Yield all families."""
        calls = CounterMetricFamily(
            "concertmaster_calls",
            "Calls that are over, by the model asked for and the one that served.",
            labels=["model_name", "target_model_name", "class", "outcome"],
        )
        for key, count in sorted(self._calls.items()):
            calls.add_metric(key, count)
        yield calls
        yield _counts("decisions", "Decisions, by reason.", "reason", DECISIONS, self._decisions)
        yield _counts("receipts", "What became of receipts.", "outcome", RECEIPTS, self.receipts)
        stood = HistogramMetricFamily(
            "concertmaster_queue_duration_seconds",
            "Arrival to first dispatch, or to the end without one.",
            labels=["outcome"],
        )
        for outcome, histogram in self._stood_s.items():
            stood.add_metric([outcome], histogram.buckets(), histogram.total)
        yield stood
        for name, text, histogram in (
            ("time_per_output_token_seconds", "Between tokens, a mean a call.", self._token_s),
            ("output_tokens_forecast_ratio", "Output tokens over their forecast.", self._ratio),
        ):
            yield HistogramMetricFamily(
                f"concertmaster_{name}", text, histogram.buckets(), histogram.total
            )


def _counts(
    name: str, text: str, label: str, values: Iterable[str], counts: Mapping[str, int]
) -> Metric:
    family = CounterMetricFamily(f"concertmaster_{name}", text, labels=[label])
    for value in values:
        family.add_metric([value], counts.get(value, 0))
    return family
