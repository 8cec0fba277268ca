"""Engines and a gateway as processes, which can be killed and started again."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from chaos.plan import ALL, ENGINES, SPEEDUP, Step

START_S = 60.0
_NEVER_DRAWN = range(20_000, 32_000)
"""Ports below those that systems draw from for outgoing connections."""

_CLI = "from concertmaster.cli import main; main()"
_MODEL = 'model = "llama-3.1-8b-instruct"\ngpu = "a100-80g"\n'
TIMEOUTS = {
    "connect_timeout_s": 1.0,
    "first_byte_timeout_s": 1.5,
    "chunk_timeout_s": 1.0,
    "total_timeout_s": 6.0,
}
"""Of the gateway; a call that times out as a whole is the slowest that there is."""

SLACK_S = 3.0
"""What a sweep, a busy machine and the client may add."""


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, nor will connect from while their server is down."""
    ports: list[int] = []
    for port in random.Random(os.getpid()).sample(_NEVER_DRAWN, len(_NEVER_DRAWN)):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError(f"expected {count} free ports, found {len(ports)}")


class Yard:
    """All processes of a run.

    Attributes:
        gateway_ups: When the gateway began to answer, and when it was killed, in turn.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._engines: list[subprocess.Popen[bytes]] = []
        self._gateway: subprocess.Popen[bytes] | None = None
        *self._ports, self._port = free_ports(ENGINES + 1)
        self.url = f"http://127.0.0.1:{self._port}"
        self._log = (folder / "log.txt").open("wb")
        (folder / "fleet.toml").write_text(self._fleet())
        (folder / "engine.toml").write_text(f"{_MODEL}speedup = {SPEEDUP}\nmax_sequences = 8\n")

    def _fleet(self) -> str:
        settings = "".join(f"{name} = {value}\n" for name, value in TIMEOUTS.items())
        urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        return (
            f"[gateway]\nport = {self._port}\nhealth_interval_s = 0.3\nbreaker_pause_s = 0.3\n"
            f"most_open = 60\n{settings}"
            f"[emulator]\nspeedup = {SPEEDUP}\n"
            f'[[pools]]\nname = "p"\n{_MODEL}replicas = {ENGINES}\nmax_sequences = 8\n'
            f"endpoints = {json.dumps(urls)}\n"
        )

    async def start(self) -> None:
        """Start everything, and wait until it answers."""
        self._engines = [self._start_engine(number) for number in range(ENGINES)]
        self._start_gateway()
        await self._answers([f"http://127.0.0.1:{port}/health" for port in self._ports])
        await self._answers([f"{self.url}/readyz"])

    def stop(self) -> None:
        """End everything that runs."""
        for process in [*self._engines, self._gateway]:
            if process is not None:
                process.kill()
                process.wait()
        self._log.close()

    def _start_engine(self, number: int) -> subprocess.Popen[bytes]:
        config, port = str(self._folder / "engine.toml"), str(self._ports[number])
        return self._start("-c", _CLI, "engine", "-c", config, "--port", port)

    def _start_gateway(self) -> None:
        child = str(Path(__file__).with_name("gateway_child.py"))
        self._gateway = self._start(child, str(self._folder), *self._options)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603  # ours
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=self._log,
            stderr=self._log,
        )

    async def _answers(self, urls: Iterable[str]) -> None:
        async with aiohttp.ClientSession() as http:
            for url in urls:
                async with asyncio.timeout(START_S):
                    while not await _is_up(http, url):  # noqa: ASYNC110  # another process
                        await asyncio.sleep(0.05)

    async def play(self, step: Step) -> None:
        """Let something go wrong for a while, and put it right again."""
        match step.kind:
            case "faults":
                await self._tell(step.engine, step.faults)
                await asyncio.sleep(step.lasts_s)
                await self._tell(step.engine, {})
            case "kill engine":
                await self._kill_engine(step)
            case "kill gateway":
                await self.restart_gateway()
            case "fill disk":
                (self._folder / "disk-full").touch()
                await asyncio.sleep(step.lasts_s)
                (self._folder / "disk-full").unlink(missing_ok=True)
            case "jump clock":
                (self._folder / "jump").write_text(str(step.jump_s))
                self._signal(signal.SIGUSR1)

    async def _kill_engine(self, step: Step) -> None:
        self._engines[step.engine].kill()
        self._engines[step.engine].wait()
        await asyncio.sleep(step.lasts_s)
        if self._engines[step.engine].poll() is not None:
            self._engines[step.engine] = self._start_engine(step.engine)
        await self._answers([f"http://127.0.0.1:{self._ports[step.engine]}/health"])

    async def restart_gateway(self) -> None:
        """Kill the gateway, and start it on the same port."""
        assert self._gateway is not None
        self._gateway.kill()
        self._gateway.wait()
        self._start_gateway()
        await self._answers([f"{self.url}/livez"])

    def _signal(self, number: signal.Signals) -> None:
        if self._gateway is not None and self._gateway.poll() is None:
            self._gateway.send_signal(number)

    async def _tell(self, engine: int, faults: dict[str, float | bool]) -> None:
        timeout = aiohttp.ClientTimeout(total=5)
        for port in self._ports if engine == ALL else [self._ports[engine]]:
            url = f"http://127.0.0.1:{port}/emulator/faults"
            with suppress(aiohttp.ClientError, TimeoutError):  # if killed, it starts without
                async with aiohttp.ClientSession(timeout=timeout) as http:
                    await http.post(url, data=json.dumps(faults))

    async def ledgers(self) -> dict[str, Any]:
        """Ask the gateway to check its ledgers; return what it found."""
        written = self._folder / "ledgers.json"
        written.unlink(missing_ok=True)
        self._signal(signal.SIGUSR2)
        async with asyncio.timeout(10):
            while not written.exists():  # noqa: ASYNC110  # a file has no event
                await asyncio.sleep(0.05)
        told: dict[str, Any] = json.loads(written.read_text())
        return told

    async def words(self, tokens: int) -> list[str]:
        """Ask an engine itself what it writes, token by token."""
        body = {"model": "llama-3.1-8b-instruct", "max_tokens": tokens, "ignore_eos": True}
        body |= {"messages": [{"role": "user", "content": "Say it."}], "stream": True}
        url = f"http://127.0.0.1:{self._ports[0]}/v1/chat/completions"
        async with aiohttp.ClientSession() as http, http.post(url, json=body) as answer:
            lines = (await answer.read()).split(b"\n\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        return [e["choices"][0]["delta"]["content"] for e in events][-tokens:]

    def log(self) -> str:
        """Return the last of what the processes said."""
        return (self._folder / "log.txt").read_bytes()[-4000:].decode(errors="replace")


async def _is_up(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
