"""A gateway with everything on, at full speed for long: nothing of it grows.

``make soak`` makes 200,000 calls; the tests make 1,500.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.yard import free_ports
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
from soak.crowd import MODEL, Crowd

CALLS = int(os.environ.get("SOAK_CALLS") or 1_500)
WARM_UP = CALLS // 4
MOST_GROWTH = 0.05 if CALLS >= 100_000 else 0.25
"""Of the resident memory; a short run has hardly warmed up, and is only there to catch a flood."""

SETTLE_S = 5.0
TESTS, REPO = Path(__file__).parents[1], Path(__file__).parents[2]


@dataclass
class Size:
    """How large the gateway is while nothing is open.

    Attributes:
        series: Lines of ``/metrics``.
        tables: How much each table of bounded size holds.
    """

    rss_mb: float
    files: int
    tasks: int
    series: int
    tables: dict[str, int]


@dataclass
class Yard:
    """A gateway and an engine that answers at once, as processes."""

    folder: Path
    gateway: "subprocess.Popen[bytes]"
    crowd: Crowd

    async def ledgers(self) -> dict[str, Any]:
        """Ask the gateway to check its ledgers; return what it found."""
        written = self.folder / "ledgers.json"
        written.unlink(missing_ok=True)
        self.gateway.send_signal(signal.SIGUSR2)
        async with asyncio.timeout(10):
            while not written.exists():  # noqa: ASYNC110  # a file has no event
                await asyncio.sleep(0.05)
        told: dict[str, Any] = json.loads(written.read_text())
        return told

    async def size(self) -> Size:
        """Let all workflows end, and measure."""
        await asyncio.sleep(SETTLE_S)
        pages = await self.crowd.get("/metrics")
        told = await self.ledgers()
        assert not told["problem"], told
        for name in ("open", "waiting", "in_flight", "kv_blocks", "decode_tokens"):
            assert told[name] == 0, (name, told)
        series = [line for line in pages.splitlines() if line and not line.startswith(b"#")]
        return Size(self.rss_mb(), told["files"], told["tasks"], len(series), told["tables"])

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.gateway.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def a_fleet_file(port: int, engine: int, folder: Path) -> str:
    return (
        f'[gateway]\nport = {port}\npolicy = "least-tokens"\nwindow_s = 1000\n'
        f'keys = "{folder}/keys.sqlite"\nreceipts = "{folder}/receipts.sqlite"\n'
        f"receipts_kept = 1000\n"
        f'[[pools]]\nname = "one"\nmodel = "{MODEL}"\ngpu = "h200"\nmax_sequences = 1024\n'
        f'kv_blocks = 10000000\nendpoints = ["http://127.0.0.1:{engine}"]\n'
    )


@asynccontextmanager
async def a_yard(folder: Path) -> AsyncIterator[Yard]:
    port, engine = free_ports(2)
    (folder / "fleet.toml").write_text(a_fleet_file(port, engine, folder))
    key, secret = new_key("team", operator=True, now_s=1.0)
    with closing(KeyFile(folder / "keys.sqlite")) as store:
        store.create(key)
    upstream = [str(REPO / "benchmarks" / "gateway" / "upstream.py"), str(engine)]
    child = [str(Path(__file__).with_name("soaked_child.py")), str(folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = (folder / "log.txt").open("wb")
    started = [
        subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log)  # noqa: ASYNC220, S603  # ours
        for command in (upstream, child)
    ]
    try:
        crowd = Crowd(port, secret, random.Random(7))
        await until_it_answers(crowd)
        yield Yard(folder, started[1], crowd)
    finally:
        for process in started:
            process.kill()
            process.wait()
        log.close()


async def until_it_answers(crowd: Crowd) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await crowd.get("/livez")
            except OSError:
                await asyncio.sleep(0.1)
            else:
                return


@dataclass
class Soaked:
    """How large the gateway was after the warm-up, half way in MB, and at the end."""

    before: Size
    half_way_mb: float
    after: Size

    def __str__(self) -> str:
        """Say how far it grew, and how fast it still did in the last half."""
        growth = self.after.rss_mb / self.before.rss_mb - 1
        slope = (self.after.rss_mb - self.half_way_mb) * 1024 / (CALLS / 2 / 1000)
        memory = f"memory {growth:+.1%}; in the last half {slope:+.1f} kB per 1,000 calls"
        return f"after warm-up {self.before}\nat the end    {self.after}\n{memory}"


async def soak(folder: Path) -> tuple[Soaked, Crowd]:
    async with a_yard(folder) as yard:
        await yard.crowd.call(WARM_UP)
        before = await yard.size()
        await yard.crowd.call(CALLS // 2 - WARM_UP)
        half_way_mb = yard.rss_mb()
        await yard.crowd.call(CALLS - CALLS // 2)
        return Soaked(before, half_way_mb, await yard.size()), yard.crowd


def test_nothing_grows(tmp_path: Path) -> None:
    soaked, crowd = asyncio.run(soak(tmp_path))

    outcomes = {f"{kind} {status}": n for (kind, status), n in sorted(crowd.outcomes.items())}
    print(f"\n{CALLS} calls: {outcomes}\n{soaked}")  # noqa: T201  # its figures
    before, after = soaked.before, soaked.after
    assert sum(crowd.outcomes.values()) == CALLS
    assert {*crowd.outcomes} <= {
        ("json", 200),
        ("stream", 200),
        ("left", 0),
        ("left", 200),
        ("wrong", 404),
    }
    assert after.rss_mb <= before.rss_mb * (1 + MOST_GROWTH)
    assert after.files <= before.files + 40
    assert after.tasks <= before.tasks
    assert after.series <= before.series + 2
    for size in (before, after):
        assert [size.tables[name] for name in ("unanswered", "live", "histories")] == [0, 0, 0]
