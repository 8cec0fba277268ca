"""What one time of asking costs a scaling policy over 100 pools of 10 replicas.

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

POOLS, REPLICAS, ROUNDS = 100, 10, 20


def main() -> None:
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


if __name__ == "__main__":
    main()
