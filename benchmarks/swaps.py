"""Is any call lost while models come and go? Many workflows at once against a live gateway.

    python benchmarks/swaps.py [--shared] [--policy NAME] [--workflows 200] [--minutes 3]
                               [--control vllm|llama.cpp|ollama]

Six models and GPUs for three, started and stopped by a scaling; or with --shared two GPUs that
all six share, where a residency moves weights. Engines are emulated and sleep for real seconds,
in a process of their own, as is the gateway. Workflows follow one another without a break, half
of the calls streamed; one caller in fifty hangs up; every minute one model fails to wake for ten
seconds. The exit code is 1 if a call was lost or answered twice.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from concertmaster import local
from concertmaster.config import FleetFile, GatewaySection, NodeSection, PoolSection, ScalingSection
from concertmaster.core.fleet import Readiness
from concertmaster.engines.openai_http import fetch
from swap_load import Load, Tally, play_load

MODELS = (
    "qwen2.5-7b-instruct",
    "llama-3.1-8b-instruct",
    "qwen2.5-3b-instruct",
    "llama-3.2-3b-instruct",
    "qwen2.5-1.5b-instruct",
    "mistral-7b-instruct",
)
GPUS = 3
KV_BLOCKS = 2000
SCALED = "las/reactive:interval_s=1,settle_s=4"
HOLD_S = 60.0
LOAD = Load(models=MODELS, calls=(1, 4), tokens=(20, 200), pause_s=4.0, patience_s=120.0)
FAILS_EVERY_S, FAILS_FOR_S = 60.0, 10.0


def a_fleet(kind: str) -> FleetFile:
    """Describe the fleet: the first models run, the others sleep, and all may be stopped."""
    lies = Readiness.SLEEPING if kind == "vllm" else Readiness.DISK
    pools = [
        PoolSection(
            name=model,
            model=model,
            gpu="a100-40g",
            control=kind,  # type: ignore[arg-type]
            state=Readiness.RUNNING if i < GPUS else lies,
            stopped=lies,
            least_replicas=0,
            max_sequences=64,
        )
        for i, model in enumerate(MODELS)
    ]
    return FleetFile(
        name="swaps",
        pools=pools,
        gateway=GatewaySection(hold_s=HOLD_S),
        scaling=ScalingSection(gpus=GPUS, cooldown_s=0.0),
    )


def a_shared_fleet(kind: str) -> FleetFile:
    """Describe two GPUs with an engine of each model on both; the first runs on one of them."""
    nodes = [NodeSection(name=f"n{i}", gpu="a100-40g", gpus=1, host_gb=128.0) for i in range(2)]
    pools = [
        PoolSection(
            name=model,
            model=model,
            gpu="a100-40g",
            nodes=[node.name for node in nodes],
            kv_blocks=KV_BLOCKS,
            control=kind,  # type: ignore[arg-type]
            state=Readiness.SLEEPING if kind == "vllm" else Readiness.DISK,
            max_sequences=64,
        )
        for model in MODELS
    ]
    gateway = GatewaySection(hold_s=HOLD_S)
    return FleetFile(name="swaps", pools=pools, nodes=nodes, gateway=gateway)


async def fail_now_and_then(url: str) -> None:
    """Let a model fail to wake for a while, over and over."""
    while True:
        await asyncio.sleep(FAILS_EVERY_S - FAILS_FOR_S)
        await fetch("POST", url, "/emulator/faults", body=b'{"wakes":"fails"}', timeout_s=5.0)
        await asyncio.sleep(FAILS_FOR_S)
        await fetch("POST", url, "/emulator/faults", body=b"{}", timeout_s=5.0)


async def ended(urls: local.Urls) -> tuple[int, int]:
    """Return how many calls engines finished, and how many they broke off."""
    ends = {"length": 0, "abort": 0}
    for url in urls.values():
        _, text = await fetch("GET", url, "/metrics", timeout_s=5.0)
        for line in text.decode().splitlines():
            for reason in ends:
                if line.startswith("vllm:request_success_total") and f'"{reason}"' in line:
                    ends[reason] += round(float(line.rpartition(" ")[2]))
    return ends["length"], ends["abort"]


async def measure(gateway: str, urls: local.Urls, args: argparse.Namespace) -> bool:
    """Play the load and print what became of it; say whether all is well."""
    failing = asyncio.create_task(fail_now_and_then(list(urls.values())[-1]))
    begun_s, port = time.monotonic(), urlsplit(gateway).port or 80
    tally = await play_load(
        port, LOAD, workflows=args.workflows, for_s=60 * args.minutes, seed=args.seed
    )
    failing.cancel()
    took_s = time.monotonic() - begun_s
    ran, broken = await ended(urls)
    _, text = await fetch("GET", gateway, "/metrics", timeout_s=5.0)
    left = [line for line in text.decode().splitlines() if line.startswith("concertmaster_queue_s")]
    show(tally, took_s, ran, broken)
    print(f"  left in the gateway: {left}")
    return not tally.lost and ran <= tally.served + tally.left and broken <= tally.left


def show(tally: Tally, took_s: float, ran: int, broken: int) -> None:
    """Print the figures."""
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.refused.items()))
    print(f"  {tally.workflows} workflows and {tally.calls} calls in {took_s:.0f} s")
    print(f"  served {tally.served}, refused {refused or 'none'}, hung up {tally.left}")
    print(f"  streams that were told of a wake {tally.held}, longest call {tally.longest_s:.1f} s")
    print(f"  lost or answered twice {len(tally.lost)}")
    print(f"  engines finished {ran} calls and broke off {broken}")
    for what in tally.lost[:10]:
        print(f"    {what[:200]}")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--policy")
    parser.add_argument("--workflows", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--control", default="vllm", choices=("vllm", "llama.cpp", "ollama"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    file = (a_shared_fleet if args.shared else a_fleet)(args.control)
    policy = args.policy or ("maestro" if args.shared else SCALED)
    with local.engines(file) as urls, local.gateway(file, urls, policy) as gateway:
        print(f"{policy} over {args.control}{', shared' if args.shared else ''}")
        return 0 if asyncio.run(measure(gateway, urls, args)) else 1


if __name__ == "__main__":
    sys.exit(main())
