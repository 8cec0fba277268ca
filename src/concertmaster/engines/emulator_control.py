"""How the emulated engine is told to load and unload: as vLLM, as llama.cpp's router, as Ollama.

Each moves the same weights in the same time, and answers as the engine that it stands for:
vLLM and Ollama when it is done, llama.cpp at once.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from concertmaster.core.errors import InvalidRequestError
from concertmaster.core.fleet import Readiness
from concertmaster.engines.emulator import Emulator
from concertmaster.engines.http_server import HttpExchange

Routes = dict[str, tuple[str, Callable[[HttpExchange], None]]]


class ControlRoutes:
    """Handlers over one emulator."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._stuck = self._failed = False

    def routes(self) -> Routes:
        """Return what is answered, by path."""
        return {
            "/is_sleeping": ("GET", self._is_sleeping),
            "/sleep": ("POST", self._sleep),
            "/wake_up": ("POST", self._wake_up),
            "/collective_rpc": ("POST", self._reload),
            "/models": ("GET", self._list),
            "/models/load": ("POST", self._load),
            "/models/unload": ("POST", self._unload),
            "/api/version": ("GET", self._version),
            "/api/ps": ("GET", self._ps),
            "/api/generate": ("POST", self._generate),
        }

    # vLLM

    def _is_sleeping(self, exchange: HttpExchange) -> None:
        _send(exchange, {"is_sleeping": self._emulator.asleep})

    def _sleep(self, exchange: HttpExchange) -> None:
        level = exchange.query.get("level", "1")
        if level not in {"1", "2"}:
            raise InvalidRequestError(f"level must be 1 or 2, got {level!r}", param="level")
        lies = Readiness.SLEEPING if level == "1" else Readiness.DISK
        if not self._emulator.fall_asleep(lambda: exchange.respond(200), lies):
            self._busy(exchange)

    def _wake_up(self, exchange: HttpExchange) -> None:
        tags = exchange.query.get("tags", "")
        if tags not in {"", "weights", "kv_cache"}:
            raise InvalidRequestError(f"tags must be weights or kv_cache, got {tags!r}")
        if self._goes_wrong(exchange):
            return
        if tags == "weights" and self._emulator.residency == "asleep":
            exchange.respond(200)  # moved together with the KV cache, or read anew in between
        elif not self._emulator.wake_up(lambda: exchange.respond(200)):
            self._busy(exchange)

    def _reload(self, exchange: HttpExchange) -> None:
        method = _fields(exchange).get("method")
        if method != "reload_weights":
            raise InvalidRequestError(f"method must be reload_weights, got {method!r}")
        if not self._emulator.reload(lambda: _send(exchange, {"results": [None]})):
            self._busy(exchange)

    def _busy(self, exchange: HttpExchange) -> None:
        state = self._emulator.residency.replace("_", " ")
        message = f"the engine of {self._emulator.model_name} is {state}; try again later"
        error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
        _send(exchange, {"error": error}, 503)

    # llama.cpp

    def _list(self, exchange: HttpExchange) -> None:
        status: dict[str, object] = {"value": self._status()}
        if self._failed:
            status |= {"failed": True, "exit_code": 1}
        _send(exchange, {"object": "list", "data": [{"id": self._name, "status": status}]})

    def _status(self) -> str:
        if self._stuck:
            return "loading"
        states = {"awake": "loaded", "asleep": "unloaded", "falling_asleep": "loaded"}
        return states.get(self._emulator.residency, "loading")

    def _load(self, exchange: HttpExchange) -> None:
        if not self._names_model(exchange):
            return
        if self._status() != "unloaded":
            _send(exchange, _llama_error("model is already running"), 400)
            return
        wakes = self._emulator.faults.wakes
        self._failed, self._stuck = wakes == "fails", wakes == "never"
        if wakes == "well":
            self._emulator.load(lambda: None)
        _send(exchange, {"success": True})

    def _unload(self, exchange: HttpExchange) -> None:
        if not self._names_model(exchange):
            return
        if self._status() == "unloaded":
            _send(exchange, _llama_error("model is not running"), 400)
            return
        self._stuck = False
        self._emulator.fall_asleep(lambda: None, Readiness.DISK)
        _send(exchange, {"success": True})

    def _names_model(self, exchange: HttpExchange) -> bool:
        if _fields(exchange).get("model") == self._name:
            return True
        _send(exchange, _llama_error("model is not found"), 400)
        return False

    # Ollama

    def _version(self, exchange: HttpExchange) -> None:
        _send(exchange, {"version": "0.31.0"})

    def _ps(self, exchange: HttpExchange) -> None:
        loaded = self._emulator.residency in {"awake", "falling_asleep"}
        name = self._name if ":" in self._name else f"{self._name}:latest"
        entry = {"name": name, "model": name, "size_vram": 0}
        _send(exchange, {"models": [entry] if loaded else []})

    def _generate(self, exchange: HttpExchange) -> None:
        fields = _fields(exchange)
        if fields.get("model") != self._name:
            _send(exchange, {"error": f"model '{fields.get('model')}' not found"}, 404)
        elif fields.get("prompt"):
            _send(exchange, {"error": "the emulated engine answers prompts at /v1 only"}, 400)
        elif fields.get("keep_alive") == 0:
            self._emulator.fall_asleep(lambda: None, Readiness.DISK)
            _send(exchange, self._done("unload"))
        elif not self._goes_wrong(exchange) and not self._emulator.load(
            lambda: _send(exchange, self._done("load"))
        ):
            _send(exchange, {"error": "server busy, please try again"}, 503)

    def _done(self, reason: str) -> dict[str, object]:
        return {"model": self._name, "response": "", "done": True, "done_reason": reason}

    # All

    @property
    def _name(self) -> str:
        return self._emulator.model_name

    def _goes_wrong(self, exchange: HttpExchange) -> bool:
        """Fail to wake, or never answer, if the faults say so and it would have to wake."""
        wakes = self._emulator.faults.wakes
        if wakes == "well" or not self._emulator.asleep:
            return False
        if wakes == "fails":
            _send(exchange, {"error": "the emulator was told to fail (wakes)"}, 500)
        return True


def _fields(exchange: HttpExchange) -> dict[str, Any]:
    """Read a body that is a JSON object.

    Raises:
        InvalidRequestError: It is not.
    """
    try:
        return msgspec.json.decode(exchange.body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"request body: {error}") from None


def _llama_error(message: str) -> dict[str, object]:
    return {"error": {"code": 400, "message": message, "type": "invalid_request_error"}}


def _send(exchange: HttpExchange, body: object, status: int = 200) -> None:
    exchange.respond(status, msgspec.json.encode(body))
