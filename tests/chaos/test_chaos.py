"""Faults of all kinds against a live gateway, judged from its agents' side.

``make chaos`` plays for 20 minutes; the tests play 20 s of the same.
"""

import asyncio
import json
import os
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest

from chaos.plan import ALL, SPEEDUP, Step, plan
from chaos.verdict import Transcript, Verdict
from chaos.yard import HEDGED, POLICY, SLACK_S, TIMEOUTS, Yard

DURATION_S = float(os.environ.get("CHAOS_DURATION_S") or 20.0)
SEED = int(os.environ.get("CHAOS_SEED") or ("7" if DURATION_S <= 60 else time.time_ns() % 10**6))
AGENTS, FEW_AGENTS = 16, 6
"""Late calls are hedged only while replicas have plenty of room."""

MOST_TOKENS = 40
LONGEST_S = TIMEOUTS["total_timeout_s"] + TIMEOUTS["connect_timeout_s"] + SLACK_S
RECENT = 12


@dataclass
class Run:
    """A run as it goes on.

    Attributes:
        events: What went wrong when, as far as it was played.
        down_s: Times at which the gateway was killed, and when it answered again.
    """

    yard: Yard
    verdict: Verdict
    seed: int
    events: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    down_s: list[tuple[float, float]] = field(default_factory=list)
    ends_s: float = 0.0

    def note(self, what: str) -> None:
        self.events.append(f"{time.monotonic():.3f} {what}")

    def judge(self, call: Transcript) -> None:
        until_s = call.began_s + call.took_s
        died = any(call.began_s < up and down < until_s + 0.1 for down, up in self.down_s)
        problem = self.verdict.problem(replace(call, gateway_died=died))
        if problem:
            self.problems.append(f"{problem}\n    after: " + "\n    ".join(self.events[-RECENT:]))


async def an_agent(run: Run, http: aiohttp.ClientSession, rng: random.Random, name: str) -> None:
    calls = 0
    while time.monotonic() < run.ends_s:
        calls += 1
        transcript = await call(run, http, rng, f"{name}-{calls}")
        run.judge(transcript)
        await asyncio.sleep(rng.uniform(0, 0.1) if transcript.status == 200 else 0.2)


async def call(run: Run, http: aiohttp.ClientSession, rng: random.Random, name: str) -> Transcript:
    """Make a call, and leave before its end now and then."""
    began = Transcript(
        name, rng.random() < 0.7, rng.randint(2, MOST_TOKENS), time.monotonic(), took_s=0.0
    )
    patience_s = rng.uniform(0, 0.5) if rng.random() < 0.1 else LONGEST_S + 10
    ended = began
    try:
        async with asyncio.timeout(patience_s):
            ended = await ask(run.yard.url, http, began)
    except TimeoutError:
        ended = replace(began, left=patience_s < LONGEST_S)
    return replace(ended, took_s=time.monotonic() - began.began_s)


async def ask(url: str, http: aiohttp.ClientSession, call: Transcript) -> Transcript:
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": f"Say it, {call.name}."}],
        "stream": call.stream,
        "max_tokens": call.tokens,
        "ignore_eos": True,
    }
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
            call = replace(call, status=answer.status)
            async for piece in answer.content.iter_any():
                call = replace(call, body=call.body + piece)
            return replace(call, whole=True)
    except aiohttp.ClientError as error:
        return replace(call, error=repr(error))


async def trouble(run: Run, steps: list[Step]) -> None:
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as playing:
        for step in steps:
            await asyncio.sleep(max(0.0, began_s + step.at_s - time.monotonic()))
            run.note(f"{step.kind} {step.engine} {step.faults or ''}")
            if step.kind == "kill gateway":
                await restart(run, step)
            else:
                playing.create_task(run.yard.play(step))


async def restart(run: Run, step: Step) -> None:
    down_s = time.monotonic()
    run.down_s.append((down_s, float("inf")))
    await run.yard.play(step)
    run.down_s[-1] = (down_s, time.monotonic())


async def settled(run: Run) -> dict[str, int | str]:
    """Wait until nothing is open, and return what the ledgers say."""
    async with asyncio.timeout(LONGEST_S):
        while (told := await run.yard.ledgers())["open"] or told["in_flight"]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return told


def check_ledgers(told: dict[str, int | str]) -> list[str]:
    problems = [f"ledgers: {told['problem']}"] if told["problem"] else []
    kept = ("open", "waiting", "in_flight", "kv_blocks", "decode_tokens")
    problems += [f"{name} is {told[name]} at the end" for name in kept if told[name]]
    return problems


async def play(
    folder: Path,
    steps: list[Step],
    seed: int,
    duration_s: float,
    *options: str,
    policy: str = POLICY,
    agents: int = AGENTS,
) -> Run:
    yard = Yard(folder, *options, policy=policy)
    try:
        await yard.start()
        run = Run(yard, Verdict(await yard.words(MOST_TOKENS), longest_s=LONGEST_S), seed)
        before = await yard.ledgers()
        run.ends_s = time.monotonic() + duration_s
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as http,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(trouble(run, steps))
            for number in range(agents):
                rng = random.Random(f"{seed} {number}")
                group.create_task(an_agent(run, http, rng, f"agent-{number}"))
        after = await settled(run)
        run.problems += check_ledgers(after)
        if int(after["files"]) > int(before["files"]) + 8 * 3 + 8:
            run.problems.append(f"{after['files']} files are open, {before['files']} were at first")
        if int(after["tasks"]) > int(before["tasks"]) + 4:
            run.problems.append(f"{after['tasks']} tasks run, {before['tasks']} did at first")
        return run
    finally:
        if os.environ.get("CHAOS_LOG"):
            print(yard.log())  # noqa: T201  # asked for
        yard.stop()


