"""What scaling does to a steady hour and to a step, and what one time of asking costs.

python benchmarks/scaling.py
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from builders import CheckedScheduler, a_fleet, a_pool, a_request
from concertmaster.core.events import RequestArrived, TimerFired
from concertmaster.core.fleet import Readiness
from scaling_load import a_scaled_fleet, agents, scaled

SEEDS = (1, 2, 3, 4, 5, 6)
STEP_S = 300.0
POOLS, REPLICAS, ROUNDS = 100, 10, 20


def steady() -> None:
    """Print starts and stops of a steady hour."""
    for name in ("las/reactive", "las/foreseen"):
        starts, stops, gpu_s = [], [], []
        for seed in SEEDS:
            load = agents(lambda _: 2.0, 3600, seed)
            records, seen = scaled(a_scaled_fleet(), load, name)
            assert records.gauges is not None
            starts.append(len(seen.starts_s))
            stops.append(len(seen.stops_s))
            gpu_s.append(round(records.gauges.gpu_s))
        print(f"steady  {name}: starts {starts}, stops {stops}, GPU-seconds {gpu_s}")


def step() -> None:
    """Print when eight replicas serve after a step, and makespans of what came after it."""
    for name in (
        "oracle-stjf/reactive",
        "oracle-stjf/foreseen",
        "least-tokens/reactive",
        "least-tokens/foreseen",
    ):
        rows = []
        for seed in SEEDS[:3]:
            load = agents(lambda now_s: 0.3 if now_s < STEP_S else 2.0, 500, seed)
            records, seen = scaled(a_scaled_fleet(), load, name)
            assert records.gauges is not None
            ends = {c.workflow_id: c.finished_s for c in records.calls if c.finished_s is not None}
            after = [plan for plan in load if plan.arrival_s >= STEP_S]
            spans_s = sorted(ends[plan.workflow_id] - plan.arrival_s for plan in after)
            lag_s = seen.serving_from(8, after_s=STEP_S) - STEP_S
            p50_s, p95_s = (spans_s[int(level * len(spans_s))] for level in (0.5, 0.95))
            facts = (lag_s, p50_s, p95_s, len(seen.starts_s), records.gauges.gpu_s)
            rows.append(" ".join(f"{fact:.0f}" for fact in facts))
        print(f"step  {name}: lag, P50, P95 s, starts, GPU-seconds: {'; '.join(rows)}")


def asking() -> None:
    """Print the median milliseconds of each policy."""
    pools = [a_pool(f"p{i}", model=f"m{i}") for i in range(POOLS)]
    states = {f"p{i}-{j}": Readiness.DISK for i in range(POOLS) for j in range(5, REPLICAS)}
    fleet = a_fleet(*pools, replicas=REPLICAS, states=states)
    for name in ("reactive", "foreseen"):
        core = CheckedScheduler(fleet, f"las/{name}").core
        core.handle(0.0, TimerFired())
        spent_ms = []
        for turn in range(1, ROUNDS + 1):
            for i in range(POOLS):
                request = a_request(f"{turn}-{i}", models=(f"m{i}",))
                core.handle(15.0 * turn - 1.0, RequestArrived(request))
            begun_s = time.perf_counter()
            core.handle(15.1 * turn, TimerFired())
            spent_ms.append(1000 * (time.perf_counter() - begun_s))
        print(f"{name}: {statistics.median(spent_ms):.2f} ms")


def main() -> None:
    """Print all three."""
    steady()
    step()
    asking()


if __name__ == "__main__":
    main()
