"""Workloads out to JSON Lines: one row a call, the columns of ``docs/workloads.md``."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from concertmaster.core.request import ServiceClass
from concertmaster.workload.files import extra
from concertmaster.workload.plan import Call, WorkflowPlan, Workload, cap_tokens


def write_jsonl(workload: Workload, path: Path) -> None:
    """Write a workload so that ``load_workloads`` gives the same workflows back.

    A path that ends in ``.zst`` is compressed. Columns at their default are left out.
    """
    content = b"".join(msgspec.json.encode(row) + b"\n" for plan in workload for row in _rows(plan))
    if path.suffix == ".zst":
        content = extra("zstandard", path).ZstdCompressor(level=10).compress(content)
    path.write_bytes(content)


def _rows(plan: WorkflowPlan) -> Iterator[dict[str, object]]:
    shared: dict[str, object] = {
        "workflow_id": plan.workflow_id,
        "app": plan.app,
        "arrival_s": plan.arrival_s,
    }
    if plan.template:
        shared["harness"] = plan.template
    if plan.task:
        shared["task_group"] = plan.task
    if plan.service_class is not ServiceClass.INTERACTIVE:
        shared["service_class"] = plan.service_class.value
    if plan.deadline_s is not None:
        shared["deadline_s"] = plan.deadline_s
    if plan.success is not None:
        shared["success"] = plan.success
    for position, call in enumerate(plan.calls):
        yield shared | _call_columns(call) | _prefix_columns(call, plan.calls[:position])


def _call_columns(call: Call) -> dict[str, object]:
    columns: dict[str, object] = {
        "stage_index": call.stage,
        "parents": call.parents,
        "role": call.role,
        "prompt_tokens": call.prompt_tokens,
        "output_tokens": call.output_tokens,
    }
    if call.max_output_tokens != cap_tokens(call.output_tokens):
        columns["max_output_tokens"] = call.max_output_tokens
    if call.tool_s:
        columns["tool_s"] = call.tool_s
    if call.step:
        columns["stage_name"] = call.step
    if call.prompt_text:
        columns["prompt_text"] = call.prompt_text
    if call.prompt_chars:
        columns["prompt_chars"] = call.prompt_chars
    if call.after_tool is not None:
        columns["input_kinds"] = "tool_result" if call.after_tool else "text"
    if call.tool_call is not None:
        columns["output_kinds"] = "tool_use" if call.tool_call else "text"
    recorded = {"model": call.model, "doubt": call.doubt}
    columns |= {name: value for name, value in recorded.items() if value is not None}
    if call.models:
        columns["models"] = call.models
    if call.outcomes:
        columns["outcomes"] = {
            model: {"correct": outcome.correct, "output_tokens": outcome.output_tokens}
            for model, outcome in call.outcomes.items()
        }
    return columns


def _prefix_columns(call: Call, earlier: Sequence[Call]) -> dict[str, object]:
    """Refer to the last earlier call that shares the most, and list only what differs."""
    keep, origin = 0, None
    for candidate in reversed(earlier):
        shared = _common(candidate.prefix_hashes, call.prefix_hashes)
        if shared > keep:
            keep, origin = shared, candidate.stage
        if keep == len(call.prefix_hashes):
            break
    columns: dict[str, object] = {"prefix_hashes": call.prefix_hashes[keep:]}
    if origin is not None:
        columns |= {"prefix_from": origin, "prefix_keep": keep}
    return columns


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count equal leading hashes; chained hashes that part never meet again."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[middle - 1] == second[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
