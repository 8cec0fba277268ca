"""What is trained on and what is kept back: groups of rows that must never be parted.

Several runs of one task, and copies of one question, share a group key; a group is held out
whole or not at all. A store keeps hashes of the keys it was trained on, so that nobody
measures it on what it has seen.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName
from concertmaster.learning.fit_success import Labelled
from concertmaster.workload.files import read_table
from concertmaster.workload.load import load_source
from concertmaster.workload.merge import distinct
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.routing import OUTCOMES_FILE, QUESTIONS_FILE
from concertmaster.workload.sources import Source
from concertmaster.workload.split import held_out
from concertmaster.workload.tables import Table

RUN = "agent:"
"""How the harness of a whole agent run begins; other rows are single answers."""

_NEEDED_OF_QUESTION = ("question_id", "source", "question")
_QUESTION_COLUMNS = (*_NEEDED_OF_QUESTION, "dup_group")
_NEEDED_OF_OUTCOME = ("question_id", "source", "model", "harness", "correct")
_OUTCOME_COLUMNS = (*_NEEDED_OF_OUTCOME, "output_tokens")
_HASH_BYTES = 6


class Question(NamedTuple):
    """One question of a routing set.

    Attributes:
        key: Its group: questions that are copies of each other share it.
        labelled: Its text and who solved it.
    """

    question_id: str
    key: str
    source: str
    labelled: Labelled


class Rows(NamedTuple):
    """Recorded workflows and questions, and what their readers had to say."""

    plans: list[WorkflowPlan]
    questions: list[Question]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> set[str]:
        """Group keys of all of them."""
        return {key_of(plan) for plan in self.plans} | {one.key for one in self.questions}

    def keep(self, *, held_out_ones: bool) -> "Rows":
        """Return the groups that are held out, or those that are not."""
        plans = [plan for plan in self.plans if held_out(key_of(plan)) == held_out_ones]
        questions = [one for one in self.questions if held_out(one.key) == held_out_ones]
        return Rows(plans, questions, self.notes)


def key_of(plan: WorkflowPlan) -> str:
    """Return the group of a workflow: its task, else itself."""
    return plan.task or plan.workflow_id


def read_rows(workloads: Sequence[str], routing: Sequence[Path], *, seed: int) -> Rows:
    """Read all that was named; arrivals play no part.

    Args:
        workloads: As after ``-w``.
        routing: Folders of routing sets.
        seed: Of what a reader draws.

    Raises:
        InputError: Nothing is named, or a file cannot be read.
    """
    if not workloads and not routing:
        problem = "expected a workload or a routing set, found neither"
        raise InputError("--workload", "", problem, "for example -w sample, or -r FOLDER")
    sources = distinct([_keyed(load_source(spec, seed=seed)) for spec in workloads])
    plans = [plan for source in sources for plan in source.plans]
    notes = [note for source in sources for note in source.notes]
    questions: list[Question] = []
    for folder in routing:
        found, found_notes = read_questions(folder)
        questions += found
        notes += found_notes
    return Rows(plans, questions, tuple(dict.fromkeys(notes)))


def _keyed(source: Source) -> Source:
    """Write the key of each workflow into it, before its id is made unlike others."""
    return replace(source, plans=[replace(plan, task=key_of(plan)) for plan in source.plans])


def read_questions(folder: Path) -> tuple[list[Question], tuple[str, ...]]:
    """Read the single answers of a routing set; of each source those of one harness.

    Raises:
        InputError: A table is missing, lacks a column or holds a value that is wrong, or
            there is no single answer in it.
    """
    table = read_table(folder / QUESTIONS_FILE, _QUESTION_COLUMNS)
    table.require(_NEEDED_OF_QUESTION, "a table of questions")
    outcomes = read_table(folder / OUTCOMES_FILE, _OUTCOME_COLUMNS)
    outcomes.require(_NEEDED_OF_OUTCOME, "a table of outcomes")
    harnesses, notes = _harnesses(outcomes)
    grades = _grades(outcomes, harnesses)
    questions = _questions(table, grades)
    if not questions:
        problem = "expected questions with single answers, found none"
        hint = f'rows whose harness begins with "{RUN}" are whole runs and do not count'
        raise InputError(str(folder), "", problem, hint)
    if skipped := len(table) - len(questions):
        notes += (f"{folder}: {skipped:,} questions without a single answer left out",)
    return questions, notes


def _questions(
    table: Table, grades: dict[tuple[str, str], dict[ModelName, float]]
) -> list[Question]:
    ids, sources = table.names("question_id"), table.texts("source")
    texts, groups = table.texts("question"), table.texts("dup_group")
    questions = []
    for row, question_id in enumerate(ids):
        correct = grades.get((sources[row], question_id))
        if correct:
            key = groups[row] or question_id
            labelled = Labelled(text=texts[row], correct=correct, group=key, source=sources[row])
            questions.append(Question(question_id, key, sources[row], labelled))
    return questions


def _harnesses(table: Table) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the harness of single answers by source: the one with the most known lengths."""
    known: Counter[tuple[str, str]] = Counter()
    names = zip(table.texts("source"), table.texts("harness"), strict=True)
    for name, tokens in zip(names, table.wholes_or_none("output_tokens"), strict=True):
        known[name] += 0 if tokens is None else 1
    chosen: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    for source, harness in sorted(known, key=lambda name: (name[0], -known[name], name[1])):
        if harness.startswith(RUN):
            continue
        first = chosen.setdefault(source, harness)
        if harness != first:
            notes += (f'{source}: answers of "{first}" used, not of {harness}',)
    return chosen, notes


