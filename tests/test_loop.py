"""The loop: outcomes become labels, drift a challenger, a win a champion, and no call waits."""

import asyncio
import logging
import math
import random
import sqlite3
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from builders import a_fleet, a_request
from concertmaster import forecaster
from concertmaster.config import GatewaySection
from concertmaster.core.errors import InputError
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, RequestId, WorkflowId
from concertmaster.gateway.forecast_metrics import SOURCES
from concertmaster.learning import figures
from concertmaster.learning.background import BackgroundTrainer, Done, Failed, Idle, Running, State
from concertmaster.learning.drift import Change, DriftWatch
from concertmaster.learning.feedback import FeedbackStore
from concertmaster.learning.labels import LEVELS
from concertmaster.learning.loop import CHALLENGED_S, TRAINED, LearningLoop, Noting
from concertmaster.learning.shadow import Verdict
from concertmaster.learning.upkeep import School
from concertmaster.predictors.evidence import STEPS
from concertmaster.predictors.interface import NO_PROMPT, Completion, Predictor, Prompt
from concertmaster.predictors.learned import LearnedPredictor
from concertmaster.predictors.store import load_predictor
from gateway_rig import over_engines, play, until
from store_builders import a_store, a_success_head

M = ModelName("m")
FIGURES = np.arange(3.0, dtype=np.float32)
P = ParamSpec("P")
R = TypeVar("R")


def says(factor: float = 1.0) -> Forecast:
    """Log-normal tokens around 150 times a factor."""
    values = (factor * math.exp(5 + 0.5 * NormalDist().inv_cdf(level)) for level in LEVELS)
    return Forecast(output_tokens=Quantiles(LEVELS, tuple(values)), source="role")


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Scripted:
    """Says one thing, and hands out figures beside it."""

    forecast: Forecast = field(default_factory=says)
    clock: Clock = field(default_factory=Clock)
    takes_s: float = 0.0
    asked: int = 0
    taught: int = 0
    reads_prompts: bool = False
    grades: list[float | None] = field(default_factory=list)

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        return self.foresee(request, prompt)[0]

    def foresee(
        self, request: Request, prompt: Prompt = NO_PROMPT
    ) -> tuple[Forecast, npt.NDArray[np.float32]]:
        self.clock.now_s += self.takes_s
        self.asked += 1
        return self.forecast, FIGURES

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast = NO_FORECAST,
    ) -> None:
        self.taught += 1

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        self.grades.append(success)


class AtOnce(Executor):
    """Runs what it is given before it returns."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as executors do
            future.set_exception(error)
        return future


class Never(Executor):
    """Takes work and does not come to it."""

    def __init__(self) -> None:
        self.given = 0

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        self.given += 1
        return Future()


class FakeTrainer:
    """Trains by being told what came of it."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.state: State = Idle()
        self.closed = False

    def may_start(self, now_s: float) -> bool:
        return not isinstance(self.state, Running)

    def start(self, now_s: float, train: Callable[..., Path], *args: object) -> bool:
        self.started.append(args)
        self.state = Running()
        return True

    def poll(self, now_s: float) -> State:
        state = self.state
        if not isinstance(state, Running):
            self.state = Idle()
        return state

    def close(self) -> None:
        self.closed = True


def train_nothing(*_: object) -> Path:
    raise InputError("train", "", "nothing to learn")


@dataclass
class Stage:
    """A loop and all that it is tied to."""

    loop: LearningLoop
    store: FeedbackStore
    trainer: FakeTrainer
    school: School
    clock: Clock
    folder: Path
    now_s: float = 0.0
    calls: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def serve(self, calls: int, factor: float = 1.0, *, ticks: bool = True) -> None:
        for _ in range(calls):
            self.calls += 1
            request = a_request(f"r{self.calls}", workflow_id=WorkflowId(f"w{self.calls}"))
            forecast = self.loop.predict(request)
            tokens = round(factor * self.rng.lognormvariate(5, 0.5))
            completion = Completion(model=M, output_tokens=tokens, finished_s=float(self.calls))
            self.loop.learn(request, completion, forecast=forecast, gpu="a40")
            self.loop.close(request.workflow_id)
            if ticks:
                self.tick()

    def tick(self) -> float:
        self.now_s += 2.0
        return self.loop.tick(self.now_s)

    def until_drift(self, factor: float = 3.0) -> None:
        self.serve(400, factor, ticks=False)
        self.tick()


