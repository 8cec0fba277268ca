"""Nine applications on eleven models: their shares, their models, their promises."""

import json
from collections import Counter
from pathlib import Path

import pytest

from concertmaster.core.errors import InputError
from concertmaster.core.request import ModelName, ServiceClass
from concertmaster.physics.hardware import gpu
from concertmaster.physics.models import model_card
from concertmaster.physics.step_time import rate_curve
from concertmaster.workload.generated import generate
from concertmaster.workload.nine_apps import APPS, SPEEDS, STAGES, solo_s
from concertmaster.workload.plan import Call, WorkflowPlan
from concertmaster.workload.split import held_out

DOCS = Path(__file__).parents[1] / "docs" / "workloads.md"
FILE = Path(__file__).parents[1] / STAGES
BIG = ("qwen2.5-14b-instruct", "qwen3-30b-a3b-instruct-2507", "qwen2.5-32b-instruct")

with_stages = pytest.mark.skipif(not FILE.exists(), reason="the recorded workflows are absent")


def drawn(settings: str = "", *, seed: int = 1) -> list[WorkflowPlan]:
    return [*generate(f"nine-apps:stages={FILE},workflows=200,{settings}", seed=seed).plans]


def calls_of(plans: list[WorkflowPlan]) -> list[Call]:
    return [call for plan in plans for call in plan.calls]


def a_call(stage: int, *parents: int, model: str, tool_s: float = 0.0) -> Call:
    return Call(
        stage=stage,
        parents=parents,
        models=(ModelName(model),),
        prompt_tokens=1500,
        output_tokens=100,
        max_output_tokens=4096,
        tool_s=tool_s,
    )


# The table of applications.


def test_there_are_nine_applications_of_both_classes_on_eleven_models() -> None:
    asked = {name for app in APPS for name in (app.model, *app.models.values())}

    assert len(APPS) == len({app.app for app in APPS}) == 9
    assert {app.service_class for app in APPS} == {*ServiceClass}
    assert asked == {*SPEEDS}
    assert len(SPEEDS) == 11
    assert all(len({app.model, *app.models.values()}) <= 3 for app in APPS)


@pytest.mark.parametrize("name", SPEEDS)
def test_speeds_are_those_of_the_rate_curves(name: str) -> None:
    curve = rate_curve(model_card(name), gpu("a100-40g"), 2 if name in BIG else 1)

    assert SPEEDS[name].decode_s == pytest.approx(curve.step_s(1, 2000, 0), rel=0.03)
    prefill_per_s = 2048 / curve.step_s(0, 0, 2048)
    assert SPEEDS[name].prefill_tokens_per_s == pytest.approx(prefill_per_s, rel=0.03)


def test_a_workflow_alone_takes_its_longest_path() -> None:
    model = "qwen2.5-7b-instruct"
    one_s = solo_s([a_call(0, model=model)])
    forked = [
        a_call(0, model=model),
        a_call(1, 0, model=model),
        a_call(2, 0, model=model, tool_s=3.0),
        a_call(3, 1, 2, model=model),
    ]

    assert one_s == pytest.approx(0.1 + 100 * SPEEDS[model].decode_s)
    assert solo_s(forked) == pytest.approx(3 * one_s + 3.0)


# What is drawn.


@with_stages
def test_a_seed_fixes_what_is_drawn_and_names_are_of_the_seed() -> None:
    assert drawn() == drawn()
    first, other = ({plan.workflow_id for plan in drawn(seed=seed)} for seed in (1, 2))

    assert len(first) == 200
    assert not first & other


@with_stages
def test_applications_follow_zipf_and_few_models_get_most_calls() -> None:
    plans = drawn("zipf=1")
    apps = Counter(plan.app for plan in plans)
    models = Counter(call.models[0] for call in calls_of(plans))
    shares = [count / models.total() for _, count in models.most_common()]

    assert apps.most_common(1)[0][0] == APPS[0].app
    assert 0.25 < apps[APPS[0].app] / 200 < 0.45
    assert sum(shares[:3]) > 0.5
    assert len(models) >= 10


@with_stages
def test_parts_share_no_task() -> None:
    test, train = ({plan.task for plan in drawn(f"part={part}")} for part in ("test", "train"))

    assert test
    assert train
    assert not test & train
    assert all(map(held_out, test))


@with_stages
def test_deadlines_are_multiples_of_what_workflows_take_alone() -> None:
    for plan in drawn("interactive=4,batch=8,least_s=20"):
        times = 4 if plan.service_class is ServiceClass.INTERACTIVE else 8
        assert plan.deadline_s == pytest.approx(max(20.0, times * solo_s(plan.calls)))


@with_stages
def test_workflows_are_cut_and_calls_keep_their_parents() -> None:
    for plan in drawn("calls=7,prompt_tokens=300"):
        stages = {call.stage for call in plan.calls}
        assert 1 <= len(plan.calls) <= 7
        for call in plan.calls:
            assert call.prompt_tokens <= 300
            assert 256 * len(call.prefix_hashes) <= call.prompt_tokens
            assert {*call.parents} <= stages


@with_stages
@pytest.mark.parametrize("caps", ["guessed", "tight"])
def test_answers_fit_their_caps(caps: str) -> None:
    calls = calls_of(drawn(f"caps={caps}"))

    assert all(1 <= call.output_tokens <= call.max_output_tokens <= 4096 for call in calls)
    if caps == "tight":
        assert sum(call.max_output_tokens for call in calls) < 2000 * len(calls)


@with_stages
def test_a_workflow_drawn_again_shares_no_prefix() -> None:
    seen: Counter[int] = Counter()
    for plan in drawn():
        seen.update({one for call in plan.calls for one in call.prefix_hashes})

    assert max(seen.values()) == 1


# Errors and docs.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        generate(f"nine-apps:stages={tmp_path / 'none.parquet'}", seed=0)

    assert "none.parquet: expected a workload file, found nothing there" in str(caught.value)


def test_a_part_without_tasks_is_refused(tmp_path: Path) -> None:
    facts = {"stage_index": 0, "parents": [], "prompt_tokens": 9, "output_tokens": 3}
    rows = [facts | {"workflow_id": app.app, "app": app.app, "task_group": "a"} for app in APPS]
    path = tmp_path / "w.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    assert len(generate(f"nine-apps:stages={path},part=train", seed=0).plans) == 300
    with pytest.raises(InputError) as caught:
        generate(f"nine-apps:stages={path},part=test", seed=0)

    assert str(caught.value) == (
        f'{path}: intercode_sql: expected a task of part "test", found none among 1 workflows '
        "(part=all takes what there is)"
    )


def test_the_docs_name_every_application_and_model() -> None:
    text = DOCS.read_text()

    for app in APPS:
        assert f"| `{app.app}` | {app.service_class.value} |" in text
    assert all(f"`{name}`" in text for name in SPEEDS)
