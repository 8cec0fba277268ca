"""The recipe chimera and its rivals: which model serves a workflow, and for how long."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CheckedScheduler,
    StubView,
    a_fleet,
    a_forecast,
    a_policy,
    a_pool,
    a_replica,
    a_request,
    a_view,
    a_waiting_call,
    a_workflow,
    placements,
)
from concertmaster.core.errors import InputError
from concertmaster.core.events import RequestFinished
from concertmaster.core.fleet import InFlight, Pool, Readiness
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.policy import Router, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.core.workflow import Owed, Workflow
from concertmaster.policies.catalog import policy
from concertmaster.policies.ordering import Fcfs, LeastAttained, ShortestRemaining
from concertmaster.policies.recipes.chimera import GoodEnough, finish_s, queued_s
from concertmaster.policies.routers import Cascade, RandomModel, Sticky, SurestPools, sent_back
from concertmaster.policies.scorers import WeightedRequests

S, L, XL = ModelName("s"), ModelName("l"), ModelName("xl")


def a_model(name: str, *, slowness: float, gigabytes: int) -> Pool:
    pool = a_pool(name, model=name, slowness=slowness)
    return replace(pool, model=replace(pool.model, weights_bytes=gigabytes * 10**9))


SMALL = a_model("s", slowness=1.0, gigabytes=3)
LARGE = a_model("l", slowness=3.0, gigabytes=15)
LARGEST = a_model("xl", slowness=5.0, gigabytes=65)
FLEET = (LARGE, SMALL, LARGEST)


def asking(
    success: Mapping[ModelName, float] | None = None,
    *,
    tokens: float = 100,
    role: str = "",
    workflow: Workflow | None = None,
    owed_tokens: int = 0,
    prompt_tokens: int = 100,
) -> Waiting:
    forecast = Forecast(
        output_tokens=Quantiles.exactly(tokens),
        remaining_tokens=Quantiles.exactly(tokens),
        success=success or {},
    )
    request = a_request(role=role, max_output_tokens=4000, prompt_tokens=prompt_tokens)
    workflow = workflow or a_workflow()
    return a_waiting_call(
        request=request, forecast=forecast, workflow=workflow, owed_tokens=owed_tokens
    )


def routed(
    router: Router,
    call: Waiting,
    pools: Sequence[Pool] = FLEET,
    view: View | None = None,
    seed: int = 1,
) -> str:
    return " ".join(router.route(call, pools, view or a_view(), random.Random(seed)))


def sent_back_to(model: ModelName) -> Workflow:
    """A workflow in which a coder's work on this model was judged by a tester."""
    workflow = a_workflow(model=model)
    workflow.note_role("coder")
    workflow.note_role("tester")
    return workflow


# Seconds to the end of a workflow.


def test_on_an_idle_model_a_workflow_takes_its_own_prefill_and_decode() -> None:
    curve = SMALL.curve
    found = finish_s(asking(tokens=100), [SMALL], a_view())

    assert found == pytest.approx(curve.prefill_s(100) + 100 * curve.step_s(1, 150))


def test_live_workflows_make_the_batch_that_a_workflow_decodes_in() -> None:
    view = a_view(live={"s": Owed(workflows=12, tokens=9000)}, replicas={"s": 2})
    found = finish_s(asking(tokens=100), [SMALL], view)

    step_s = SMALL.curve.step_s(7, 7 * 150)
    assert found == pytest.approx(SMALL.curve.prefill_s(100) + 100 * step_s)


def test_workflows_ahead_are_served_by_all_replicas_in_whole_batches() -> None:
    live = {"s": Owed(workflows=12, tokens=9000)}
    view = a_view(live=live, replicas={"s": 2}, full=("s",), waiting={"s": 7000})
    open_view = replace(view, full=())

    waits_s = finish_s(asking(), [SMALL], view) - finish_s(asking(), [SMALL], open_view)

    assert waits_s == pytest.approx(7000 * SMALL.curve.step_s(7, 7 * 150) / (7 * 2))


