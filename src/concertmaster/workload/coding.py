"""Coding agents: recorded sessions, served by one model, or by one that plans and one that acts.

Sessions are read in place. The call that answers a person plans; those that follow a tool,
and all of sub-agents, act: so it is with SwarmX's coding agent (a large model plans, a small
one acts). Sessions run for hours and outgrow every context, so both are cut.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path

from concertmaster.core.request import ModelName
from concertmaster.core.settings import Reader, number, whole, word
from concertmaster.workload import columns
from concertmaster.workload.files import read_table
from concertmaster.workload.plan import Call, WorkflowPlan
from concertmaster.workload.split import PART, in_part
from concertmaster.workload.staged import read_staged

APP = "coding"
SESSIONS = "../shared/data/public/workflow_stages_codingagent.parquet"
PLANNER, ACTOR = "planner", "actor"
MAIN = "main"
"""Role of the agent itself in recorded sessions; others are its sub-agents."""

SETTINGS: Mapping[str, Reader] = {
    "sessions": word,
    "workflows": whole(1),
    "part": PART,
    "calls": whole(1),
    "prompt_tokens": whole(1),
    "pause_s": number(0),
    "planner": word,
    "actor": word,
    "deadline_s": number(1e-3),
}
"""What may follow ``coding:``."""


def draw(
    *,
    rng: random.Random,
    sessions: str = SESSIONS,
    workflows: int = 300,
    part: str = "all",
    calls: int = 24,
    prompt_tokens: int = 120_000,
    pause_s: float = 20.0,
    planner: str = "qwen3-30b-a3b-instruct-2507",
    actor: str = "qwen3-4b-instruct-2507",
    deadline_s: float | None = None,
) -> list[WorkflowPlan]:
    """Draw sessions, none of them twice.

    Args:
        rng: Fixes them.
        sessions: Workflow file with the sessions.
        workflows: How many; all that there are, if these are fewer.
        part: ``test`` draws one of five sessions only, by a hash of its name, ``train`` the
            others, ``all`` both.
        calls: Most calls of a session; later ones are left out.
        prompt_tokens: A session ends before its first longer prompt.
        pause_s: Longest time before a call; longer ones, of people mostly, are cut.
        planner: Model that answers people.
        actor: Model that goes on after tools; the same as ``planner`` for one model.
        deadline_s: Seconds after arrival by which the last answer is due.
    """
    models = {PLANNER: (ModelName(planner),), ACTOR: (ModelName(actor),)}
    wanted = (plan for plan in _recorded(sessions) if in_part(plan.workflow_id, part))
    cut = [_cut(plan, calls, prompt_tokens) for plan in wanted]
    usable = [plan for plan in cut if plan.calls]
    return [
        replace(
            plan,
            app=APP,
            arrival_s=0.0,
            calls=tuple(_assigned(plan.calls, models, pause_s)),
            deadline_s=deadline_s,
        )
        for plan in rng.sample(usable, min(workflows, len(usable)))
    ]


@cache
def _recorded(sessions: str) -> Sequence[WorkflowPlan]:
    return read_staged(read_table(Path(sessions), frozenset(columns.COLUMNS)), sessions).plans


def _cut(plan: WorkflowPlan, calls: int, prompt_tokens: int) -> WorkflowPlan:
    """Keep the beginning, whose calls wait for none but each other."""
    short = takewhile(lambda call: call.prompt_tokens <= prompt_tokens, plan.calls)
    return replace(plan, calls=tuple(short)[:calls])


def _assigned(
    calls: Sequence[Call], models: Mapping[str, tuple[ModelName, ...]], pause_s: float
) -> Iterator[Call]:
    for call in calls:
        role = ACTOR if call.after_tool or call.role != MAIN else PLANNER
        yield replace(
            call,
            role=role,
            step=call.role,
            models=models[role],
            tool_s=min(call.tool_s, pause_s),
        )
