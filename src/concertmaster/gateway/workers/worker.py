"""The process of one worker: it listens once the scheduler has told it how.

    python -m concertmaster.gateway.workers.worker FOLDER NUMBER

It ends at SIGTERM, and when whoever started it is gone, which it sees by the end of its input.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from concertmaster.config import GatewaySection
from concertmaster.gateway.agent import Patience, hurry, see_off
from concertmaster.gateway.keyring import KeyCheck
from concertmaster.gateway.reach import tls_of
from concertmaster.gateway.server import keyring_of, listen
from concertmaster.gateway.workers.carrier import Carrier
from concertmaster.gateway.workers.frames import FromScheduler, Hello, Rules
from concertmaster.gateway.workers.hub import SIDE_SOCKET, SOCKET
from concertmaster.gateway.workers.side import SideRelay
from concertmaster.gateway.workers.stopping import told_to_stop
from concertmaster.gateway.workers.wire import Wire
from concertmaster.observe.logs import log_to

LOOK_S = 0.05
DRAIN_S = 30.0
LISTENING = b"listening\n"
_OUTPUT = 1


class Worker:
    """Keeps in touch with the scheduler, and serves.

    Args:
        folder: Has the scheduler's sockets.
        number: Its name.

    Attributes:
        carrier: Its desk; ``None`` until the scheduler has told the rules.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number
        self.carrier: Carrier | None = None
        self._rules: asyncio.Future[Rules] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()

    async def keep_in_touch(self) -> None:
        """Connect to the scheduler, and again whenever it is gone, for ever."""
        while True:
            try:
                await asyncio.get_running_loop().create_unix_connection(
                    self._wire, str(self._folder / SOCKET)
                )
            except OSError:
                await asyncio.sleep(LOOK_S)
                continue
            await self._lost.wait()
            self._lost.clear()

    def _wire(self) -> Wire[FromScheduler]:
        greeting = Hello(self._number, os.getpid())
        return Wire[FromScheduler](list[FromScheduler], self._hear, self._lose, greeting)

    def _hear(self, wire: Wire[FromScheduler], frame: FromScheduler) -> None:
        """Take in the rules; from then on the carrier listens."""
        assert isinstance(frame, Rules), "a scheduler tells the rules first"
        if not self._rules.done():
            self._rules.set_result(frame)
        if self.carrier is None:
            self.carrier = Carrier(frame, SideRelay(self._folder / SIDE_SOCKET), self._number)
        self.carrier.hear(wire, frame)
        self.carrier.connected(wire)
        wire.hear = self.carrier.hear

    def _lose(self, _: Wire[FromScheduler]) -> None:
        if self.carrier is not None:
            self.carrier.orphaned()
        self._lost.set()

    @property
    def settings(self) -> GatewaySection:
        """What the rules say first."""
        return self._rules.result().settings

    async def has_rules(self, stopped: asyncio.Event) -> bool:
        """Wait for the rules, or until told to stop before."""
        ending = asyncio.create_task(stopped.wait())
        await asyncio.wait((self._rules, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        return self._rules.done()

    async def serve(self, stopped: asyncio.Event, listening: Callable[[], object]) -> None:
        """Listen, tell so, and go on until told to stop; then let calls end."""
        rules, settings, carrier = self._rules.result(), self.settings, self.carrier
        assert carrier is not None, "the rules come first"
        async with AsyncExitStack() as stack:
            keyring = await stack.enter_async_context(keyring_of(settings.keys))
            judge = None if keyring is None else KeyCheck(keyring, carrier.count)
            at, tls = (settings.host, rules.port), tls_of("", settings)
            server = await listen(at, carrier, judge, tls, shared=True)
            patience = Patience(settings.head_timeout_s, settings.body_timeout_s)
            duties = (carrier.watch(), carrier.sweep(), hurry(carrier.agents, patience))
            tasks = [asyncio.create_task(duty) for duty in duties]
            listening()
            await stopped.wait()
            server.close()
            await _drain(carrier)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(carrier: Carrier) -> None:
    deadline_s = time.monotonic() + DRAIN_S
    while carrier.open_calls and time.monotonic() < deadline_s:  # noqa: ASYNC110  # polled once a life
        await asyncio.sleep(0.02)
    await see_off(carrier.agents)
    carrier.close()


async def run(folder: Path, number: int) -> None:
    """Serve until told to stop."""
    stopped = told_to_stop()
    worker = Worker(folder, number)
    touch = asyncio.create_task(worker.keep_in_touch())
    try:
        if await worker.has_rules(stopped):
            log_to(worker.settings.log)
            await worker.serve(stopped, lambda: os.write(_OUTPUT, LISTENING))
    finally:
        touch.cancel()


if __name__ == "__main__":
    uvloop.run(run(Path(sys.argv[1]), int(sys.argv[2])))