def test_a_model_that_sleeps_is_as_far_away_as_it_takes_to_wake() -> None:
    asleep, awake = a_view(wake_s={"s": 20.0}, replicas={"s": 0}), a_view()

    gap_s = finish_s(asking(), [SMALL], asleep) - finish_s(asking(), [SMALL], awake)

    assert gap_s == pytest.approx(20.0)


def test_what_the_engines_hold_of_the_prompt_is_not_prefilled_again() -> None:
    here = asking(workflow=a_workflow(model=S, context_tokens=90))
    there = asking(workflow=a_workflow(model=L, context_tokens=90))

    saved_s = finish_s(there, [SMALL], a_view()) - finish_s(here, [SMALL], a_view())

    assert saved_s == pytest.approx(SMALL.curve.prefill_s(100) - SMALL.curve.prefill_s(10))


def test_a_model_is_done_when_its_fastest_pool_is() -> None:
    other = a_pool("s2", model="s", slowness=9.0)

    both_s = finish_s(asking(), [other, SMALL], a_view(full=("s2",), waiting={"s2": 9999}))

    assert both_s == finish_s(asking(), [SMALL], a_view(replicas={"s": 2}))


def test_the_published_load_is_what_open_calls_need_and_nothing_of_the_call_itself() -> None:
    open_calls = [asking(owed_tokens=tokens) for tokens in (300, 500)]
    view = a_view(open={"s": open_calls}, replicas={"s": 2})

    token_s = SMALL.curve.step_s(256, 0) / 256
    assert queued_s(asking(tokens=4000), [SMALL], view) == pytest.approx(800 * token_s / 2)
    assert queued_s(asking(tokens=4000), [SMALL], a_view()) == 0.0


# The choice.


@pytest.mark.parametrize(
    ("tau", "tau_s", "chosen"),
    [
        (0.1, 0.5, S),  # 10 s against at most 11 s
        (0.2, 0.5, L),  # 12 s is within a fifth more
        (0.2, 2.1, L),
        (0.0, 2.0, L),  # in seconds
        (0.0, 1.9, S),
        (1.0, 0.0, XL),
    ],
)
def test_the_surest_model_within_the_slack_is_chosen(
    tau: float, tau_s: float, chosen: ModelName
) -> None:
    loads_s, success = {S: 10.0, L: 12.0, XL: 20.0}, {S: 0.3, L: 0.6, XL: 0.9}

    assert GoodEnough(rule="slack", tau=tau, tau_s=tau_s).pick(loads_s, success) == chosen


@pytest.mark.parametrize(("gain", "chosen"), [(0.1, L), (0.19, L), (0.21, S)])
def test_a_model_must_beat_the_fastest_by_the_least_gain(gain: float, chosen: ModelName) -> None:
    rule = GoodEnough(rule="slack", tau=1.0, min_gain=gain)

    assert rule.pick({S: 1.0, L: 1.5}, {S: 0.5, L: 0.7}) == chosen


def test_ties_go_to_the_faster_model_and_then_to_the_first_of_the_fleet() -> None:
    rule = GoodEnough(rule="slack", tau=1.0)

    assert rule.pick({S: 1.0, XL: 1.6, L: 1.5}, {S: 0.1, L: 0.7, XL: 0.7}) == L
    assert rule.pick({XL: 1.0, L: 1.0}, {L: 0.7, XL: 0.7}) == XL
    assert rule.pick({S: 1.0, XL: 1.5, L: 1.5}, {S: 0.1, L: 0.7, XL: 0.7}) == XL
    assert GoodEnough(rule="slack", min_gain=0.0).pick({S: 1.0, L: 1.01}, {S: 0.7, L: 0.7}) == S


def test_models_that_will_never_be_ready_are_still_told_apart_by_success() -> None:
    never_s = float("inf")

    assert GoodEnough(rule="slack", tau=0.0).pick({S: never_s, L: never_s}, {S: 0.1, L: 0.7}) == L
    assert GoodEnough(rule="slack").pick({S: never_s, L: 9.0}, {S: 0.9, L: 0.1}) == L


loads = st.dictionaries(st.sampled_from((S, L, XL)), st.floats(0.0, 1e4), min_size=1)


