import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import a_call, a_plan
from concertmaster.core.errors import InputError
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, Request, WorkflowId
from concertmaster.learning import evaluate as module
from concertmaster.learning.baselines import Baselines, fit_baselines
from concertmaster.learning.datasets import (
    Question,
    Rows,
    key_of,
    read_questions,
    read_rows,
    refuse_overlap,
    seen_hashes,
)
from concertmaster.learning.evaluate import Calls, evaluate, figures_of, online_figures, served
from concertmaster.learning.evaluate_success import evaluate_success
from concertmaster.learning.rehearsal import remaining
from concertmaster.predictors.evidence import TARGETS
from concertmaster.predictors.heads import LEVELS
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.predictors.store import Store, read_store
from concertmaster.workload.plan import WorkflowPlan
from concertmaster.workload.split import held_out
from store_builders import BIG, SMALL, a_store, some_plans, some_questions

LEVEL_NAMES = {"0.5", "0.9", "0.95", "0.99"}


def quiet(what: str, share: float) -> None:
    assert what
    assert 0 <= share <= 1


class Told:
    """A predictor that is told what to say of each call, and writes down what it learns."""

    reads_prompts = True

    def __init__(self, say: Callable[[Request], dict[str, Quantiles]]) -> None:
        self._say = say
        self.heard: list[str] = []

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        self.heard.append(f"predict {request.request_id}")
        return Forecast(**self._say(request), source="role")  # type: ignore[arg-type]

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast | None = None,
    ) -> None:
        self.heard.append(f"learn {request.request_id}")

    def close(self, workflow_id: WorkflowId, success: float | None = None) -> None:
        self.heard.append(f"close {workflow_id}")


def knowing(plans: list[WorkflowPlan], factor: float = 1.0) -> Told:
    """Say the truth of each call, times a factor."""
    truths = {plan.workflow_id: remaining(plan) for plan in plans}

    def say(request: Request) -> dict[str, Quantiles]:
        assert request.stage is not None
        truth = truths[request.workflow_id][request.stage]
        return {name: Quantiles.exactly(factor * value) for name, value in truth.items()}

    return Told(say)


def like(baselines: Baselines) -> Told:
    """Say what the baseline says."""

    def say(request: Request) -> dict[str, Quantiles]:
        rows = baselines.of(request.app, request.role)
        return {t: Quantiles(LEVELS, tuple(r)) for t, r in zip(TARGETS, rows.tolist(), strict=True)}

    return Told(say)


def calls_of(plans: list[WorkflowPlan], predictor: Told) -> Calls:
    return served(plans, predictor, Baselines(fit_baselines(plans)), quiet, "test")


@pytest.fixture(scope="module")
def plans() -> list[WorkflowPlan]:
    return some_plans(40) + some_plans(10, seed=1, app="search")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return read_store(a_store(tmp_path_factory.mktemp("store") / "s", some_plans(20, seed=7)))


# Figures.


def test_who_knows_the_truth_loses_nothing_and_orders_all(plans: list[WorkflowPlan]) -> None:
    figures = figures_of(calls_of(plans, knowing(plans)), seed=0)

    for target in TARGETS:
        one = figures[target]
        assert one["pinball"] == one["mae"] == 0
        assert one["pinball_skill"] == 1
        assert set(one["coverage"].values()) == {1.0}
        assert one["mean_over_apps"]["pinball_skill"] == 1
    assert figures["remaining_tokens"]["kendall_tau_distance"] == 0


def test_the_baseline_has_no_skill_against_itself(plans: list[WorkflowPlan]) -> None:
    baselines = Baselines(fit_baselines(plans))
    figures = figures_of(served(plans, like(baselines), baselines, quiet, "x"), seed=0)

    for target in TARGETS:
        one = figures[target]
        for group in (one, *one["by_app"].values(), *one["by_role"].values()):
            assert group["pinball_skill"] == pytest.approx(0, abs=1e-12)
            assert group["coverage"] == group["coverage_baseline"]
    order = figures["remaining_tokens"]
    assert order["kendall_tau_distance"] == order["kendall_tau_distance_baseline"] > 0


