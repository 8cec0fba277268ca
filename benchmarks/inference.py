"""How well workflows are told from clients that send nothing: real sessions, ids taken out.

``python benchmarks/inference.py DATA [--live 64] [--calls 4000] [--seed 1] [--again]`` reads
the sessions in DATA, replays them as chat bodies through ``WorkflowInference`` with so many at
a time, and compares what it finds with what is known. A pair is two calls of one workflow; an
edge is a call and one that it waited for. Precision is the share of what was found that is so,
recall the share of what is so that was found.

A session is sent in two forms. *chat*: each role keeps its conversation, a message a turn, its
own answers between them, as chat agents do. *text*: each prompt as the data has it, in one
message of the user, as agents with a scratchpad do; calls whose prompt was cut are left out.
Of sessions with the same task one is taken, or all with ``--again``: several models, several
times, word for word alike at the start.

The coding sessions have no text: each message has a text of its own, tool calls and results
have ids, and a role begins anew after its summary where its prompt has shrunk by half.
"""

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow.parquet as pq

from concertmaster.gateway.identity import Identity
from concertmaster.gateway.inference import WorkflowInference

CUT_CHARS = 2000
CALLS_PER_S = 10.0
CODING = "codingagent"
_COLUMNS = ["workflow_id", "app", "stage_index", "role", "parents", "prompt_tokens"]
_TEXTS = [*_COLUMNS, "task_group", "prompt_text", "prompt_chars", "output_text"]
_KINDS = [*_COLUMNS, "input_kinds", "output_kinds"]


class Asked(NamedTuple):
    """A call as a client would send it.

    Attributes:
        stage: Its index in its session.
        parents: Those of the calls that it waited for.
        messages: What it sends.
        tool_call_ids: What its answer asks for.
    """

    stage: int
    parents: tuple[int, ...]
    messages: list[dict[str, object]]
    tool_call_ids: tuple[str, ...] = ()


@dataclass
class Score:
    """Counts of one kind of session."""

    sessions: int = 0
    calls: int = 0
    right: Counter[float] = field(default_factory=Counter)
    found: Counter[float] = field(default_factory=Counter)
    told: Counter[float] = field(default_factory=Counter)
    at_home: Counter[float] = field(default_factory=Counter)
    owners: dict[str, int] = field(default_factory=dict)
    edges: int = 0
    pairs_found: int = 0
    pairs_right: int = 0
    pairs: int = 0


def said(role: str, content: str) -> dict[str, object]:
    """Return a message."""
    return {"role": role, "content": content}


def as_chat(rows: Sequence[dict[str, Any]]) -> Iterator[Asked]:
    """Each role keeps its conversation."""
    kept: dict[str, list[dict[str, object]]] = {}
    seen: dict[str, str] = {}
    for row in rows:
        role, text = row["role"], row["prompt_text"] or ""
        before = seen.get(role)
        turns = kept.setdefault(role, [said("system", f"You are {role} of {row['app']}.")])
        whole = before is not None and before != "" and text.startswith(before)
        grown = text[len(before or "") :] if whole else text
        fanned = before == text and not row["parents"]
        turns = turns[:2] if fanned else [*turns, said("user", grown)]
        yield Asked(row["stage_index"], tuple(row["parents"] or ()), turns)
        kept[role] = [*turns, said("assistant", row["output_text"] or "")]
        seen[role] = text


def as_text(rows: Sequence[dict[str, Any]]) -> Iterator[Asked]:
    """Each prompt is one message."""
    for row in rows:
        text = row["prompt_text"] or ""
        if row["prompt_chars"] <= CUT_CHARS and text:
            yield Asked(row["stage_index"], tuple(row["parents"] or ()), [said("user", text)])


def as_coding(rows: Sequence[dict[str, Any]]) -> Iterator[Asked]:
    """Messages of a coding session by kind; their texts are made up and differ."""
    session = rows[0]["workflow_id"]
    kept: dict[str, list[dict[str, object]]] = {}
    last: dict[str, tuple[int, str]] = {}
    for row in rows:
        role, stage = row["role"], row["stage_index"]
        prompt_tokens, call_id = last.get(role, (0, ""))
        turns = kept.get(role, [said("system", f"You are {role.partition(':')[0]}.")])
        if row["prompt_tokens"] < prompt_tokens / 2:
            turns = [turns[0], said("user", f"summary of {session} at {stage}")]
        if "tool_result" in (row["input_kinds"] or "") and call_id:
            turn = {**said("tool", f"result {stage}"), "tool_call_id": call_id}
        else:
            turn = said("user", f"{session} {role} {stage}")
        turns = [*turns, turn]
        asks = "tool_use" in (row["output_kinds"] or "")
        call_id = f"toolu_{session}_{stage}" if asks else ""
        ids = (call_id,) if asks else ()
        yield Asked(stage, tuple(row["parents"] or ()), turns, ids)
        answer: dict[str, object] = said("assistant", f"answer {stage}")
        if asks:
            answer["tool_calls"] = [{"id": call_id, "type": "function"}]
        kept[role] = [*turns, answer]
        last[role] = (row["prompt_tokens"], call_id)


