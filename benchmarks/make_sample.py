"""Make the workload that ships in the package: drawn from a fitted model, no row copied.

Run ``python benchmarks/make_sample.py`` to write ``src/concertmaster/workload/sample``; the
same seed gives the same bytes. The numbers below were fitted to public data; the comment
beside each says to what, where "log-normal (m, d)" is the mean and deviation of logarithms:

- Agent workflows: InterCode (MIT), tau-bench (MIT), HyperAgent (Apache-2.0), Reflexion (MIT),
  Tree of Thought (MIT).
- Coding sessions: kv-cache-tester (Apache-2.0).
- Accuracies and lengths of models: ZeroEval (Apache-2.0), level-5 mathematics.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from concertmaster.core.request import (
    PREFIX_CHUNK_TOKENS,
    ModelName,
    ServiceClass,
    WorkflowId,
)
from concertmaster.workload.arrivals import arrivals_s
from concertmaster.workload.jsonl import write_jsonl
from concertmaster.workload.plan import Call, ModelOutcome, WorkflowPlan, Workload
from concertmaster.workload.prefixes import chain, extend, salt_of

SEED = 7
SAMPLE_PATH = Path(__file__).parents[1] / "src/concertmaster/workload/sample/sample.jsonl"
RATE_RPS = 1.0
CAP_TOKENS = 2048
FEWEST_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model: how able it is, and how wordy.

    Attributes:
        skill: Logit of its accuracy on a question of difficulty 0.
        wordiness: Mean log ratio of its answer's length to the typical one.
    """

    name: ModelName
    skill: float
    wordiness: float


