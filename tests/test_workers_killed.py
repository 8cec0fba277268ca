"""``serve`` with two workers, as processes: each is killed once, and calls go on."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp

from gateway_rig import CHAT, Upstream, a_body, play

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


def test_whichever_process_is_killed_is_started_again_and_all_end_at_a_signal(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with Upstream() as upstream:
            path = tmp_path / "fleet.toml"
            pool = '[[pools]]\nname = "p"\nmodel = "qwen2.5-1.5b-instruct"\ngpu = "a40"\n'
            path.write_text(f'[gateway]\nworkers = 2\n{pool}endpoints = ["{upstream.url}"]\n')
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SERVE, "serve", "-c", str(path), "--port", "0"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                assert process.stdout is not None
                said = (await process.stdout.readline()).decode()
                assert "2 workers" in said
                url = said.partition("/v1 ")[0]
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
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    play(main(), seconds=120)
