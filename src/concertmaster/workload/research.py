"""Deep research: a planner, queries in parallel of two calls each, and a merge of what they found.

The shape is that of SwarmX's deep research (a 32B model plans and sums up, an 8B model
queries). Lengths are ours: heavy-tailed, told in part by role, prompt size and prompt words,
and in part by nothing.
"""

import random
from collections.abc import Callable, Mapping
from itertools import count
from typing import NamedTuple

from concertmaster.core.request import ModelName, WorkflowId
from concertmaster.core.settings import Reader, choice, number, whole, word
from concertmaster.workload.drawing import around, hashes, hint, names, tokens
from concertmaster.workload.plan import Call, WorkflowPlan, cap_tokens

APP = "research"
MOST_NOTES_TOKENS = 24_576
PLANNER_SYSTEM_TOKENS, SEARCHER_SYSTEM_TOKENS, READER_SYSTEM_TOKENS = 768, 512, 512

BREADTHS = ("Give a quick take on", "Summarise", "Compare views on", "Survey all there is on")
"""How a question begins, by the quarter of the fan-out law that its fan-out lies in."""

DEPTHS: Mapping[str, float] = {"in brief": 0.5, "as a report": 1.0, "in great depth": 1.8}
"""How it ends, and what that does to the length of the merge."""

FOCUSES: Mapping[str, float] = {"key points": 0.6, "an outline": 1.0, "every detail": 1.7}
"""What a reader is asked for, and what that does to the length of its notes."""

TOPICS = (
    "battery recycling",
    "heat pumps in old houses",
    "coral reefs",
    "rail freight",
    "open-source licences",
    "night trains",
    "soil carbon",
    "sleep and memory",
    "urban beekeeping",
    "desalination",
)

RAMBLES = 0.04
"""Share of notes that come out four times as long, which nothing tells."""


class Document(NamedTuple):
    """What a reader is given.

    Attributes:
        share: How often.
        prompt_tokens: Median length of the document.
        output_tokens: Median length of the notes on one of median length.
    """

    share: float
    prompt_tokens: int
    output_tokens: int


DOCUMENTS: Mapping[str, Document] = {
    "abstract": Document(0.4, 600, 90),
    "article": Document(0.4, 2500, 300),
    "transcript": Document(0.2, 7000, 900),
}

FanOut = Callable[[random.Random], int]
PEAKS = (2, 5, 8, 11)
FEWEST, MOST = 1, 12


def uniform(rng: random.Random) -> int:
    """Draw 1 to 12 queries, each as likely."""
    return rng.randint(FEWEST, MOST)


def four_peak(rng: random.Random) -> int:
    """Draw 2, 5, 8 or 11 queries, or a quarter of the time one more or one less."""
    return rng.choice(PEAKS) + rng.choice((0,) * 6 + (-1, 1))


SETTINGS: Mapping[str, Reader] = {
    "fanout": choice(**{"uniform": uniform, "four-peak": four_peak}),
    "workflows": whole(1),
    "told": number(0, 1),
    "big": word,
    "small": word,
    "deadline_s": number(1e-3),
}
"""What may follow ``research:``."""


def draw(
    *,
    rng: random.Random,
    fanout: FanOut = uniform,
    workflows: int = 300,
    told: float = 0.85,
    big: str = "qwen3-32b",
    small: str = "qwen3-8b",
    deadline_s: float | None = None,
) -> list[WorkflowPlan]:
    """Draw workflows.

    Args:
        rng: Fixes them.
        fanout: Law of the number of queries.
        workflows: How many.
        told: How often words of a prompt tell the truth; else they are drawn at random.
        big: Model that plans and merges.
        small: Model that queries.
        deadline_s: Seconds after arrival by which the last answer is due.
    """
    return [
        WorkflowPlan(
            workflow_id=WorkflowId(name),
            app=APP,
            arrival_s=0.0,
            calls=_Research(name, ModelName(big), ModelName(small), told, rng).calls(fanout(rng)),
            deadline_s=deadline_s,
        )
        for name in names(APP, workflows, rng)
    ]