# Qwen2.5 on level-5 mathematics: 3B 0.27, 7B 0.51, 32B 0.58 correct; 1.5B put below 3B.
# Median log ratio of lengths: 3B to 7B +0.15, 7B to 32B +0.22.
MODELS = (
    Model(name=ModelName("qwen2.5-1.5b-instruct"), skill=-1.9, wordiness=0.25),
    Model(name=ModelName("qwen2.5-7b-instruct"), skill=0.1, wordiness=0.08),
    Model(name=ModelName("qwen2.5-32b-instruct"), skill=0.7, wordiness=-0.14),
)
# Correlation of correctness between two of these models: 0.33 to 0.49.
DIFFICULTY_DEVIATION = 2.2
# Deviation of the log ratio of two models' lengths: 0.55 to 0.79, so 0.45 for each.
WORDINESS_DEVIATION = 0.45


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What a role's calls look like.

    Attributes:
        tokens: Log-normal (m, d) of its answer's length.
        tool_s: Log-normal (m, d) of the pause before its call; ``None`` for no pause.
        system_tokens: System text that leads its prompts, the same in all workflows.
    """

    name: str
    tokens: tuple[float, float]
    system_tokens: int
    tool_s: tuple[float, float] | None = None
    does: str


PLANNER = Role(  # Tree of Thought planner (4.26, 0.20), with more spread
    name="planner", tokens=(4.26, 0.45), system_tokens=512, does="Plan the steps."
)
CODER = Role(  # role class coder (5.38, 1.23), HyperAgent Editor (4.98, 0.77)
    name="coder", tokens=(5.38, 0.77), system_tokens=768, does="Write the code."
)
TESTER = Role(  # role class verifier (5.13, 0.87); pauses: coding tools, p50 8 s, halved
    name="tester",
    tokens=(5.13, 0.70),
    system_tokens=512,
    tool_s=(1.4, 0.8),
    does="Read the test report.",
)
QUERY = Role(  # HyperAgent sub-agents (4.81, 0.61)
    name="query",
    tokens=(4.81, 0.61),
    system_tokens=512,
    tool_s=(0.4, 0.5),
    does="Answer one part from the pages found.",
)
MERGE = Role(  # Tree of Thought writer (5.80, 0.13), with more spread
    name="merge", tokens=(5.80, 0.30), system_tokens=256, does="Merge the parts."
)
AGENT = Role(  # tau-bench agent (3.92, 0.67), first prompts 1,272 tokens, growth 116 a turn
    name="agent",
    tokens=(3.92, 0.67),
    system_tokens=1280,
    tool_s=(1.2, 1.0),
    does="Help the customer.",
)
ANALYST = Role(  # InterCode SQL agent (3.03, 0.82), first prompts 220 tokens, growth 42 a turn
    name="analyst",
    tokens=(3.03, 0.82),
    system_tokens=256,
    tool_s=(-1.2, 0.6),
    does="Write the next SQL query.",
)

GROWTH: Mapping[str, tuple[float, float]] = {  # log-normal: tokens that a tool adds to the context
    "coding": (5.0, 0.7),  # HyperAgent: 314 a call, halved
    "research": (5.7, 0.5),  # pages found, per query
    "support": (4.2, 0.8),
    "data": (3.6, 0.7),
}
WORDS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "coding": (
        ("parser", "cache", "scheduler", "config loader", "retry loop", "test runner"),
        ("drops the last line", "leaks a handle", "ignores the limit", "fails on empty input"),
    ),
    "research": (
        ("heat pumps", "battery recycling", "tidal power", "soil carbon", "night trains"),
        ("cost since 2010", "main makers", "rules by country", "open problems"),
    ),
    "support": (
        ("flight", "order", "refund", "seat", "subscription"),
        ("is late", "was charged twice", "must be moved", "cannot be found"),
    ),
    "data": (
        ("orders", "customers", "shipments", "invoices", "returns"),
        ("per month", "by region", "without a match", "above the mean"),
    ),
}
HARDNESS = ("simple", "ordinary", "tricky")
HINT_RATIO = 0.7  # share of tasks whose wording tells the difficulty


@dataclass(slots=True)
class Draft:
    """A workflow while it is being made."""

    app: str
    rng: random.Random
    name: str
    task: str
    task_tokens: int
    difficulty: float
    calls: list[Call] = field(default_factory=list)

    def add(self, role: Role, parents: Sequence[int]) -> int:
        """Append a call that reads what its parents wrote; return its stage."""
        stage = len(self.calls)
        origin = next((c for c in reversed(self.calls) if c.role == role.name), None)
        prompt_tokens = role.system_tokens + self.task_tokens + self._read_tokens(parents)
        if origin:
            prompt_tokens = max(prompt_tokens, origin.prompt_tokens + origin.output_tokens)
        output_tokens = _tokens(role.tokens, self.rng)
        self.calls.append(
            Call(
                stage=stage,
                parents=tuple(parents),
                role=role.name,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                max_output_tokens=CAP_TOKENS,
                tool_s=self._pause_s(role, parents),
                prompt_text=f"You are the {role.name}. {role.does} Task: {self.task}",
                prefix_hashes=self._hashes(role, stage, origin, prompt_tokens),
                outcomes={model.name: self._outcome(model, output_tokens) for model in MODELS},
            )
        )
        return stage

    def _read_tokens(self, parents: Sequence[int]) -> int:
        """Sum what the parents wrote and what tools added."""
        growth = sum(round(self.rng.lognormvariate(*GROWTH[self.app])) for _ in parents)
        return growth + sum(self.calls[parent].output_tokens for parent in parents)

    def _pause_s(self, role: Role, parents: Sequence[int]) -> float:
        if role.tool_s is None or not parents:
            return 0.0
        return round(min(60.0, self.rng.lognormvariate(*role.tool_s)), 3)

    def _hashes(
        self, role: Role, stage: int, origin: Call | None, prompt_tokens: int
    ) -> tuple[int, ...]:
        """Begin as the role's last prompt here did, else with the role's system text."""
        if origin:
            base, shared_tokens = origin.prefix_hashes, origin.prompt_tokens
        else:
            shared_tokens = role.system_tokens
            chunks = shared_tokens // PREFIX_CHUNK_TOKENS
            base = tuple(chain(0, salt_of(f"{self.app} {role.name}"), chunks))
        salt = salt_of(f"{self.name} {stage}")
        return extend(base, shared_tokens=shared_tokens, prompt_tokens=prompt_tokens, salt=salt)

    def _outcome(self, model: Model, typical_tokens: int) -> ModelOutcome:
        chance = 1.0 / (1.0 + math.exp(self.difficulty - model.skill))
        ratio = math.exp(self.rng.gauss(model.wordiness, WORDINESS_DEVIATION))
        return ModelOutcome(
            correct=float(self.rng.uniform(0.0, 1.0) < chance),
            output_tokens=max(FEWEST_TOKENS, min(CAP_TOKENS, round(typical_tokens * ratio))),
        )


def _tokens(law: tuple[float, float], rng: random.Random) -> int:
    return max(FEWEST_TOKENS, min(CAP_TOKENS, round(rng.lognormvariate(*law))))


def coding(draft: Draft) -> None:
    """Planner, coder, tester, coder; tests fail again with 0.36 (Reflexion: 1.2 to 2.5 tries)."""
    last = draft.add(CODER, [draft.add(PLANNER, [])])
    for _ in range(4):
        last = draft.add(CODER, [draft.add(TESTER, [last])])
        if draft.rng.uniform(0.0, 1.0) > 0.36:
            break


def research(draft: Draft) -> None:
    """Planner, two to six queries at once (Tree of Thought: five), one merge."""
    first = draft.add(PLANNER, [])
    (width,) = draft.rng.choices((2, 3, 4, 5, 6), weights=(1, 2, 3, 4, 2))
    draft.add(MERGE, [draft.add(QUERY, [first]) for _ in range(width)])


def support(draft: Draft) -> None:
    """Chat for three to nine turns (tau-bench: eleven at the median), tools or a person between."""
    last = draft.add(AGENT, [])
    for _ in range(draft.rng.randint(2, 8)):
        last = draft.add(AGENT, [last])


def data(draft: Draft) -> None:
    """Run SQL until it fits: 1, 4 and 10 calls at p10, p50 and p90, as in InterCode."""
    last = draft.add(ANALYST, [])
    for _ in range(9):
        if draft.rng.uniform(0.0, 1.0) < 0.19:
            break
        last = draft.add(ANALYST, [last])


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One application of the sample.

    Attributes:
        batch_ratio: Share of its workflows that no person waits for.
        deadline_ratio: Share of its workflows with a deadline.
        difficulty: Mean difficulty, in logits.
    """

    name: str
    workflows: int
    make: Callable[[Draft], None]
    batch_ratio: float
    deadline_ratio: float
    difficulty: float


