"""A fleet file that changes while it is served."""

import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from concertmaster.core.fleet import PoolId, ReplicaId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.admin import AdminRoutes, Outcome
from concertmaster.gateway.server import controls_of, running_gateway
from concertmaster.predictors.recent import RecentLengths
from concertmaster.reloading import Reloader, followed
from concertmaster.serving import prepared
from gateway_rig import CHAT, Heard, Upstream, a_body, an_answer, hangs, play, until

BODY = a_body(model="auto")


def text(*urls: str, pool: str = "", rest: str = "", gateway: str = "") -> str:
    listed = ", ".join(f'"{url}"' for url in urls)
    return (
        '[[pools]]\nname = "a"\nmodel = "llama-3.1-8b-instruct"\ngpu = "a100-80g"\n'
        f"endpoints = [{listed}]\n{pool}\n{rest}\n"
        f"[gateway]\nport = 0\nhealth_interval_s = 0.02\nmodels = 'recent'\n{gateway}\n"
    )


def remove(path: Path) -> None:
    path.unlink()


def write(path: Path, content: str) -> None:
    path.write_text(content)


class Live(NamedTuple):
    """A gateway that follows a file."""

    path: Path
    reloader: Reloader
    scheduler: Scheduler
    http: aiohttp.ClientSession
    metrics: dict[str, int]

    def rewrite(self, *urls: str, pool: str = "", rest: str = "", gateway: str = "") -> Outcome:
        self.path.write_text(text(*urls, pool=pool, rest=rest, gateway=gateway))
        return self.reloader.reload()

    async def call(self) -> int:
        async with self.http.post(CHAT, json=BODY) as answer:
            await answer.read()
            return answer.status

    def takes_calls(self, name: str) -> bool:
        replica = self.scheduler.replicas[ReplicaId(name)]
        return replica.alive and not replica.draining


@asynccontextmanager
async def live(path: Path, first: str, *, traced: bool = False) -> AsyncIterator[Live]:
    write(path, first)
    served = prepared(path, {}, {})
    scheduler = Scheduler(served.fleet, served.policy, random.Random(0))
    async with running_gateway(
        scheduler,
        RecentLengths(),
        served.urls,
        served.settings,
        drain_s=0.0,
        controls=controls_of(served.file),
        peers=served.peers,
        admin=AdminRoutes(),
    ) as (gateway, port):
        reloader = Reloader(path, {}, {}, served, gateway, traced=traced)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            yield Live(path, reloader, scheduler, http, gateway.metrics.reloads)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.toml"


# Replicas.


def test_an_address_that_is_new_gets_calls_once_it_answers(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, Upstream() as two, live(path, text(one.url)) as at:
            two.healthy = False

            outcome = at.rewrite(one.url, two.url)
            await asyncio.sleep(0.1)

            assert outcome == Outcome((f"a-1 at {two.url} joins",), ())
            assert not at.takes_calls("a-1")
            two.healthy = True
            await until(lambda: at.takes_calls("a-1"))
            assert [await at.call() for _ in range(6)] == [200] * 6
            assert two.heard
            holding = at.reloader._gateway.service.holding
            assert len(holding._replicas((PoolId("a"),))) == 2
            at.scheduler.validate()

    play(main())


def test_an_address_that_is_gone_finishes_what_it_has_and_gets_nothing_more(path: Path) -> None:
    async def main() -> None:
        going = asyncio.Event()

        async def waits(_: Heard, out: asyncio.StreamWriter) -> None:
            await going.wait()
            out.write(an_answer(b"{}"))

        async with (
            Upstream(waits) as one,
            Upstream() as two,
            live(path, text(one.url, two.url)) as at,
        ):
            calls = [asyncio.create_task(at.call()) for _ in range(2)]
            await until(lambda: one.heard)
            before = len(one.heard)

            outcome = at.rewrite(two.url)
            assert outcome.changed == (f"a-0 at {one.url} is removed",)
            assert [await at.call() for _ in range(4)] == [200] * 4
            assert len(one.heard) == before
            going.set()
            assert [await one for one in calls] == [200, 200]
            at.scheduler.validate()

    play(main())


def test_no_sign_of_life_brings_a_removed_replica_back_but_its_address_does(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, Upstream() as two, live(path, text(one.url, two.url)) as at:
            at.rewrite(two.url)
            one.hang_up()
            await asyncio.sleep(0.1)
            assert at.scheduler.replicas[ReplicaId("a-0")].alive, "it was asked for its health"
            await one.listen()
            await asyncio.sleep(0.1)
            assert not at.takes_calls("a-0")

            outcome = at.rewrite(two.url, one.url)

            assert outcome.changed == (f"a-0 at {one.url} joins",)
            await until(lambda: at.takes_calls("a-0"))
            assert sorted(at.scheduler.replicas) == ["a-0", "a-1"]

    play(main())


def test_an_address_that_comes_back_too_soon_gets_another_name(path: Path) -> None:
    async def main() -> None:
        async with (
            Upstream(hangs) as one,
            Upstream() as two,
            live(path, text(one.url, two.url)) as at,
        ):
            call = asyncio.create_task(at.call())
            await until(lambda: one.heard)
            at.rewrite(two.url)
            assert at.rewrite(two.url, one.url).changed == (f"a-2 at {one.url} joins",)
            call.cancel()

    play(main())


@pytest.mark.parametrize(
    ("pool", "rest"),
    [
        ("command = ['serve', '--port={port}']", ""),
        ("state = 'disk'", ""),
        ("", "[scaling]\ngpus = 4"),
    ],
)
def test_replicas_that_hang_on_more_than_an_address_need_a_restart(
    path: Path, pool: str, rest: str
) -> None:
    async def main() -> None:
        async with Upstream() as one, Upstream() as two:
            first = text(one.url, pool=pool.replace("serve", "true"), rest=rest)
            async with live(path, first) as at:
                outcome = at.rewrite(
                    one.url, two.url, pool=pool.replace("serve", "true"), rest=rest
                )
                assert outcome.changed == ()
                assert "pools.a.endpoints" in outcome.kept
                assert list(at.scheduler.replicas) == ["a-0"]

    play(main())


# Settings.


def test_another_policy_takes_over(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url)) as at:
            outcome = at.rewrite(one.url, gateway="policy = 'fcfs'\nwindow_s = 1.5")

            assert outcome.changed == ("gateway.policy = fcfs", "gateway.window_s = 1.5")
            assert (at.scheduler.policy.name, at.scheduler.policy.window_s) == ("fcfs", 1.5)
            assert await at.call() == 200
            assert at.rewrite(one.url).changed[0] == "gateway.policy = least-tokens+las"

    play(main())


@pytest.mark.parametrize(
    ("policy", "traced", "why"),
    [
        ("fcfs/reactive", False, "as it scales or binds otherwise"),
        ("round-robin@arrival", False, "as it scales or binds otherwise"),
        ("fcfs", True, "as a trace is written"),
    ],
)
def test_a_policy_of_another_build_needs_a_restart(
    path: Path, policy: str, why: str, *, traced: bool
) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url), traced=traced) as at:
            outcome = at.rewrite(one.url, gateway=f"policy = '{policy}'")

            assert outcome == Outcome((), (f"gateway.policy: 'least-tokens+las' stays, {why}",))
            assert at.scheduler.policy.name == "least-tokens+las"
            assert at.metrics == {"partly": 1}

    play(main())