def test_who_says_too_much_covers_all_and_who_says_too_little_nothing(
    plans: list[WorkflowPlan],
) -> None:
    much = figures_of(calls_of(plans, knowing(plans, 2.0)), seed=0)["output_tokens"]
    little = figures_of(calls_of(plans, knowing(plans, 0.5)), seed=0)["output_tokens"]

    assert set(much["coverage"].values()) == {1.0}
    assert set(little["coverage"].values()) == {0.0}
    mean = np.mean([call.output_tokens for plan in plans for call in plan.calls])
    assert much["mae"] == pytest.approx(mean)
    assert little["mae"] == pytest.approx(mean / 2)


def test_figures_are_told_for_every_app_role_and_step(plans: list[WorkflowPlan]) -> None:
    one = figures_of(calls_of(plans, knowing(plans)), seed=0)["output_tokens"]

    assert set(one["by_app"]) == {"chat", "search"}
    roles = {f"{app}/{role}" for app in ("chat", "search") for role in ("planner", "coder")}
    assert set(one["by_role"]) == roles
    assert set(one["by_step"]) == {"role"}
    for groups in (one["by_app"], one["by_role"], one["by_step"]):
        assert sum(group["rows"] for group in groups.values()) == one["rows"]
    assert one["rows"] == sum(len(plan.calls) for plan in plans)
    assert one["mean_over_apps"]["groups"] == 2


def test_the_mean_over_apps_weighs_apps_alike() -> None:
    plans = some_plans(60) + some_plans(4, seed=1, app="search")
    baselines = Baselines(fit_baselines(plans))

    def say(request: Request) -> dict[str, Quantiles]:
        right = remaining(next(p for p in plans if p.workflow_id == request.workflow_id))
        assert request.stage is not None
        if request.app == "search":
            truth = right[request.stage]
            return {name: Quantiles.exactly(value) for name, value in truth.items()}
        rows = baselines.of(request.app, request.role).tolist()
        return {t: Quantiles(LEVELS, tuple(r)) for t, r in zip(TARGETS, rows, strict=True)}

    one = figures_of(served(plans, Told(say), baselines, quiet, "x"), seed=0)["output_tokens"]

    assert one["mean_over_apps"]["pinball_skill"] == pytest.approx(0.5)
    assert one["pinball_skill"] < 0.3


def test_coverage_of_large_groups_is_held_against_what_was_stated() -> None:
    plans = some_plans(700)
    baselines = Baselines(fit_baselines(plans))
    fair = figures_of(served(plans, like(baselines), baselines, quiet, "x"), seed=0)
    much = figures_of(calls_of(plans, knowing(plans, 2.0)), seed=0)

    assert fair["output_tokens"]["coverage_flags"]["groups"] == 2
    assert fair["remaining_tokens"]["coverage_flags"]["off"] == []
    flags = much["output_tokens"]["coverage_flags"]
    assert {(one["group"], one["level"]) for one in flags["off"]} == {
        (f"chat/{role}", level) for role in ("planner", "coder") for level in ("0.5", "0.9", "0.95")
    }


def test_small_groups_are_not_judged(plans: list[WorkflowPlan]) -> None:
    one = figures_of(calls_of(plans, knowing(plans, 2.0)), seed=0)["output_tokens"]

    assert one["coverage_flags"]["groups"] == 0
    assert one["coverage_flags"]["off"] == []
    assert {group["coverage_off"] for group in one["by_role"].values()} == {None}