def _grades(
    table: Table, harnesses: dict[str, str]
) -> dict[tuple[str, str], dict[ModelName, float]]:
    ids, models = table.names("question_id"), table.names("model")
    sources, names = table.texts("source"), table.texts("harness")
    grades: dict[tuple[str, str], dict[ModelName, float]] = {}
    for row, grade in enumerate(table.numbers_or_none("correct", most=1.0)):
        source = sources[row]
        if grade is not None and harnesses.get(source) == names[row]:
            grades.setdefault((source, ids[row]), {})[ModelName(models[row])] = grade
    return grades


def seen_hashes(
    plans: Iterable[WorkflowPlan], questions: Iterable[Question]
) -> npt.NDArray[np.uint64]:
    """Return the sorted hashes of all keys and ids, to keep with what was trained on them."""
    names = {_name(kind, name) for kind, name, _ in _names(plans, questions)}
    return np.array(sorted(names), dtype=np.uint64)


def refuse_overlap(
    seen: npt.NDArray[np.uint64],
    plans: Sequence[WorkflowPlan],
    questions: Sequence[Question],
    *,
    where: str,
    remedy: str,
) -> None:
    """Check that nothing here was trained on.

    Args:
        seen: What ``seen_hashes`` gave in training.
        plans: Workflows to measure on.
        questions: Questions to measure on.
        where: What was trained, for the message.
        remedy: What to do if something was.

    Raises:
        InputError: Some of it was: how much, an example, and what to do.
    """
    known = set(seen.tolist())
    groups: dict[tuple[str, str], str] = {}
    for kind, name, shown in _names(plans, questions):
        if _name(kind, name) in known:
            groups.setdefault((kind, name), shown)
    if not groups:
        return
    counts = Counter(kind for kind, _ in groups)
    found = " and ".join(f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    problem = f"it was trained on {found} of these, for example {min(groups.values())}"
    raise InputError(where, "", problem, remedy)


def _names(
    plans: Iterable[WorkflowPlan], questions: Iterable[Question]
) -> Iterable[tuple[str, str, str]]:
    """Yield kind, name and what to show, of every key and id."""
    for plan in plans:
        yield "task", key_of(plan), f'workflow "{plan.workflow_id}"'
        yield "workflow", plan.workflow_id, f'workflow "{plan.workflow_id}"'
    for one in questions:
        yield "question", one.key, f'question "{one.question_id}"'
        yield "question id", one.question_id, f'question "{one.question_id}"'


def _name(kind: str, name: str) -> int:
    text = f"{kind} {name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=_HASH_BYTES).digest(), "big")
