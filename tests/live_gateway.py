"""A gateway in an event loop of its own thread, for tests that call it from outside."""

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

from gateway_rig import STREAM_HEAD, Heard, Rig, an_answer, events, over_upstreams

_T = TypeVar("_T")
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


@dataclass
class Live:
    """What runs in the other thread.

    Attributes:
        upstreams: One, or a list of them.
    """

    rig: Rig
    upstreams: Any
    loop: asyncio.AbstractEventLoop

    def do(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run something in the gateway's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(task, self.loop).result(60)


@contextmanager
def live(over: AbstractAsyncContextManager[tuple[Rig, Any]] | None = None) -> Iterator[Live]:
    """Keep a gateway running until the block ends; what it logged as an error fails the block."""
    ready: Future[tuple[Live, asyncio.Event]] = Future()

    async def main() -> None:
        ended = asyncio.Event()
        async with over or over_upstreams(answers_anything) as (rig, upstreams):
            ready.set_result((Live(rig, upstreams, asyncio.get_running_loop()), ended))
            await ended.wait()

    problems: list[BaseException] = []

    def run() -> None:
        try:
            uvloop.run(main())
        except BaseException as error:  # noqa: BLE001  # raised again in the test's thread
            problems.append(error)
            if not ready.done():
                ready.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    found, ended = ready.result(60)
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(ended.set)
        thread.join(60)
    if problems:
        raise problems[0]


async def answers_anything(heard: Heard, out: asyncio.StreamWriter) -> None:
    """Answer as an engine would, whatever it is asked."""
    asked: Any = json.loads(heard.body)
    if "embeddings" in heard.line:
        data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        out.write(a_json({"object": "list", "data": data, "usage": USAGE}))
    elif asked.get("stream") is True:
        delta = {"index": 0, "delta": {"content": "a"}, "text": "a", "finish_reason": None}
        last = {"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}
        chunk = {"object": "chat.completion.chunk", "choices": [delta]}
        out.write(STREAM_HEAD + events(chunk, {**chunk, "choices": [last], "usage": USAGE}))
    else:
        message = {"role": "assistant", "content": "a"}
        choice = {"index": 0, "message": message, "text": "a", "finish_reason": "stop"}
        out.write(a_json({"object": "chat.completion", "choices": [choice], "usage": USAGE}))


def a_json(content: object) -> bytes:
    return an_answer(json.dumps(content).encode(), headers=("content-type: application/json",))