def test_tool_time_counts_only_where_it_was_recorded() -> None:
    timed = a_plan("t", a_call(0), a_call(1, tool_s=5.0), app="timed")
    short = a_plan("s", a_call(0), app="timed")
    untimed = a_plan("u", a_call(0), a_call(1), app="untimed")
    plans = [timed, short, untimed]

    figures = figures_of(calls_of(plans, knowing(plans)), seed=0)
    none = figures_of(calls_of([untimed], knowing([untimed])), seed=0)

    assert figures["remaining_tool_s"]["rows"] == 3
    assert set(figures["remaining_tool_s"]["by_app"]) == {"timed"}
    assert none["remaining_tool_s"] is None


def test_the_output_is_held_against_what_was_said_of_the_model_that_answered() -> None:
    plan = a_plan("w", a_call(0, output_tokens=40, model=ModelName("m")))

    class OnModel(Told):
        def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
            other = {name: Quantiles.exactly(1.0) for name in TARGETS}
            on = {ModelName("m"): Quantiles.exactly(40.0)}
            return Forecast(**other, output_tokens_on=on)  # type: ignore[arg-type]

    one = figures_of(calls_of([plan], OnModel(lambda _: {})), seed=0)["output_tokens"]

    assert one["mae"] == 0


def test_pairs_are_the_same_under_the_same_seed(plans: list[WorkflowPlan]) -> None:
    baselines = Baselines(fit_baselines(plans))
    calls = served(plans, like(baselines), baselines, quiet, "x")

    distances = [
        figures_of(calls, seed=seed)["remaining_tokens"]["kendall_tau_distance"]
        for seed in (0, 0, 1)
    ]

    assert distances[0] == distances[1] != distances[2]


# Order of serving.


def test_a_call_is_forecast_before_it_is_learnt_and_after_what_it_waited_for() -> None:
    plan = a_plan("w", a_call(0), a_call(1), a_call(2, parents=(0,)), a_call(3, parents=(1, 2)))
    predictor = knowing([plan])

    calls_of([plan], predictor)

    heard = predictor.heard
    for call in plan.calls:
        assert heard.index(f"predict w/{call.stage}") < heard.index(f"learn w/{call.stage}")
        for parent in call.parents:
            assert heard.index(f"learn w/{parent}") < heard.index(f"predict w/{call.stage}")
    assert heard[-1] == "close w"