@given(loads, st.fixed_dictionaries({m: st.floats(0.0, 1.0) for m in (S, L, XL)}), st.floats(0, 2))
def test_the_chosen_model_is_never_less_sure_than_the_fastest_nor_later_than_the_slack(
    loads_s: dict[ModelName, float], success: dict[ModelName, float], tau: float
) -> None:
    chosen = GoodEnough(rule="slack", tau=tau).pick(loads_s, success)

    least_s = min(loads_s.values())
    assert loads_s[chosen] <= max((1 + tau) * least_s, least_s + GoodEnough(rule="slack").tau_s)
    assert success[chosen] >= min(success[m] for m in loads_s if loads_s[m] == least_s)


@pytest.mark.parametrize(
    ("worth_s", "chosen"),
    [(0.0, S), (39.0, S), (41.0, L), (99.0, L), (101.0, XL)],
)
def test_a_model_is_granted_time_by_what_it_gains(worth_s: float, chosen: ModelName) -> None:
    loads_s, success = {S: 10.0, L: 14.0, XL: 44.0}, {S: 0.3, L: 0.4, XL: 0.7}

    assert GoodEnough(worth_s=worth_s).pick(loads_s, success) == chosen


def test_at_the_same_gain_short_workflows_go_to_the_slow_model_and_long_ones_do_not() -> None:
    """A share of the fastest's time does the opposite where only the slow model has a line."""
    success, line_s = {S: 0.3, L: 0.5}, 3.0
    short = {S: 2.0, L: 2 * 2.0 + line_s}
    long = {S: 30.0, L: 2 * 30.0 + line_s}
    earned, slack = GoodEnough(worth_s=40.0), GoodEnough(rule="slack", tau=1.2, tau_s=0.0)

    assert [earned.pick(loads_s, success) for loads_s in (short, long)] == [L, S]
    assert [slack.pick(loads_s, success) for loads_s in (short, long)] == [S, L]


@given(
    loads,
    st.fixed_dictionaries({m: st.floats(0.0, 1.0) for m in (S, L, XL)}),
    st.floats(0, 500),
)
def test_no_model_takes_longer_than_it_has_earned(
    loads_s: dict[ModelName, float], success: dict[ModelName, float], worth_s: float
) -> None:
    chosen = GoodEnough(worth_s=worth_s).pick(loads_s, success)

    fastest = min(loads_s, key=lambda m: loads_s[m])
    gain = success[chosen] - success[fastest]
    assert gain >= 0
    assert loads_s[chosen] <= loads_s[fastest] + worth_s * gain


def test_one_queued_call_shuts_a_model_out_under_the_published_rule_only() -> None:
    """The fastest model is idle, so its published load is zero, and so is any share of it."""
    call = asking({S: 0.2, L: 0.9}, tokens=10)
    view = a_view(
        open={"l": [asking(owed_tokens=10)]},
        live={"l": Owed(workflows=1, tokens=10)},
    )

    assert routed(GoodEnough(rule="paper", tau=9.0), call, view=view) == "s"
    assert routed(GoodEnough(rule="paper", tau=9.0), call) == "l"
    assert routed(GoodEnough(rule="slack"), call, view=view) == "l"


def test_the_published_load_can_be_had_without_the_published_rule_and_the_rule_without_it() -> None:
    """The call itself needs more time than a right answer is worth, and its load is open calls."""
    call = asking({S: 0.2, L: 0.9}, tokens=100_000)

    assert routed(GoodEnough(), call) == "s"
    assert routed(GoodEnough(load="open"), call) == "l"
    assert routed(GoodEnough(rule="paper"), call) == "l"
    assert routed(GoodEnough(rule="paper", load="owed"), call) == "s"


def test_leaving_a_model_costs_the_prefill_of_what_it_holds_unless_that_is_switched_off() -> None:
    success = {S: 0.5, L: 0.54}
    workflow = sent_back_to(S)
    workflow.context_tokens = 100_000
    call = asking(success, role="coder", workflow=workflow, tokens=1, prompt_tokens=100_000)
    twins = [SMALL, a_pool("l", model="l")]

    assert routed(GoodEnough(), call, twins) == "s"
    assert routed(GoodEnough(switch_cost=False), call, twins) == "l"


