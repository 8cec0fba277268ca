"""Processes that run tasks beside this one, and end with it."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial


@contextmanager
def parallel(
    jobs: int, begin: Callable[..., object] | None = None, *facts: object
) -> Iterator[ProcessPoolExecutor]:
    """Start processes, which are ended at once should the block be left early.

    Ctrl-C is this process's to answer: theirs ignore it.

    Args:
        jobs: How many.
        begin: Called once in each of them.
        facts: What it is given.
    """
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(jobs, initializer=partial(_begin, begin, facts))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(wait=True)


def _begin(begin: Callable[..., object] | None, facts: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin is not None:
        begin(*facts)
