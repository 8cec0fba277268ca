"""Which models a workflow will ask: what is learned of those that are over, and from what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_pool, a_request
from concertmaster.core.demand import Demands
from concertmaster.core.events import RequestFinished, TokensStreamed
from concertmaster.core.forecast import Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.core.workflow import Workflow, Workflows
from concertmaster.predictors.interface import Completion
from concertmaster.predictors.recent import RecentLengths
from concertmaster.predictors.shares import ModelShares

M, X, ANY = ModelName("m"), ModelName("x"), ModelName("")
W = WorkflowId("w")


def asks(role: str, *models: ModelName, workflow: str = "w", app: str = "") -> Request:
    return a_request(role, workflow_id=WorkflowId(workflow), role=role, models=models, app=app)


def play(shares: ModelShares | RecentLengths, *calls: tuple[Request, int]) -> None:
    """Let calls of one workflow finish in this order, and close it."""
    for request, tokens in calls:
        completion = Completion(model=M, output_tokens=tokens)
        if isinstance(shares, ModelShares):
            shares.note(request, completion)
        else:
            shares.learn(request, completion)
    shares.close(calls[0][0].workflow_id)


def test_a_planner_is_followed_by_what_followed_others_like_it() -> None:
    shares = ModelShares()
    for tokens in (100, 200, 300):
        query = (asks("query", X), tokens)
        play(shares, (asks("planner", M), 50), query, query)

    assert shares.of(asks("planner", M)) == {M: 50.0, X: 400.0}
    assert shares.of(asks("query", X)) == {}  # only its own model follows
    assert shares.of(asks("planner", M, app="other")) == {}


def test_nothing_is_said_of_two_workflows_nor_of_one_that_is_not_over() -> None:
    shares = ModelShares()
    for _ in range(2):
        play(shares, (asks("planner", M), 50), (asks("query", X), 100))
    shares.note(asks("planner", M), Completion(model=M, output_tokens=50))

    assert shares.of(asks("planner", M)) == {}


def test_calls_that_name_no_model_say_nothing_of_which_it_was() -> None:
    shares = ModelShares()
    for _ in range(3):
        play(shares, (asks("planner"), 50), (asks("query"), 100))
        play(shares, (asks("chooser", M, X), 50), (asks("query"), 100))

    assert shares.of(asks("planner")) == shares.of(asks("chooser", M, X)) == {}


def test_what_follows_may_change_and_is_bounded() -> None:
    shares = ModelShares(most_groups=1, most_workflows=1)
    for _ in range(3):
        play(shares, (asks("planner", M), 50), (asks("query", X), 100))
    assert shares.of(asks("planner", M)) == {}  # its group came second
    for _ in range(600):
        play(shares, (asks("query", X), 100), (asks("after", M), 7))
    assert shares.of(asks("query", X)) == pytest.approx({X: 100.0, M: 7.0}, rel=0.01)

    shares.note(asks("query", X), Completion(model=X, output_tokens=9))
    shares.note(asks("query", X, workflow="v"), Completion(model=X, output_tokens=9))
    assert len(shares._open) == 1


def test_recent_lengths_tell_it_with_what_they_know_of_the_call() -> None:
    predictor = RecentLengths()
    for _ in range(10):
        play(predictor, (asks("planner", M), 50), (asks("query", X), 100))

    forecast = predictor.predict(asks("planner", M))
    assert forecast.remaining_by == {M: 50.0, X: 100.0}
    assert forecast.source == "role"


# What the core makes of it.


def owed(scheduler: CheckedScheduler) -> tuple[int, int]:
    workflows = scheduler.core.workflows
    return workflows.owed(M).tokens, workflows.owed(X).tokens


def test_each_model_is_owed_its_own_part_and_served_from_it() -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q", model="x"))
    scheduler = CheckedScheduler(fleet)
    by = {M: 50.0, X: 400.0, ANY: 6.0}
    whole = a_forecast(20, remaining_tokens=Quantiles.exactly(456.0), remaining_by=by)
    scheduler.arrive("w/0", 0.0, whole, workflow_id=W, models=(M,))
    assert owed(scheduler) == (56, 400)

    rest = a_forecast(100, remaining_by={X: 395.0, M: 30.0})
    scheduler.arrive("w/1", 1.0, rest, workflow_id=W, models=(X,))
    assert owed(scheduler) == (30, 395)
    scheduler.at(2.0, TokensStreamed(((RequestId("w/0"), 1, 3), (RequestId("w/1"), 1, 5))))
    assert owed(scheduler) == (27, 390)
    scheduler.at(3.0, RequestFinished(RequestId("w/0"), 1, 40))
    assert owed(scheduler) == (0, 390)


moves = st.lists(
    st.tuples(
        st.sampled_from(("commit", "stream", "lose")),
        st.sampled_from((M, X)),
        st.integers(0, 50),
        st.dictionaries(st.sampled_from((M, X, ModelName("y"))), st.integers(1, 90)),
    ),
    max_size=30,
)


@given(moves)
def test_what_is_owed_by_model_is_the_sum_of_what_was_announced_less_what_was_served(
    history: list[tuple[str, ModelName, int, dict[ModelName, int]]],
) -> None:
    workflows, demands = Workflows(), Demands(1.0)
    workflows.demands = demands
    workflow: Workflow = workflows.arrive(0.0, a_request("r", workflow_id=W))
    for what, model, tokens, elsewhere in history:
        if what == "commit":
            workflows.commit(workflow, model, tokens, elsewhere)
        elif what == "stream":
            workflows.stream(workflow, tokens, model)
        else:
            workflow.open_calls = 1
            workflows.settle(W, answered=False)
            assert not workflow.owed
            workflow.open_calls = 1
        workflows.validate()
        for one in demands.models:
            flow = demands.flow(one)
            assert workflows.owed(one).tokens == flow.tokens - flow.output_tokens