def a_stage(
    folder: Path,
    champion: Predictor | None = None,
    challenger: Predictor | None = None,
    **settings: Any,  # noqa: ANN401
) -> Stage:
    clock = settings.pop("clock", None) or Clock()
    path = folder / "labels.sqlite"
    store = FeedbackStore(path)
    trainer = FakeTrainer()
    school = School(
        trainer=trainer,
        train=train_nothing,
        load=lambda _: challenger or Scripted(),
        champion=folder / "champion",
        labels=path,
        folder=folder / "challengers",
    )
    facts = {"executor": AtOnce(), "watch": DriftWatch(), "can_train": lambda: True}
    loop = LearningLoop(
        champion or Scripted(), clock, store=store, school=school, **{**facts, **settings}
    )
    return Stage(loop, store, trainer, school, clock, folder)


def on_wall(loop: LearningLoop) -> Any:  # noqa: ANN401
    champion = loop._shadow.champion
    assert isinstance(champion, Noting)
    return champion.inner


# Labels.


def test_every_completion_is_a_label_with_what_the_heads_saw(tmp_path: Path) -> None:
    stage = a_stage(tmp_path, run="run1")
    stage.serve(3)
    stage.loop.end()

    labels = stage.store.latest(10)
    assert [label.request_id for label in labels] == ["run1/r1", "run1/r2", "run1/r3"]
    assert {label.workflow_id for label in labels} == {f"run1/w{i}" for i in (1, 2, 3)}
    for label in labels:
        assert label.features is not None
        assert label.features.tolist() == FIGURES.tolist()
        assert (label.gpu, label.source, label.remaining_calls) == ("a40", "role", 1)
    assert stage.loop.figures.labels["labels"] == 3
    assert stage.trainer.closed


def test_a_label_of_the_fallback_has_no_figures_of_the_champion(tmp_path: Path) -> None:
    clock = Clock()
    slow = Scripted(clock=clock, takes_s=1.0)
    stage = a_stage(tmp_path, slow, clock=clock)
    stage.serve(4)

    found = [label.features is not None for label in stage.store.latest(10)]
    assert found == [True, False, False, False]
    assert slow.asked == 1
    assert slow.taught == 4
    counts = stage.loop.figures.budget
    assert (counts["late"], counts["skipped"]) == (1, 3)


