"""What one decision costs: arrivals at an idle fleet, and finishes and arrivals with a long line.

    python benchmarks/decisions.py [--policy swarmx --policy least-tokens --replicas 100 1000]

Prints the median and P99 of a decision over fleets of 10 to 1,000 replicas, each with no
call waiting (every arrival is placed) and with a line of --waiting calls: every finish frees
room for one, every arrival is routed and joins. Then how cost grows with the fleet, and for
several policies how often the first takes the time of each other. With --weighs every decision
is also made by a scheduler that keeps what it weighed, for receipts, in turns with one that does
not, and the ratio of both is printed.
"""

import argparse
import dataclasses
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from concertmaster.core.actions import Dispatch
from concertmaster.core.events import RequestArrived, RequestFinished
from concertmaster.core.fleet import (
    Cluster,
    ClusterId,
    Fleet,
    Model,
    Node,
    NodeId,
    Pool,
    PoolId,
    Readiness,
    ReplicaId,
)
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.physics.hardware import gpu
from concertmaster.physics.models import model_card
from concertmaster.physics.step_time import rate_curve
from concertmaster.policies.catalog import policy

FLEETS = (10, 30, 100, 300, 1000)
WAITING = 10_000
FORECAST = Forecast(
    output_tokens=Quantiles((0.1, 0.5, 0.9, 0.99), (20.0, 150.0, 500.0, 1200.0)), source="role"
)


def a_fleet(replicas: int, *, max_sequences: int) -> Fleet:
    """Replicas of one 8B model, in four pools of different GPUs."""
    card = model_card("llama-3.1-8b-instruct")
    cluster = Cluster(cluster_id=ClusterId("local"))
    pools = [
        Pool(
            pool_id=PoolId(name),
            gpu=name,
            tensor_parallel=1,
            kv_blocks=20_000,
            model=Model(
                name=ModelName(card.name),
                context_tokens=card.context_tokens,
                weights_bytes=card.weights_bytes,
                kv_bytes_per_token=card.kv_bytes_per_token,
            ),
            curve=rate_curve(card, gpu(name), 1),
            max_sequences=max_sequences,
        )
        for name in ("a100-80g", "h100", "l40s", "a40")
    ]
    members = {}
    for i in range(replicas):
        pool = pools[i % len(pools)]
        node = Node(node_id=NodeId(f"n{i}"), cluster=cluster, gpu=pool.gpu, gpus=1)
        members[ReplicaId(f"r{i:04d}")] = (pool, node, Readiness.RUNNING)
    return Fleet(
        name="decisions",
        clusters=(cluster,),
        nodes=tuple(n for _, n, _ in members.values()),
        pools=tuple(pools),
        replicas=members,
    )


def requests(rng: random.Random) -> Iterator[Request]:
    """Yield calls of many workflows, without end."""
    serial = 0
    while True:
        serial += 1
        yield Request(
            request_id=RequestId(f"q{serial}"),
            workflow_id=WorkflowId(f"w{rng.randrange(serial)}"),
            arrival_s=serial / 1000,
            prompt_tokens=rng.randrange(50, 2000),
            max_output_tokens=2048,
        )


def idle_line(name: str, replicas: int, decisions: int) -> list[float]:
    """Seconds of arrivals that are placed at once, on replicas with some calls each."""
    rng = random.Random(0)
    scheduler = Scheduler(
        a_fleet(replicas, max_sequences=256), dataclasses.replace(policy(name), window_s=1e9), rng
    )
    source, taken = requests(rng), []
    for _ in range(4 * replicas):
        request = next(source)
        scheduler.handle(request.arrival_s, RequestArrived(request, FORECAST))
    for _ in range(decisions):
        request = next(source)
        event = RequestArrived(request, FORECAST)
        begun_s = time.perf_counter()
        actions = scheduler.handle(request.arrival_s, event)
        taken.append(time.perf_counter() - begun_s)
        assert isinstance(actions[0], Dispatch)
    return taken


def long_line(name: str, replicas: int, waiting: int, decisions: int) -> tuple[list[float], ...]:
    """Seconds of finishes that let the best of the waiting calls go, and of arrivals."""
    rng = random.Random(0)
    scheduler = Scheduler(
        a_fleet(replicas, max_sequences=4), dataclasses.replace(policy(name), window_s=1e9), rng
    )
    source, finishes, arrivals = requests(rng), list[float](), list[float]()
    running: list[RequestId] = []
    now_s = 0.0
    while len(scheduler.line) < waiting:
        request = next(source)
        now_s = request.arrival_s
        actions = scheduler.handle(now_s, RequestArrived(request, FORECAST))
        running += [a.request_id for a in actions if isinstance(a, Dispatch)]
    gc.collect()
    gc.freeze()
    for _ in range(decisions):
        finished = running.pop(rng.randrange(len(running)))
        request = next(source)
        for event, taken in (
            (RequestFinished(finished, 1, 100), finishes),
            (RequestArrived(request, FORECAST), arrivals),
        ):
            begun_s = time.perf_counter()
            actions = scheduler.handle(request.arrival_s, event)
            taken.append(time.perf_counter() - begun_s)
            running += [a.request_id for a in actions if isinstance(a, Dispatch)]
    gc.unfreeze()
    return finishes, arrivals