def replay(sessions: list[list[Asked]], live: int, rng: random.Random, score: Score) -> None:
    """Play sessions, so many at a time, each a call at a time, in an order that is drawn."""
    inference = WorkflowInference()
    waiting = list(reversed(sessions))
    open_now: list[tuple[int, Iterator[Asked]]] = []
    groups: list[tuple[int, str]] = []
    now_s, number = 0.0, 0
    while waiting or open_now:
        while waiting and len(open_now) < live:
            score.sessions += 1
            open_now.append((score.sessions, iter(waiting.pop())))
        place = rng.randrange(len(open_now))
        session, calls = open_now[place]
        asked = next(calls, None)
        if asked is None:
            open_now[place] = open_now[-1]
            open_now.pop()
            continue
        now_s += rng.expovariate(CALLS_PER_S)
        number += 1
        name = f"{session}/{asked.stage}"
        text = memoryview(msgspec.json.encode(asked.messages))
        told = inference.infer(text, request_id=name, now_s=now_s)
        ids = [one.encode() for one in asked.tool_call_ids]
        stage = told.stage or 0
        inference.note_tool_calls(ids, told.workflow_id, stage, request_id=name)
        judge(score, session, asked, told)
        groups.append((session, told.workflow_id))
    count_pairs(score, groups)


def judge(score: Score, session: int, asked: Asked, told: Identity) -> None:
    """Count the edges of a call, and whether it came to its own session."""
    score.calls += 1
    if told.parents:
        score.told[told.confidence] += 1
        score.at_home[told.confidence] += score.owners[told.workflow_id] == session
    else:
        score.owners[told.workflow_id] = session
    score.edges += len(asked.parents)
    true = {f"{session}/{parent}" for parent in asked.parents}
    for parent in told.parents:
        score.found[told.confidence] += 1
        score.right[told.confidence] += parent in true


def count_pairs(score: Score, groups: Sequence[tuple[int, str]]) -> None:
    """Count pairs of calls: of one session, put together, and both."""

    def pairs(counts: Counter[Any]) -> int:
        return sum(count * (count - 1) // 2 for count in counts.values())

    score.pairs += pairs(Counter(session for session, _ in groups))
    score.pairs_found += pairs(Counter(told for _, told in groups))
    score.pairs_right += pairs(Counter(groups))


def sessions_of(path: Path, columns: list[str]) -> dict[str, list[list[dict[str, Any]]]]:
    """Read sessions by the app that they are of."""
    rows = pq.read_table(path, columns=columns).to_pylist()
    by_app: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for _, group in groupby(rows, key=lambda row: row["workflow_id"]):
        session = list(group)
        by_app[session[0]["app"]].append(session)
    return by_app


def some(sessions: list[list[Asked]], calls: int, rng: random.Random) -> list[list[Asked]]:
    """Draw sessions until there are so many calls."""
    drawn: list[list[Asked]] = []
    total = 0
    for session in rng.sample(sessions, k=len(sessions)):
        if total >= calls:
            break
        drawn.append(session)
        total += len(session)
    return drawn


def of_distinct_tasks(sessions: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Take the last session of each task."""
    by_task = {row.get("task_group") or row["workflow_id"]: one for one in sessions for row in one}
    return list(by_task.values())


def percent(part: int, whole: int) -> str:
    """Write a share."""
    return f"{100 * part / whole:.1f}" if whole else "–"


def line(name: str, form: str, score: Score) -> str:
    """Write a row of the table."""
    found, right = sum(score.found.values()), sum(score.right.values())
    return (
        f"| {name} | {form} | {score.sessions:,} | {score.calls:,} "
        f"| {percent(score.pairs_right, score.pairs_found)} "
        f"| {percent(score.pairs_right, score.pairs)} "
        f"| {percent(right, found)} | {percent(right, score.edges)} |"
    )


def main() -> None:
    """Print the tables that docs/identity.md has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--live", type=int, default=64)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    by_sign: dict[float, Counter[str]] = defaultdict(Counter)
    staged = sessions_of(asked.data / "workflow_stages.parquet", _TEXTS)
    coding = sessions_of(asked.data / "workflow_stages_codingagent.parquet", _KINDS)
    print("| sessions | form | number | calls | pairs, precision % | recall % ", end="")
    print("| edges, precision % | recall % |\n|---|---|---|---|---|---|---|---|")
    for name, sessions in {**staged, **coding}.items():
        forms = {"kinds": as_coding} if name == CODING else {"chat": as_chat, "text": as_text}
        for form, send in forms.items():
            rng, score = random.Random(asked.seed), Score()
            taken = sessions if asked.again else of_distinct_tasks(sessions)
            bodies = [list(send(session)) for session in taken]
            replay(some(bodies, asked.calls, rng), asked.live, rng, score)
            print(line(name, form, score), flush=True)
            for told in score.told:
                by_sign[round(told, 1)].update(
                    told=score.told[told],
                    at_home=score.at_home[told],
                    found=score.found[told],
                    right=score.right[told],
                )
    print("\n| confidence told | calls | workflow right % | parent right % |\n|---|---|---|---|")
    for sign, counts in sorted(by_sign.items()):
        home = percent(counts["at_home"], counts["told"])
        right = percent(counts["right"], counts["found"])
        print(f"| {sign} | {counts['told']:,} | {home} | {right} |")


if __name__ == "__main__":
    main()