def test_a_full_disk_reaches_no_caller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = a_stage(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    assert stage.store._file is not None
    stage.store._file.write = full  # type: ignore[method-assign,assignment]
    stage.store._connect = full  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        stage.serve(5)

    assert stage.loop.figures.failed_flushes == 5
    assert stage.store.buffered == 15
    assert len(caplog.records) == 1


def test_outcomes_of_unknown_calls_and_failures_are_harmless(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.loop.learn(a_request("never-asked"), Completion(model=M, output_tokens=3))
    stage.loop.failed(RequestId("nobody"))
    stage.loop.close(WorkflowId("nothing"))
    for _ in range(100):
        stage.tick()

    assert stage.loop.figures.labels["unknown"] == 2


def test_of_a_call_that_failed_no_prompt_is_kept() -> None:
    loop = LearningLoop(load_predictor(None, models=(M,)), Clock(), executor=AtOnce())
    champion = loop._champion.inner
    assert isinstance(champion, LearnedPredictor)
    assert champion.judge is not None
    for i in range(4):
        loop.predict(a_request(f"r{i}"), Prompt(text=f"say {i}"))
    loop.failed(RequestId("r1"))
    loop.learn(a_request("r2"), Completion(model=M, output_tokens=3))

    assert list(champion.judge._asked) == ["r0", "r3"]


def test_without_a_file_drift_is_still_counted() -> None:
    loop = LearningLoop(Scripted(), Clock(), executor=AtOnce(), can_train=lambda: True)
    for i in range(300):
        request = a_request(f"r{i}")
        completion = Completion(model=M, output_tokens=900, finished_s=float(i))
        loop.learn(request, completion, forecast=loop.predict(request))
        loop.tick(2.0 * i)

    assert sum(loop.figures.drift.values()) == 1
    assert loop.figures.coverage["output_tokens", 0.5] == 0.0
    loop.end()


def test_upkeep_never_has_two_rounds_under_way(tmp_path: Path) -> None:
    executor = Never()
    stage = a_stage(tmp_path, executor=executor)
    stage.serve(10)

    assert executor.given == 1


# Challenges.


def test_drift_starts_one_training_and_not_two(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.until_drift()
    assert sum(stage.loop.figures.drift.values()) == 1
    stage.serve(50, 3.0)
    stage.loop._drifted(next(iter(_alarms())))
    stage.serve(50, 3.0)

    assert len(stage.trainer.started) == 1
    champion, labels, out, _ = stage.trainer.started[0]
    assert (champion, labels) == (stage.school.champion, stage.school.labels)
    assert out == stage.school.folder / "a"


def _alarms() -> list[Any]:
    watch = DriftWatch()
    law = says().output_tokens
    assert law is not None
    found = [watch.add(("output_tokens", "other"), law, 900.0, float(i)) for i in range(200)]
    return [alarm for alarm in found if alarm is not None]


def test_no_drift_starts_no_training(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.serve(400)

    assert stage.trainer.started == []


def test_a_challenger_that_wins_is_installed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    better = Scripted(says(3.0))
    stage = a_stage(tmp_path, challenger=better)
    stage.until_drift()
    stage.trainer.state = Done(stage.folder / "challengers" / "a")
    stage.tick()
    assert stage.tick() == CHALLENGED_S
    with caplog.at_level(logging.INFO):
        stage.serve(400, 3.0)

    assert on_wall(stage.loop) is better
    assert stage.loop._champion.inner is better
    assert stage.loop.predict(a_request("last")) == says(3.0)
    assert stage.loop.figures.challengers == {"install": 1, "discard": 0}
    assert stage.loop.figures.trainings == {"done": 1}
    assert stage.school.champion == stage.folder / "challengers" / "a"
    assert stage.school.place() == stage.folder / "challengers" / "b"
    assert [r for r in caplog.messages if "verdict=install" in r and "champion_pinball" in r]
    assert [r for r in caplog.messages if "installed path=" in r]


def test_a_challenger_that_is_worse_is_not_installed(tmp_path: Path) -> None:
    champion = Scripted(says(2.0))
    stage = a_stage(tmp_path, champion, Scripted(says(0.3)))
    stage.until_drift(4.0)
    stage.trainer.state = Done(stage.folder / "challengers" / "a")
    stage.serve(400, 2.0)

    assert on_wall(stage.loop) is champion
    assert stage.loop._shadow.verdict is Verdict.DISCARD
    assert stage.loop.figures.challengers == {"install": 0, "discard": 1}
    assert stage.school.champion == stage.folder / "champion"
    assert len(stage.trainer.started) == 1


def test_prompts_are_read_while_a_challenger_reads_them(tmp_path: Path) -> None:
    stage = a_stage(tmp_path, challenger=Scripted(reads_prompts=True))
    stage.until_drift()
    assert not stage.loop.reads_prompts
    stage.trainer.state = Done(stage.folder / "challengers" / "a")
    stage.tick()
    stage.tick()

    assert stage.loop.reads_prompts


def test_a_training_that_fails_is_tried_again(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.until_drift()
    stage.trainer.state = Failed("killed by SIGKILL")
    for _ in range(4):
        stage.tick()

    assert stage.loop.figures.trainings == {"failed": 1}
    assert len(stage.trainer.started) == 2
    assert stage.loop.predict(a_request("later")) == says()


def test_a_challenger_that_cannot_be_read_is_no_challenger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = a_stage(tmp_path)

    def broken(_: Path) -> Predictor:
        raise InputError("store", "", "changed")

    stage.school.load = broken
    stage.until_drift()
    stage.trainer.state = Done(stage.folder / "challengers" / "a")
    stage.tick()
    stage.tick()

    assert stage.loop.figures.trainings == {"failed": 1}
    assert not stage.loop._shadow.is_challenged
    assert [r for r in caplog.messages if "challenger_unreadable" in r]


def test_without_lightgbm_the_log_says_once_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = a_stage(tmp_path, can_train=lambda: False)
    stage.until_drift()
    stage.loop._drifted(_alarms()[0])
    stage.tick()

    assert stage.trainer.started == []
    said = [record for record in caplog.messages if "concertmaster[train]" in record]
    assert len(said) == 1


def test_a_real_training_that_is_killed_leaves_the_loop_serving(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    with BackgroundTrainer() as trainer:
        stage.loop._upkeep._school.trainer = trainer  # type: ignore[union-attr]
        stage.until_drift()
        stage.tick()
        assert trainer._run is not None
        trainer._run.process.kill()
        trainer._run.process.join(10)
        stage.tick()
        stage.tick()

        assert stage.loop.figures.trainings == {"failed": 1}
        assert stage.loop.predict(a_request("later")) == says()


def test_misses_of_the_fallback_are_no_drift_of_the_champion(tmp_path: Path) -> None:
    clock = Clock()
    stage = a_stage(tmp_path, Scripted(clock=clock, takes_s=1.0), clock=clock)
    stage.serve(20, ticks=False)
    stage.serve(300, 9.0, ticks=False)

    counts = stage.loop.figures.budget
    assert counts["skipped"] > 280
    assert sum(stage.loop.figures.drift.values()) == 0


def test_drift_during_a_challenge_asks_for_no_other_training(tmp_path: Path) -> None:
    stage = a_stage(tmp_path, challenger=Scripted(says(0.3)))
    stage.until_drift()
    stage.trainer.state = Done(stage.folder / "challengers" / "a")
    stage.tick()
    stage.tick()
    stage.loop._drifted(_alarms()[0])
    stage.serve(50, 3.0)

    assert stage.loop.figures.challengers["discard"] == 1
    assert len(stage.trainer.started) == 1


# What else is watched.


def serve_workflows(stage: Stage, count: int, *, longer: float, grade: float | None) -> None:
    """Workflows of one call each, whose lengths hold; what remains is said to be less or more."""
    for i in range(count):
        request = a_request(f"x{i}", workflow_id=WorkflowId(f"x{i}"))
        said = stage.loop.predict(request)
        tokens = round(longer * stage.rng.lognormvariate(5, 0.5))
        done = Completion(model=M, output_tokens=tokens, finished_s=float(i))
        stage.loop.learn(request, done, forecast=said, gpu="a40")
        stage.loop.close(request.workflow_id, grade)


def test_drift_of_what_remains_and_of_success_is_named_and_trains_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    law = says().output_tokens
    champion = Scripted(Forecast(remaining_tokens=law, success={M: 0.9}, source="role"))
    stage = a_stage(tmp_path, champion)
    with caplog.at_level(logging.WARNING):
        serve_workflows(stage, 300, longer=1.5, grade=0.0)
    stage.tick()

    kinds = {"remaining_tokens": "higher", "success": "lower"}
    assert stage.loop.figures.drift == dict.fromkeys(kinds.items(), 1)
    for target, kind in kinds.items():
        assert [m for m in caplog.messages if f"drift target={target} kind={kind} group=" in m]
    assert stage.trainer.started == []


def test_a_failed_call_is_no_drift_of_what_remains(tmp_path: Path) -> None:
    champion = Scripted(Forecast(remaining_tokens=Quantiles.exactly(1e6), source="role"))
    stage = a_stage(tmp_path, champion)
    for i in range(300):
        request, lost = (a_request(f"{x}{i}", workflow_id=WorkflowId(f"x{i}")) for x in "ab")
        done = Completion(model=M, output_tokens=5, finished_s=float(i))
        stage.loop.learn(request, done, forecast=stage.loop.predict(request))
        stage.loop.predict(lost)
        stage.loop.failed(lost.request_id)
        stage.loop.close(request.workflow_id)

    assert stage.loop.figures.drift == {}


def test_a_grade_that_is_none_is_said_once_and_kept_from_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion = Scripted(Forecast(success={M: 0.9}, source="role"))
    stage = a_stage(tmp_path, champion)
    with caplog.at_level(logging.WARNING):
        for grade in (math.nan, 1.5, -1.0):
            serve_workflows(stage, 1, longer=1.0, grade=grade)
    stage.loop.end()

    assert len(caplog.messages) == 1
    assert "grade_refused found=nan" in caplog.messages[0]
    assert champion.grades == [None] * 3
    assert [label.workflow_success for label in stage.store.latest(9)] == [None]


def test_an_installed_challenger_knows_what_was_learnt_of_success(tmp_path: Path) -> None:
    store = a_store(tmp_path / "s", success=a_success_head().arrays())
    old, heir = (Noting(load_predictor(store)) for _ in range(2))
    heir.inherit(old)

    assert isinstance(old.inner, LearnedPredictor)
    assert isinstance(heir.inner, LearnedPredictor)
    assert heir.inner.judge is old.inner.judge is not None
    Noting(Scripted()).inherit(old)


# Names.


def test_labels_of_metrics_are_those_of_the_parts() -> None:
    assert tuple(change.value for change in Change) == figures.KINDS
    assert set(figures.DRIFTING) > TRAINED
    assert set(figures.VERDICTS) == {v.value for v in Verdict} - {"undecided"}
    assert set(SOURCES) == {"none", "model", *STEPS, "other"}
    assert SOURCES[-1] == "other"


# In the gateway.


def test_a_gateway_keeps_labels_of_what_it_served(tmp_path: Path) -> None:
    path = tmp_path / "labels.sqlite"
    loop = LearningLoop(
        Scripted(), clock=lambda: 0.0, store=FeedbackStore(path), run="x", can_train=lambda: False
    )

    async def main() -> None:
        async with over_engines(predictor=loop) as (rig, _):
            replies = await asyncio.gather(*(rig.call({"max_tokens": 5}) for _ in range(6)))
            assert [reply.status for reply in replies] == [200] * 6
            assert (await rig.call({"model": "nobody"})).status == 404
            await rig.idle()
            assert await rig.metric('concertmaster_forecasts_total{source="role"}') == 7
            name = 'concertmaster_labels_total{outcome="labels"}'
            await until(lambda: loop.figures.labels["labels"] == 6, "flushed")
            assert await rig.metric(name) == 6
            loop._next_round_s = math.inf  # what comes now is written at the end alone
            assert (await rig.call({"max_tokens": 5})).status == 200

    play(main())
    labels = FeedbackStore(path).latest(10)
    assert len(labels) == 7
    assert {label.gpu for label in labels} != {""}


def test_labels_that_were_not_flushed_yet_are_written_at_the_end(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    stage.serve(3, ticks=False)
    assert stage.store.latest(10) == []
    stage.loop.end()

    assert len(stage.store.latest(10)) == 3


def test_a_turn_that_raises_does_not_end_the_turns(tmp_path: Path) -> None:
    stage = a_stage(tmp_path)
    turns: list[float] = []

    def broken(now_s: float) -> float:
        turns.append(now_s)
        raise RuntimeError("broken")

    stage.loop.tick = broken  # type: ignore[method-assign]

    async def main() -> None:
        async with over_engines(predictor=stage.loop, may_log=True) as (rig, _):
            assert (await rig.call({"max_tokens": 2})).status == 200
            await until(lambda: len(turns) >= 2, "a second turn")

    play(main())


def test_serving_without_feedback_learns_all_the_same(tmp_path: Path) -> None:
    settings = GatewaySection(models="recent")
    loop = forecaster.serving_predictor(settings, a_fleet())
    assert isinstance(loop, LearningLoop)
    loop.end()
    kept = GatewaySection(models="recent", feedback=str(tmp_path / "f" / "labels.sqlite"))
    with_file = forecaster.serving_predictor(kept, a_fleet())
    assert isinstance(with_file, LearningLoop)
    with_file.learn(a_request("a"), Completion(model=M, output_tokens=3))
    with_file.end()
    assert (tmp_path / "f" / "labels.sqlite").exists()
