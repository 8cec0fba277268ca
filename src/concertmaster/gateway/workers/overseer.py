"""Starts the scheduler's process and its workers, again when one ends, and stops them in turn."""

import asyncio
import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from concertmaster.gateway.workers.stopping import told_to_stop
from concertmaster.gateway.workers.worker import LISTENING

RESTART_S = 0.5
"""How long after a process has ended unasked it is started again."""

END_S = 45.0
"""What a process gets to end by itself before it is killed; longer than calls are let end."""

SCHEDULER = "scheduler"
_WORKER = "concertmaster.gateway.workers.worker"
_log = logging.getLogger(__name__)

Process = asyncio.subprocess.Process


class Overseer:
    """Keeps one scheduler and several workers running.

    Args:
        scheduler: The command of the scheduler's process, for a folder and a port.
        host: Where workers listen.
        port: Likewise; 0 for any that is free.
        workers: How many.
        ready: Told the port once all of them listen.
    """

    def __init__(
        self,
        scheduler: Callable[[Path, int], Sequence[str]],
        *,
        host: str,
        port: int,
        workers: int,
        ready: Callable[[int], None],
    ) -> None:
        self._scheduler = scheduler
        self._at = (host, port)
        self._workers = workers
        self._ready = ready
        self._processes: dict[str, Process] = {}
        self._commands: dict[str, Sequence[str]] = {}
        self._stopped = asyncio.Event()

    async def run(self) -> int:
        """Run until told to stop; return the exit code: the scheduler's, if it never served.

        Raises:
            OSError: The port is taken or the host is not ours.
        """
        self._stopped = told_to_stop(at_end_of_input=False)
        with ExitStack() as stack:
            port = stack.enter_context(reserved(*self._at)).getsockname()[1]
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="concertmaster-")))
            self._commands = {
                SCHEDULER: self._scheduler(folder, port),
                **{
                    f"worker {number}": (sys.executable, "-m", _WORKER, str(folder), str(number))
                    for number in range(self._workers)
                },
            }
            return await self._oversee(port)

    async def _oversee(self, port: int) -> int:
        for name in self._commands:
            await self._start(name)
        try:
            code = await self._begin()
            if code is not None:
                return code
            self._ready(port)
            await self._keep_running()
        finally:
            await self._end()
        return 0

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._read_again)
        stopping = asyncio.create_task(self._stopped.wait())
        watches = [asyncio.create_task(self._watch(name)) for name in self._commands]
        try:
            await asyncio.wait([stopping, *watches], return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            for task in (stopping, *watches):
                task.cancel()
            await asyncio.gather(stopping, *watches, return_exceptions=True)

    async def _begin(self) -> int | None:
        """Wait until all workers listen; return the exit code if that will not be."""
        workers = [one for name, one in self._processes.items() if name != SCHEDULER]
        listening = asyncio.gather(*map(_listens, workers))
        ended = asyncio.ensure_future(self._processes[SCHEDULER].wait())
        stopped = asyncio.ensure_future(self._stopped.wait())
        waits: list[Awaitable[object]] = [listening, ended, stopped]
        await asyncio.wait(map(asyncio.ensure_future, waits), return_when="FIRST_COMPLETED")
        try:
            if ended.done():
                return ended.result()
            if stopped.done():
                return 0
            return None if all(listening.result()) else 1
        finally:
            for wait in (listening, ended, stopped):
                wait.cancel()
            await asyncio.gather(listening, ended, stopped, return_exceptions=True)

    async def _start(self, name: str) -> None:
        self._processes[name] = await asyncio.create_subprocess_exec(
            *self._commands[name],
            stdin=asyncio.subprocess.PIPE,  # its end tells that this process is gone
            stdout=None if name == SCHEDULER else asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )

    async def _watch(self, name: str) -> None:
        """Start a process again whenever it ends, for ever."""
        while True:
            process = self._processes[name]
            code = await process.wait()
            facts = {"event": "process_ended", "part": name, "pid": process.pid, "code": code}
            _log.error("%s ended with %d, starting it again", name, code, extra=facts)
            await asyncio.sleep(RESTART_S)
            await self._start(name)

    def _read_again(self) -> None:
        process = self._processes[SCHEDULER]
        if process.returncode is None:
            process.send_signal(signal.SIGHUP)

    async def _end(self) -> None:
        """End the scheduler, which lets calls end; then the workers, which have none any more."""
        await _end(self._processes[SCHEDULER])
        workers = [one for name, one in self._processes.items() if name != SCHEDULER]
        await asyncio.gather(*map(_end, workers))


def reserved(host: str, port: int) -> socket.socket:
    """Hold a port for workers, of this process and of no other gateway.

    Raises:
        OSError: It is taken or the host is not ours.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
        found = alone.getsockname()
    held = socket.socket(family, kind)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(found)
    return held


async def _listens(process: Process) -> bool:
    assert process.stdout is not None
    return await process.stdout.readline() == LISTENING


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
