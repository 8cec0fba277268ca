"""Shadow: a challenger is heard by nobody, and installed only if it is better."""

import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import pytest

from builders import a_request
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.learning.labels import LEVELS
from concertmaster.learning.shadow import Shadow, Verdict, pinball
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt

M = ModelName("m")


def says(factor: float = 1.0, sigma: float = 0.5) -> Forecast:
    """Log-normal tokens around 150; with the settings as they are it is true."""
    values = (factor * math.exp(5 + sigma * NormalDist().inv_cdf(x)) for x in LEVELS)
    return Forecast(output_tokens=Quantiles(LEVELS, tuple(values)))


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Scripted:
    """Says what a script says, and remembers what it was told."""

    script: Callable[[Request], Forecast]
    heard: list[str] = field(default_factory=list)
    told: list[Forecast] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    takes_s: float = 0.0
    fails_at: str = ""
    reads_prompts: bool = False

    def note(self, what: str) -> None:
        self.clock.now_s += self.takes_s
        self.heard.append(what)
        if self.fails_at and what.startswith(self.fails_at):
            raise RuntimeError("the prompt was: a secret")

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        self.note(f"predict {request.request_id} {prompt.chars}")
        return self.script(request)

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        self.told.append(forecast)
        self.note(f"learn {request.request_id} {completion.output_tokens} {prompt.chars}")

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        self.note(f"close {workflow_id} {success}")


def always(forecast: Forecast) -> Scripted:
    return Scripted(lambda _: forecast)


def noisy(seed: int, sigma: float = 0.3) -> Scripted:
    """As good as any other of its kind: each answer is off by chance."""
    rng = random.Random(seed)
    choices = [says(math.exp(sigma * i / 5)) for i in range(-10, 11)]
    return Scripted(lambda _: rng.choice(choices))


def play(shadow: Shadow, labels: int, seed: int = 0) -> int:
    """Let calls come and be answered until a verdict; return how many were."""
    rng = random.Random(seed)
    for i in range(labels):
        request = a_request(f"r{i}")
        shadow.predict(request)
        tokens = round(rng.lognormvariate(5, 0.5))
        shadow.learn(request, Completion(model=M, output_tokens=tokens))
        if shadow.catch_up() is not Verdict.UNDECIDED:
            return i + 1
    return labels


def shadow_of(champion: Scripted, challenger: Scripted, **settings: float) -> Shadow:
    shadow = Shadow(champion, challenger.clock, **settings)  # type: ignore[arg-type]
    shadow.challenge(challenger)
    return shadow


# Verdicts.


@pytest.mark.parametrize("wrong", [1.5, 1 / 1.5])
def test_a_better_challenger_is_installed(wrong: float) -> None:
    challenger = always(says())
    shadow = shadow_of(always(says(wrong)), challenger)

    labels = play(shadow, 2_000)
    assert shadow.verdict is Verdict.INSTALL
    assert 200 <= labels <= 400
    assert shadow.champion is challenger
    assert shadow.predict(a_request()) == says()
    figures = shadow.figures
    assert figures.challenger_pinball < figures.champion_pinball
    assert figures.challenger_coverage[0.5] == pytest.approx(0.5, abs=0.1)
    assert (figures.labels, figures.reason) == (labels, "better")


def test_a_worse_challenger_is_discarded_early() -> None:
    champion = always(says())
    shadow = shadow_of(champion, always(says(1.5)))

    assert play(shadow, 2_000) < 300
    assert (shadow.verdict, shadow.figures.reason) == (Verdict.DISCARD, "worse")
    assert shadow.champion is champion


def test_one_that_is_no_better_is_installed_no_more_often_than_stated() -> None:
    """At most 5 % of 100, wherever the verdict falls: one looks after each label."""
    verdicts = []
    for seed in range(100):
        shadow = shadow_of(
            noisy(seed), noisy(1_000 + seed), level=0.05, max_labels=400, min_labels=50
        )
        play(shadow, 400, seed)
        verdicts.append(shadow.verdict)

    assert verdicts.count(Verdict.INSTALL) <= 5
    assert Verdict.UNDECIDED not in verdicts


def test_no_verdict_falls_for_a_challenger_before_enough_labels() -> None:
    shadow = shadow_of(always(says(9.0)), always(says()), min_labels=300)

    assert play(shadow, 2_000) == 300
    assert shadow.verdict is Verdict.INSTALL