def test_every_call_is_answered_once_or_refused_whatever_fails(tmp_path: Path) -> None:
    print(f"\nCHAOS_SEED={SEED} for {DURATION_S:g} s")  # noqa: T201  # a failed run needs it
    steps = plan(SEED, DURATION_S)

    run = asyncio.run(play(tmp_path, steps, SEED, DURATION_S))

    print(dict(sorted(run.verdict.outcomes.items())))  # noqa: T201
    assert not run.problems, f"seed {SEED}\n" + "\n".join(run.problems[:5])
    assert run.verdict.outcomes["served"] > 10 * DURATION_S**0.5


def test_every_call_is_answered_once_while_late_ones_are_hedged(tmp_path: Path) -> None:
    duration_s = DURATION_S / 2
    print(f"\nCHAOS_SEED={SEED} for {duration_s:g} s, hedged")  # noqa: T201
    lives = [step for step in plan(SEED, duration_s) if step.kind != "kill gateway"]  # it counts
    steps = [stalling(step) for step in lives]

    run = asyncio.run(play(tmp_path, steps, SEED, duration_s, policy=HEDGED, agents=FEW_AGENTS))
    hedges = json.loads((tmp_path / "ledgers.json").read_text())["hedges"]

    print(dict(sorted(run.verdict.outcomes.items())), hedges)  # noqa: T201
    assert not run.problems, f"seed {SEED}\n" + "\n".join(run.problems[:5])
    assert run.verdict.outcomes["served"] > 10 * duration_s**0.5
    assert hedges, "nobody was late"


def stalling(step: Step) -> Step:
    """Let one engine stall for long where calls would go wrong in another way, half of the time."""
    if step.kind != "faults" or step.engine == ALL or int(step.at_s * 1000) % 2:
        return step
    return replace(step, faults={"stall_ratio": 0.7, "stall_s": 60.0 * SPEEDUP})


def test_the_same_seed_plans_the_same_faults_and_each_kind_is_among_them() -> None:
    steps = plan(3, 60.0)

    assert steps == plan(3, 60.0) != plan(4, 60.0)
    assert {step.kind for step in steps} == {
        "faults", "kill engine", "kill gateway", "fill disk", "jump clock"
    }  # fmt: skip


def test_a_gateway_that_takes_cuts_for_ends_is_found_out(tmp_path: Path) -> None:
    steps = [Step(0.0, 4.0, "faults", number, {"death_ratio": 0.7}) for number in range(3)]

    run = asyncio.run(play(tmp_path, steps, 1, 3.0, "clean-end"))

    assert any("looks finished" in problem for problem in run.problems)
    assert "faults 0 {'death_ratio': 0.7}" in run.problems[0]


A, B = (
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    (b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n'),
)
ERROR, END = b'data: {"error":{"message":"x"}}\n\n', b"data: [DONE]\n\n"
REFUSED = b'{"error":{"message":"no","type":"server_error","param":null,"code":"x"}}'


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"body": A + B + END, "whole": True}, ""),
        ({"body": A + ERROR}, ""),
        ({"body": A}, ""),
        ({"body": A + B + END}, "was cut, and looks finished"),
        ({"body": A + ERROR + END}, "broke, and looks finished"),
        ({"body": A + ERROR, "whole": True}, "broke, and looks finished"),
        ({"body": b": held\n\nretry: 1000\n" + ERROR, "whole": True}, ""),
        ({"body": ERROR + END, "whole": True}, "broke, and looks finished"),
        ({"body": A + B, "whole": True}, "lacks its end"),
        ({"body": A + END, "whole": True}, "lacks its end"),
        ({"body": A + A + B + END, "whole": True}, "lost, doubled or moved"),
        ({"body": B + A + END, "whole": True}, "lost, doubled or moved"),
        ({"body": A + B + END, "whole": True, "took_s": 9.0}, "took 9.0 s"),
        ({"body": A + B + END, "whole": True, "took_s": 9.0, "gateway_died": True}, ""),
        ({"status": 0}, "the gateway lived"),
        ({"status": 0, "gateway_died": True}, ""),
        ({"status": 0, "left": True}, ""),
        ({"status": 503, "body": REFUSED, "whole": True}, ""),
        ({"status": 503, "body": REFUSED}, "without a reason"),
        ({"status": 500, "body": b"oops", "whole": True}, "without a reason"),
        ({"stream": False, "body": b"{", "whole": True}, "no completion"),
        ({"stream": False, "body": b"{"}, ""),
    ],
)
def test_what_is_wrong_with_an_answer_is_told(call: dict[str, object], problem: str) -> None:
    facts: dict[str, object] = {"status": 200, "took_s": 1.0, **call}
    transcript = replace(Transcript("c", stream=True, tokens=2, began_s=0.0, took_s=0.0), **facts)  # type: ignore[arg-type]

    found = Verdict(["a", "b"], longest_s=8.0).problem(transcript)

    assert (problem in found) if problem else not found