def test_what_cannot_change_is_named_and_the_rest_is_taken_up(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url)) as at:
            outcome = at.rewrite(
                one.url,
                pool="max_sequences = 7",
                rest='[emulator]\nspeedup = 2\n[[pools]]\nname = "b"\n'
                'model = "llama-3.1-8b-instruct"\ngpu = "a100-80g"\n'
                f'endpoints = ["{one.url}"]',
                gateway="hold_s = 7\nseed = 4\nmax_body_mb = 0.00001",
            )

            assert outcome.changed == ("gateway.max_body_mb = 1e-05", "gateway.hold_s = 7.0")
            assert outcome.kept == (
                "gateway.seed: 0 stays",
                "emulator",
                "pools.b: it is new",
                "pools.a.max_sequences",
            )
            assert await at.call() == 413

    play(main())


@pytest.mark.parametrize(
    "broken", ["pools = 3", "a = = 1", "", "[[pools]]\nname = 'a'", "x = '${NO_SUCH_NAME}'"]
)
def test_a_broken_file_changes_nothing_and_says_so(
    path: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url)) as at:
            write(path, broken)

            outcome = at.reloader.reload()

            assert outcome.problem.startswith(str(path))
            assert at.metrics == {"refused": 1}
            assert f"not taken up, what was read before stays: {outcome.problem}" in caplog.messages
            assert await at.call() == 200
            assert at.rewrite(one.url, gateway="hold_s = 9").changed == ("gateway.hold_s = 9.0",)

    with caplog.at_level(logging.ERROR):
        play(main())


def test_the_same_file_changes_nothing(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url)) as at:
            assert at.reloader.reload() == Outcome()

    play(main())


# When.


def test_it_follows_the_file_and_the_signal(path: Path) -> None:
    async def main() -> None:
        async with Upstream() as one, live(path, text(one.url)) as at:
            async with followed(at.reloader):
                await asyncio.sleep(0)
                write(path, text(one.url, gateway="hold_s = 3"))
                await until(lambda: at.metrics["taken_up"] == 1)
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: at.metrics["taken_up"] == 2)
            assert at.metrics == {"taken_up": 2}

    play(main())


def test_a_file_that_is_being_written_is_left_alone(path: Path) -> None:
    async def main() -> None:
        async with (
            Upstream() as one,
            Upstream() as two,
            live(path, text(one.url, two.url)) as at,
            followed(at.reloader),
        ):
            for number in range(12):
                write(path, text(one.url) + "#" * number)
                await asyncio.sleep(0.1)
            assert at.takes_calls("a-1")
            remove(path)
            await asyncio.sleep(0.8)
            assert at.metrics == {}
            write(path, text(one.url))
            await until(lambda: at.metrics["taken_up"] == 1)
            assert not at.takes_calls("a-1")

    play(main())