def test_online_coverage_is_told_of_the_first_labels_and_after(
    plans: list[WorkflowPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_LABELS", 30)
    calls = calls_of(plans, knowing(plans, 2.0))

    one = online_figures(calls, seed=0)["output_tokens"]

    assert one["first_labels"]["rows"] == 30
    assert one["after"]["rows"] == one["rows"] - 30
    assert one["first_labels"]["coverage"]["0.9"] == 1.0
    assert one["by_app"]["chat"]["first_labels"]["rows"] == 30
    few = one["by_app"]["search"]
    assert few["first_labels"]["rows"] + (few["after"] or {"rows": 0})["rows"] == few["rows"]


def test_nothing_after_the_first_labels_is_nothing(plans: list[WorkflowPlan]) -> None:
    one = online_figures(calls_of(plans, knowing(plans)), seed=0)["output_tokens"]

    assert one["after"] is None


# A whole store.


def test_a_report_has_the_keys_of_the_contract(store: Store) -> None:
    rows = Rows(some_plans(12, seed=3), some_questions(30))

    report = evaluate(store, rows, progress=quiet)

    for target in ("output_tokens", "remaining_tokens", "remaining_calls"):
        assert {"pinball", "pinball_skill", "mae", "coverage"} <= set(report[target])
        assert set(report[target]["coverage"]) == LEVEL_NAMES
    assert {"auc", "map", "brier", "ece", "per_model"} <= set(report["success"])
    assert set(report["success"]["per_model"]) == {BIG, SMALL}
    assert (report["workflows"], report["questions"]) == (12, 30)
    assert report["online"] is None


def keys_of(report: Any) -> Iterator[str]:  # noqa: ANN401  # any part of a report
    """Keys at any depth, but for names of groups and levels."""
    if isinstance(report, list):
        for one in report:
            yield from keys_of(one)
    elif isinstance(report, dict):
        for key, value in report.items():
            yield key
            named = key.startswith(("by_", "per_", "coverage", "pinball_by", "skill_by"))
            parts = value.values() if named and key != "coverage_flags" and value else [value]
            for part in parts:
                yield from keys_of(part)


def test_every_key_of_a_report_is_defined(store: Store) -> None:
    rows = Rows(some_plans(60, seed=3), some_questions(120))
    report = evaluate(store, rows, online=True, progress=quiet)
    page = (Path(__file__).parents[1] / "docs/forecasts.md").read_text()
    fields = page.partition("### Fields")[2].partition("## Measured")[0]

    assert set(keys_of(report)) <= set(re.findall(r"`(\w+)`", fields))


def test_the_same_seed_gives_the_same_report(store: Store) -> None:
    rows = Rows(some_plans(12, seed=3), some_questions(30))
    first = evaluate(store, rows, online=True, seed=4, progress=quiet)

    assert evaluate(store, rows, online=True, seed=4, progress=quiet) == first


def test_frozen_figures_do_not_depend_on_the_order_of_workflows(store: Store) -> None:
    plans = some_plans(12, seed=3)
    one = evaluate(store, Rows(plans, []), progress=quiet)
    other = evaluate(store, Rows(plans[::-1], []), progress=quiet)

    assert other["output_tokens"]["pinball"] == pytest.approx(one["output_tokens"]["pinball"])
    assert other["remaining_tokens"]["mae"] == pytest.approx(one["remaining_tokens"]["mae"])


def test_online_it_learns_and_frozen_it_does_not(store: Store) -> None:
    plans = [
        a_plan(f"n{i}", a_call(0, output_tokens=2000, max_output_tokens=4096), app="new")
        for i in range(60)
    ]

    report = evaluate(store, Rows(plans, []), online=True, progress=quiet)

    assert report["online"]["output_tokens"]["mae"] < report["output_tokens"]["mae"] / 4


def test_what_is_not_measured_is_nothing(store: Store) -> None:
    lengths = evaluate(store, Rows(some_plans(2, seed=3), []), progress=quiet)
    success = evaluate(store, Rows([], some_questions(30)), progress=quiet)

    assert lengths["success"] is None
    assert [success[target] for target in TARGETS] == [None] * 4


def test_nothing_to_measure_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="expected something to measure on, found nothing"):
        evaluate(store, Rows([], []), progress=quiet)


def test_questions_need_a_success_head(tmp_path: Path) -> None:
    store = read_store(a_store(tmp_path / "s", success=None, encoder=None))

    with pytest.raises(InputError, match="expected a success head to measure on questions"):
        evaluate(store, Rows([], some_questions(3)), progress=quiet)


def test_skill_needs_baselines(tmp_path: Path) -> None:
    store = read_store(a_store(tmp_path / "s", baselines=None))

    with pytest.raises(InputError, match="expected the part baselines"):
        evaluate(store, Rows(some_plans(2), []), progress=quiet)


# Success.


def oracle(questions: list[Question]) -> Callable[[str, Any], dict[ModelName, float]]:
    truth = {one.labelled.text: one.labelled.correct for one in questions}
    return lambda text, models: {model: 0.01 + 0.98 * truth[text][model] for model in models}


def test_an_oracle_ranks_all_and_recovers_the_whole_gap() -> None:
    questions = some_questions(200)

    found = evaluate_success(questions, oracle(questions), quiet)

    assert found["auc"] == found["map"] == found["auc_pooled"] == 1
    assert found["brier"] == pytest.approx(0.0001)
    assert found["gap_recovered"]["ratio"] == pytest.approx(1.0)
    (pair,) = found["gap_recovered"]["table"]
    assert (pair["small"], pair["big"], pair["questions"]) == (SMALL, BIG, 200)


def test_who_says_the_same_of_all_questions_ranks_nothing() -> None:
    found = evaluate_success(
        some_questions(200), lambda _, models: dict.fromkeys(models, 0.5), quiet
    )

    assert found["auc"] == 0.5
    assert found["by_source"]["sums"]["auc"] == 0.5
    assert found["per_model"][BIG]["auc"] == 0.5
    assert found["brier"] == pytest.approx(0.25)


def test_a_model_that_is_not_forecast_is_counted_not_scored() -> None:
    questions = some_questions(20)

    found = evaluate_success(questions, lambda *_: {BIG: 0.7}, quiet)

    assert found["not_forecast"] == 20
    assert set(found["per_model"]) == {BIG}


def test_nothing_forecast_is_no_figure() -> None:
    found = evaluate_success(some_questions(3), lambda *_: {}, quiet)

    assert (found["auc"], found["brier"], found["ece"]) == (None, None, None)
    assert (found["reliability"], found["gap_recovered"]["ratio"]) == ([], None)


def test_pairs_of_few_common_questions_are_left_out() -> None:
    questions = some_questions(99)

    assert evaluate_success(questions, oracle(questions), quiet)["gap_recovered"]["pairs"] == 0


# Groups.


def test_a_fifth_of_the_groups_is_held_out() -> None:
    share = sum(held_out(f"group {i}") for i in range(5000)) / 5000

    assert share == pytest.approx(0.2, abs=0.02)


def test_runs_of_one_task_are_never_parted() -> None:
    rows = Rows(some_plans(100), some_questions(100))
    kept, held = rows.keep(held_out_ones=False), rows.keep(held_out_ones=True)

    assert kept.keys.isdisjoint(held.keys)
    assert kept.keys | held.keys == rows.keys
    assert len(kept.plans) + len(held.plans) == 100
    assert held.plans
    assert held.questions


def test_a_workflow_without_task_is_its_own_group() -> None:
    assert key_of(a_plan("w7")) == "w7"
    assert key_of(a_plan("w7", task="t")) == "t"


def test_the_same_workload_twice_stays_in_the_same_groups() -> None:
    rows = read_rows(["sample", "sample"], [], seed=0)
    once = read_rows(["sample"], [], seed=0)

    assert len(rows.plans) == 2 * len(once.plans)
    assert rows.keys == once.keys


def overlap(trained: Rows, measured: Rows) -> None:
    seen = seen_hashes(trained.plans, trained.questions)
    refuse_overlap(seen, measured.plans, measured.questions, where="store", remedy="go away")


def test_other_data_is_no_overlap() -> None:
    overlap(
        Rows(some_plans(9), some_questions(9)),
        Rows(some_plans(9, seed=1), some_questions(9, seed=1)),
    )


def test_a_task_that_was_trained_on_is_an_overlap_even_in_another_run() -> None:
    trained = Rows([a_plan("w1", task="t")], [])

    with pytest.raises(InputError) as caught:
        overlap(trained, Rows([a_plan("w2", task="t"), a_plan("w3", task="u")], []))

    assert str(caught.value) == (
        'store: it was trained on 1 task of these, for example workflow "w2" (go away)'
    )


def test_a_workflow_that_was_trained_on_is_an_overlap_even_under_another_task() -> None:
    with pytest.raises(InputError, match="it was trained on 1 workflow of these"):
        overlap(Rows([a_plan("w", task="t")], []), Rows([a_plan("w", task="u")], []))


def test_a_copy_of_a_question_is_an_overlap() -> None:
    (question,) = some_questions(1)
    copy = question._replace(question_id="another")

    with pytest.raises(InputError, match='1 question of these, for example question "another"'):
        overlap(Rows([], [question]), Rows([], [copy]))


def test_hashes_are_six_bytes_and_sorted() -> None:
    seen = seen_hashes(some_plans(50), some_questions(50))

    assert (np.diff(seen.astype(np.int64)) > 0).all()
    assert int(seen.max()) < 1 << 48


# Routing sets.

Columns = dict[str, list[Any]]


@pytest.fixture
def routing(tmp_path: Path) -> Callable[..., Path]:
    pytest.importorskip("pyarrow", reason="routing sets are Parquet: needs the extra data")
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    def write(questions: Columns, outcomes: Columns) -> Path:
        pq.write_table(pa.table(questions), tmp_path / "routing_questions.parquet")
        pq.write_table(pa.table(outcomes), tmp_path / "routing_outcomes.parquet")
        return tmp_path

    return write


QUESTIONS: Columns = {
    "question_id": ["a", "b", "c"],
    "source": ["sums", "sums", "web"],
    "question": ["1+1?", "2+2?", "find it"],
    "dup_group": ["g", None, "h"],
}
OUTCOMES: Columns = {
    "question_id": ["a", "a", "b", "c", "a"],
    "source": ["sums", "sums", "sums", "web", "sums"],
    "model": ["m", "n", "m", "m", "m"],
    "harness": ["plain", "plain", "plain", "agent:react", "shots"],
    "correct": [1.0, 0.0, None, 1.0, 0.0],
    "output_tokens": [5, None, 7, 9, None],
}


def test_single_answers_of_one_harness_a_source_are_read(routing: Callable[..., Path]) -> None:
    questions, notes = read_questions(routing(QUESTIONS, OUTCOMES))

    (one,) = questions
    assert (one.question_id, one.key, one.source) == ("a", "g", "sums")
    assert one.labelled.correct == {"m": 1.0, "n": 0.0}
    assert one.labelled.group == "g"
    assert any('answers of "plain" used, not of shots' in note for note in notes)
    assert any("2 questions without a single answer left out" in note for note in notes)


def test_a_question_without_copies_is_its_own_group(routing: Callable[..., Path]) -> None:
    graded = {**OUTCOMES, "correct": [1.0, 0.0, 0.5, 1.0, 0.0]}

    questions, _ = read_questions(routing(QUESTIONS, graded))

    assert [one.key for one in questions] == ["g", "b"]


@pytest.mark.parametrize(
    ("questions", "outcomes", "problem"),
    [
        (
            QUESTIONS,
            {**OUTCOMES, "correct": [1.0, float("nan"), 0.0, 1.0, 0.0]},
            "row 1, correct: expected a number in 0…1 or nothing, found nan",
        ),
        (
            QUESTIONS,
            {**OUTCOMES, "correct": [1.0, 2.0, 0.0, 1.0, 0.0]},
            "row 1, correct: expected a number in 0…1 or nothing, found 2.0",
        ),
        (
            QUESTIONS,
            {**OUTCOMES, "harness": ["agent:x"] * 5},
            "expected questions with single answers, found none",
        ),
        (
            {key: QUESTIONS[key] for key in ("question_id", "source")},
            OUTCOMES,
            "columns: expected columns question in a table of questions",
        ),
        (
            QUESTIONS,
            {key: OUTCOMES[key] for key in ("question_id", "source", "model", "harness")},
            "columns: expected columns correct in a table of outcomes",
        ),
        ({key: [] for key in QUESTIONS}, OUTCOMES, "expected at least one row, found none"),
    ],
)
def test_tables_that_are_wrong_are_refused(
    routing: Callable[..., Path], questions: Columns, outcomes: Columns, problem: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_questions(routing(questions, outcomes))

    assert problem in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a workload file, found nothing there"):
        read_questions(tmp_path / "nowhere")


def test_something_must_be_named() -> None:
    with pytest.raises(InputError, match="expected a workload or a routing set, found neither"):
        read_rows([], [], seed=0)


def test_shuffling_needs_no_global_randomness(store: Store) -> None:
    state = random.getstate()
    evaluate(store, Rows(some_plans(3, seed=3), []), online=True, progress=quiet)

    assert random.getstate() == state
