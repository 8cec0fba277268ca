"""The gateway of a soak: a process of its own, in which tables reach their steady size in seconds.

Usage: soaked_child.py FOLDER

The folder holds ``fleet.toml``. Workflows are over after two seconds of silence instead of ten
minutes, and prompts are remembered for 2,000 calls instead of 100,000; all else is as served.
SIGUSR2 writes ``ledgers.json``, and beside the ledgers how much each table of bounded size holds.
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
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.inference import WorkflowInference
from concertmaster.learning.loop import LearningLoop
from concertmaster.policies.catalog import policy
from concertmaster.predictors.encoder import StaticEncoder
from concertmaster.predictors.learned import LearnedPredictor

IDLE_S = 2.0
PROMPTS = 2_000


def tables(gateway: Gateway) -> dict[str, int]:
    """Count what is kept when nothing is open, by table."""
    loop, intake = gateway.forecaster._predictor, gateway._intake
    assert isinstance(loop, LearningLoop)
    champion = loop._champion.inner
    assert isinstance(champion, LearnedPredictor)
    judge = champion.judge
    assert judge is not None
    assert isinstance(judge._encoder, StaticEncoder)
    words = judge._encoder.pieces
    return {
        "unanswered": len(judge._asked) + len(loop._asked) + len(loop._answers._fell_back),
        "live": len(gateway._idle) + len(gateway.scheduler.workflows),
        "histories": len(champion.evidence.histories) + len(loop._coverage._open),
        "await_grade": len(loop._watching._open),
        "await_grade_traits": len(judge._parts),
        "texts": len(judge._traits),
        "words": len(words._fresh) + len(words._older),
        "sessions": len(intake._normalizer._roots),
        "prompts": len(intake._inference._ends),
    }


def tell(gateway: Gateway) -> None:
    tell_ledgers(gateway, tables=tables(gateway))


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
        loop.add_signal_handler(signal.SIGUSR2, tell, gateway)
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()


if __name__ == "__main__":
    compose.run_loop(main())
