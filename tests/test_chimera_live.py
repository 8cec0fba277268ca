"""A gateway that chooses models for whole workflows."""

import random

import pytest

from builders import a_call, a_fleet, a_forecast, a_plan, a_pool, a_request, a_workload
from concertmaster.core.events import RequestArrived, RequestFinished
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.core.scheduler import Scheduler
from concertmaster.gateway.replay import Replay
from concertmaster.policies.catalog import policy
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.workload.plan import Call, ModelOutcome, WorkflowPlan
from concertmaster.workload.records import RunRecords
from gateway_rig import over_engines, play

SMALL, BIG = ModelName("small"), ModelName("big")
SPEEDUP = 50.0
OUTCOMES = {
    SMALL: ModelOutcome(correct=0.0, output_tokens=30),
    BIG: ModelOutcome(correct=1.0, output_tokens=50),
}


class Doubtful:
    """Takes both models for equal until the last call of a workflow of four."""

    reads_prompts = False

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        return a_forecast(40.0, success={SMALL: 0.5, BIG: 0.9 if request.stage == 3 else 0.5})

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        pass

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        pass


def stage(number: int, role: str) -> Call:
    answers = role == "solver"
    return a_call(number, role=role, outcomes=OUTCOMES if answers else {}, output_tokens=20)


def played(*roles: str) -> tuple[RunRecords, int]:
    """Play one workflow; also return how many the scheduler still holds."""
    plan: WorkflowPlan = a_plan("w", *(stage(i, role) for i, role in enumerate(roles)))

    async def main() -> tuple[RunRecords, int]:
        fleet = a_fleet(a_pool("s", model=SMALL), a_pool("b", model=BIG))
        chimera = policy("chimera")
        async with over_engines(
            fleet=fleet, speedup=SPEEDUP, policy=chimera, predictor=Doubtful()
        ) as (rig, _):
            player = Replay(url=rig.url, workload=a_workload(plan), speedup=SPEEDUP)
            records = await player.run(policy="chimera", seed=0)
            assert rig.gateway.scheduler.workflows.owed(BIG).tokens == 0
            assert rig.gateway.scheduler.workflows.owed(SMALL).tokens == 0
            return records, len(rig.gateway.scheduler.workflows)

    return play(main())


def test_a_workflow_stays_with_its_model_although_another_has_become_likelier() -> None:
    records, held = played("planner", "solver", "planner", "solver")
    assert [call.model for call in records.calls] == [SMALL] * 4
    assert [call.output_tokens for call in records.calls] == [20, 30, 20, 30]
    assert records.workflows[0].success == 0.0
    assert held == 0


def test_a_workflow_moves_to_a_likelier_model_once_a_verifier_has_sent_its_work_back() -> None:
    records, held = played("planner", "solver", "verifier", "solver")
    assert [call.model for call in records.calls] == [SMALL] * 3 + [BIG]
    assert [call.output_tokens for call in records.calls] == [20, 30, 20, 50]
    assert records.workflows[0].success == 1.0
    assert held == 0


@pytest.mark.parametrize(("expected_calls", "owed_tokens"), [(1.0, 0), (2.0, 700)])
def test_what_nobody_closes_owes_nothing_once_its_last_expected_call_is_answered(
    expected_calls: float, owed_tokens: int
) -> None:
    scheduler = Scheduler(a_fleet(), policy("chimera"), random.Random(0))
    forecast = a_forecast(
        800.0,
        remaining_tokens=Quantiles.exactly(800.0),
        remaining_calls=Quantiles.exactly(expected_calls),
    )
    request = a_request("r")
    scheduler.handle(0.0, RequestArrived(request, forecast))
    scheduler.handle(1.0, RequestFinished(request.request_id, 1, 100))
    assert scheduler.workflows.owed(ModelName("m")).tokens == owed_tokens
    scheduler.validate()
