"""Model choice under load: who is right how often, and how soon, on mixed fleets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from concertmaster import compose
from concertmaster.core.forecast import NO_FORECAST, Forecast
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.reproduce import chimera_world as world
from concertmaster.reproduce.chimera_arms import ARMS, BUSY, ORACLES, SLACKS, WITHOUT
from concertmaster.reproduce.chimera_summary import summary
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.study import Cell, Figures, Results, Summary
from concertmaster.reproduce.window import figures, middle
from concertmaster.workload.records import RunRecords

BLIND = frozenset({"vllm", "vllm+mlfq"})
"""Rivals that look at no forecast but the room an answer needs, for which recent lengths do."""

LOADS = (0.3, 0.7, 1.1)
MORE_LOADS = (0.5, 0.9, 1.0)
DEFAULT_WORLDS = 3
WORKFLOWS = 300


class Witness:
    """Passes forecasts on, and remembers what success they promised."""

    def __init__(self, inner: Predictor) -> None:
        self.reads_prompts = inner.reads_prompts
        self.promised: dict[RequestId, Mapping[ModelName, float]] = {}
        self._inner = inner

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        """Note what is promised."""
        forecast = self._inner.predict(request, prompt)
        self.promised[request.request_id] = forecast.success
        return forecast

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        """Pass on."""
        self._inner.learn(request, completion, prompt, forecast)

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        """Pass on."""
        self._inner.close(workflow_id, success)


@dataclass(frozen=True, slots=True)
class Chimera:
    """The recipe, its rivals, its parts taken out, and what oracles would add."""

    name: str = "chimera"
    title: str = "The right model under load, the shortest workflow first"
    modules: tuple[str, ...] = ("chimera", "chimera_world", "chimera_arms")

    @property
    def settings(self) -> Mapping[str, object]:
        """How many workflows a run has, and from which data."""
        return {"workflows": WORKFLOWS, "data": str(world.DATA)}

    def cells(self, *, seeds: int, full: bool) -> Sequence[Cell]:
        """Rivals at every load; variants at the busy one; the full grid has all fleets."""
        settings = list(world.WORLDS)[: None if full else DEFAULT_WORLDS]
        loads = sorted(LOADS + MORE_LOADS * full)
        variants = [arm for arm in (*SLACKS, *WITHOUT, *ORACLES) if arm not in ARMS]
        arms = [*product(loads, ARMS), *product([BUSY], variants)]
        return [
            Cell(setting=setting, arm=arm, load=load, seed=seed)
            for seed, setting, (load, arm) in product(range(seeds), settings, arms)
        ]

    def run(self, cell: Cell) -> Figures:
        """Draw questions of the test split and let the fleet answer them."""
        fleet, capacity_rps = world.fleet_of(cell.setting), world.capacity_of(cell.setting)
        workload = draw(
            world.plans_of(cell.setting, test=True),
            workflows=WORKFLOWS,
            rate_rps=cell.load * capacity_rps,
            seed=cell.seed,
        )
        if cell.arm in BLIND:
            witness = Witness(compose.predictor_of(compose.RECENT, fleet))
        else:
            witness = Witness(world.predictor_of(cell.setting))
        run = compose.simulate(fleet, workload, cell.arm, seed=cell.seed, predictor=witness)
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