class _Research:
    """One workflow in the making."""

    def __init__(
        self, name: str, big: ModelName, small: ModelName, told: float, rng: random.Random
    ) -> None:
        self._name = name
        self._big = big
        self._small = small
        self._told = told
        self._rng = rng
        self._stages = count()

    def calls(self, queries: int) -> tuple[Call, ...]:
        """Make the planner, ``queries`` pairs of searcher and reader, and the merge."""
        rng = self._rng
        depth = rng.choice(sorted(DEPTHS))
        breadth = BREADTHS[min(3, 4 * (queries - FEWEST) // MOST)]
        begins = hint(breadth, BREADTHS, self._told, rng)
        ends = hint(depth, sorted(DEPTHS), self._told, rng)
        question = f"{begins} {rng.choice(TOPICS)}, {ends}."
        planner = self._planner(question, queries)
        pairs = [self._query(question, planner.stage) for _ in range(queries)]
        readers = [reader for _, reader in pairs]
        merge = self._merge(question, readers, DEPTHS[depth])
        return (planner, *(call for pair in pairs for call in pair), merge)

    def _planner(self, question: str, queries: int) -> Call:
        return self._call(
            "planner",
            self._big,
            question,
            system_tokens=PLANNER_SYSTEM_TOKENS,
            own_tokens=tokens(60, 0.5, self._rng),
            output_tokens=tokens(120 + 45 * queries, 0.35, self._rng),
        )

    def _query(self, question: str, planner: int) -> tuple[Call, Call]:
        """Search, and read what was found."""
        searcher = self._call(
            "searcher",
            self._small,
            f"{question}\nWrite a search for part {self._rng.randint(1, MOST)} of the plan.",
            parents=(planner,),
            system_tokens=SEARCHER_SYSTEM_TOKENS,
            own_tokens=tokens(150, 0.3, self._rng),
            output_tokens=tokens(70, 0.45, self._rng),
        )
        return searcher, self._reader(searcher.stage)

    def _reader(self, searcher: int) -> Call:
        rng = self._rng
        kinds, focuses = sorted(DOCUMENTS), sorted(FOCUSES)
        kind = rng.choices(kinds, [DOCUMENTS[one].share for one in kinds])[0]
        focus = rng.choice(focuses)
        document = DOCUMENTS[kind]
        document_tokens = tokens(document.prompt_tokens, 0.4, rng, most=16_384)
        stretch = (document_tokens / document.prompt_tokens) ** 0.5 * FOCUSES[focus]
        rambles = 4 if rng.random() < RAMBLES else 1
        given, wanted = hint(kind, kinds, self._told, rng), hint(focus, focuses, self._told, rng)
        return self._call(
            "reader",
            self._small,
            f"Read this {given} and write down {wanted}.",
            parents=(searcher,),
            system_tokens=READER_SYSTEM_TOKENS,
            own_tokens=document_tokens,
            output_tokens=tokens(document.output_tokens * stretch * rambles, 0.35, rng),
            tool_s=around(0.8, 0.6, rng),
        )

    def _merge(self, question: str, readers: list[Call], depth: float) -> Call:
        notes_tokens = sum(call.output_tokens for call in readers)
        return self._call(
            "merge",
            self._big,
            f"{question}\nMerge {len(readers)} notes into an answer.",
            parents=tuple(call.stage for call in readers),
            system_tokens=PLANNER_SYSTEM_TOKENS,
            own_tokens=min(MOST_NOTES_TOKENS, 60 + notes_tokens),
            output_tokens=tokens(700 * depth, 0.4, self._rng),
        )

    def _call(
        self,
        role: str,
        model: ModelName,
        text: str,
        *,
        system_tokens: int,
        own_tokens: int,
        output_tokens: int,
        parents: tuple[int, ...] = (),
        tool_s: float = 0.0,
    ) -> Call:
        stage = next(self._stages)
        prompt_tokens = system_tokens + own_tokens
        return Call(
            stage=stage,
            parents=parents,
            role=role,
            models=(model,),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            max_output_tokens=cap_tokens(output_tokens),
            tool_s=tool_s,
            prompt_text=text,
            prompt_chars=4 * prompt_tokens,
            prefix_hashes=hashes(
                f"{APP} {role}", system_tokens, prompt_tokens, f"{self._name} {stage}"
            ),
        )
