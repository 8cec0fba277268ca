"""OpenVINO GenAI's continuous batching behind the OpenAI API, as a process.

``python openvino_engine.py MODEL.gguf NAME PORT KV_BLOCKS MAX_SEQUENCES``, until SIGTERM.
One thread steps the engine; metrics have vLLM's names.
"""

import asyncio
import itertools
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import openvino_genai as genai
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    generate_latest,
)

from concertmaster.engines.http_server import HttpExchange, HttpServer

IDLE_S = 0.5
LABELS = ("model_name",)


@dataclass
class Answer:
    """One call: what the engine is asked, and what hears of its tokens.

    Attributes:
        tell: Called on the event loop with fresh token ids; ``None`` once there are no more.
    """

    prompt: Any
    most_tokens: int
    ignore_eos: bool
    tell: Callable[[list[int] | None], object]
    handle: Any = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class Metrics:
    """Gauges by vLLM's names."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str) -> Gauge:
            return Gauge(f"vllm:{name}", name, LABELS, registry=self.registry).labels(model)

        self.running = gauge("num_requests_running")
        self.waiting = gauge("num_requests_waiting")
        self.kv_ratio = gauge("kv_cache_usage_perc")
        self.generated = Counter(
            "vllm:generation_tokens", "generation_tokens", LABELS, registry=self.registry
        ).labels(model)


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, path: str, model: str, *, kv_blocks: int, max_sequences: int) -> None:
        settings = genai.SchedulerConfig()
        settings.num_kv_blocks = kv_blocks
        settings.max_num_seqs = max_sequences
        settings.max_num_batched_tokens = 256
        settings.enable_prefix_caching = True
        self._pipeline = genai.ContinuousBatchingPipeline(
            path, settings, "CPU", {"INFERENCE_NUM_THREADS": 1}
        )
        self.tokenizer = self._pipeline.get_tokenizer()
        self.metrics = Metrics(model)
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.Queue[Answer | None] = queue.Queue()
        self._numbers = itertools.count()
        self._live: list[Answer] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, answer: Answer) -> None:
        """Take a call in."""
        self._inbox.put(answer)

    def close(self) -> None:
        """End the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._take_in():
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            self._note()
            self._live = [answer for answer in self._live if self._pass_on(answer)]

    def _take_in(self) -> bool:
        """Hand calls over; wait for one while there is nothing to do."""
        wait = not self._live
        while True:
            try:
                answer = self._inbox.get(timeout=IDLE_S) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if answer is None:
                return False
            wait = False
            settings = genai.GenerationConfig()
            settings.max_new_tokens = answer.most_tokens
            settings.ignore_eos = answer.ignore_eos
            number = next(self._numbers)
            answer.handle = self._pipeline.add_request(number, answer.prompt, settings)
            self._live.append(answer)

    def _note(self) -> None:
        seen = self._pipeline.get_metrics()
        self.metrics.running.set(seen.scheduled_requests)
        self.metrics.waiting.set(max(0, seen.requests - seen.scheduled_requests))
        self.metrics.kv_ratio.set(seen.cache_usage / 100)

    def _pass_on(self, answer: Answer) -> bool:
        """Tell of new tokens; say whether there may be more."""
        if answer.cancelled.is_set():
            answer.handle.cancel()
            return False
        while answer.handle.can_read():
            for part in answer.handle.read().values():
                self.metrics.generated.inc(len(part.generated_ids))
                self._loop.call_soon_threadsafe(answer.tell, list(part.generated_ids))
        going_on = bool(answer.handle.get_status() == genai.GenerationStatus.RUNNING)
        if not going_on:
            self._loop.call_soon_threadsafe(answer.tell, None)
        return going_on