def test_without_a_forecast_of_success_the_fastest_model_is_taken() -> None:
    assert routed(GoodEnough(rule="slack", tau=9.0), asking()) == "s"
    busy = a_view(full=("s",), waiting={"s": 100_000})
    assert routed(GoodEnough(rule="slack", tau=9.0), asking(), view=busy) == "l"


def test_a_model_without_a_forecast_of_success_is_taken_for_its_speed_alone() -> None:
    assert routed(GoodEnough(rule="slack", tau=9.0), asking({S: 0.2, L: 0.5})) == "l"
    assert routed(GoodEnough(rule="slack", tau=9.0), asking({XL: 0.01, L: 0.015})) == "s"


@pytest.mark.parametrize("rule", ["slack", "paper"])
def test_a_fleet_of_one_model_has_no_choice(rule: str) -> None:
    pools = (SMALL, a_pool("s2", model="s"))

    for success in ({}, {S: 0.0}, {L: 1.0}):
        router = policy(f"chimera:rule={rule}").router
        assert routed(router, asking(success), pools) == "s s2"
        assert routed(router, asking(success, role="coder", workflow=sent_back_to(S)), pools) == (
            "s s2"
        )


# Keeping it.


def test_a_workflow_keeps_its_model_while_nobody_sends_its_work_back() -> None:
    surer = {S: 0.1, L: 0.9, XL: 0.95}
    workflow = a_workflow(model=S)
    for role in ("planner", "coder", "tester"):
        assert (
            routed(GoodEnough(rule="slack", tau=9.0), asking(surer, role=role, workflow=workflow))
            == "s"
        )
        workflow.note_role(role)

    assert (
        routed(GoodEnough(rule="slack", tau=9.0), asking(surer, role="coder", workflow=workflow))
        == "xl"
    )
    assert (
        routed(GoodEnough(rule="slack", tau=9.0, escalate=False), asking(surer, role="coder"))
        == "xl"
    )
    stays = GoodEnough(rule="slack", tau=9.0, escalate=False)
    assert routed(stays, asking(surer, role="coder", workflow=workflow)) == "s"


def test_work_is_sent_back_only_by_a_verifier_to_a_role_that_has_worked() -> None:
    def back(*roles: str) -> bool:
        workflow = a_workflow()
        for role in roles[:-1]:
            workflow.note_role(role)
        return sent_back(workflow, roles[-1])

    assert back("coder", "tester", "coder")
    assert back("planner", "solver", "verifier", "solver")
    assert not back("coder", "tester", "writer")
    assert not back("coder", "planner", "coder")
    assert not back("coder")
    assert not back("tester", "")
    assert not back("coder", "tester", "")


def test_escalation_goes_only_to_models_that_are_at_least_as_sure() -> None:
    """The fastest is out of the question, however fast it is."""
    success = {S: 0.2, L: 0.5, XL: 0.6}
    call = asking(success, role="coder", workflow=sent_back_to(L))

    assert routed(GoodEnough(rule="slack", tau=0.0, tau_s=0.0), call) == "l"
    assert routed(GoodEnough(rule="slack", tau=9.0), call) == "xl"
    crowded = a_view(full=("l", "xl"), waiting={"l": 10**6, "xl": 10**6})
    assert routed(GoodEnough(rule="slack"), call, view=crowded) in ("l", "xl")


@given(
    st.fixed_dictionaries({m: st.sampled_from((0.0, 0.2, 0.5, 0.9)) for m in (S, L, XL)}),
    st.sampled_from((S, L, XL)),
    st.fixed_dictionaries({m: st.integers(0, 10**5) for m in ("s", "l", "xl")}),
    st.sampled_from(("earned", "slack", "paper")),
)
def test_work_that_was_sent_back_never_goes_to_a_model_that_is_less_sure(
    success: dict[ModelName, float], at: ModelName, ahead: dict[str, int], rule: str
) -> None:
    call = asking(success, role="coder", workflow=sent_back_to(at))
    view = a_view(full=("s", "l", "xl"), waiting=ahead)

    chosen = ModelName(routed(policy(f"chimera:rule={rule},tau=1").router, call, view=view))

    assert success[chosen] >= success[at]


