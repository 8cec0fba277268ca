"""Metrics of the processes that move bytes."""

import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class CrewMember(Protocol):
    """One of them."""

    calls: int
    connections: int
    cpu_s: float


def worker_families(members: Mapping[int, CrewMember]) -> Iterator[Metric]:
    """Yield what each does, and what deciding takes."""
    calls = CounterMetricFamily(
        "concertmaster_worker_calls", "Calls that a worker brought.", labels=["worker"]
    )
    connections = GaugeMetricFamily(
        "concertmaster_worker_connections", "Connections of agents.", labels=["worker"]
    )
    cpu = CounterMetricFamily(
        "concertmaster_worker_cpu_seconds", "CPU that a worker has used.", labels=["worker"]
    )
    for name, member in sorted(members.items()):
        calls.add_metric([str(name)], member.calls)
        connections.add_metric([str(name)], member.connections)
        cpu.add_metric([str(name)], member.cpu_s)
    yield from (calls, connections, cpu)
    yield CounterMetricFamily(
        "concertmaster_scheduler_cpu_seconds",
        "CPU that the process that decides has used.",
        value=time.process_time(),
    )
