"""vLLM's HTTP API in front of an emulated engine."""

import dataclasses
import itertools
from collections.abc import Callable

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from concertmaster.core.errors import CallerError
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.emulator_calls import (
    Ask,
    Kind,
    TokenizeBody,
    parse,
    read_ask,
    tokens_in,
)
from concertmaster.engines.emulator_control import ControlRoutes
from concertmaster.engines.emulator_embeddings import Embeddings
from concertmaster.engines.emulator_sinks import StreamedAnswer, WholeAnswer
from concertmaster.engines.faults import Faults
from concertmaster.engines.http_server import HttpExchange, HttpServer

VERSION = "0.33.0"
"""The release of vLLM whose API and metric names are spoken."""

_ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


async def serve(emulator: Emulator, host: str, port: int) -> "EmulatorServer":
    """Start the emulator and listen; port 0 takes a free one. Close what it returns."""
    emulator.start()
    server = EmulatorServer(emulator)
    await server.start(host, port)
    return server


class EmulatorServer(HttpServer):
    """An emulator's front. Closing it stops the emulator too."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__(self._handle)
        self._emulator = emulator
        self._numbers = itertools.count(1)
        self._routes: dict[str, tuple[str, Callable[[HttpExchange], None]]] = {
            "/health": ("GET", self._health),
            "/ping": ("GET POST", self._health),
            "/version": ("GET", self._version),
            "/load": ("GET", self._load),
            "/metrics": ("GET", self._metrics),
            **ControlRoutes(emulator).routes(),
            "/tokenize": ("POST", self._tokenize),
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/v1/embeddings": ("POST", self._embed),
            "/emulator/faults": ("GET POST", self._faults),
        }

    def close(self) -> None:
        """Stop listening, cut all connections, stop the emulator."""
        super().close()
        self._emulator.close()

    def _handle(self, exchange: HttpExchange) -> None:
        methods, handle = self._routes.get(exchange.path, ("", _not_found))
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if methods and method not in methods.split():
            allow = (("allow", ", ".join(methods.split())),)
            _fail(exchange, 405, f"{exchange.path} takes {methods}", headers=allow)
            return
        try:
            handle(exchange)
        except CallerError as error:
            _fail(exchange, error.status, str(error), param=error.param)

    # Answers.

    def _chat(self, exchange: HttpExchange) -> None:
        self._answer(exchange, "chat.completion", "chatcmpl")

    def _complete(self, exchange: HttpExchange) -> None:
        self._answer(exchange, "text_completion", "cmpl")

    def _embed(self, exchange: HttpExchange) -> None:
        embeddings = Embeddings(self._emulator, f"embd-{next(self._numbers)}", exchange)
        if self._is_able(exchange):
            embeddings.begin()

    def _answer(self, exchange: HttpExchange, kind: Kind, prefix: str) -> None:
        emulator = self._emulator
        number = f"{prefix}-{next(self._numbers)}"
        ask = read_ask(emulator, number, kind, exchange.headers, exchange.body)
        if not self._is_able(exchange):
            return
        emulator.settings.check_fits(ask.call)
        chosen_id = exchange.headers.get("x-request-id") or f"{emulator.rng.getrandbits(128):032x}"
        sink = _sink(exchange, ask, f"{prefix}-{chosen_id}", emulator.model_name)
        answer = emulator.answer(ask.call, sink, ask.finish_reason)
        exchange.on_disconnect = lambda: emulator.cancel(answer)

    def _is_able(self, exchange: HttpExchange) -> bool:
        """Whether a call can be answered; if not, say why."""
        emulator = self._emulator
        if emulator.residency != "awake":
            _not_ready(exchange, emulator)
        elif emulator.dropped:
            _fail(exchange, 500, "the weights were dropped by sleep and not reloaded")
        else:
            return not _fails_at_once(exchange, emulator)
        return False

    # Everything else.

    def _health(self, exchange: HttpExchange) -> None:
        if self._emulator.residency == "loading":
            _not_ready(exchange, self._emulator)
        else:
            exchange.respond(200)

    def _version(self, exchange: HttpExchange) -> None:
        _send(exchange, {"version": VERSION})

    def _load(self, exchange: HttpExchange) -> None:
        _send(exchange, {"server_load": self._emulator.live_calls})

    def _metrics(self, exchange: HttpExchange) -> None:
        exchange.respond(200, self._emulator.metrics.render(), CONTENT_TYPE_LATEST)

    def _tokenize(self, exchange: HttpExchange) -> None:
        count = tokens_in(parse(exchange.body, TokenizeBody).text())
        limit = self._emulator.max_model_tokens
        tokens = list(range(count))
        _send(exchange, {"count": count, "max_model_len": limit, "tokens": tokens})

    def _models(self, exchange: HttpExchange) -> None:
        model = {
            "id": self._emulator.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": self._emulator.model_name,
            "parent": None,
            "max_model_len": self._emulator.max_model_tokens,
            "permission": [],
        }
        _send(exchange, {"object": "list", "data": [model]})

    def _faults(self, exchange: HttpExchange) -> None:
        if exchange.method == "POST":
            self._emulator.faults = Faults.from_json(exchange.body)
        _send(exchange, dataclasses.asdict(self._emulator.faults))


def _fails_at_once(exchange: HttpExchange, emulator: Emulator) -> bool:
    """Answer with an error if that is a fault which was asked for."""
    faults = emulator.faults
    for status, name in ((500, "error_ratio"), (429, "full_ratio")):
        ratio = getattr(faults, name)
        if ratio and emulator.rng.random() < ratio:
            _fail(exchange, status, f"the emulator was told to fail ({name})")
            return True
    return False


def _sink(
    exchange: HttpExchange, ask: Ask, answer_id: str, model_name: str
) -> StreamedAnswer | WholeAnswer:
    kind = StreamedAnswer if ask.streams else WholeAnswer
    return kind(exchange, ask, answer_id, model_name)


def _send(exchange: HttpExchange, body: object) -> None:
    exchange.respond(200, msgspec.json.encode(body))


def _fail(
    exchange: HttpExchange,
    status: int,
    message: str,
    *,
    param: str | None = None,
    headers: tuple[tuple[str, str], ...] = (),
) -> None:
    """Answer with an error body as vLLM writes it: its code is the status."""
    error = {"message": message, "type": _ERROR_TYPES[status], "param": param, "code": status}
    exchange.respond(status, msgspec.json.encode({"error": error}), headers=headers)


def _not_found(exchange: HttpExchange) -> None:
    _fail(exchange, 404, f"there is nothing at {exchange.path}")


def _not_ready(exchange: HttpExchange, emulator: Emulator) -> None:
    state = emulator.residency.replace("_", " ")
    remedy = "POST /wake_up first" if emulator.residency == "asleep" else "try again later"
    _fail(exchange, 503, f"the engine of {emulator.model_name} is {state}; {remedy}")
