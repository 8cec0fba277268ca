"""Workflows with one row a call: workflow_stages, coding sessions, and our own JSON Lines.

What a file does not say is derived by the rules in ``docs/workloads.md``: tool time from
start and wall times, prefix hashes from hit counts or from the common leading text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from concertmaster.core.request import WorkflowId
from concertmaster.workload.columns import StagedColumns
from concertmaster.workload.graph import GraphError, topological
from concertmaster.workload.plan import Call, WorkflowPlan, cap_tokens
from concertmaster.workload.prefixes import common_chars, extend, salt_of
from concertmaster.workload.sources import Source, all_or_none_timed, bad_stage
from concertmaster.workload.tables import Table, counted_note

CUT_MARK = "\n…[cut]…\n"
"""Stands in a recorded prompt where its middle was left out."""

_CHARS_PER_TOKEN = 4
_LEAST_COMMON_CHARS = 16
_WHOLE_CONTEXT = "cl100k_ctx"


class Prompt(NamedTuple):
    """What a later call of the same workflow may share with this one."""

    row: int
    prompt_tokens: int
    hashes: tuple[int, ...]


def read_staged(table: Table, name: str) -> Source:
    """Turn rows into workflows, in the order in which workflows first appear."""
    columns = StagedColumns(table)
    timed = all_or_none_timed(table, columns.arrivals_s, "arrival_s")
    rows_of: dict[str, list[int]] = {}
    for row, workflow_id in enumerate(columns.workflow_ids):
        rows_of.setdefault(workflow_id, []).append(row)
    plans, dropped = [], []
    for rows in rows_of.values():
        try:
            plans.append(_plan(columns, rows))
        except GraphError as error:
            if not table.broken:
                raise _located(columns, rows, error) from None
            dropped.append(rows[0])
    notes = columns.notes + counted_note(table, "workflow left out, cut at the break", dropped)
    if table.broken and plans:
        last = columns.workflow_ids[-1]
        notes += (f'{table.file}: workflow "{last}" stands before the break: calls may be missing',)
    return Source(name=name, plans=plans, timed=timed, notes=table.notes + notes)


def _located(columns: StagedColumns, rows: Sequence[int], error: GraphError) -> Exception:
    row = next(row for row in rows if columns.stages[row] == error.stage)
    return bad_stage(columns.table, row, columns.workflow_ids[row], str(error), error.remedy)


def _plan(columns: StagedColumns, rows: Sequence[int]) -> WorkflowPlan:
    first = rows[0]
    row_of: dict[int, int] = {}
    for row in rows:
        if row_of.setdefault(columns.stages[row], row) != row:
            raise _twice(columns, row)
    _check_same(columns, rows)
    order = topological({stage: columns.parents[row] for stage, row in row_of.items()})
    return WorkflowPlan(
        workflow_id=WorkflowId(columns.workflow_ids[first]),
        app=columns.apps[first],
        template=columns.templates[first],
        task=columns.tasks[first],
        arrival_s=columns.arrivals_s[first] or 0.0,
        calls=_calls(columns, [row_of[stage] for stage in order], row_of),
        service_class=columns.classes[first],
        deadline_s=columns.deadlines_s[first],
        success=columns.successes[first],
    )


def _check_same(columns: StagedColumns, rows: Sequence[int]) -> None:
    """Raise unless what is said of a workflow is the same in all of its rows."""
    first = rows[0]
    for column, values in columns.of_workflow():
        for row in rows:
            if values[row] != values[first]:
                expected = f"{values[first]} as in {columns.table.where(first)}"
                raise columns.table.error(row, column, f"{expected} of the same workflow")


def _twice(columns: StagedColumns, row: int) -> Exception:
    workflow_id, stage = columns.workflow_ids[row], columns.stages[row]
    problem = f"expected each stage once, found stage {stage} twice"
    return bad_stage(columns.table, row, workflow_id, problem, "number its stages 0, 1, 2, …")


def _calls(
    columns: StagedColumns, rows: Sequence[int], row_of: Mapping[int, int]
) -> tuple[Call, ...]:
    calls = []
    seen: list[Prompt] = []
    by_role: dict[str, Prompt] = {}
    hashes_of: dict[int, tuple[int, ...]] = {}
    for row in rows:
        role, stage = columns.roles[row], columns.stages[row]
        hashes = _hashes(columns, row, by_role.get(role), seen, hashes_of)
        calls.append(_call(columns, row, row_of, hashes))
        prompt = Prompt(row, columns.prompt_tokens[row], hashes)
        by_role[role], hashes_of[stage] = prompt, hashes
        seen.append(prompt)
    return tuple(calls)


def _call(
    columns: StagedColumns, row: int, row_of: Mapping[int, int], hashes: tuple[int, ...]
) -> Call:
    output_tokens = columns.output_tokens[row]
    return Call(
        stage=columns.stages[row],
        parents=columns.parents[row],
        role=columns.roles[row],
        step=columns.steps[row],
        prompt_tokens=columns.prompt_tokens[row],
        output_tokens=output_tokens,
        max_output_tokens=columns.caps_tokens[row] or cap_tokens(output_tokens),
        tool_s=_tool_s(columns, row, row_of),
        prompt_text=columns.prompt_texts[row],
        prompt_chars=columns.prompt_chars[row] or 0,
        after_tool=columns.after_tools[row],
        tool_call=columns.tool_calls[row],
        prefix_hashes=hashes,
        outcomes=columns.outcomes[row],
        model=columns.models[row],
        models=columns.models_asked[row],
        doubt=columns.doubts[row],
    )


def _tool_s(columns: StagedColumns, row: int, row_of: Mapping[int, int]) -> float:
    """Take the recorded pause; else what start and wall times leave; else 0."""
    tool_s = columns.tools_s[row]
    start_s = columns.starts_s[row]
    if tool_s is not None or start_s is None or not columns.parents[row]:
        return tool_s or 0.0
    end_s = 0.0
    for parent in columns.parents[row]:
        parent_row = row_of[parent]
        parent_start_s, wall_s = columns.starts_s[parent_row], columns.walls_s[parent_row]
        if parent_start_s is None or wall_s is None:
            return 0.0
        end_s = max(end_s, parent_start_s + wall_s)
    return max(0.0, start_s - end_s)


def _hashes(
    columns: StagedColumns,
    row: int,
    previous: Prompt | None,
    seen: Sequence[Prompt],
    hashes_of: Mapping[int, tuple[int, ...]],
) -> tuple[int, ...]:
    given = columns.prefix_hashes[row]
    origin = columns.prefix_from[row]
    if given is not None or origin is not None:
        return _given_hashes(columns, row, hashes_of)
    hit_tokens = columns.hits_tokens[row]
    if hit_tokens is not None:
        previous = _long_enough(hit_tokens, previous, seen)
        shared_tokens = hit_tokens if previous else 0
    elif columns.prompt_texts[row]:
        shared_tokens = _shared_tokens(columns, previous.row, row) if previous else 0
    else:
        return ()
    return extend(
        previous.hashes if previous else (),
        shared_tokens=shared_tokens,
        prompt_tokens=columns.prompt_tokens[row],
        salt=salt_of(f"{columns.workflow_ids[row]} {columns.stages[row]}"),
    )


def _given_hashes(
    columns: StagedColumns, row: int, hashes_of: Mapping[int, tuple[int, ...]]
) -> tuple[int, ...]:
    own = columns.prefix_hashes[row] or ()
    origin, keep = columns.prefix_from[row], columns.prefix_keep[row] or 0
    if origin is None:
        return own
    shared = hashes_of.get(origin, ())
    if keep > len(shared):
        expected = f"at most the {len(shared)} hashes of stage {origin} before it"
        raise columns.table.error(row, "prefix_keep", expected)
    return shared[:keep] + own


def _long_enough(hit_tokens: int, previous: Prompt | None, seen: Sequence[Prompt]) -> Prompt | None:
    """Find the call that the hit was on: the last of the same role, else the last that fits."""
    if previous and previous.prompt_tokens >= hit_tokens:
        return previous
    fits = (prompt for prompt in reversed(seen) if prompt.prompt_tokens >= hit_tokens)
    return next(fits, previous)


def _shared_tokens(columns: StagedColumns, earlier: int, later: int) -> int:
    """Estimate how many leading tokens two prompts of one workflow and role share.

    Counts of a whole context (``cl100k_ctx``) grow by what was said, so all of the earlier
    prompt is shared. Else the recorded heads are compared; if one begins with the other,
    all of the shorter prompt is shared, and if they part, what nobody recorded (system
    text, taken to lead) and the common text at four characters a token.
    """
    least_tokens = min(columns.prompt_tokens[earlier], columns.prompt_tokens[later])
    if columns.token_sources[later] == columns.token_sources[earlier] == _WHOLE_CONTEXT:
        return least_tokens
    heads = [columns.prompt_texts[row].partition(CUT_MARK)[0] for row in (earlier, later)]
    common = common_chars(*heads)
    if common == min(map(len, heads)) > 0:
        return least_tokens
    if common < _LEAST_COMMON_CHARS:
        return 0
    chars = columns.prompt_chars[later] or len(columns.prompt_texts[later])
    unrecorded_tokens = max(0, columns.prompt_tokens[later] - chars // _CHARS_PER_TOKEN)
    return min(least_tokens, unrecorded_tokens + common // _CHARS_PER_TOKEN)
