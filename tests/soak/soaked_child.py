"""The gateway of a soak: a process of its own, in which tables reach their steady size in seconds.

Usage: soaked_child.py FOLDER

The folder holds ``fleet.toml``. Workflows are over after two seconds of silence instead of ten
minutes, and prompts are remembered for 2,000 calls instead of 100,000; all else is as served.
SIGUSR2 writes ``ledgers.json``.
"""

import asyncio
import random
import signal

from chaos.gateway_child import FOLDER, tell_ledgers
from concertmaster import compose, forecaster
from concertmaster.config_files import load_fleet
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import server
from concertmaster.gateway.inference import WorkflowInference
from concertmaster.policies.catalog import policy

IDLE_S = 2.0
PROMPTS = 2_000


async def main() -> None:
    file = load_fleet(FOLDER / "fleet.toml")
    fleet = compose.build_fleet(file, name="soak", served=True)
    urls = {ReplicaId(name): url for name, url in compose.endpoints(file, where="fleet").items()}
    scheduler = Scheduler(fleet, policy(file.gateway.policy), random.Random(0), weighs=True)
    predictor = forecaster.serving_predictor(file.gateway, fleet, trains=False)
    async with server.running_gateway(scheduler, predictor, urls, file.gateway) as (gateway, _):
        gateway._idle._idle_s = IDLE_S
        gateway._intake._inference = WorkflowInference(max_prompts=PROMPTS, max_tool_calls=PROMPTS)
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR2, tell_ledgers, gateway)
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()


if __name__ == "__main__":
    compose.run_loop(main())
