"""How engines are told to load a model and to let go of it: one way each for vLLM and others.

Each way is a few HTTP calls. They wait until the engine has done what was asked; whoever calls
sets a limit to that.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from concertmaster.core.fleet import Readiness
from concertmaster.engines.openai_http import fetch

ControlKind: TypeAlias = Literal["vllm", "llama.cpp", "ollama", "process", "none"]
"""As a fleet file names them; ``process`` is none of HTTP but a program of this machine."""

CALL_TIMEOUT_S = 600.0
QUESTION_TIMEOUT_S = 10.0
RETRY_S = 0.5
"""Between two tries with an engine that is busy with the one before."""

POLL_S = 0.1
"""Between two looks at how far an engine has come."""

NEAR = (Readiness.SLEEPING, Readiness.HOST)
"""Where an engine that sleeps keeps its weights: in RAM."""


class ControlError(OSError):
    """An engine did not do what it was told; the message says what it answered."""


class EngineControl(Protocol):
    """Brings a model into service on an engine that runs, and takes it out."""

    health_path: str
    """What answers 200 while the engine can be talked to."""

    async def load(self, url: str, model: str, lay: Readiness) -> None:
        """Make it ready to answer; ``lay`` is where its weights are taken to lie.

        Raises:
            OSError: It will not be ready.
        """

    async def unload(self, url: str, model: str, to: Readiness) -> Readiness:
        """Free its GPU memory; return where its weights lie, as near to ``to`` as it can.

        Calls under way are cut by every engine, so there must be none.

        Raises:
            OSError: It keeps its memory.
        """

    async def resident(self, url: str, model: str) -> bool:
        """Whether it could answer now.

        Raises:
            OSError: It cannot be asked.
        """


class VllmControl:
    """vLLM with ``--enable-sleep-mode`` and ``VLLM_SERVER_DEV_MODE=1``.

    Level 1 keeps the weights in RAM; level 2 drops them, and they are read again on waking.
    """

    health_path = "/health"

    async def load(self, url: str, model: str, lay: Readiness) -> None:
        """Wake it, and have it read its weights again where they were dropped."""
        if lay in (Readiness.DISK, Readiness.REMOTE):
            await _post_patiently(url, "/wake_up?tags=weights")
            await _post_patiently(url, "/collective_rpc", {"method": "reload_weights"})
            await _post_patiently(url, "/wake_up?tags=kv_cache")
        else:
            await _post_patiently(url, "/wake_up")

    async def unload(self, url: str, model: str, to: Readiness) -> Readiness:
        """Put it to sleep."""
        level = 1 if to in NEAR else 2
        await _post(url, f"/sleep?level={level}")
        return Readiness.SLEEPING if level == 1 else Readiness.DISK

    async def resident(self, url: str, model: str) -> bool:
        """Ask whether it sleeps; an engine that does not know the question is awake."""
        status, body = await _get(url, "/is_sleeping")
        return not (status == 200 and b"true" in body)


class LlamaCppControl:
    """``llama-server`` as a router, started without a model."""

    health_path = "/health"

    async def load(self, url: str, model: str, lay: Readiness) -> None:
        """Ask for the model, and wait until its process serves."""
        state = await self._state(url, model)
        if state in {"unloaded", ""}:
            await _post(url, "/models/load", {"model": model})
            state = "loading"
        while state in {"loading", "downloading"}:
            await asyncio.sleep(POLL_S)
            state = await self._state(url, model)
        if state not in _LLAMA_SERVES:
            raise ControlError(f"its model is {state or 'unknown'} after POST /models/load")

    async def unload(self, url: str, model: str, to: Readiness) -> Readiness:
        """End the model's process; the weights may stay in the page cache, which is not ours."""
        if await self._state(url, model) != "unloaded":
            await _post(url, "/models/unload", {"model": model})
        while await self._state(url, model) != "unloaded":  # noqa: ASYNC110  # polled over HTTP
            await asyncio.sleep(POLL_S)
        return Readiness.DISK

    async def resident(self, url: str, model: str) -> bool:
        """Look the model up; one that idles asleep wakes by itself."""
        return await self._state(url, model) in _LLAMA_SERVES

    async def _state(self, url: str, model: str) -> str:
        for entry in await _listed(url, "/models", "data"):
            if entry.get("id") == model:
                status = entry.get("status")
                return str(status.get("value", "")) if isinstance(status, dict) else "loaded"
        return ""


_LLAMA_SERVES = frozenset({"loaded", "sleeping"})


