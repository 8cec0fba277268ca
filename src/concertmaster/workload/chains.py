"""Routing sets turned into workflows: a chain of roles answers each question.

Stages that answer take each model's real length and outcome for that question. Stages
that plan, verify or test have no recorded answer: their lengths are drawn, with a seed that
depends on question and stage alone, from real lengths of that role class where the
folder has them, else from a log-normal law fitted to them.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from concertmaster.core.errors import InputError, unknown_name
from concertmaster.core.request import PREFIX_CHUNK_TOKENS, ModelName, WorkflowId
from concertmaster.workload.plan import NO_OUTCOMES, Call, ModelOutcome, WorkflowPlan, cap_tokens
from concertmaster.workload.prefixes import chain, extend, salt_of

ANSWER_ROLES = frozenset({"actor", "agent", "answerer", "coder", "expert", "solver"})
"""Roles whose model answers the question itself."""

IF_REJECTED = "?"
"""Ends a role that works only if the verifier before it rejects the last answer."""

ROLE_CLASSES: Mapping[str, str] = {
    "critic": "verifier",
    "judge": "verifier",
    "planner": "planner",
    "reflector": "reflector",
    "reviewer": "verifier",
    "summarizer": "writer",
    "tester": "verifier",
    "verifier": "verifier",
    "writer": "writer",
}
"""The other roles, and the ``role_class`` whose lengths they have."""

LENGTH_LAWS: Mapping[str, tuple[float, float]] = {
    "planner": (3.96, 1.58),
    "reflector": (4.14, 0.28),
    "verifier": (5.13, 0.87),
    "writer": (5.80, 0.13),
}
"""Mean and deviation of the log of output tokens, fitted to ``workflow_stages.parquet``."""

PREAMBLE_TOKENS = 512
"""System text that leads every prompt of a template, the same for all questions."""

ROLE_TOKENS = 64
"""What a stage is told to do; it ends the prompt, so that all before it is shared."""

MOST_HELPER_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a routing set, and how each model did on it.

    Attributes:
        group: What copies of the question share.
    """

    question_id: str
    source: str
    group: str
    text: str
    prompt_tokens: int
    outcomes: Mapping[ModelName, ModelOutcome]


@dataclass(frozen=True, slots=True)
class Template:
    """Roles in the order in which they work, each on what all before it said."""

    roles: tuple[str, ...]

    def __str__(self) -> str:
        """Write it as it is read: ``planner-coder``."""
        return "-".join(self.roles)

    @classmethod
    def parse(cls, file: str, text: str) -> "Template":
        """Read ``planner-coder-tester-coder``; ``coder?`` works only on rejected code.

        >>> Template.parse("data", "planner-solver").roles
        ('planner', 'solver')
        """
        roles = tuple(text.split("-"))
        known = sorted(ANSWER_ROLES | ROLE_CLASSES.keys())
        for role in roles:
            if role.removesuffix(IF_REJECTED) not in known:
                raise unknown_name(file, f"template {text}", "role", role, known)
        judged = False
        for role in roles:
            if role.endswith(IF_REJECTED) and not judged:
                problem = f"expected a verifier before {role}, found none"
                remedy = f"for example solver-verifier-{role}"
                raise InputError(file, f"template {text}", problem, remedy)
            judged = judged or ROLE_CLASSES.get(role) == "verifier"
        if ANSWER_ROLES.isdisjoint(roles):
            problem = f"expected a stage that answers ({', '.join(sorted(ANSWER_ROLES))})"
            remedy = f"for example {text}-solver"
            raise InputError(file, f"template {text}", f"{problem}, found none", remedy)
        return cls(roles)


def workflow(
    question: Question, template: Template, lengths: Mapping[str, Sequence[int]], *, seed: int
) -> WorkflowPlan:
    """Make the workflow in which ``template`` answers ``question``.

    ``lengths`` are real output lengths by role class; the fitted law stands in for absent ones.
    """
    salt = salt_of(f"{question.question_id} {template}")
    preamble = chain(0, salt_of(f"preamble {template}"), PREAMBLE_TOKENS // PREFIX_CHUNK_TOKENS)
    context_tokens = PREAMBLE_TOKENS + question.prompt_tokens
    calls = []
    transcript = tuple(preamble)
    for stage, role in enumerate(template.roles):
        transcript = extend(
            transcript,
            shared_tokens=len(transcript) * PREFIX_CHUNK_TOKENS,
            prompt_tokens=context_tokens,
            salt=salt,
        )
        call = _call(
            question,
            stage=stage,
            role=role,
            context_tokens=context_tokens,
            transcript=transcript,
            lengths=lengths,
            seed=seed,
        )
        calls.append(call)
        context_tokens += call.output_tokens
    return WorkflowPlan(
        workflow_id=WorkflowId(f"{question.question_id}:{template}"),
        app=f"{question.source}:{template}",
        template=str(template),
        task=question.group,
        arrival_s=0.0,
        calls=tuple(calls),
    )


def _call(
    question: Question,
    *,
    stage: int,
    role: str,
    context_tokens: int,
    transcript: tuple[int, ...],
    lengths: Mapping[str, Sequence[int]],
    seed: int,
) -> Call:
    doubt = None
    if role.endswith(IF_REJECTED):
        role = role.removesuffix(IF_REJECTED)
        doubt = random.Random(f"{seed} {question.question_id} {stage} verdict").random()
    answers = role in ANSWER_ROLES
    rng = random.Random(f"{seed} {question.question_id} {stage}")
    if answers:
        known_tokens = [outcome.output_tokens for outcome in question.outcomes.values()]
        output_tokens, longest_tokens = round(median(known_tokens)), max(known_tokens)
    else:
        output_tokens = longest_tokens = helper_tokens(ROLE_CLASSES[role], lengths, rng)
    prompt_tokens = context_tokens + ROLE_TOKENS
    own_text_salt = salt_of(f"{question.question_id} {stage} {role}")
    return Call(
        stage=stage,
        parents=(stage - 1,) if stage else (),
        role=role,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_output_tokens=cap_tokens(longest_tokens),
        prompt_text=f"{question.text}\n\nYou are the {role}.",
        prefix_hashes=extend(
            transcript,
            shared_tokens=context_tokens,
            prompt_tokens=prompt_tokens,
            salt=own_text_salt,
        ),
        outcomes=question.outcomes if answers else NO_OUTCOMES,
        doubt=doubt,
    )


def helper_tokens(role_class: str, lengths: Mapping[str, Sequence[int]], rng: random.Random) -> int:
    """Draw the length of an answer that nobody recorded."""
    real = lengths.get(role_class)
    if real:
        return max(1, min(MOST_HELPER_TOKENS, rng.choice(real)))
    mean, deviation = LENGTH_LAWS[role_class]
    return max(1, min(MOST_HELPER_TOKENS, round(rng.lognormvariate(mean, deviation))))
