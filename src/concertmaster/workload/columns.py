"""The columns of a file with one row a call, checked and filled in.

Which columns there are and what they mean: ``docs/workloads.md``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.workload.plan import NO_OUTCOMES, ModelOutcome
from concertmaster.workload.sources import service_classes
from concertmaster.workload.tables import Table, counted_note

REQUIRED = ("workflow_id", "stage_index", "parents", "prompt_tokens", "output_tokens")
COLUMNS = (
    *REQUIRED,
    "app",
    "harness",
    "task_group",
    "service_class",
    "arrival_s",
    "deadline_s",
    "success",
    "role",
    "stage_name",
    "model",
    "models",
    "max_output_tokens",
    "tool_s",
    "think_s",
    "t_start_s",
    "wall_s",
    "prompt_text",
    "prompt_chars",
    "input_kinds",
    "output_kinds",
    "stop",
    "token_source",
    "prefix_hit_tokens",
    "prefix_from",
    "prefix_keep",
    "prefix_hashes",
    "doubt",
    "outcomes",
)


@dataclass(slots=True)
class StagedColumns:
    """The checked columns of a table, one list a column."""

    table: Table
    workflow_ids: list[str] = field(init=False)
    stages: list[int] = field(init=False)
    parents: list[tuple[int, ...]] = field(init=False)
    prompt_tokens: list[int] = field(init=False)
    output_tokens: list[int] = field(init=False)
    caps_tokens: list[int | None] = field(init=False)
    apps: list[str] = field(init=False)
    templates: list[str] = field(init=False)
    tasks: list[str] = field(init=False)
    roles: list[str] = field(init=False)
    steps: list[str] = field(init=False)
    after_tools: list[bool | None] = field(init=False)
    tool_calls: list[bool | None] = field(init=False)
    models: list[ModelName | None] = field(init=False)
    models_asked: list[tuple[ModelName, ...]] = field(init=False)
    classes: list[ServiceClass] = field(init=False)
    arrivals_s: list[float | None] = field(init=False)
    deadlines_s: list[float | None] = field(init=False)
    successes: list[float | None] = field(init=False)
    tools_s: list[float | None] = field(init=False)
    starts_s: list[float | None] = field(init=False)
    walls_s: list[float | None] = field(init=False)
    prompt_texts: list[str] = field(init=False)
    prompt_chars: list[int | None] = field(init=False)
    token_sources: list[str] = field(init=False)
    hits_tokens: list[int | None] = field(init=False)
    prefix_from: list[int | None] = field(init=False)
    prefix_keep: list[int | None] = field(init=False)
    prefix_hashes: list[tuple[int, ...] | None] = field(init=False)
    doubts: list[float | None] = field(init=False)
    outcomes: list[Mapping[ModelName, ModelOutcome]] = field(init=False)
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.table.require(REQUIRED, "a workflow file")
        self._read_calls()
        self._read_workflows()
        self._read_times()
        self._read_prefixes()

    def _read_calls(self) -> None:
        table = self.table
        self.stages = table.wholes("stage_index")
        self.parents = _parents(table)
        self.roles = table.texts("role")
        self.steps = table.texts("stage_name")
        self.after_tools = [_names(kinds, "tool_result") for kinds in table.texts("input_kinds")]
        self.tool_calls = _tool_calls(table)
        self.models = [known_model(name) for name in table.texts("model")]
        self.models_asked = _models_asked(table)
        self.caps_tokens = table.wholes_or_none("max_output_tokens", least=1)
        self.doubts = table.numbers_or_none("doubt", most=1.0)
        self.outcomes = _outcomes(table)
        self.prompt_tokens, prompt_note = at_least_one(table, "prompt_tokens")
        self.output_tokens, output_note = at_least_one(table, "output_tokens")
        self.notes = prompt_note + output_note

    def _read_workflows(self) -> None:
        table = self.table
        self.workflow_ids = table.names("workflow_id")
        self.apps = table.texts("app")
        self.templates = table.texts("harness")
        self.tasks = table.texts("task_group")
        self.classes = service_classes(table)
        self.deadlines_s = table.numbers_or_none("deadline_s")
        self.successes = table.numbers_or_none("success", most=1.0)

    def of_workflow(self) -> tuple[tuple[str, Sequence[object]], ...]:
        """Return the columns that say something of the whole workflow."""
        return (
            ("app", self.apps),
            ("harness", self.templates),
            ("task_group", self.tasks),
            ("arrival_s", self.arrivals_s),
            ("service_class", self.classes),
            ("deadline_s", self.deadlines_s),
        )

    def _read_times(self) -> None:
        table = self.table
        self.arrivals_s = table.numbers_or_none("arrival_s")
        given, thought = table.numbers_or_none("tool_s"), table.numbers_or_none("think_s")
        self.tools_s = [
            tool if tool is not None else think for tool, think in zip(given, thought, strict=True)
        ]
        self.starts_s = table.numbers_or_none("t_start_s")
        self.walls_s = table.numbers_or_none("wall_s")

    def _read_prefixes(self) -> None:
        table = self.table
        self.prompt_texts = table.texts("prompt_text")
        self.prompt_chars = table.wholes_or_none("prompt_chars")
        self.token_sources = table.texts("token_source")
        self.hits_tokens = table.wholes_or_none("prefix_hit_tokens")
        self.prefix_from = table.wholes_or_none("prefix_from")
        self.prefix_keep = table.wholes_or_none("prefix_keep")
        self.prefix_hashes = table.lists("prefix_hashes")


def known_model(name: str) -> ModelName | None:
    """Drop names that say that the model is not known."""
    unknown = not name or name.startswith("unknown") or name.endswith("(undisclosed)")
    return None if unknown else ModelName(name)


def at_least_one(table: Table, column: str) -> tuple[list[int], tuple[str, ...]]:
    """Read token counts; 0 counts as 1, which a note says, because no engine serves 0."""
    values = table.wholes(column)
    zeros = [row for row, value in enumerate(values) if not value]
    for row in zeros:
        values[row] = 1
    return values, counted_note(table, f"{column} 0 read as 1", zeros)


def _names(kinds: str, kind: str) -> bool | None:
    """Say whether a list like ``text+tool_use`` names a kind; ``None`` if it is empty.

    >>> _names("text+tool_use", "tool_use"), _names("text", "tool_use"), _names("", "tool_use")
    (True, False, None)
    """
    return kind in kinds.split("+") if kinds else None


def _tool_calls(table: Table) -> list[bool | None]:
    """Read what the answer was made of; where that is not said, why it stopped."""
    kinds, stops = table.texts("output_kinds"), table.texts("stop")
    return [
        _names(kind or stop, "tool_use") or stop == "tool_use" if kind or stop else None
        for kind, stop in zip(kinds, stops, strict=True)
    ]


def _parents(table: Table) -> list[tuple[int, ...]]:
    parents = []
    for row, waits in enumerate(table.lists("parents")):
        if waits is None:
            raise table.error(row, "parents", "a list of stages", "[] if it waits for none")
        parents.append(tuple(dict.fromkeys(waits)))
    return parents


def _models_asked(table: Table) -> list[tuple[ModelName, ...]]:
    """Read the models that may answer; none named, any may."""
    return [
        tuple(dict.fromkeys(map(ModelName, names or ()))) for names in table.text_lists("models")
    ]


def _outcomes(table: Table) -> list[Mapping[ModelName, ModelOutcome]]:
    cells = table.columns.get("outcomes")
    if cells is None:
        return [NO_OUTCOMES] * len(table)
    return [
        _outcomes_of(table, row, cell) if cell else NO_OUTCOMES for row, cell in enumerate(cells)
    ]


def _outcomes_of(table: Table, row: int, cell: object) -> Mapping[ModelName, ModelOutcome]:
    """Read ``{"model": {"correct": 1, "output_tokens": 210}}``, as an object or as its JSON."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            cell = None
    if not isinstance(cell, dict):
        raise table.error(row, "outcomes", "an object {model: {correct, output_tokens}}")
    return {
        ModelName(model): _outcome(table, row, model, entry)
        for model, entry in cell.items()
        if entry is not None
    }


def _outcome(table: Table, row: int, model: str, entry: object) -> ModelOutcome:
    values = entry if isinstance(entry, dict) else {}
    correct, output_tokens = values.get("correct"), values.get("output_tokens")
    if type(output_tokens) is not int or output_tokens < 1:
        raise table.error(
            row, f"outcomes.{model}.output_tokens", "a whole number >= 1", part=output_tokens
        )
    if not isinstance(correct, int | float) or not 0 <= correct <= 1:
        raise table.error(row, f"outcomes.{model}.correct", "a number in 0…1", part=correct)
    return ModelOutcome(correct=float(correct), output_tokens=output_tokens)
