"""What the study of model choice plays: fleets of real models, questions they were asked.

Questions and outcomes come from the routing sets. Forecasts start from the shipped store,
whose training left the test split out, and see a stretch of traffic of the training split,
each workflow on a model drawn at random, before any figure is taken.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

from concertmaster import compose, forecaster
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import Fleet
from concertmaster.core.request import ModelName
from concertmaster.learning.datasets import key_of
from concertmaster.predictors.interface import Predictor
from concertmaster.reproduce.capacity import capacity_rps, full_rate_rps
from concertmaster.reproduce.chimera_witness import Witness
from concertmaster.reproduce.data import data_folder
from concertmaster.reproduce.draw import draw
from concertmaster.reproduce.fleets import study_fleet
from concertmaster.reproduce.ledger import FOLDER
from concertmaster.workload.load import load_source
from concertmaster.workload.plan import NO_OUTCOMES, ModelOutcome, WorkflowPlan
from concertmaster.workload.split import held_out

DATA = data_folder()
BLIND = "vllm"
RUSH_WORKFLOWS = 1200
WARM_UP_WORKFLOWS, WARM_UP_LOAD, WARM_UP_SEED = 800, 0.6, 4242

_MATHS = ("solver", "planner-solver", "planner-solver-verifier-solver")
_CODE = ("coder", "planner-coder", "planner-coder-tester-coder")
_CODE_SETS = ("mapcoder_humaneval", "mapcoder_mbpp", "mapcoder_apps")


class World(NamedTuple):
    """A fleet and what it is asked."""

    fleet: str
    sources: tuple[str, ...]
    templates: tuple[str, ...] = _MATHS


WORLDS: Mapping[str, World] = {
    "qwen1.5-7b+72b/mmlu-pro": World("qwen15-7b-72b", ("mmlu_pro",)),
    "qwen2.5-3b+72b/math": World("qwen-3b-72b", ("zeroeval_math_l5",)),
    "gpt-3.5+4/code": World("gpt-stand-ins", _CODE_SETS, _CODE),
    "qwen2.5-3b+7b+72b/math": World("qwen-3b-7b-72b", ("zeroeval_math_l5",)),
    "llama3.1-8b+70b/gsm": World("llama-8b-70b", ("zeroeval_gsm",)),
    "llama3.1-8b+70b/mmlu-pro": World("llama-8b-70b", ("mmlu_pro",)),
    "qwen2.5-7b+72b/math": World("qwen-7b-72b", ("zeroeval_math_l5",)),
    "llama2-7b+13b+70b/mmlu-pro": World("llama2-7b-13b-70b", ("mmlu_pro",)),
}
"""Settings by name; the first three are the default grid."""


@cache
def fleet_of(setting: str) -> Fleet:
    """Return the fleet of a setting."""
    return study_fleet(WORLDS[setting].fleet)


@cache
def plans_of(setting: str, *, test: bool) -> tuple[WorkflowPlan, ...]:
    """Return the chains of one split that every model of the fleet has answered."""
    models = {*fleet_of(setting).models}
    plans = [
        plan
        for plan in _chains(WORLDS[setting].sources, WORLDS[setting].templates)
        if held_out(key_of(plan)) == test and models <= _outcomes(plan).keys()
    ]
    if not plans:
        problem = f"expected answers of {', '.join(sorted(models))}, found none"
        raise InputError(str(DATA), setting, problem, "take the routing sets whole")
    return tuple(plans)


@cache
def _chains(sources: tuple[str, ...], templates: tuple[str, ...]) -> list[WorkflowPlan]:
    return [
        plan
        for source, template in product(sources, templates)
        for plan in load_source(f"{DATA}#{source}:{template}", seed=0).plans
    ]


@cache
def capacity_of(setting: str) -> float:
    """Workflows a second that the fleet finishes under the router that is blind to quality.

    Taken in a rush of arrivals: with a crowd that arrives at once all first stages come
    first, and what they need is not what the later ones need.
    """
    fleet, plans = fleet_of(setting), plans_of(setting, test=True)
    crowd_rps = capacity_rps(fleet, plans, policy=BLIND, keep_in=FOLDER)
    rush = draw(plans, workflows=RUSH_WORKFLOWS, rate_rps=2 * crowd_rps, seed=WARM_UP_SEED)
    return full_rate_rps(compose.simulate(fleet, rush, BLIND, seed=WARM_UP_SEED))


@cache
def _warm_predictor(setting: str, *, graded: bool) -> Predictor:
    fleet = fleet_of(setting)
    predictor = forecaster.predictor_of(forecaster.SHIPPED, fleet)
    rate_rps = WARM_UP_LOAD * capacity_of(setting)
    workload = draw(
        plans_of(setting, test=False),
        workflows=WARM_UP_WORKFLOWS,
        rate_rps=rate_rps,
        seed=WARM_UP_SEED,
    )
    witness = Witness(predictor, graded=graded)
    compose.simulate(fleet, workload, "random-model", seed=WARM_UP_SEED, predictor=witness)
    return predictor


def predictor_of(setting: str, *, graded: bool = True) -> Predictor:
    """Return forecasts as they stand after the warm-up, to be used up by one run.

    Args:
        setting: Whose questions are warmed up on.
        graded: Whether they were told the grades of these workflows.
    """
    return copy.deepcopy(_warm_predictor(setting, graded=graded))


def by_model(setting: str, plans: Sequence[WorkflowPlan]) -> dict[str, float]:
    """Share of workflows that each model of the fleet would get right if it served all alone.

    ``best`` is the share that at least one of them gets right.
    """
    models = fleet_of(setting).models
    grades = [[_outcomes(plan)[model].correct for model in models] for plan in plans]
    shares = {
        str(model): sum(row[at] for row in grades) / len(plans) for at, model in enumerate(models)
    }
    return {**shares, "best": sum(map(max, grades)) / len(plans)}


def _outcomes(plan: WorkflowPlan) -> Mapping[ModelName, ModelOutcome]:
    call = plan.deciding_call
    return NO_OUTCOMES if call is None else call.outcomes
