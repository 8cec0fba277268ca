"""``serve`` with two workers, as processes: each is killed once, and calls go on."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from gateway_rig import CHAT, Upstream, Wire, a_body, a_call, hangs, play, until
from test_gateway_hedging import streams

SERVE = "from concertmaster.cli import main; main()"


def children(pid: int, word: str) -> set[int]:
    """Processes of a parent whose command has a word in it."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, words = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == pid and word in words:
            found.add(int(folder.name))
    return found


async def status(url: str) -> int:
    """Make a call on a connection of its own; 0 if there is none."""
    try:
        async with (
            aiohttp.ClientSession() as http,
            http.post(url + CHAT, json=a_body(model="auto")) as reply,
        ):
            return reply.status
    except aiohttp.ClientError:
        return 0


async def until_all_served(url: str) -> set[int]:
    """Call until ten in a row are answered; return what came before."""
    seen, good = set(), 0
    async with asyncio.timeout(40):
        while good < 10:
            code = await status(url)
            good = good + 1 if code == 200 else 0
            seen.add(code)
            await asyncio.sleep(0.02)
    return seen


@asynccontextmanager
async def serving(
    tmp_path: Path, *urls: str, policy: str = "least-tokens"
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Serve one pool by two workers; yields the process and its address."""
    path = tmp_path / "fleet.toml"
    pool = '[[pools]]\nname = "p"\nmodel = "qwen2.5-1.5b-instruct"\ngpu = "a40"\n'
    gateway = f'[gateway]\nworkers = 2\npolicy = "{policy}"\n'
    path.write_text(f"{gateway}{pool}endpoints = {json.dumps(urls)}\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVE, "serve", "-c", str(path), "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        said = (await process.stdout.readline()).decode()
        assert "2 workers" in said
        yield process, said.partition("/v1 ")[0]
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def test_whichever_process_is_killed_is_started_again_and_all_end_at_a_signal(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with Upstream() as upstream, serving(tmp_path, upstream.url) as (process, url):
            assert await until_all_served(url) == {200}
            workers = children(process.pid, "workers.worker")
            assert len(workers) == 2
            victim = min(workers)
            os.kill(victim, signal.SIGKILL)
            assert await until_all_served(url) <= {200, 0}
            (scheduler,) = children(process.pid, "commands_serve")
            os.kill(scheduler, signal.SIGKILL)
            while await status(url) == 200:  # noqa: ASYNC110  # not for long
                await asyncio.sleep(0)
            assert await until_all_served(url) == {200, 503}
            assert children(process.pid, "commands_serve") != {scheduler}
            assert len(children(process.pid, "workers.worker") - {victim}) == 2
            process.terminate()
            assert await process.wait() == 0
            assert await status(url) == 0

    play(main(), seconds=120)


# Hedges.


def holder(pids: set[int], wire: Wire) -> int | None:
    """The process that has the other end of a connection; none until one has accepted it."""
    ours = wire.writer.get_extra_info("sockname")[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, peer, _, *_, inode = line.split()[:10]
        if int(peer.rpartition(":")[2], 16) != ours:
            continue
        for pid in pids:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if str(link.readlink()) == f"socket:[{inode}]":
                        return pid
    return None


async def accepted_by(pids: set[int], wire: Wire) -> int:
    while (pid := holder(pids, wire)) is None:  # noqa: ASYNC110  # another process
        await asyncio.sleep(0.002)
    return pid


@asynccontextmanager
async def one_to_each(url: str, workers: set[int]) -> AsyncIterator[dict[int, Wire]]:
    """Connect until every worker has a connection."""
    host, port = url.removeprefix("http://").split(":")
    wires: dict[int, Wire] = {}
    async with AsyncExitStack() as stack:
        while set(wires) != workers:
            wire = Wire(*await asyncio.open_connection(host, int(port)))
            stack.push_async_callback(wire.close)
            wires[await accepted_by(workers, wire)] = wire
        yield wires


async def metrics(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    async with aiohttp.ClientSession() as http, http.get(url + "/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def ends_at(url: str, name: str, wanted: float) -> None:
    async with asyncio.timeout(20):
        while await metrics(url, name) != wanted:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.05)


def test_a_worker_that_is_killed_amid_a_race_leaves_nothing_and_others_race_on(
    tmp_path: Path,
) -> None:
    rule = "round-robin/hedge:floor_s=0.1,share=1"
    call = a_call(stream=True, model="auto")

    async def main() -> None:
        async with (
            Upstream(hangs) as one,
            Upstream(hangs) as two,
            serving(tmp_path, one.url, two.url, policy=rule) as (process, url),
            one_to_each(url, children(process.pid, "workers.worker")) as wires,
        ):
            (victim, lost), (_, kept) = wires.items()
            lost.send(call)
            await until(lambda: one.heard and two.heard, "both have it", seconds=20)
            assert await metrics(url, "concertmaster_inflight_requests") == 2
            os.kill(victim, signal.SIGKILL)
            await until(lambda: one.lost == two.lost == 1, "both are stopped", seconds=20)
            await ends_at(url, "concertmaster_inflight_requests", 0)
            assert await metrics(url, "concertmaster_kv_reserved_ratio") == 0
            assert await metrics(url, 'concertmaster_hedges_total{outcome="cancelled"}') == 1

            two.script = streams("fast")
            kept.send(call)
            async with asyncio.timeout(20):
                body = await kept.reader.readuntil(b"\r\n0\r\n\r\n")
            assert (body.count(b"HTTP/1.1"), body.count(b"fast")) == (1, 2)
            await until(lambda: one.lost == 2, "the loser is stopped", seconds=20)
            assert await metrics(url, 'concertmaster_hedges_total{outcome="won"}') == 1
            await ends_at(url, "concertmaster_inflight_requests", 0)
            assert await metrics(url, "concertmaster_kv_reserved_ratio") == 0

    play(main(), seconds=120)
