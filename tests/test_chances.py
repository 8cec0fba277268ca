"""Chances are worked out when somebody asks, and say what was known when they were stated."""

from pathlib import Path

import numpy as np
import pytest

from builders import a_request
from concertmaster.core.events import RequestArrived
from concertmaster.core.forecast import Forecast
from concertmaster.core.request import ModelName, WorkflowId
from concertmaster.learning.budget import makes_sense
from concertmaster.observe.trace import Entry, Header, TraceReader, TraceWriter
from concertmaster.predictors import judge as judge_module
from concertmaster.predictors.chances import Chances
from concertmaster.predictors.encoder import Encoder
from concertmaster.predictors.judge import Judge
from store_builders import BIG, SMALL, a_success_head, an_encoder

A, B = ModelName("a"), ModelName("b")
MODELS = (SMALL, BIG)


class Asked:
    """Chances that note how often they were worked out."""

    def __init__(self, *chances: float) -> None:
        self.times = 0
        self._chances = chances

    def __call__(self) -> tuple[float, ...]:
        self.times += 1
        return self._chances


def test_asking_whom_there_is_a_chance_of_works_nothing_out() -> None:
    asked = Asked(0.5, 0.25)
    chances = Chances((A, B), asked)

    assert (list(chances), len(chances), A in chances, "c" in chances) == ([A, B], 2, True, False)
    assert chances.get(ModelName("c")) is None
    assert (asked.times, chances.read) == (0, False)


def test_they_are_worked_out_once() -> None:
    asked = Asked(0.5, 0.25)
    chances = Chances((A, B), asked)

    assert [chances[A], chances.get(B), chances.get(ModelName("c"))] == [0.5, 0.25, None]
    assert chances == {A: 0.5, B: 0.25}
    assert repr(chances) == repr({A: 0.5, B: 0.25})
    assert (asked.times, chances.read) == (1, True)


def test_a_trace_holds_them_as_any_others(tmp_path: Path) -> None:
    path, chances = tmp_path / "t.jsonl", Chances((A,), Asked(0.5))
    with TraceWriter(path, Header(trace=1, fleet="f", policy="p", seed=0)) as trace:
        trace(1.0, RequestArrived(a_request(), Forecast(success=chances)), [])

    (entry,) = TraceReader(path).entries()

    expected = RequestArrived(a_request(), Forecast(success={A: 0.5}))
    assert entry == Entry(1.0, expected, ())


def test_a_trace_refuses_what_is_no_mapping(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "t", Header(trace=1, fleet="f", policy="p", seed=0)) as trace,
        pytest.raises(NotImplementedError, match="cannot hold a complex"),
    ):
        trace(1.0, RequestArrived(a_request(), Forecast(tool_call=1j)), [])  # type: ignore[arg-type]


def test_whether_a_forecast_makes_sense_is_asked_of_chances_that_were_read() -> None:
    asked = Asked(1.5)
    chances = Chances((A,), asked)

    assert makes_sense(Forecast(success=chances))
    assert asked.times == 0
    assert chances[A] == 1.5
    assert not makes_sense(Forecast(success=chances))


# Of a judge


class Reads:
    """An encoder that notes what it read."""

    def __init__(self) -> None:
        self._inner: Encoder = an_encoder()
        self.name, self.dims = self._inner.name, self._inner.dims
        self.texts: list[str] = []

    def encode(self, texts: list[str]) -> object:
        self.texts += texts
        return self._inner.encode(texts)


def a_judge(*, at_once: bool = False) -> tuple[Judge, Reads]:
    encoder = Reads()
    return Judge(a_success_head(), encoder, at_once=at_once), encoder  # type: ignore[arg-type]


def test_a_prompt_is_read_when_somebody_asks_for_a_chance() -> None:
    judge, encoder = a_judge()
    chances = judge.foresee(a_request("r"), "what is + ?", MODELS)
    assert encoder.texts == []

    assert chances == judge("what is + ?", MODELS)
    assert encoder.texts == ["what is + ?"]


def test_chances_are_those_of_the_instant_at_which_they_were_stated() -> None:
    judge, _ = a_judge()
    before = judge("what is + ?", MODELS)
    stated = judge.foresee(a_request("r"), "what is + ?", MODELS)
    for i in range(9):
        request = a_request(f"r{i}", workflow_id=WorkflowId(f"w{i}"))
        judge.foresee(request, "is ?", MODELS)
        judge.answered(request, BIG)
        judge.graded(WorkflowId(f"w{i}"), 0.0)

    assert judge("what is + ?", MODELS) != before
    assert stated == before


def test_a_grade_reads_the_first_prompt_that_a_model_answered_and_no_other() -> None:
    judge, encoder = a_judge()
    first, second = (a_request(f"w/{i}", workflow_id=WorkflowId("w")) for i in range(2))
    judge.foresee(first, "what", MODELS)
    judge.foresee(second, "is", MODELS)
    judge.answered(first, BIG)
    judge.answered(second, BIG)
    assert encoder.texts == []
    judge.graded(WorkflowId("w"), 1.0)

    assert encoder.texts == ["what"]


@pytest.mark.parametrize(("graded", "read"), [(True, ["what 0", "what 1"]), (False, [])])
def test_prompts_without_an_answer_are_not_held_for_ever(
    monkeypatch: pytest.MonkeyPatch, *, graded: bool, read: list[str]
) -> None:
    monkeypatch.setattr(judge_module, "MOST_UNREAD", 3)
    judge, encoder = a_judge()
    if graded:
        judge.graded(WorkflowId("another"), 1.0)
    for i in range(5):
        judge.foresee(a_request(f"r{i}"), f"what {i}", MODELS)

    assert encoder.texts == read
    assert len(judge._unread) == 3


def test_no_prompt_is_kept_once_it_was_read() -> None:
    judge, _ = a_judge()
    judge.foresee(a_request("r"), "what", MODELS)
    traits = judge._asked[a_request("r").request_id].traits
    assert traits is not None
    first = traits()

    assert traits._text == ""
    np.testing.assert_array_equal(traits(), first)


def test_where_an_encoder_may_be_slow_or_fail_prompts_are_read_at_once() -> None:
    judge, encoder = a_judge(at_once=True)

    judge.foresee(a_request("r"), "what", MODELS)

    assert encoder.texts == ["what"]
