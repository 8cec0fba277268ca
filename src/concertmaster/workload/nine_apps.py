"""Nine multi-agent applications on eleven models: people and programs share a fleet.

Workflows are read in place. Which application comes next follows Zipf's law, and each role of
an application has its model, so that a few models get most of the calls and the rest are
asked for now and then. Deadlines are multiples of what a workflow takes alone.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from concertmaster.core.errors import InputError
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName, ServiceClass, WorkflowId
from concertmaster.core.settings import Reader, choice, number, whole, word
from concertmaster.workload import columns
from concertmaster.workload.drawing import MOST_TOKENS, around, names
from concertmaster.workload.files import read_table
from concertmaster.workload.plan import Call, WorkflowPlan
from concertmaster.workload.prefixes import chain
from concertmaster.workload.split import PART, in_part
from concertmaster.workload.staged import read_staged
from concertmaster.workload.tables import Table

NAME = "nine-apps"
STAGES = "../shared/data/public/workflow_stages.parquet"
INTERACTIVE, BATCH = ServiceClass.INTERACTIVE, ServiceClass.BATCH
LEAST_CAP_TOKENS = 256
HELD_OUT_OF = 5


class Speed(NamedTuple):
    """A model alone on its GPUs: A100 of 40 GB, two of them from 14B on.

    Attributes:
        decode_s: Seconds of a token.
        prefill_tokens_per_s: Prompt tokens a second.
    """

    decode_s: float
    prefill_tokens_per_s: float


SPEEDS: Mapping[str, Speed] = {
    "qwen2.5-7b-instruct": Speed(0.0143, 15_000),
    "qwen2.5-14b-instruct": Speed(0.0192, 13_500),
    "qwen3-8b": Speed(0.0151, 14_000),
    "llama-3.1-8b-instruct": Speed(0.0148, 14_000),
    "qwen2.5-3b-instruct": Speed(0.0081, 32_000),
    "mistral-7b-instruct": Speed(0.0142, 14_000),
    "qwen2.5-1.5b-instruct": Speed(0.0052, 62_000),
    "qwen3-4b-instruct-2507": Speed(0.0098, 25_000),
    "llama-3.2-3b-instruct": Speed(0.0082, 33_000),
    "qwen3-30b-a3b-instruct-2507": Speed(0.0106, 35_000),
    "qwen2.5-32b-instruct": Speed(0.0353, 6_300),
}
"""All models that are asked for."""


class App(NamedTuple):
    """An application: an entry of the workflow file.

    Attributes:
        app: Its name there.
        service_class: Whether people wait for it.
        tool_s: Median seconds before a call that is not the first.
        model: Of all roles that are not named.
        models: Of the others.
    """

    app: str
    service_class: ServiceClass
    tool_s: float
    model: str
    models: Mapping[str, str] = {}


APPS = (
    App("intercode_sql", INTERACTIVE, 0.2, "qwen2.5-7b-instruct", {"planner": "qwen3-8b"}),
    App(
        "taubench_airline",
        INTERACTIVE,
        0.4,
        "qwen2.5-14b-instruct",
        {"user_simulator": "qwen3-8b"},
    ),
    App("intercode_bash", INTERACTIVE, 0.3, "llama-3.1-8b-instruct", {"planner": "qwen3-8b"}),
    App(
        "reflexion_hotpot_react",
        INTERACTIVE,
        0.8,
        "qwen2.5-7b-instruct",
        {"reflector": "qwen2.5-14b-instruct"},
    ),
    App(
        "tot_writing",
        BATCH,
        0.1,
        "mistral-7b-instruct",
        {"planner": "qwen2.5-1.5b-instruct", "voter": "qwen2.5-3b-instruct"},
    ),
    App(
        "whowhen_captain",
        BATCH,
        0.5,
        "llama-3.1-8b-instruct",
        dict.fromkeys(
            ("Verification_Expert", "Validation_Expert", "DataVerification_Expert"),
            "qwen3-4b-instruct-2507",
        ),
    ),
    App("intercode_python", INTERACTIVE, 0.3, "llama-3.2-3b-instruct"),
    App("hyperagent", BATCH, 1.0, "qwen3-30b-a3b-instruct-2507"),
    App(
        "whowhen_magentic",
        BATCH,
        1.5,
        "qwen2.5-14b-instruct",
        {"Orchestrator": "qwen2.5-32b-instruct", "WebSurfer": "qwen3-30b-a3b-instruct-2507"},
    ),
)
"""The applications, the one that is asked for most first."""

SETTINGS: Mapping[str, Reader] = {
    "stages": word,
    "workflows": whole(1),
    "part": PART,
    "zipf": number(0),
    "calls": whole(1),
    "prompt_tokens": whole(1),
    "caps": choice(guessed=False, tight=True),
    "interactive": number(1),
    "batch": number(1),
    "least_s": number(0),
}
"""What may follow ``nine-apps:``."""


class Promise(NamedTuple):
    """By when a workflow is due.

    Attributes:
        factors: Times what it takes alone, by class.
        least_s: Seconds that it has at the least.
    """

    factors: Mapping[ServiceClass, float]
    least_s: float

    def deadline_s(self, service_class: ServiceClass, calls: Sequence[Call]) -> float:
        """Seconds after arrival by which the last of these calls is due."""
        return max(self.least_s, self.factors[service_class] * solo_s(calls))


def draw(
    *,
    rng: random.Random,
    stages: str = STAGES,
    workflows: int = 300,
    part: str = "all",
    zipf: float = 1.0,
    calls: int = 24,
    prompt_tokens: int = 16_000,
    caps: bool = False,
    interactive: float = 5.0,
    batch: float = 10.0,
    least_s: float = 15.0,
) -> list[WorkflowPlan]:
    """Draw workflows with replacement; one that is drawn again shares no prefix with the first.

    Args:
        rng: Fixes them.
        stages: Workflow file with the applications.
        workflows: How many.
        part: ``test`` draws held-out tasks only, ``train`` the others, ``all`` both.
        zipf: Exponent: the application of rank r is asked for in proportion to r to its minus.
        calls: Most calls of a workflow; later ones are left out.
        prompt_tokens: A workflow ends before its first longer prompt.
        caps: Whether the cap of a call is the least power of two that holds all recorded
            answers of its application and role; else as ``cap_tokens`` guesses it.
        interactive: Deadline of a workflow that people wait for, times what it takes alone.
        batch: The same of others.
        least_s: Seconds that each has at the least.
    """
    promise = Promise({INTERACTIVE: interactive, BATCH: batch}, least_s)
    shares = [rank**-zipf for rank in range(1, len(APPS) + 1)]
    picked = rng.choices(APPS, shares, k=workflows)
    found = {app.app: iter(_picked(app, stages, part, picked.count(app), rng)) for app in APPS}
    seen: Counter[WorkflowId] = Counter()
    drawn = []
    for name, app in zip(names(NAME, workflows, rng), picked, strict=True):
        plan = next(found[app.app])
        again = seen[plan.workflow_id]
        seen[plan.workflow_id] += 1
        kept = tuple(_asked(_cut(plan, calls, prompt_tokens), app, again, rng))
        if caps:
            kept = tuple(_capped(kept, _longest(stages, app.app)))
        drawn.append(
            replace(
                plan,
                workflow_id=WorkflowId(f"{name}~{plan.workflow_id}"),
                arrival_s=0.0,
                calls=kept,
                service_class=app.service_class,
                deadline_s=promise.deadline_s(app.service_class, kept),
            )
        )
    return drawn


# From the file.


@cache
def _tables(stages: str) -> Mapping[str, Table]:
    table = read_table(Path(stages), frozenset(columns.COLUMNS))
    return {app.app: table.select("app", app.app) for app in APPS}


def _picked(app: App, stages: str, part: str, count: int, rng: random.Random) -> list[WorkflowPlan]:
    """Pick workflows of an application, and read only those.

    Raises:
        InputError: Its part is empty.
    """
    table = _tables(stages)[app.app]
    rows = _rows_of(stages, app.app)
    groups = table.texts("task_group")
    kept = [name for name, places in rows.items() if in_part(groups[places[0]] or name, part)]
    if not count:
        return []
    if not kept:
        problem = f'expected a task of part "{part}", found none among {len(rows)} workflows'
        raise InputError(stages, app.app, problem, "part=all takes what there is")
    chosen = rng.choices(kept, k=count)
    needed = [row for name in dict.fromkeys(chosen) for row in rows[name]]
    plans = read_staged(table.keep(needed), app.app).plans
    by_name = {str(plan.workflow_id): plan for plan in plans}
    return [by_name[name] for name in chosen]


@cache
def _rows_of(stages: str, app: str) -> Mapping[str, Sequence[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(_tables(stages)[app].texts("workflow_id")):
        rows.setdefault(name, []).append(row)
    return rows


@cache
def _longest(stages: str, app: str) -> Mapping[str, int]:
    """Longest recorded answer of each role."""
    table = _tables(stages)[app]
    longest: dict[str, int] = {}
    for role, tokens in zip(table.texts("role"), table.wholes("output_tokens"), strict=True):
        longest[role] = max(longest.get(role, 1), min(MOST_TOKENS, tokens))
    return longest


# What is made of it.


def _cut(plan: WorkflowPlan, calls: int, prompt_tokens: int) -> Sequence[Call]:
    """Keep the beginning; the first call stays, its prompt cut if need be."""
    first = plan.calls[0]
    tokens = min(prompt_tokens, first.prompt_tokens)
    hashes = first.prefix_hashes[: tokens // PREFIX_CHUNK_TOKENS]
    kept = [replace(first, prompt_tokens=tokens, prefix_hashes=hashes)]
    for call in plan.calls[1:calls]:
        if call.prompt_tokens > prompt_tokens:
            break
        kept.append(call)
    return kept


def _asked(calls: Sequence[Call], app: App, again: int, rng: random.Random) -> Iterator[Call]:
    """Name each call's model, and let tools take their time."""
    for call in calls:
        output_tokens = min(MOST_TOKENS, call.output_tokens)
        hashes = call.prefix_hashes
        yield replace(
            call,
            models=(ModelName(app.models.get(call.role, app.model)),),
            output_tokens=output_tokens,
            max_output_tokens=min(MOST_TOKENS, call.max_output_tokens),
            tool_s=around(app.tool_s, 0.5, rng) if call.parents else 0.0,
            prefix_hashes=tuple(chain(one, again, 1)[0] for one in hashes) if again else hashes,
        )


def _capped(calls: Sequence[Call], longest: Mapping[str, int]) -> Iterator[Call]:
    for call in calls:
        cap = max(LEAST_CAP_TOKENS, 1 << (longest[call.role] - 1).bit_length())
        yield replace(call, max_output_tokens=cap)


def solo_s(calls: Sequence[Call]) -> float:
    """Seconds that a workflow takes alone, with every model at hand and nothing cached."""
    ends_s: dict[int, float] = {}
    for call in calls:
        speed = SPEEDS[call.models[0]]
        begun_s = max((ends_s[parent] for parent in call.parents), default=0.0) + call.tool_s
        prefill_s = call.prompt_tokens / speed.prefill_tokens_per_s
        ends_s[call.stage] = begun_s + prefill_s + call.output_tokens * speed.decode_s
    return max(ends_s.values())