def test_work_that_was_sent_back_stays_if_nobody_knows_who_is_surer() -> None:
    call = asking(role="coder", workflow=sent_back_to(XL))

    assert routed(GoodEnough(rule="slack"), call) == "xl"


def test_a_workflow_leaves_a_model_that_cannot_hold_its_call() -> None:
    call = asking({S: 0.2, L: 0.9}, workflow=a_workflow(model=XL))

    assert routed(GoodEnough(rule="slack", tau=9.0), call, (SMALL, LARGE)) == "l"


# Rivals.


def test_a_cascade_goes_up_one_model_at_each_rejection_and_stays_there() -> None:
    workflow, found = a_workflow(), []
    for role in ("planner", "coder", *("tester", "coder") * 3):
        found.append(routed(Cascade(), asking(role=role, workflow=workflow)))
        workflow.note_role(role)
        workflow.model = ModelName(found[-1])

    assert found == ["s", "s", "s", "l", "l", "xl", "xl", "xl"]


def test_sticky_holds_the_first_choice_while_its_model_can_hold_the_call() -> None:
    router = Sticky(SurestPools())

    assert routed(router, asking({S: 0.1, L: 0.9})) == "l"
    assert routed(router, asking({S: 0.1, L: 0.9}, workflow=a_workflow(model=S))) == "s"
    gone = asking({S: 0.1, L: 0.9}, workflow=a_workflow(model=XL))
    assert routed(router, gone, (SMALL, LARGE)) == "l"
    twins = (a_pool("a", model="s"), LARGE, a_pool("b", model="s"))
    assert routed(router, asking(workflow=a_workflow(model=S)), twins) == "a b"


def test_a_random_model_is_drawn_by_its_replicas_in_service() -> None:
    view, rng = a_view(replicas={"s": 6, "l": 3, "xl": 0}), random.Random(7)
    draws = [RandomModel().route(asking(), FLEET, view, rng) for _ in range(5000)]

    counts = Counter(pool for (pool,) in draws)
    shares = [counts[SMALL.pool_id], counts[LARGE.pool_id], counts[LARGEST.pool_id]]
    assert [n / 5000 for n in shares] == pytest.approx([0.6, 0.3, 0.1], abs=0.025)
    again = random.Random(7)
    assert draws == [RandomModel().route(asking(), FLEET, view, again) for _ in range(5000)]


def test_vllm_counts_a_waiting_call_four_times() -> None:
    replica = a_replica()
    for i, streamed in enumerate((0, 0, 5)):
        call = InFlight(
            request=a_request(f"r{i}"),
            prefill_tokens=10,
            decode_tokens=9,
            expected_tokens=9,
            streamed_tokens=streamed,
        )
        replica.admit(0.0, call, 20)

    assert WeightedRequests().cost_s(0.0, asking(), replica) == 9.0
    assert WeightedRequests(request_s=0.5, waiting_weight=1).cost_s(0.0, asking(), replica) == 1.5
    assert [one.name for one in policy("vllm").scorers] == ["weighted_requests"]


# Through the scheduler.


def serve(scheduler: CheckedScheduler, roles: Sequence[str], forecast: Forecast) -> list[str]:
    """Pools of a workflow's calls, one after the other."""
    found = []
    for i, role in enumerate(roles):
        name = f"w/{i}"
        got = placements(
            scheduler.arrive(name, float(i), forecast, workflow_id=WorkflowId("w"), role=role)
        )
        found.append(got[name])
        scheduler.at(i + 0.5, RequestFinished(RequestId(name), 1, 5))
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chimera:tau=9", "s-0 s-0 s-0 l-0"),
        ("chimera:tau=9,escalate=no", "s-0 s-0 s-0 s-0"),
        ("cascade", "s-0 s-0 s-0 l-0"),
        ("quality-only", "l-0 l-0 l-0 l-0"),
    ],
)
def test_a_workflow_through_the_scheduler(name: str, expected: str) -> None:
    scheduler = CheckedScheduler(a_fleet(SMALL, LARGE), name)
    unsure = a_forecast(5, success={S: 0.5, L: 0.515 if "chimera" in name else 0.9})
    scheduler.arrive("w/9", 0.0, unsure, workflow_id=WorkflowId("w"), role="planner")
    scheduler.at(0.0, RequestFinished(RequestId("w/9"), 1, 5))
    sure = a_forecast(5, success={S: 0.2, L: 0.9})

    assert " ".join(serve(scheduler, ("coder", "coder", "tester", "coder"), sure)) == expected


