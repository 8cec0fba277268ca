"""Budget: a slow, broken or senseless predictor costs a decision little, and misleads none."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import a_forecast, a_request
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.budget import BudgetedPredictor, makes_sense
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.predictors.recent import RecentLengths

M = ModelName("m")
GOOD, PLAIN = a_forecast(100.0), a_forecast(7.0)
SHORT, LONG = Prompt(chars=100), Prompt(chars=100_000)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Scripted:
    """Takes a fixed time, and a time for each character."""

    clock: Clock
    says: Forecast
    takes_s: float = 0.0
    char_s: float = 0.0
    error: Exception | None = None
    reads_prompts: bool = False
    learned: list[str] = field(default_factory=list)
    told: list[Forecast] = field(default_factory=list)

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        self.clock.now_s += self.takes_s + self.char_s * prompt.chars
        if self.error:
            raise self.error
        return self.says

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        self.told.append(forecast)
        self.learned.append(request.request_id)
        if self.error:
            raise self.error

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        self.learned.append(f"{workflow_id} {success}")
        if self.error:
            raise self.error


@dataclass
class Rig:
    """A predictor, its fallback, and the wrapper around both."""

    clock: Clock
    main: Scripted
    fallback: Scripted
    budgeted: BudgetedPredictor

    def ask(self, count: int = 1, prompt: Prompt = SHORT) -> list[Forecast]:
        return [self.budgeted.predict(a_request(), prompt) for _ in range(count)]


def a_rig(**main: object) -> Rig:
    clock = Clock()
    slow = Scripted(clock, GOOD, **main)  # type: ignore[arg-type]
    fallback = Scripted(clock, PLAIN)
    return Rig(clock, slow, fallback, BudgetedPredictor(slow, fallback, clock, budget_s=0.02))


# Time.


def test_a_predictor_that_keeps_to_its_budget_is_always_asked() -> None:
    rig = a_rig(takes_s=0.019)

    assert rig.ask(500) == [GOOD] * 500
    assert rig.budgeted.counts == {"in_time": 500}


def test_a_slow_predictor_is_waited_for_once_then_skipped() -> None:
    rig = a_rig(takes_s=0.2)

    assert rig.ask(100) == [GOOD] + [PLAIN] * 99
    assert rig.budgeted.counts == {"late": 1, "skipped": 99}
    assert rig.clock.now_s == pytest.approx(0.2)


def test_a_slow_predictor_is_tried_again_and_costs_a_hundredth_of_calls() -> None:
    rig = a_rig(takes_s=0.2)
    rig.ask(10_000)

    assert 80 <= rig.budgeted.counts["late"] <= 90


def test_a_predictor_that_has_recovered_is_asked_again() -> None:
    rig = a_rig(takes_s=0.2)
    rig.ask(10)
    rig.main.takes_s = 0.001

    assert rig.ask(200)[-10:] == [GOOD] * 10


def test_one_hiccup_is_forgiven() -> None:
    rig = a_rig(takes_s=0.001)
    rig.ask(50)
    rig.main.takes_s = 0.09
    rig.ask(1)
    rig.main.takes_s = 0.001

    assert rig.ask(50) == [GOOD] * 50
    assert rig.budgeted.counts == {"in_time": 100, "late": 1}


def test_only_prompts_too_long_for_the_budget_are_skipped() -> None:
    rig = a_rig(char_s=1e-6)

    for _ in range(20):
        assert rig.ask(prompt=SHORT) == [GOOD]
        rig.ask(prompt=LONG)
    assert rig.budgeted.counts == {"in_time": 20, "late": 1, "skipped": 19}


def test_a_longer_prompt_is_expected_to_take_no_less() -> None:
    rig = a_rig(takes_s=0.5)
    rig.ask(prompt=SHORT)

    assert rig.ask(prompt=LONG) == [PLAIN]
    assert rig.ask(prompt=Prompt(text="x")) == [GOOD]


def test_what_has_been_spent_counts() -> None:
    rig = a_rig(takes_s=0.01)
    rig.ask()

    assert rig.budgeted.predict_within(0.005, a_request(), SHORT) == PLAIN
    assert rig.budgeted.predict_within(0.015, a_request(), SHORT) == GOOD


# Faults.


def test_an_error_is_answered_by_the_fallback_with_a_line_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = a_rig(error=ValueError("cannot read 'a secret'"))

    assert rig.ask(10) == [PLAIN] * 10
    assert len(caplog.records) == 1
    rig.main.error = KeyError("a secret")
    rig.ask(10)
    assert len(caplog.records) == 2
    rig.clock.now_s += 60.0
    rig.ask(10)

    assert len(caplog.records) == 3
    assert rig.budgeted.counts == {"failed": 30}
    assert "failed_ValueError error='ValueError at test_budget.py:" in caplog.text
    assert "secret" not in caplog.text


def test_a_predictor_that_takes_its_time_to_fail_is_skipped() -> None:
    rig = a_rig(error=ValueError(), takes_s=0.2)
    rig.ask(50)

    assert rig.budgeted.counts == {"failed": 1, "skipped": 49}


@pytest.mark.parametrize(
    "says",
    [
        a_forecast(math.nan),
        a_forecast(math.inf),
        a_forecast(-1.0),
        Forecast(output_tokens_on={M: Quantiles.exactly(math.nan)}),
        Forecast(remaining_tokens=Quantiles.exactly(math.nan)),
        Forecast(remaining_calls=Quantiles.exactly(-1.0)),
        Forecast(remaining_tool_s=Quantiles.exactly(math.inf)),
        Forecast(success={M: 1.1}),
        Forecast(tool_call=math.nan),
    ],
)
def test_a_senseless_forecast_is_not_passed_on(says: Forecast) -> None:
    rig = a_rig()
    rig.main.says = says

    assert rig.ask(2) == [PLAIN] * 2
    assert rig.budgeted.counts == {"senseless": 2}


def test_no_forecast_makes_sense() -> None:
    assert makes_sense(NO_FORECAST)


def test_without_a_fallback_that_works_there_is_no_forecast() -> None:
    rig = a_rig(error=ValueError())
    rig.fallback.error = ValueError()

    assert rig.ask() == [NO_FORECAST]
    assert rig.budgeted.counts == {"failed": 1, "fallback_failed": 1}


@pytest.mark.parametrize("broken", ["main", "fallback", "none"])
def test_both_learn_from_everything_though_one_is_broken(broken: str) -> None:
    rig = a_rig(takes_s=0.5)
    for name, each in (("main", rig.main), ("fallback", rig.fallback)):
        each.error = ValueError() if name == broken else None
    rig.budgeted.learn(a_request("r1"), Completion(model=M, output_tokens=3))
    rig.budgeted.close(WorkflowId("w"), 0.5)

    assert rig.main.learned == rig.fallback.learned == ["r1", "w 0.5"]
    assert rig.budgeted.counts["not_learned"] == (0 if broken == "none" else 2)


def test_each_learns_beside_what_it_said_itself() -> None:
    rig = a_rig(takes_s=0.2)
    for name in ("r1", "r2"):
        said = rig.budgeted.predict(a_request(name))
        rig.budgeted.learn(a_request(name), Completion(model=M, output_tokens=3), NO_PROMPT, said)

    assert rig.main.told == [GOOD, NO_FORECAST]
    assert rig.fallback.told == [NO_FORECAST, PLAIN]


def test_calls_without_an_outcome_are_not_remembered_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("concertmaster.learning.budget.MOST_OPEN", 5)
    rig = a_rig(error=ValueError())
    for i in range(20):
        rig.budgeted.predict(a_request(f"r{i}"))

    assert list(rig.budgeted._fell_back) == [f"r{i}" for i in range(15, 20)]


class Waiting(Scripted):
    """Wants to know of calls that no answer will come of."""

    def failed(self, request_id: RequestId) -> None:
        self.learned.append(f"{request_id} failed")
        if self.error:
            raise self.error


def test_of_a_call_that_failed_nothing_is_kept() -> None:
    rig = a_rig(error=ValueError())
    for name in ("r1", "r2"):
        rig.budgeted.predict(a_request(name))
    rig.budgeted.failed(RequestId("r1"))

    assert list(rig.budgeted._fell_back) == ["r2"]


@pytest.mark.parametrize("error", [None, ValueError()])
def test_who_waits_for_an_outcome_is_told_that_none_will_come(error: Exception | None) -> None:
    clock = Clock()
    main, fallback = Waiting(clock, GOOD, error=error), Waiting(clock, PLAIN)
    budgeted = BudgetedPredictor(main, fallback, clock)
    budgeted.failed(RequestId("r1"))

    assert main.learned == fallback.learned == ["r1 failed"]
    assert budgeted.counts["not_learned"] == (error is not None)


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("fallback", [False, True])
def test_prompts_are_read_if_either_reads_them(*, main: bool, fallback: bool) -> None:
    rig = a_rig(reads_prompts=main)
    rig.fallback.reads_prompts = fallback
    budgeted: Predictor = BudgetedPredictor(rig.main, rig.fallback, rig.clock)

    assert budgeted.reads_prompts == (main or fallback)


# The contract of predictors.


@given(lengths=st.lists(st.integers(1, 2000), min_size=10, max_size=30))
def test_predicting_teaches_nothing(lengths: list[int]) -> None:
    asked, unasked = (
        BudgetedPredictor(RecentLengths(), RecentLengths(window=8), Clock()) for _ in range(2)
    )
    for tokens in lengths:
        asked.predict(a_request())
        for predictor in (asked, unasked):
            predictor.learn(a_request(), Completion(model=M, output_tokens=tokens))

    assert asked.predict(a_request()) == unasked.predict(a_request()) != NO_FORECAST
