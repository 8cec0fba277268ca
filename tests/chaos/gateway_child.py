"""A gateway in a process of its own, whose disk and clock can be made to fail.

Usage: gateway_child.py FOLDER [clean-end]

The folder holds ``fleet.toml``, and ``disk-full`` while its label store is to fail. SIGUSR1
moves its clock by the seconds in ``jump``. SIGUSR2 makes it check its ledgers and write what
it found to ``ledgers.json``. With ``clean-end`` it takes an answer that broke for a whole one,
as no gateway should.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

from concertmaster import compose
from concertmaster.config_files import load_fleet
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway import server, stream
from concertmaster.gateway.driver import Gateway
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.refusals import Refusals
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.loop import LearningLoop
from concertmaster.policies.catalog import policy
from concertmaster.predictors.recent import RecentLengths

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
FULL = FOLDER / "disk-full"


class SmallDisk(sqlite3.Connection):
    """A database on a disk that is full now and then."""

    def execute(self, *arguments: object) -> sqlite3.Cursor:
        if FULL.exists():
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(*arguments)  # type: ignore[arg-type]

    def executemany(self, *arguments: object) -> sqlite3.Cursor:
        if FULL.exists():
            raise OSError(28, "No space left on device")
        return super().executemany(*arguments)  # type: ignore[arg-type]


class Clock:
    """Seconds that jump when told to."""

    def __init__(self, speedup: float) -> None:
        self.ahead_s = 0.0
        self._speedup = speedup
        self._started_s = time.monotonic()

    def __call__(self) -> float:
        return (time.monotonic() - self._started_s + self.ahead_s) * self._speedup

    def jump(self) -> None:
        self.ahead_s += float((FOLDER / "jump").read_text())


def on_small_disk(path: Path, **settings: Any) -> sqlite3.Connection:  # noqa: ANN401  # sqlite3's
    if FULL.exists():
        raise OSError(28, "No space left on device")
    return sqlite3.connect(path, factory=SmallDisk, **settings)


def tell_ledgers(gateway: Gateway, **beside: object) -> None:
    scheduler, problem = gateway.scheduler, ""
    try:
        scheduler.validate()
    except AssertionError as error:
        problem = str(error) or "a ledger is wrong"
    replicas = scheduler.replicas.values()
    told = {
        "problem": problem,
        "open": gateway.open_exchanges,
        "waiting": len(scheduler.line),
        "in_flight": sum(len(replica.in_flight) for replica in replicas),
        "kv_blocks": sum(replica.kv.reserved_blocks for replica in replicas),
        "decode_tokens": sum(replica.decode_tokens for replica in replicas),
        "hedges": dict(scheduler.races.outcomes),
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208  # one look
        **beside,
    }
    written = FOLDER / "ledgers.part"
    written.write_text(json.dumps(told))
    written.rename(FOLDER / "ledgers.json")


def take_cuts_for_ends() -> None:
    """Break the rule that a cut answer must not look finished."""

    def end(self: Refusals, exchange: Exchange) -> None:
        exchange.caller.write(stream.END)
        self._end(exchange, 502)
        exchange.caller.finished(keep_alive=False)

    Refusals._cut = end  # type: ignore[method-assign]


async def main() -> None:
    file = load_fleet(FOLDER / "fleet.toml")
    fleet = compose.build_fleet(file, name="chaos", served=True)
    clock = Clock(file.emulator.speedup)
    server.scaled_clock = lambda _: clock  # type: ignore[attr-defined,assignment]  # its own pace
    predictor = LearningLoop(
        RecentLengths(),
        time.perf_counter,
        store=FeedbackStore(FOLDER / "labels.sqlite", connect=on_small_disk),
    )
    urls = {ReplicaId(name): url for name, url in compose.endpoints(file, where="fleet").items()}
    running = server.running_gateway(
        Scheduler(fleet, policy(file.gateway.policy), random.Random(0)),
        predictor,
        urls,
        file.gateway,
        speedup=file.emulator.speedup,
        drain_s=2.0,
    )
    async with running as (gateway, _):
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, clock.jump)
        loop.add_signal_handler(signal.SIGUSR2, tell_ledgers, gateway)
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()


if __name__ == "__main__":
    if "clean-end" in sys.argv:
        take_cuts_for_ends()
    compose.run_loop(main())
