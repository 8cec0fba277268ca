"""Request traces: each row is a workflow of one call, at its recorded instant.

Sessions are not made into chains: those of the public traces are guesses (Mooncake) or
name a client (ServeGen), and an open-loop replay keeps the recorded arrivals exact.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from concertmaster.core.request import PREFIX_CHUNK_TOKENS, WorkflowId
from concertmaster.workload.columns import at_least_one, known_model
from concertmaster.workload.plan import Call, WorkflowPlan, cap_tokens
from concertmaster.workload.prefixes import chain, salt_of
from concertmaster.workload.sources import Source, all_or_none_timed, service_classes
from concertmaster.workload.tables import Table

REQUIRED = ("input_tokens", "output_tokens")
COLUMNS = (*REQUIRED, "source", "t_s", "model", "block_ids", "service_class", "deadline_s")
BLOCK_TOKENS = 512
"""Prompt tokens that one entry of ``block_ids`` stands for."""

_CHUNKS_PER_BLOCK = BLOCK_TOKENS // PREFIX_CHUNK_TOKENS


class BlockHashes:
    """Prefix hashes of recorded blocks: each block of 512 tokens is two chunks of 256."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, int], list[int]] = {}

    def of(self, source: str, block_ids: Sequence[int], prompt_tokens: int) -> tuple[int, ...]:
        """Return the hashes of the prompt's whole chunks; ids of other sources differ."""
        hashes: list[int] = []
        for block_id in block_ids:
            key = (source, block_id)
            if key not in self._chunks:
                self._chunks[key] = chain(0, salt_of(f"{source} {block_id}"), _CHUNKS_PER_BLOCK)
            hashes += self._chunks[key]
        return tuple(hashes[: prompt_tokens // PREFIX_CHUNK_TOKENS])


def read_requests(table: Table, name: str) -> Source:
    """Turn requests into workflows of one call, named after source and position in it."""
    table.require(REQUIRED, "a request trace")
    arrivals_s = table.numbers_or_none("t_s")
    prompt_tokens, prompt_note = at_least_one(table, "input_tokens")
    output_tokens, output_note = at_least_one(table, "output_tokens")
    sources = table.names("source") if "source" in table else [_stem(table.file)] * len(table)
    models = [known_model(text) for text in table.texts("model")]
    classes, deadlines_s = service_classes(table), table.numbers_or_none("deadline_s")
    blocks, hashes = table.lists("block_ids"), BlockHashes()
    counts: Counter[str] = Counter()
    plans = []
    for row, source in enumerate(sources):
        call = Call(
            stage=0,
            prompt_tokens=prompt_tokens[row],
            output_tokens=output_tokens[row],
            max_output_tokens=cap_tokens(output_tokens[row]),
            prefix_hashes=hashes.of(source, blocks[row] or (), prompt_tokens[row]),
            model=models[row],
        )
        plan = WorkflowPlan(
            workflow_id=WorkflowId(f"{source}:{counts[source]:06d}"),
            app=source,
            arrival_s=arrivals_s[row] or 0.0,
            calls=(call,),
            service_class=classes[row],
            deadline_s=deadlines_s[row],
        )
        counts[source] += 1
        plans.append(plan)
    timed = all_or_none_timed(table, arrivals_s, "t_s")
    notes = table.notes + prompt_note + output_note
    return Source(name=name, plans=plans, timed=timed, notes=notes)


def _stem(file: str) -> str:
    """Name a trace without sources after its file.

    >>> _stem("logs/monday.jsonl.zst")
    'monday'
    """
    return Path(file).name.partition(".")[0]