APPS = (
    App(
        name="coding",
        workflows=72,
        make=coding,
        batch_ratio=0.25,
        deadline_ratio=0.4,
        difficulty=0.5,
    ),
    App(
        name="research",
        workflows=54,
        make=research,
        batch_ratio=0.6,
        deadline_ratio=0.3,
        difficulty=-0.5,
    ),
    App(
        name="support",
        workflows=84,
        make=support,
        batch_ratio=0.0,
        deadline_ratio=0.2,
        difficulty=-1.0,
    ),
    App(name="data", workflows=90, make=data, batch_ratio=0.3, deadline_ratio=0.3, difficulty=0.0),
)
SECONDS_PER_CALL, SECONDS_PER_TOKEN = 0.5, 0.02
SLACK_RATIOS = (1.5, 4.0)


def build(seed: int) -> Workload:
    """Make the whole sample; equal seeds give equal workloads."""
    rng = random.Random(f"{seed} sample")
    slots = [(app, count) for app in APPS for count in range(app.workflows)]
    rng.shuffle(slots)
    instants_s = arrivals_s(len(slots), RATE_RPS, 1.0, rng)
    plans = [
        _workflow(app, count, round(arrival_s, 3), seed)
        for (app, count), arrival_s in zip(slots, instants_s, strict=True)
    ]
    plans.sort(key=lambda plan: (plan.arrival_s, plan.workflow_id))
    return Workload(name="sample", workflows=tuple(plans))


def _workflow(app: App, count: int, arrival_s: float, seed: int) -> WorkflowPlan:
    name = f"{app.name}-{count:03d}"
    rng = random.Random(f"{seed} {name}")
    difficulty = rng.gauss(app.difficulty, DIFFICULTY_DEVIATION)
    draft = Draft(
        app=app.name,
        rng=rng,
        name=name,
        task=_task(app, difficulty, rng),
        task_tokens=round(rng.lognormvariate(4.2, 0.6)),
        difficulty=difficulty,
    )
    app.make(draft)
    batch = rng.uniform(0.0, 1.0) < app.batch_ratio
    promised = rng.uniform(0.0, 1.0) < app.deadline_ratio
    return WorkflowPlan(
        workflow_id=WorkflowId(name),
        app=app.name,
        arrival_s=arrival_s,
        calls=tuple(draft.calls),
        service_class=ServiceClass.BATCH if batch else ServiceClass.INTERACTIVE,
        deadline_s=_deadline_s(draft.calls, rng) if promised else None,
    )


def _task(app: App, difficulty: float, rng: random.Random) -> str:
    """Word the task; most of the time the adjective tells how hard it is."""
    offset = (difficulty - app.difficulty) / DIFFICULTY_DEVIATION
    true_hardness = HARDNESS[0 if offset < -0.5 else 1 if offset < 0.5 else 2]
    told = true_hardness if rng.uniform(0.0, 1.0) < HINT_RATIO else rng.choice(HARDNESS)
    subjects, predicates = WORDS[app.name]
    return f"{told} case: {rng.choice(subjects)}, {rng.choice(predicates)}."


def _deadline_s(calls: Sequence[Call], rng: random.Random) -> float:
    """Promise a multiple of what the longest chain takes on an idle, ordinary replica."""
    end_s: dict[int, float] = {}
    for call in calls:
        ready_s = max((end_s[parent] for parent in call.parents), default=0.0)
        service_s = SECONDS_PER_CALL + SECONDS_PER_TOKEN * call.output_tokens
        end_s[call.stage] = ready_s + call.tool_s + service_s
    return float(math.ceil(max(end_s.values()) * rng.uniform(*SLACK_RATIOS)))


def main() -> None:
    """Write the sample and print what is in it."""
    workload = build(SEED)
    SAMPLE_PATH.parent.mkdir(exist_ok=True)
    write_jsonl(workload, SAMPLE_PATH)
    size_bytes = SAMPLE_PATH.stat().st_size
    print(f"{len(workload)} workflows, {workload.requests} calls, {workload.duration_s:.0f} s")
    print(f"{workload.total_tokens:,} tokens, {size_bytes:,} bytes")


if __name__ == "__main__":
    main()