def figures(name: str, replicas: int, waiting: int, decisions: int) -> list[float]:
    """Median and P99 in microseconds: no line, then finishes and arrivals with one."""
    found = []
    idle = idle_line(name, replicas, decisions)
    for seconds in (idle, *long_line(name, replicas, waiting, decisions)):
        seconds.sort()
        found += [1e6 * statistics.median(seconds), 1e6 * seconds[int(0.99 * len(seconds))]]
    return found


def show_weighing(name: str, replicas: int, decisions: int) -> None:
    """Print what it costs to keep what was weighed, on arrivals that are placed at once."""
    rng = random.Random(0)
    chosen = dataclasses.replace(policy(name), window_s=1e9)
    fleets = (a_fleet(replicas, max_sequences=256) for _ in range(2))
    plain, weighs = (
        Scheduler(fleet, chosen, random.Random(1), weighs=on)
        for fleet, on in zip(fleets, (False, True), strict=True)
    )
    source = requests(rng)
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(4 * replicas + decisions):
        request = next(source)
        both = ((plain, taken[0]), (weighs, taken[1]))
        for scheduler, seconds in both if i % 2 else reversed(both):
            event = RequestArrived(request, FORECAST)
            begun_s = time.perf_counter()
            scheduler.handle(request.arrival_s, event)
            if scheduler.weighing is not None:
                scheduler.weighing.take(request.request_id)
            seconds.append(time.perf_counter() - begun_s)
    off_s, on_s = (statistics.median(seconds[4 * replicas :]) for seconds in taken)
    print(f"{name}, {replicas} replicas: {1e6 * off_s:.1f} us, keeping what was weighed", end=" ")
    print(f"{1e6 * on_s:.1f} us, x {on_s / off_s:.2f}", flush=True)


def show(name: str, table: dict[int, list[float]], waiting: int) -> None:
    """Print the figures of a policy and how they grow with the fleet."""
    print(f"policy {name}, microseconds a decision, {waiting:,} wait\n")
    print(f"{'replicas':>9}{'no line P50':>13}{'P99':>8}{'finish P50':>13}{'P99':>8}", end="")
    print(f"{'arrival P50':>13}{'P99':>8}")
    for replicas, row in table.items():
        print(f"{replicas:>9}" + "".join(f"{p50:>13.0f}{p99:>8.0f}" for p50, p99 in pairs(row)))
    least, most = min(table), max(table)
    for column, label in ((0, "no line"), (2, "finishes"), (4, "arrivals")) * (least < most):
        growth = math.log(table[most][column] / table[least][column]) / math.log(most / least)
        print(f"growth, {label}: cost ~ replicas^{growth:.2f}")
    print(flush=True)


def pairs(row: list[float]) -> list[tuple[float, float]]:
    """Return (median, P99) of each kind of decision."""
    return list(zip(row[::2], row[1::2], strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--policy", action="append")
    parser.add_argument("--replicas", nargs="+", type=int, default=FLEETS)
    parser.add_argument("--waiting", type=int, default=WAITING)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--weighs", action="store_true")
    options = parser.parse_args()
    if options.weighs:
        for name in options.policy or ["least-tokens+las"]:
            for replicas in options.replicas:
                show_weighing(name, replicas, options.decisions)
        return
    tables: dict[str, dict[int, list[float]]] = {}
    for name in options.policy or ["least-tokens+las"]:
        tables[name] = {
            replicas: figures(name, replicas, options.waiting, options.decisions)
            for replicas in options.replicas
        }
        show(name, tables[name], options.waiting)
    first, *others = tables
    for other in others:
        for replicas, row in tables[other].items():
            ratios = (
                mine / theirs for mine, theirs in zip(tables[first][replicas], row, strict=True)
            )
            listed = ", ".join(f"{ratio:.1f}" for ratio in list(ratios)[::2])
            print(f"{first} / {other}, P50 at {replicas} replicas: {listed}")
    if options.json:
        options.json.write_text(json.dumps(tables))


if __name__ == "__main__":
    main()