def test_one_that_neither_wins_nor_loses_is_given_up() -> None:
    shadow = shadow_of(always(says()), always(says()), max_labels=500)

    assert play(shadow, 2_000) == 500
    assert (shadow.verdict, shadow.figures.reason) == (Verdict.DISCARD, "no better")


def test_one_that_is_sharper_but_loses_coverage_is_discarded() -> None:
    """The champion is far too wide, and right at both levels that are held to coverage."""
    values = [1.0, 1.0, 1.0, math.exp(5), 9e3, 9e3, math.exp(5 + 0.5 * 1.645), 9e5]
    values[4:6] = [values[6], values[6]]
    champion = Forecast(output_tokens=Quantiles(LEVELS, tuple(values)))
    shadow = shadow_of(always(champion), always(says(0.8)))

    play(shadow, 2_000)
    assert shadow.verdict is Verdict.DISCARD
    assert shadow.figures.challenger_pinball < shadow.figures.champion_pinball
    assert shadow.figures.reason.startswith("loses coverage at 0.5: 0.2")


def test_one_that_says_nothing_does_not_beat_one_that_knows() -> None:
    shadow = shadow_of(always(says()), always(NO_FORECAST))
    play(shadow, 2_000)

    assert shadow.verdict is Verdict.DISCARD


def test_without_a_challenger_nothing_is_kept() -> None:
    champion = always(says())
    shadow = Shadow(champion, Clock())
    play(shadow, 10)

    assert (shadow.is_challenged, shadow.verdict) == (False, Verdict.DISCARD)
    assert (len(shadow._heard), len(champion.heard)) == (0, 2)


# Unheard.


def test_the_challenger_answers_nobody_and_hears_what_the_champion_heard() -> None:
    champion, challenger = always(says()), always(says(3.0))
    shadow = shadow_of(champion, challenger)
    shadow.close(WorkflowId("before"), 1.0)
    for i in range(5):
        request = a_request(f"r{i}")
        assert shadow.predict(request, Prompt(chars=i)) == says()
        if i % 2:
            shadow.learn(request, Completion(model=M, output_tokens=i), Prompt(chars=i))
    shadow.close(WorkflowId("w"))
    assert challenger.heard == []

    assert shadow.catch_up() is Verdict.UNDECIDED
    assert challenger.heard == champion.heard
    assert shadow.figures.labels == 2


def test_the_challenger_answers_before_it_is_told_the_outcome() -> None:
    """Even if it is asked late: it hears things in the order in which they came."""
    challenger = always(says())
    shadow = shadow_of(always(says()), challenger)
    request = a_request("r")
    shadow.predict(request)
    shadow.learn(request, Completion(model=M, output_tokens=7))
    shadow.catch_up()

    assert challenger.heard == ["predict r 0", "learn r 7 0"]


def test_each_learns_beside_its_own_forecast() -> None:
    champion, challenger = always(says()), always(says(3.0))
    shadow = Shadow(champion, Clock())
    shadow.predict(a_request("before"))
    shadow.challenge(challenger)
    for name in ("r", "before"):
        said = shadow.predict(a_request(name)) if name == "r" else says()
        completion = Completion(model=M, output_tokens=7)
        shadow.learn(a_request(name), completion, NO_PROMPT, said)
    shadow.catch_up()

    assert champion.told == [says(), says()]
    assert challenger.told == [says(3.0), NO_FORECAST]


def test_an_installed_challenger_has_first_heard_all() -> None:
    clock = Clock()
    challenger = Scripted(lambda _: says(), clock=clock, takes_s=0.001)
    champion = always(says(4.0))
    shadow = shadow_of(champion, challenger, min_labels=50, max_behind=10_000)
    for i in range(500):
        request = a_request(f"r{i}")
        shadow.predict(request)
        shadow.learn(request, Completion(model=M, output_tokens=150))
    while shadow.champion is champion:
        shadow.catch_up(limit_s=0.01)

    assert shadow.verdict is Verdict.INSTALL
    assert challenger.heard == champion.heard


