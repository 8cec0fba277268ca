"""Routing sets: several models on the same questions, read from a folder of two tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from concertmaster.core.errors import InputError
from concertmaster.core.model_names import canonical
from concertmaster.core.request import ModelName
from concertmaster.workload.chains import (
    ANSWER_ROLES,
    IF_REJECTED,
    LENGTH_LAWS,
    ROLE_CLASSES,
    Question,
    Template,
    workflow,
)
from concertmaster.workload.files import read_table
from concertmaster.workload.plan import ModelOutcome
from concertmaster.workload.sources import Source
from concertmaster.workload.tables import Table

QUESTIONS_FILE, OUTCOMES_FILE = "routing_questions.parquet", "routing_outcomes.parquet"
STAGES_FILE = "workflow_stages.parquet"
QUESTION_COLUMNS = ("question_id", "source", "question", "prompt_tokens")
GROUP_COLUMN = "dup_group"
OUTCOME_COLUMNS = ("question_id", "source", "model", "harness", "correct", "output_tokens")
LENGTH_COLUMNS = ("role_class", "output_tokens")

DEFAULT_TEMPLATE = "solver"

_RUN = "agent:"


@dataclass(frozen=True, slots=True)
class _Answer:
    """One row of the outcome table."""

    question_id: str
    model: ModelName
    correct: float
    output_tokens: int | None


def read_routing(folder: Path, text: str | None, *, seed: int) -> Source:
    """Read ``SOURCE:TEMPLATE`` of a routing folder; the template is ``solver`` if left out."""
    questions = read_table(folder / QUESTIONS_FILE, (*QUESTION_COLUMNS, GROUP_COLUMN))
    questions.require(QUESTION_COLUMNS, "a table of questions")
    source, _, roles = (text or "").partition(":")
    if not source:
        known = ", ".join(sorted(set(questions.texts("source"))))
        problem = "expected a source after #, found none"
        remedy = f"add #SOURCE:planner-solver, where SOURCE is one of {known}"
        raise InputError(str(folder), "", problem, remedy)
    template = Template.parse(str(folder), roles or DEFAULT_TEMPLATE)
    questions = questions.select("source", source)
    outcomes, notes = _outcomes(read_table(folder / OUTCOMES_FILE, OUTCOME_COLUMNS), source)
    lengths, length_notes = _helper_lengths(folder, template)
    asked = [question for question in _questions(questions, outcomes) if question.outcomes]
    if skipped := len(questions) - len(asked):
        notes += (f"{folder}: {skipped:,} questions without a single answer left out",)
    plans = [workflow(question, template, lengths, seed=seed) for question in asked]
    return Source(name=f"{source}:{template}", plans=plans, timed=False, notes=notes + length_notes)


def _questions(
    table: Table, outcomes: Mapping[str, Mapping[ModelName, ModelOutcome]]
) -> list[Question]:
    ids, sources = table.names("question_id"), table.names("source")
    groups = table.texts(GROUP_COLUMN)
    texts, prompt_tokens = table.texts("question"), table.wholes("prompt_tokens")
    return [
        Question(
            question_id=question_id,
            source=sources[row],
            group=groups[row] or question_id,
            text=texts[row],
            prompt_tokens=prompt_tokens[row],
            outcomes=outcomes.get(question_id, {}),
        )
        for row, question_id in enumerate(ids)
    ]


def _outcomes(
    table: Table, source: str
) -> tuple[dict[str, dict[ModelName, ModelOutcome]], tuple[str, ...]]:
    """Collect what each model did on each question, under one harness."""
    table.require(OUTCOME_COLUMNS, "a table of outcomes")
    table = table.select("source", source)
    harness, notes = _harness(table)
    answers = _answers(table.select("harness", harness))
    by_question: dict[str, dict[ModelName, ModelOutcome]] = {}
    typical_tokens = _median_tokens(answers) or 1
    for question_id, own in _by_question(answers).items():
        fallback_tokens = _median_tokens(own) or typical_tokens
        by_question[question_id] = {
            answer.model: ModelOutcome(
                correct=answer.correct, output_tokens=answer.output_tokens or fallback_tokens
            )
            for answer in own
        }
    if unknown := sum(answer.output_tokens is None for answer in answers):
        rule = f"the median of that question, else of all ({typical_tokens})"
        notes += (f"{source}: {unknown:,} answers of unknown length: taken as {rule}",)
    return by_question, notes


def _harness(table: Table) -> tuple[str, tuple[str, ...]]:
    """Choose single answers before whole runs, then the harness that says most of most models.

    That is the one with lengths of the most models, then of the most answers, then with the
    most right answers.
    """
    names, models = table.texts("harness"), table.texts("model")
    lengths, grades = table.wholes_or_none("output_tokens"), table.numbers_or_none("correct")
    known = Counter(name for name, tokens in zip(names, lengths, strict=True) if tokens)
    right: Counter[str] = Counter()
    measured: dict[str, set[str]] = {name: set() for name in names}
    for name, model, tokens, grade in zip(names, models, lengths, grades, strict=True):
        right[name] += round(grade or 0.0)
        if tokens:
            measured[name].add(canonical(model))
    chosen = min(
        measured,
        key=lambda name: (
            name.startswith(_RUN),
            -len(measured[name]),
            -known[name],
            -right[name],
            name,
        ),
    )
    others = sorted(set(names) - {chosen})
    if not others:
        return chosen, ()
    return chosen, (f'answers of "{chosen}" used, not of {", ".join(others)}',)


def _answers(table: Table) -> list[_Answer]:
    ids, models = table.names("question_id"), table.names("model")
    correct = table.numbers_or_none("correct", most=1.0)
    output_tokens = table.wholes_or_none("output_tokens")
    return [
        _Answer(
            question_id, ModelName(canonical(models[row])), correct[row] or 0.0, output_tokens[row]
        )
        for row, question_id in enumerate(ids)
    ]


def _by_question(answers: Sequence[_Answer]) -> dict[str, list[_Answer]]:
    groups: dict[str, list[_Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.question_id, []).append(answer)
    return groups


def _median_tokens(answers: Sequence[_Answer]) -> int | None:
    known = [answer.output_tokens for answer in answers if answer.output_tokens]
    return round(median(known)) if known else None


def _helper_lengths(
    folder: Path, template: Template
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Read real lengths by role class, if a workflow file lies beside the questions."""
    roles = {role.removesuffix(IF_REJECTED) for role in template.roles}
    wanted = {ROLE_CLASSES[role] for role in roles - ANSWER_ROLES}
    if not wanted:
        return {}, ()
    if not (folder / STAGES_FILE).is_file():
        laws = "; ".join(f"{name} {LENGTH_LAWS[name]}" for name in sorted(wanted))
        return {}, (f"lengths of stages without recorded answers: log-normal, {laws}",)
    table = read_table(folder / STAGES_FILE, LENGTH_COLUMNS)
    table.require(LENGTH_COLUMNS, "a workflow file")
    lengths: dict[str, list[int]] = {name: [] for name in sorted(wanted)}
    for name, tokens in zip(table.texts("role_class"), table.wholes("output_tokens"), strict=True):
        if name in wanted:
            lengths[name].append(tokens)
    drawn = ", ".join(f"{len(values):,} of {name}" for name, values in lengths.items())
    return lengths, (f"lengths of stages without recorded answers: drawn from {drawn}",)
