"""When a process is to end."""

import asyncio
import os
import signal

_INPUT = 0


def told_to_stop(*, at_end_of_input: bool = True) -> asyncio.Event:
    """Return what is set at SIGTERM or SIGINT.

    Args:
        at_end_of_input: Also when the input ends: whoever holds its other end is gone.
    """
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if at_end_of_input:
        loop.add_reader(_INPUT, lambda: _read(stopped))
    return stopped


def _read(stopped: asyncio.Event) -> None:
    if not os.read(_INPUT, 4096):
        asyncio.get_running_loop().remove_reader(_INPUT)
        stopped.set()