def test_catching_up_stops_when_its_time_is_over() -> None:
    clock = Clock()
    challenger = Scripted(lambda _: says(), clock=clock, takes_s=0.002)
    shadow = shadow_of(always(says()), challenger)
    for i in range(100):
        shadow.predict(a_request(f"r{i}"))
    shadow.catch_up(limit_s=0.005)

    assert len(challenger.heard) == 3


@pytest.mark.parametrize("fails_at", ["predict", "learn", "close"])
def test_a_challenger_that_raises_is_discarded_with_one_line(
    caplog: pytest.LogCaptureFixture, fails_at: str
) -> None:
    caplog.set_level(logging.WARNING)
    challenger = always(says())
    challenger.fails_at = fails_at
    shadow = shadow_of(always(says()), challenger)
    shadow.close(WorkflowId("w"))
    play(shadow, 50)
    for _ in range(3):
        assert shadow.predict(a_request()) == says()

    assert shadow.verdict is Verdict.DISCARD
    assert not shadow.is_challenged
    assert len(caplog.records) == 1
    assert "reason='raised RuntimeError at test_shadow.py:" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("takes_s", "after"), [(0.3, 1), (0.03, 11), (0.019, None)])
def test_a_slow_challenger_is_discarded(takes_s: float, after: int | None) -> None:
    challenger = Scripted(lambda _: says(), clock=Clock(), takes_s=takes_s)
    shadow = shadow_of(always(says()), challenger, budget_s=0.02)
    for i in range(60):
        shadow.predict(a_request(f"r{i}"))
        shadow.catch_up()

    assert shadow.is_challenged == (after is None)
    assert len(challenger.heard) == (after or 60)


def test_a_challenger_that_falls_behind_is_discarded_and_its_prompts_let_go() -> None:
    shadow = shadow_of(always(says()), always(says()), max_behind=100)
    for i in range(150):
        shadow.predict(a_request(f"r{i}"))

    assert shadow.figures.reason == "fell behind"
    assert len(shadow._heard) == 0


def test_a_forecast_that_is_not_a_number_discards_the_challenger() -> None:
    nan = Forecast(output_tokens=Quantiles.exactly(math.nan))
    shadow = shadow_of(always(says()), always(nan))
    play(shadow, 10)

    assert shadow.verdict is Verdict.DISCARD


def test_a_champion_whose_forecasts_are_not_numbers_is_replaced() -> None:
    nan = Forecast(output_tokens=Quantiles.exactly(math.nan))
    shadow = shadow_of(always(nan), always(says()))
    play(shadow, 500)

    assert shadow.verdict is Verdict.INSTALL


def test_errors_of_the_champion_are_the_callers() -> None:
    champion = always(says())
    champion.fails_at = "predict"

    with pytest.raises(RuntimeError):
        Shadow(champion, Clock()).predict(a_request())


@pytest.mark.parametrize("reader", ["champion", "challenger"])
def test_prompts_are_read_while_either_reads_them(reader: str) -> None:
    champion, challenger = always(says(2.0)), always(says())
    (champion if reader == "champion" else challenger).reads_prompts = True
    shadow = shadow_of(champion, challenger)
    assert shadow.reads_prompts

    play(shadow, 1_000)
    assert shadow.champion is challenger
    assert shadow.reads_prompts == (reader == "challenger")


def test_a_second_challenge_begins_afresh() -> None:
    shadow = shadow_of(always(says()), always(says(2.0)))
    play(shadow, 2_000)
    shadow.challenge(always(says()))

    assert (shadow.verdict, shadow.figures.labels) == (Verdict.UNDECIDED, 0)
    assert shadow.counts == {Verdict.DISCARD: 1}


def test_an_outcome_of_a_call_from_before_the_challenge_is_not_scored() -> None:
    shadow = Shadow(always(says()), Clock())
    shadow.predict(a_request("old"))
    shadow.challenge(always(says()))
    shadow.learn(a_request("old"), Completion(model=M, output_tokens=5))
    shadow.catch_up()

    assert shadow.figures.labels == 0
    assert RequestId("old") not in shadow._open


def test_the_loss_counts_both_sides() -> None:
    law = Quantiles.exactly(math.e**2 - 1)
    over, under = pinball(law, math.e - 1), pinball(law, math.e**3 - 1)

    assert over == pytest.approx(sum(1 - x for x in LEVELS) / 8)
    assert under == pytest.approx(sum(LEVELS) / 8)
