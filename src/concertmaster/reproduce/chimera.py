"""Model choice under load: who is right how often, and how soon, on mixed fleets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from concertmaster import compose, forecaster
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.reproduce import chimera_world as world
from concertmaster.reproduce.chimera_arms import (
    ARMS,
    BUSY,
    ORACLES,
    SLACKS,
    UNGRADED,
    WITHOUT,
)
from concertmaster.reproduce.chimera_summary import summary
from concertmaster.reproduce.chimera_witness import Witness
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.study import Cell, Figures, Results, Summary
from concertmaster.reproduce.window import figures, middle
from concertmaster.workload.records import RunRecords

BLIND = frozenset({"vllm", "vllm+mlfq"})
"""Rivals that look at no forecast but the room an answer needs, for which recent lengths do."""

LOADS = (0.3, 0.7, 1.1)
MORE_LOADS = (0.5, 0.9, 1.0)
DEFAULT_WORLDS = 3
WORKFLOWS, RUSH_WORKFLOWS = 200, 600
"""Of a run, below load 1 and from there on, where lines grow for as long as it lasts."""


@dataclass(frozen=True, slots=True)
class Chimera:
    """The recipe, its rivals, its parts taken out, and what oracles would add."""

    name: str = "chimera"
    title: str = "The right model under load, the shortest workflow first"
    modules: tuple[str, ...] = ("chimera", "chimera_world", "chimera_arms", "chimera_witness")

    @property
    def settings(self) -> Mapping[str, object]:
        """How many workflows a run has, and from which data."""
        return {"workflows": [WORKFLOWS, RUSH_WORKFLOWS], "data": str(world.DATA)}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Rivals at every load; variants at the busy one, on one fleet unless it is the full grid.

        What a right answer is worth is swept on every fleet, and the full grid has them all.
        """
        settings = list(world.WORLDS)[: None if full else DEFAULT_WORLDS]
        loads = sorted(LOADS + MORE_LOADS * full)
        return [
            Cell(setting=setting, arm=arm, load=load, seed=seed)
            for seed, setting in product(range(seeds), settings)
            for load, arm in _arms(loads, variants=full or setting == settings[0])
        ]

    def run(self, cell: Cell) -> Figures:
        """Draw questions of the test split and let the fleet answer them."""
        fleet, capacity_rps = world.fleet_of(cell.setting), world.capacity_of(cell.setting)
        workload = draw(
            world.plans_of(cell.setting, test=True),
            workflows=WORKFLOWS if cell.load < 1 else RUSH_WORKFLOWS,
            rate_rps=cell.load * capacity_rps,
            seed=cell.seed,
        )
        witness = _witness(cell)
        policy = cell.arm.removesuffix(UNGRADED)
        run = compose.simulate(fleet, workload, policy, seed=cell.seed, predictor=witness)
        kept = middle(run)
        plans = {plan.workflow_id: plan for plan in workload}
        asked = [plans[one.workflow_id] for one in kept.workflows]
        alone = world.by_model(cell.setting, asked)
        return {
            **figures(run),
            "per_token_s": per_token_s(kept),
            "promised_ratio": promised_ratio(kept, witness.promised),
            "longest_wait_s": longest_wait_s(kept),
            "capacity_rps": capacity_rps,
            "best_ratio": alone.pop("best"),
            "weakest_ratio": min(alone.values()),
            "strongest_ratio": max(alone.values()),
        }

    def summarise(self, results: Results) -> Summary:
        """State the claims."""
        return summary(results)


def _arms(loads: Sequence[float], *, variants: bool) -> Iterator[tuple[float, str]]:
    yield from product(loads, ARMS)
    for arm in (*SLACKS, *(*WITHOUT, *ORACLES) * variants):
        if arm not in ARMS:
            yield BUSY, arm


def _witness(cell: Cell) -> Witness:
    if cell.arm in BLIND:
        return Witness(forecaster.predictor_of(forecaster.RECENT, world.fleet_of(cell.setting)))
    graded = not cell.arm.endswith(UNGRADED)
    return Witness(world.predictor_of(cell.setting, graded=graded), graded=graded)


def per_token_s(run: RunRecords) -> float:
    """Mean over workflows of makespan by output token."""
    tokens: dict[WorkflowId, int] = {}
    for call in run.calls:
        tokens[call.workflow_id] = tokens.get(call.workflow_id, 0) + call.output_tokens
    return _mean(
        (one.finished_s - one.arrival_s) / tokens[one.workflow_id]
        for one in run.workflows
        if one.finished_s is not None
    )


def promised_ratio(
    run: RunRecords, promised: Mapping[RequestId, Mapping[ModelName, float]]
) -> float:
    """Mean success that was forecast of the model that gave each workflow's last answer."""
    last = {call.workflow_id: call for call in run.calls if call.finished_s is not None}
    return _mean(
        promised[call.request_id].get(ModelName(call.model), 0.0) for call in last.values()
    )


def longest_wait_s(run: RunRecords) -> float:
    """Longest time that a call stood in the line."""
    return max(
        (call.dispatched_s - call.arrival_s for call in run.calls if call.dispatched_s is not None),
        default=0.0,
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


STUDY = Chimera()