def test_chimera_wakes_a_model_that_is_worth_the_wait() -> None:
    fleet = a_fleet(SMALL, LARGE, states={"l-0": Readiness.SLEEPING})
    scheduler = CheckedScheduler(fleet, "chimera:tau_s=5")

    actions = scheduler.arrive("a", 0.0, a_forecast(5, success={S: 0.2, L: 0.9}))

    assert [type(action).__name__ for action in actions] == ["Wake"]
    assert placements(scheduler.arrive("b", 0.1, a_forecast(5, success={S: 0.9, L: 0.9}))) == {
        "b": "s-0"
    }


# Settings.


def test_settings_reach_the_recipe() -> None:
    text = "tau=0.3,tau_s=2,min_gain=0.1,escalate=no,aging=0.5,rule=paper,order=las,knows=both"
    found = policy(f"chimera:{text}")

    assert found.name == f"chimera:{text}"
    assert found.router == GoodEnough(
        tau=0.3, tau_s=2.0, min_gain=0.1, escalate=False, rule="paper"
    )
    assert (found.aging, found.ordering) == (0.5, LeastAttained())
    assert found.clairvoyant == {"length", "success"}
    plain = policy("chimera")
    assert (plain.router, plain.aging, plain.ordering) == (
        GoodEnough(),
        0.1,
        ShortestRemaining(),
    )
    assert plain.clairvoyant == frozenset()
    assert policy("chimera:knows=length").clairvoyant == {"length"}
    assert policy("chimera:order=fcfs").ordering == Fcfs()


KNOWN = (
    "known: aging, escalate, knows, load, min_gain, order, rule, switch_cost, tau, tau_s, worth_s"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "chimera:tao=1",
            f'policy chimera: unknown setting "tao" (did you mean "tau"? {KNOWN})',
        ),
        ("chimera:=1", f'policy chimera: unknown setting "" ({KNOWN})'),
        ("chimera:tau", 'policy chimera: tau: expected a number, at least 0, found ""'),
        ("chimera:tau=-1", 'policy chimera: tau: expected a number, at least 0, found "-1"'),
        ("chimera:tau=nan", 'policy chimera: tau: expected a number, at least 0, found "nan"'),
        ("chimera:tau_s=inf", 'policy chimera: tau_s: expected a number, at least 0, found "inf"'),
        ("chimera:tau_s=1s", 'policy chimera: tau_s: expected a number, at least 0, found "1s"'),
        (
            "chimera:min_gain=2",
            'policy chimera: min_gain: expected a number, 0 to 1, found "2"',
        ),
        ("chimera:aging=0", 'policy chimera: aging: expected a number, at least 1e-06, found "0"'),
        ("chimera:escalate=1", 'policy chimera: escalate: expected yes or no, found "1"'),
        (
            "chimera:rule=old",
            'policy chimera: rule: expected earned or slack or paper, found "old"',
        ),
        (
            "chimera:order=sjf",
            'policy chimera: order: expected stjf or las or fcfs or oldest, found "sjf"',
        ),
        (
            "chimera:knows=all",
            'policy chimera: knows: expected length or success or both, found "all"',
        ),
        ("chimera:tau=1,tau=2", "policy chimera: setting tau is named twice (name it once)"),
        ("cascade:tau=1", 'policy cascade: unknown setting "tau" (known: none)'),
        ("fcfs:tau=1", "policy fcfs:tau=1: fcfs takes no settings (write fcfs)"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_expected_and_found(name: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        policy(name)

    assert str(refusal.value) == message


def test_the_stub_of_a_view_is_one() -> None:
    view: View = StubView()
    assert view.ready_s(SMALL) == 0.0
    assert a_policy("chimera").router == GoodEnough()
