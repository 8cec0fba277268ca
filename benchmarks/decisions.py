"""What one decision costs: arrivals at an idle fleet, and finishes with a long line.

    python benchmarks/decisions.py

Prints the median and P99 of a decision over fleets of 10 to 1,000 replicas, each with no
call waiting (every arrival is placed) and with 10,000 waiting (every finish frees room for
one), and how cost grows with the fleet.
"""

import argparse
import dataclasses
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


def long_line(name: str, replicas: int, decisions: int) -> list[float]:
    """Seconds of finishes that let the best of 10,000 waiting calls go."""
    rng = random.Random(0)
    scheduler = Scheduler(
        a_fleet(replicas, max_sequences=4), dataclasses.replace(policy(name), window_s=1e9), rng
    )
    source, taken, running = requests(rng), [], []
    for _ in range(4 * replicas + WAITING):
        request = next(source)
        actions = scheduler.handle(request.arrival_s, RequestArrived(request, FORECAST))
        running += [a.request_id for a in actions if isinstance(a, Dispatch)]
    now_s = request.arrival_s
    for _ in range(decisions):
        finished = running.pop(rng.randrange(len(running)))
        event = RequestFinished(finished, 1, 100)
        begun_s = time.perf_counter()
        actions = scheduler.handle(now_s, event)
        taken.append(time.perf_counter() - begun_s)
        running += [a.request_id for a in actions if isinstance(a, Dispatch)]
        request = next(source)
        scheduler.handle(now_s, RequestArrived(request, FORECAST))
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--policy", default="least-tokens+las")
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = {}
    print(f"policy {options.policy}, microseconds a decision\n")
    print(f"{'replicas':>9}{'no line P50':>13}{'P99':>8}{'10,000 wait P50':>17}{'P99':>8}")
    for replicas in FLEETS:
        row = []
        for measure in (idle_line, long_line):
            seconds = sorted(measure(options.policy, replicas, options.decisions))
            row += [1e6 * statistics.median(seconds), 1e6 * seconds[int(0.99 * len(seconds))]]
        table[replicas] = row
        print(f"{replicas:>9}{row[0]:>13.0f}{row[1]:>8.0f}{row[2]:>17.0f}{row[3]:>8.0f}")
    for column, label in ((0, "no line"), (2, "10,000 waiting")):
        growth = math.log(table[FLEETS[-1]][column] / table[FLEETS[0]][column]) / math.log(
            FLEETS[-1] / FLEETS[0]
        )
        print(f"growth, {label}: cost ~ replicas^{growth:.2f}")
    if options.json:
        options.json.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
