"""Reference against fast engine model, on one chat-like load in one run.

Prompt and answer lengths are log-normal with the means of public chat traces (about 1,150
and 210 tokens); arrivals are Poisson at a rate that keeps a given batch busy.

    python benchmarks/engine_model.py
"""

import argparse
import random
import time

from concertmaster.core.cost import RateCurve
from concertmaster.core.request import RequestId
from concertmaster.physics.batching import BatchingEngine, EngineCall, EngineSettings
from concertmaster.physics.fast import FastEngine
from concertmaster.physics.reference import ReferenceEngine

CURVE = RateCurve(
    fixed_s=0.001,
    linear_tokens=(1, 256, 2048, 8192),
    linear_s=(0.005, 0.006, 0.030, 0.12),
    sequence_s=5e-6,
    kv_token_s=3e-8,
    prefill_pair_s=1e-9,
)
SETTINGS = EngineSettings(kv_blocks=40_000)

Load = list[tuple[float, EngineCall]]


def chat_load(requests: int, rate_rps: float, rng: random.Random) -> Load:
    """Draw arrivals and lengths."""
    now_s, load = 0.0, []
    for number in range(requests):
        now_s += rng.expovariate(rate_rps)
        call = EngineCall(
            request_id=RequestId(f"r{number}"),
            prompt_tokens=min(16_000, 1 + int(rng.lognormvariate(6.55, 1.0))),
            output_tokens=min(2_000, 1 + int(rng.lognormvariate(4.85, 1.0))),
        )
        load.append((now_s, call))
    return load


def drive(engine: BatchingEngine, load: Load) -> tuple[dict[RequestId, float], float, float]:
    """Run a load to its end: completion times, wall seconds, mean batch seen by arrivals."""
    ends_s: dict[RequestId, float] = {}
    running = 0

    def drain(until_s: float) -> None:
        while (at_s := engine.next_milestone_s()) is not None and at_s <= until_s:
            for milestone in engine.advance(at_s):
                if milestone.kind == "finished":
                    ends_s[milestone.request_id] = milestone.time_s

    begun_s = time.perf_counter()
    for arrival_s, call in load:
        drain(arrival_s)
        engine.submit(arrival_s, call)
        running += engine.running_requests
    drain(float("inf"))
    return ends_s, time.perf_counter() - begun_s, running / len(load)


def compare(requests: int, rate_rps: float) -> None:
    """Run both models on the same load and print one line."""
    load = chat_load(requests, rate_rps, random.Random(7))
    fast_ends_s, fast_wall_s, batch = drive(FastEngine(CURVE, SETTINGS), load)
    ends_s, wall_s, _ = drive(ReferenceEngine(CURVE, SETTINGS), load)
    error = max(abs(fast_ends_s[key] - end_s) / end_s for key, end_s in ends_s.items())
    print(
        f"{rate_rps:6.1f} rps  batch {batch:5.0f}  reference {wall_s:7.2f} s  "
        f"fast {fast_wall_s:6.3f} s ({fast_wall_s / requests * 1e6:4.0f} us/request)  "
        f"ratio {wall_s / fast_wall_s:5.1f}  largest difference {error:.1e}"
    )


def main() -> None:
    """Compare at low, moderate and high batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3_000)
    requests = parser.parse_args().requests
    for rate_rps in (2.0, 8.0, 16.0, 24.0, 32.0):
        compare(requests, rate_rps)


if __name__ == "__main__":
    main()
