"""A host that asks for decisions goes on by itself when none comes in time."""

import random
import time
from collections.abc import Iterator, Sequence

import pytest

from builders import a_fleet, a_forecast, a_pool, a_request
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import Request, RequestId
from concertmaster.policies.catalog import policy
from concertmaster.predictors.interface import NO_PROMPT, Predictor, Prompt
from concertmaster.predictors.recent import RecentLengths
from concertmaster.scheduler_agent.agent import SchedulerAgent, with_fallback
from concertmaster.scheduler_agent.remote import RemotePredictor

FAST, SLOW = ReplicaId("fast-0"), ReplicaId("slow-0")
EVERYWHERE = (SLOW, FAST)


class Told:
    def __init__(self, forecast: Forecast | None) -> None:
        self.answer = forecast

    def forecast(self, request: Request, *, within_s: float) -> Forecast | None:
        return self.answer


class Sleeper(RecentLengths):
    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        time.sleep(0.3)
        return super().predict(request, prompt)


def recent() -> Predictor:
    return RecentLengths()


def sleeper() -> Predictor:
    return Sleeper()


def an_agent(foresight: object) -> SchedulerAgent:
    fleet = a_fleet(a_pool("fast"), a_pool("slow", slowness=4.0), replicas=1)
    return SchedulerAgent(fleet, policy("swarmx"), foresight, random.Random(1))  # type: ignore[arg-type]


def first(_request: Request, candidates: Sequence[ReplicaId]) -> ReplicaId:
    return candidates[0]


def test_it_chooses_among_what_the_host_offers_and_nothing_else() -> None:
    agent = an_agent(Told(a_forecast(100.0)))

    everywhere = agent.decide(a_request("r0"), EVERYWHERE, within_s=1.0)
    slow_only = agent.decide(a_request("r0"), (SLOW, ReplicaId("unheard")), within_s=1.0)

    assert everywhere is not None
    assert everywhere.replica_id == FAST
    assert slow_only is not None
    assert slow_only.replica_id == SLOW
    assert agent.decide(a_request("r0"), (ReplicaId("unheard"),), within_s=1.0) is None


def test_what_was_sent_counts_until_it_has_ended() -> None:
    agent = an_agent(Told(a_forecast(100.0)))
    for i in range(60):
        agent.sent(a_request(f"r{i}"), FAST, a_forecast(100.0))
        agent.streamed(RequestId(f"r{i}"), 1)

    busy = agent.decide(a_request("x"), EVERYWHERE, within_s=1.0)
    for i in range(60):
        agent.ended(RequestId(f"r{i}"))
    idle = agent.decide(a_request("x"), EVERYWHERE, within_s=1.0)

    assert busy is not None
    assert idle is not None
    assert busy.cost_s > idle.cost_s
    assert idle.replica_id == FAST


def test_a_decision_that_comes_too_late_is_none() -> None:
    fleet = a_fleet(a_pool("fast"), replicas=1)
    clock = iter([0.0, 0.0, 5.0])
    agent = SchedulerAgent(
        fleet,
        policy("swarmx"),
        Told(a_forecast(1.0)),
        random.Random(1),
        clock=lambda: next(clock),
    )

    assert agent.decide(a_request("r0"), (FAST,), within_s=1.0) is None


@pytest.fixture
def remote() -> Iterator[RemotePredictor]:
    predictor = RemotePredictor(recent)
    assert predictor.forecast(a_request("warm"), within_s=30.0) is not None
    yield predictor
    predictor.close()


def test_a_killed_predictor_leaves_the_host_to_its_own_policy(remote: RemotePredictor) -> None:
    choose = with_fallback(an_agent(remote), first, within_s=1.0)
    assert choose(a_request("r0"), EVERYWHERE) == FAST

    remote.process.kill()
    remote.process.join()

    assert [choose(a_request(f"x{i}"), EVERYWHERE) for i in range(5)] == [SLOW] * 5


def test_a_slow_predictor_leaves_the_host_to_its_own_policy_and_is_used_once_it_keeps_up() -> None:
    predictor = RemotePredictor(sleeper)
    assert predictor.forecast(a_request("warm"), within_s=30.0) is not None
    agent = an_agent(predictor)

    hasty = with_fallback(agent, first, within_s=0.05)
    patient = with_fallback(agent, first, within_s=30.0)

    assert hasty(a_request("r0"), EVERYWHERE) == SLOW
    assert patient(a_request("r1"), EVERYWHERE) == FAST
    predictor.close()


def test_a_setting_of_the_recipe_that_is_out_of_range_is_refused() -> None:
    with pytest.raises(InputError) as refusal:
        policy("swarmx:tail=1.5")

    assert str(refusal.value) == ('policy swarmx: tail: expected a number, 0 to 0.99, found "1.5"')