class Sink:
    """Writes one answer out as tokens come: whole, or as server-sent events."""

    def __init__(
        self, exchange: HttpExchange, body: dict[str, Any], prompt_tokens: int, engine: Engine
    ) -> None:
        self._exchange = exchange
        self._body = body
        self._engine = engine
        self._prompt_tokens = prompt_tokens
        self._chat = "messages" in body
        self._tokens: list[int] = []
        if body.get("stream"):
            exchange.start(200, [("content-type", "text/event-stream")])

    def __call__(self, tokens: list[int] | None) -> None:
        """Take new tokens in, or the end."""
        streams = self._body.get("stream")
        if tokens is not None:
            self._tokens += tokens
            if streams:
                self._frame([self._choice(self._engine.tokenizer.decode(tokens), None)])
            return
        reason = "length" if len(self._tokens) >= self._body["max_tokens"] else "stop"
        if not streams:
            text = self._engine.tokenizer.decode(self._tokens)
            whole = {**self._head(), "choices": [self._choice(text, reason)]}
            self._exchange.respond(200, msgspec.json.encode({**whole, "usage": self._usage()}))
            return
        self._frame([self._choice("", reason)])
        if (self._body.get("stream_options") or {}).get("include_usage"):
            self._frame([], usage=self._usage())
        self._exchange.end(b"data: [DONE]\n\n")

    def _frame(self, choices: list[Any], **more: object) -> None:
        payload = {**self._head(), "choices": choices, **more}
        self._exchange.write(b"data: " + msgspec.json.encode(payload) + b"\n\n")

    def _head(self) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        if self._chat and self._body.get("stream"):
            kind += ".chunk"
        return {"id": "tiny-1", "object": kind, "created": 0, "model": self._body["model"]}

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        place = "delta" if self._body.get("stream") else "message"
        what: dict[str, Any] = {place: said} if self._chat else {"text": text}
        return {"index": 0, "finish_reason": reason, **what}

    def _usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": self._prompt_tokens, "completion_tokens": len(self._tokens)}
        return {**counts, "total_tokens": sum(counts.values())}


class Front(HttpServer):
    """The API."""

    def __init__(self, engine: Engine, model: str) -> None:
        super().__init__(self._handle)
        self._engine = engine
        self._model = model

    def _handle(self, exchange: HttpExchange) -> None:
        if exchange.path in {"/v1/chat/completions", "/v1/completions"}:
            self._complete(exchange)
        elif exchange.path == "/metrics":
            body = generate_latest(self._engine.metrics.registry)
            exchange.respond(200, body, CONTENT_TYPE_LATEST)
        elif exchange.path == "/v1/models":
            models = {"object": "list", "data": [{"id": self._model, "object": "model"}]}
            exchange.respond(200, msgspec.json.encode(models))
        else:
            exchange.respond(200 if exchange.path == "/health" else 404)

    def _complete(self, exchange: HttpExchange) -> None:
        body = msgspec.json.decode(exchange.body)
        body.setdefault("max_tokens", body.pop("max_completion_tokens", 16))
        text = body.get("prompt", "")
        if "messages" in body:
            text = self._engine.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True
            )
        prompt = self._engine.tokenizer.encode(text).input_ids
        sink = Sink(exchange, body, int(prompt.shape[1]), self._engine)
        answer = Answer(prompt, body["max_tokens"], bool(body.get("ignore_eos")), sink)
        exchange.on_disconnect = answer.cancelled.set
        self._engine.ask(answer)


async def main(path: str, model: str, port: int, kv_blocks: int, max_sequences: int) -> None:
    """Serve until SIGTERM."""
    engine = Engine(path, model, kv_blocks=kv_blocks, max_sequences=max_sequences)
    front = Front(engine, model)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await front.start("127.0.0.1", port)
    print("ready", front.port, flush=True)  # noqa: T201  # whoever started it waits for this
    await ended.wait()
    front.close()
    engine.close()


if __name__ == "__main__":
    path, model, *sizes = sys.argv[1:]
    asyncio.run(main(path, model, *map(int, sizes)))