class OllamaControl:
    """Ollama: an empty prompt loads a model, and ``keep_alive`` says how long it stays.

    Every call sets that time anew, so the server must run with ``OLLAMA_KEEP_ALIVE=-1``.
    """

    health_path = "/api/version"

    async def load(self, url: str, model: str, lay: Readiness) -> None:
        """Load it for good; the answer comes once it is there."""
        await _post_patiently(url, "/api/generate", {"model": model, "keep_alive": -1})

    async def unload(self, url: str, model: str, to: Readiness) -> Readiness:
        """Have it go at once, and wait until it has gone."""
        await _post(url, "/api/generate", {"model": model, "keep_alive": 0})
        while await self.resident(url, model):  # noqa: ASYNC110  # polled over HTTP
            await asyncio.sleep(POLL_S)
        return Readiness.DISK

    async def resident(self, url: str, model: str) -> bool:
        """Look for it among the models in memory; a name without a tag means ``latest``."""
        names = {model, model if ":" in model else f"{model}:latest"}
        return any(entry.get("name") in names for entry in await _listed(url, "/api/ps", "models"))


class NoControl:
    """An engine that always runs, or that somebody else starts and stops."""

    health_path = "/health"

    async def load(self, url: str, model: str, lay: Readiness) -> None:
        """See whether it is there."""
        status, _ = await _get(url, self.health_path)
        if status != 200:
            raise ControlError(f"GET {self.health_path} answered {status}, and control is none")

    async def unload(self, url: str, model: str, to: Readiness) -> Readiness:
        """Refuse."""
        raise ControlError("control is none")

    async def resident(self, url: str, model: str) -> bool:
        """Take it to be there."""
        return True


CONTROLS: Mapping[ControlKind, EngineControl] = {
    "vllm": VllmControl(),
    "llama.cpp": LlamaCppControl(),
    "ollama": OllamaControl(),
    "process": NoControl(),
    "none": NoControl(),
}


def control_misfit(
    kind: ControlKind, *, has_command: bool, state: Readiness, stopped: Readiness | None
) -> tuple[str, str] | None:
    """Return what is wrong with a kind of control for a pool, and what to do; ``None`` if nothing.

    Args:
        kind: How its engines are controlled.
        has_command: Whether the gateway runs them.
        state: Where weights lie at the start.
        stopped: Where they are said to lie once a replica was stopped, if that is said.
    """
    if kind == "process" and not has_command:
        return "a process needs a command", 'add command = ["PROGRAM", ...]'
    if has_command and kind not in ("process", "vllm"):
        problem = f'expected "process", or "vllm" if it can sleep too, found "{kind}"'
        return problem, "the gateway starts and ends a command itself"
    if kind == "none" and state is not Readiness.RUNNING:
        return f'nothing wakes replicas whose state is "{state.value}"', 'set state = "running"'
    if stopped in NEAR and kind not in ("vllm", "none"):
        return f'"{kind}" keeps no weights in RAM once stopped', 'set stopped = "disk"'
    return None


async def _post(url: str, path: str, fields: Mapping[str, object] | None = None) -> None:
    status, body = await _ask(url, path, fields)
    if status != 200:
        raise _refused(path, status, body)


async def _post_patiently(url: str, path: str, fields: Mapping[str, object] | None = None) -> None:
    """Ask until the answer is not that it is busy: it may still be falling asleep."""
    while True:
        status, body = await _ask(url, path, fields)
        if status == 200:
            return
        if status != 503:
            raise _refused(path, status, body)
        await asyncio.sleep(RETRY_S)


async def _ask(url: str, path: str, fields: Mapping[str, object] | None) -> tuple[int, bytes]:
    body = b"" if fields is None else msgspec.json.encode(fields)
    return await fetch("POST", url, path, body=body, timeout_s=CALL_TIMEOUT_S)


async def _get(url: str, path: str) -> tuple[int, bytes]:
    return await fetch("GET", url, path, timeout_s=QUESTION_TIMEOUT_S)


async def _listed(url: str, path: str, key: str) -> list[dict[str, Any]]:
    """Return the objects of a list that an engine answers with.

    Raises:
        ControlError: It answers with something else.
    """
    status, body = await _get(url, path)
    try:
        found = msgspec.json.decode(body) if status == 200 else None
    except msgspec.DecodeError:
        found = None
    entries = found.get(key) if isinstance(found, dict) else None
    if entries is None and isinstance(found, dict) and key in found:
        return []  # Go writes an empty list as null
    if not isinstance(entries, list):
        raise ControlError(f"GET {path} answered {status} without a list of {key}")
    return [entry for entry in entries if isinstance(entry, dict)]


def _refused(path: str, status: int, body: bytes) -> ControlError:
    said = body[:200].decode(errors="replace").strip()
    return ControlError(f"POST {path} answered {status}" + (f": {said}" if said else ""))
