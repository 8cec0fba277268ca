"""Replicas that come and go behind a live gateway: processes of this machine, and sleepers."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from builders import a_fleet, a_pool
from concertmaster.core.events import ReplicaDemoted, ReplicaDied, ReplicaReady
from concertmaster.core.fleet import Fleet, Readiness, ReplicaId, ScalingLimits
from concertmaster.engines.control import ControlKind
from concertmaster.gateway import control, processes
from concertmaster.policies.catalog import policy
from engine_process import SEATS
from gateway_rig import (
    Heard,
    Rig,
    Upstream,
    a_rig,
    an_answer,
    exactly,
    over_engines,
    play,
    until,
)

HERE = Path(__file__).parent
SPEEDUP = 20.0
QUICK = (
    "reactive:interval_s=2,settle_s=10",
    "foreseen:interval_s=2,settle_s=10,memory_s=10,clear_s=5",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def a_fleet_of_processes(serving: int) -> Fleet:
    pool = a_pool(max_sequences=SEATS, least_replicas=0)
    states = {f"p-{i}": Readiness.DISK for i in range(serving, 2)}
    return a_fleet(pool, replicas=2, states=states, limits=ScalingLimits(cooldown_s=1.0))


@asynccontextmanager
async def over_processes(
    serving: int,
    command: Sequence[str] = (),
    **settings: Any,  # noqa: ANN401
) -> AsyncIterator[Rig]:
    """Start a gateway that starts and ends its two engines itself."""
    ports = free_ports(2)
    program = (sys.executable, str(HERE / "engine_process.py"))
    commands = {
        ReplicaId(f"p-{i}"): command or (*program, str(port), str(SPEEDUP))
        for i, port in enumerate(ports)
    }
    urls = {
        str(name): f"http://127.0.0.1:{port}" for name, port in zip(commands, ports, strict=True)
    }
    fleet = a_fleet_of_processes(serving)
    async with a_rig(
        urls, fleet=fleet, speedup=SPEEDUP, commands=commands, health_interval_s=0.1, **settings
    ) as rig:
        yield rig


def running(rig: Rig) -> list[asyncio.subprocess.Process]:
    return list(rig.gateway.service.control._processes.values())  # type: ignore[attr-defined]


async def burst(rig: Rig, calls: int, tokens: int) -> None:
    """Make calls at once, each a workflow of its own; every one is served in full."""
    final = {"x_dynamo_session_final": "true"}
    asked = (
        rig.call(exactly(tokens), x_dynamo_session_id=f"{tokens}-{i}", **final)
        for i in range(calls)
    )
    replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * calls
    assert {reply.json["usage"]["completion_tokens"] for reply in replies} == {tokens}


@pytest.mark.parametrize("name", QUICK)
def test_processes_start_for_a_burst_and_end_after_it_to_zero_and_back(name: str) -> None:
    async def main() -> None:
        async with over_processes(1, policy=policy(f"least-tokens/{name}"), drain_s=1.0) as rig:
            assert len(running(rig)) == 1
            await burst(rig, 6 * SEATS, 1500)
            assert ReplicaReady(ReplicaId("p-1")) in rig.history
            await until(lambda: not running(rig), "all processes ended", seconds=10.0)
            await until(lambda: not rig.gateway.service.control._errands._tasks, "stopped")  # type: ignore[attr-defined]
            assert all(one.alive for one in rig.gateway.scheduler.replicas.values())
            ups = sum(isinstance(event, ReplicaReady) for event in rig.history)
            await burst(rig, 1, 20)
            await rig.idle()
            assert sum(isinstance(event, ReplicaReady) for event in rig.history) > ups
            assert not [event for event in rig.history if isinstance(event, ReplicaDied)]
            left = running(rig)
        assert all(one.returncode is not None for one in left), "a process outlived the gateway"

    play(main())


def test_a_process_that_ends_unasked_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with over_processes(serving=1) as rig:
            (process,) = running(rig)
            process.kill()
            await until(lambda: not rig.replica().alive)
            await until(lambda: rig.replica().alive, "started again", seconds=10.0)
            await burst(rig, 1, 20)

    monkeypatch.setattr(processes, "RESTART_S", 0.01)
    play(main())


@pytest.mark.parametrize("command", [("/no/such/program",), (sys.executable, "-c", "exit(3)")])
def test_a_process_that_does_not_come_up_is_dead(command: Sequence[str]) -> None:
    async def main() -> None:
        async with over_processes(0, command) as rig:
            first = asyncio.ensure_future(rig.call(exactly(2)))
            both = [ReplicaDied(ReplicaId(name)) for name in ("p-0", "p-1")]
            await until(lambda: all(event in rig.history for event in both))
            assert (await rig.call(exactly(2))).status == 503
            assert [rig.history.count(event) for event in both] == [1, 1]
            assert not running(rig)
            first.cancel()

    play(main())


def test_a_process_that_can_sleep_sleeps_to_stay_near_and_ends_to_go_to_disk() -> None:
    async def main() -> None:
        controls: dict[ReplicaId, ControlKind] = {
            ReplicaId("p-0"): "vllm",
            ReplicaId("p-1"): "vllm",
        }
        async with over_processes(1, controls=controls, drain_s=1.0) as rig:
            service, name = rig.gateway.service, ReplicaId("p-0")
            (process,) = running(rig)
            service.control.stop(name, Readiness.SLEEPING)
            await until(lambda: ReplicaDemoted(name, Readiness.SLEEPING) in rig.history)
            assert await service.control.is_asleep(name)
            service.control.start(name)
            await until(lambda: ReplicaReady(name) in rig.history)
            assert running(rig) == [process]
            service.control.stop(name, Readiness.DISK)
            await until(lambda: ReplicaDemoted(name, Readiness.DISK) in rig.history)
            assert (running(rig), process.returncode is None) == ([], False)
            assert (await rig.call(exactly(2))).status == 200
            assert running(rig) != [process]

    play(main())


def test_a_vllm_of_somebody_else_that_sleeps_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with over_engines(fleet=a_sleepy_fleet()) as (rig, (engine,)):
            service, name = rig.gateway.service, ReplicaId("p-0")
            near = ReplicaDemoted(name, Readiness.SLEEPING)
            for to, count in ((Readiness.SLEEPING, 1), (Readiness.DISK, 2), (Readiness.DISK, 3)):
                service.control.stop(name, to)
                await until(lambda count=count: rig.history.count(near) == count)  # type: ignore[misc]
            assert (engine.residency, engine.dropped) == ("asleep", False)
            assert (await rig.call(exactly(2))).status == 200

    monkeypatch.setattr(control, "STAY_S", 0.01)
    play(main())
    assert sum("cannot be stopped: a vLLM that sleeps" in one for one in caplog.messages) == 1


def test_a_process_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import signal, http.server as h, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.send_header('content-length', '0')\n"
        "        self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "h.HTTPServer(('127.0.0.1', {port}), H).serve_forever()\n"
    )
    (port,) = free_ports(1)

    async def main() -> None:
        told: list[object] = []
        name = ReplicaId("p-0")
        urls = {name: f"http://127.0.0.1:{port}"}
        commands = {name: (sys.executable, "-c", script.replace("{port}", str(port)))}
        engines = {name: control.Engine(urls[name], "m", "process")}
        serving = control.Standing(alive=True, readiness=Readiness.RUNNING, ready_s=0.0)
        ours = processes.controller(engines, commands, told.append, lambda _: serving)
        await ours.open([name])
        (process,) = ours._processes.values()  # type: ignore[attr-defined]
        ours.stop(name, Readiness.DISK)
        ours.start(name)
        await until(lambda: ReplicaReady(name) in told, seconds=10.0)
        assert told == [ReplicaDemoted(name, Readiness.DISK), ReplicaReady(name)]
        assert process.returncode == -9
        await ours.close()
        assert not ours._processes  # type: ignore[attr-defined]
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)

    monkeypatch.setattr(processes, "TERM_S", 0.05)
    play(main())


# Engines that somebody else runs.


def a_sleepy_fleet(replicas: int = 1) -> Fleet:
    pool = a_pool(max_sequences=64, least_replicas=0, stopped=Readiness.SLEEPING)
    return a_fleet(pool, replicas=replicas, limits=ScalingLimits(cooldown_s=0.0))


class Sleepless(Upstream):
    """A server that knows no sleep, as vLLM without its development mode."""

    def _control(self, heard: Heard) -> bytes:
        if "/sleep" in heard.line:
            return an_answer(b"", "404 Not Found")
        return super()._control(heard)


def test_an_engine_sleeps_when_nobody_asks_and_wakes_for_a_call() -> None:
    async def main() -> None:
        quick = policy("least-tokens/reactive:interval_s=2,settle_s=2")
        async with over_engines(fleet=a_sleepy_fleet(), policy=quick) as (rig, (engine,)):
            await until(lambda: engine.residency == "asleep")
            await until(lambda: rig.replica().readiness is Readiness.SLEEPING)
            assert (await rig.call(exactly(2))).status == 200
            await rig.idle()

    play(main())


def test_an_engine_that_refuses_to_sleep_serves_on_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        quick = policy("least-tokens/reactive:interval_s=0.1,settle_s=0")
        ready, fleet = ReplicaReady(ReplicaId("p-0")), a_sleepy_fleet()
        async with (
            Sleepless() as upstream,
            a_rig({"p-0": upstream.url}, fleet=fleet, policy=quick) as rig,
        ):
            await until(lambda: rig.history.count(ready) >= 2)
            assert rig.replica().readiness is Readiness.RUNNING
            assert (await rig.call()).status == 200
            await rig.idle()

    play(main())
    refusals = [one for one in caplog.messages if "cannot be stopped: POST /sleep" in one]
    assert len(refusals) == 1
