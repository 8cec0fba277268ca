"""One contract for the whole catalog, then what each policy is known for."""

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CheckedScheduler,
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
from concertmaster.core.events import ReplicaDraining, RequestFinished, TokensStreamed
from concertmaster.core.fleet import InFlight, Pool, Replica, ReplicaId
from concertmaster.core.forecast import NO_FORECAST, Forecast, Quantiles
from concertmaster.core.policy import Policy, Scorer
from concertmaster.core.queue import Waiting
from concertmaster.core.request import ModelName, RequestId, WorkflowId
from concertmaster.policies.admission import BoundedLine
from concertmaster.policies.catalog import NAMES, ORDERINGS, policy
from concertmaster.policies.filters import FitsKvCache
from concertmaster.policies.ordering import (
    EarliestDeadline,
    FeedbackQueues,
    LeastAttained,
    ShortestJob,
    ShortestRemaining,
)
from concertmaster.policies.pickers import SHORTLIST, LeastCost, PowerOfTwo, shortlist
from concertmaster.policies.recipes.baselines import CACHED_TOKENS, PLACEMENTS, REQUESTS, TOKENS
from concertmaster.policies.routers import SurestPools

CATALOG = (
    *NAMES,
    "round-robin+las",
    "prefix-affinity+sjf",
    "random+edf",
    "power-of-two+mlfq",
    "random@arrival",
)
SCORERS: dict[str, Scorer] = {one.name: one for one in (*TOKENS, *CACHED_TOKENS, *REQUESTS)}
every_policy = pytest.mark.parametrize("name", CATALOG)
every_scorer = pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS.keys())

M, X = ModelName("m"), ModelName("x")


def load(
    replica: Replica, *prompts: int, answers: int = 100, prefix: tuple[int, ...] = ()
) -> Replica:
    for i, prompt_tokens in enumerate(prompts, start=len(replica.in_flight)):
        call = InFlight(
            request=a_request(
                f"{replica.replica_id}/{i}", prompt_tokens=prompt_tokens, prefix_hashes=prefix
            ),
            prefill_tokens=prompt_tokens,
            decode_tokens=answers,
            expected_tokens=answers,
        )
        replica.admit(0.0, call, prompt_tokens + answers)
    return replica


def costs_s(of: Policy, call: Waiting, replicas: Iterable[Replica]) -> list[float]:
    return [sum(of.costs_s(0.0, call, replica).values()) for replica in replicas]


# The contract.


@every_policy
def test_it_serves_everything_without_a_forecast(name: str) -> None:
    fleet = a_fleet(a_pool(max_sequences=2), a_pool("q", model="x", slowness=3.0), replicas=2)
    scheduler = CheckedScheduler(fleet, name)
    running: list[str] = []
    for i in range(30):
        running += placements(scheduler.arrive(f"r{i}", 0.1 * i))
    for i in range(1000):
        if not running:
            break
        done = running.pop(0)
        running += placements(scheduler.at(4.0 + i, RequestFinished(RequestId(done), 1, 50)))

    assert len(scheduler.core.line) == 0
    placed = [rid for _, _, actions in scheduler.history for rid in placements(actions)]
    assert sorted(placed) == sorted(f"r{i}" for i in range(30))


@every_policy
@given(seed=st.integers(0, 1000), first=st.integers(0, 4), count=st.integers(1, 4))
def test_it_never_picks_a_replica_that_was_not_offered(
    name: str, seed: int, first: int, count: int
) -> None:
    replicas = [a_replica(f"p-{i}") for i in range(8)]
    offered = replicas[first : first + count]
    chosen_policy, call = policy(name), a_waiting_call()

    def cost_s(replica: Replica) -> float:
        assert replica in offered
        return sum(chosen_policy.costs_s(0.0, call, replica).values())

    picks = [
        chosen_policy.picker.pick(call, offered, cost_s, random.Random(seed)) for _ in range(2)
    ]

    assert picks[0] in offered
    assert picks[0] is picks[1], "the same inputs gave another choice"


@every_policy
def test_it_avoids_a_replica_that_is_draining(name: str) -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=3), name)
    scheduler.at(0.0, ReplicaDraining(ReplicaId("p-1")))

    found = [placements(scheduler.arrive(f"r{i}", 0.2 * i)) for i in range(12)]

    assert {replica for one in found for replica in one.values()} == {"p-0", "p-2"}


@every_policy
def test_it_keeps_the_keys_of_an_ordering_that_does_not_drift(name: str) -> None:
    ordering, workflow = policy(name).ordering, a_workflow()
    forecast = a_forecast(30, remaining_tokens=Quantiles.exactly(80))

    def urgency_s() -> float:
        return ordering.urgency_s(a_request(deadline_s=9.0), forecast, workflow, a_pool())

    before_s = urgency_s()
    workflow.attained_s, workflow.output_tokens, workflow.calls = 50.0, 900, 7

    assert (urgency_s() > before_s) == ordering.drifts
    assert urgency_s() >= before_s


@every_policy
def test_it_ages_so_that_every_wait_is_finite(name: str) -> None:
    assert policy(name).aging > 0
    assert policy(name).name == name


@every_scorer
@given(prompts=st.lists(st.integers(1, 5000), max_size=6), answers=st.integers(1, 900))
def test_a_cost_is_not_negative_and_equal_for_equal_inputs(
    scorer: Scorer, prompts: list[int], answers: int
) -> None:
    one, twin = (load(a_replica(), *prompts, answers=answers) for _ in range(2))
    call = a_waiting_call(forecast=a_forecast(answers))

    assert scorer.cost_s(0.0, call, one) >= 0.0
    assert scorer.cost_s(0.0, call, one) == scorer.cost_s(0.0, call, twin)


@every_scorer
@given(prompts=st.lists(st.integers(1, 5000), max_size=6), more=st.integers(1, 5000))
def test_a_longer_queue_never_lowers_a_cost(scorer: Scorer, prompts: list[int], more: int) -> None:
    shorter, longer = load(a_replica(), *prompts), load(a_replica(), *prompts, more)
    call = a_waiting_call()

    assert scorer.cost_s(0.0, call, longer) >= scorer.cost_s(0.0, call, shorter)


@every_scorer
def test_a_cost_falls_with_time_or_stays(scorer: Scorer) -> None:
    replica = load(a_replica(), 5000)
    costs = [scorer.cost_s(now_s, a_waiting_call(), replica) for now_s in (0.0, 0.3, 0.6, 9.0)]

    assert costs == sorted(costs, reverse=True)


# Names.


def test_every_name_of_the_catalog_builds_a_policy_of_that_name() -> None:
    assert [policy(name).name for name in CATALOG] == list(CATALOG)
    told = {name: set(policy(name).clairvoyant) for name in NAMES if policy(name).clairvoyant}
    assert told == {"oracle-stjf": {"length"}, "oracle-model": {"length", "success"}}


def test_a_placement_alone_is_first_come_first_served() -> None:
    assert policy("round-robin").ordering == ORDERINGS["fcfs"][0]


def test_an_ordering_alone_places_by_tokens() -> None:
    assert policy("mlfq").scorers == TOKENS
    assert policy("mlfq").ordering == FeedbackQueues()


KNOWN_PLACEMENTS = (
    "known: least-requests, least-tokens, llm-d-latency, power-of-two, prefix-affinity, random, "
    "round-robin, vllm"
)
KNOWN_POLICIES = (
    "known: cascade, chimera, edf, fcfs, las, least-requests, least-tokens, llm-d-latency, ltr, "
    "maestro, mlfq, murakkab, oldest, oracle-model, oracle-stjf, point, power-of-two, "
    "prefix-affinity, quality-only, random, random-model, round-robin, sjf, stjf, swarmx, vllm"
)
KNOWN_ORDERINGS = "known: edf, fcfs, las, mlfq, oldest, sjf, stjf"


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("least-token", 'policy "least-token"', f'did you mean "least-tokens"? {KNOWN_POLICIES}'),
        ("las+round-robin", 'policy "las"', KNOWN_PLACEMENTS),
        ("oracle-stjf+las", 'policy "oracle-stjf"', KNOWN_PLACEMENTS),
        ("round-robin+lsa", 'ordering "lsa"', f'did you mean "las"? {KNOWN_ORDERINGS}'),
        ("random+", 'ordering ""', KNOWN_ORDERINGS),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_the_nearest(
    name: str, problem: str, remedy: str
) -> None:
    with pytest.raises(InputError) as refusal:
        policy(name)

    assert str(refusal.value) == f"policy: unknown {problem} ({remedy})"


# Placements.


def best(of: str, call: Waiting, *replicas: Replica) -> str:
    chosen = policy(of)

    def cost_s(replica: Replica) -> float:
        return sum(chosen.costs_s(0.0, call, replica).values())

    return chosen.picker.pick(call, replicas, cost_s, random.Random(1)).replica_id


def test_least_tokens_goes_where_the_answer_ends_first_not_where_fewest_wait() -> None:
    slow = a_replica("slow-0", a_pool("slow", slowness=4.0))
    fast = load(a_replica("fast-0", a_pool("fast")), 300, 300)
    call = a_waiting_call()

    assert best("least-tokens", call, slow, fast) == "fast-0"
    assert best("least-requests", call, slow, fast) == "slow-0"


def test_least_tokens_counts_prefill_that_is_still_to_do() -> None:
    long = load(a_replica("p-0"), 3000)
    short = load(a_replica("p-1"), 10, 10, 10)

    assert best("least-tokens", a_waiting_call(), long, short) == "p-1"


def test_least_tokens_counts_the_distance() -> None:
    near, far = a_replica("p-1"), a_replica("p-0")
    far.network_s = 0.2

    assert best("least-tokens", a_waiting_call(), far, near) == "p-1"


def a_call_with_prefix() -> Waiting:
    hashes = tuple(range(8))
    return a_waiting_call(request=a_request(prompt_tokens=2100, prefix_hashes=hashes))


def test_prefix_affinity_goes_where_the_prefix_is() -> None:
    holder, other = a_replica("p-9"), a_replica("p-0")
    holder.prefixes.touch(tuple(range(8)))
    call = a_call_with_prefix()

    assert best("prefix-affinity", call, other, holder) == "p-9"
    assert best("least-tokens", call, other, holder) == "p-0"


def test_prefix_affinity_leaves_a_holder_that_is_busy() -> None:
    holder, other = load(a_replica("p-9"), 6000), a_replica("p-0")
    holder.prefixes.touch(tuple(range(8)))

    assert best("prefix-affinity", a_call_with_prefix(), other, holder) == "p-0"


def test_a_workflow_stays_with_its_prefix_through_its_calls() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=4), "prefix-affinity")
    homes = set()
    for stage in range(5):
        hashes = tuple(range(stage + 1))
        found = placements(
            scheduler.arrive(
                f"w/{stage}", 10.0 * stage, prompt_tokens=300 * (stage + 1), prefix_hashes=hashes
            )
        )
        homes |= set(found.values())
        scheduler.at(10.0 * stage + 5, RequestFinished(RequestId(f"w/{stage}"), 1, 50))

    assert len(homes) == 1


def test_equal_costs_go_to_the_replica_used_longest_ago() -> None:
    replicas = [a_replica(f"p-{i}") for i in range(3)]
    for replica, serial in zip(replicas, (5, 2, 9), strict=True):
        replica.last_dispatch = serial

    assert best("least-requests", a_waiting_call(), *replicas) == "p-1"


def test_round_robin_takes_turns_also_after_one_was_away() -> None:
    scheduler = CheckedScheduler(a_fleet(replicas=3), "round-robin")

    found = [placements(scheduler.arrive(f"r{i}", 0.2 * i)).popitem()[1] for i in range(6)]

    assert found == ["p-0", "p-1", "p-2"] * 2


def test_power_of_two_takes_the_cheaper_of_two_different_ones() -> None:
    busy, idle = load(a_replica("p-0"), 10), a_replica("p-1")

    def pick(rng: random.Random, *replicas: Replica) -> str:
        picked = PowerOfTwo().pick(
            a_waiting_call(), replicas, lambda r: float(r.running_requests), rng
        )
        return picked.replica_id

    rng = random.Random(3)
    assert {pick(rng, busy, idle) for _ in range(40)} == {"p-1"}
    assert pick(rng, busy) == "p-0"


def test_of_a_large_pool_the_least_loaded_and_the_holders_of_the_prefix_are_scored() -> None:
    pool = a_pool()
    replicas = [load(a_replica(f"p-{i:02d}", pool), 10, answers=1000 - 10 * i) for i in range(40)]
    replicas[3].prefixes.touch((0,))
    call = a_call_with_prefix()

    kept = [one.replica_id for one in shortlist(call, replicas)]

    assert kept == [*(f"p-{i}" for i in range(39, 39 - SHORTLIST, -1)), "p-03"]
    assert shortlist(call, replicas[:SHORTLIST]) == replicas[:SHORTLIST]


def test_each_pool_has_a_shortlist_of_its_own() -> None:
    replicas = [
        a_replica(f"{pool.pool_id}-{i:02d}", pool)
        for pool in (a_pool("a"), a_pool("b"))
        for i in range(20)
    ]

    pools = [one.pool.pool_id for one in shortlist(a_waiting_call(), replicas)]

    assert (pools.count(replicas[0].pool.pool_id), len(pools)) == (SHORTLIST, 2 * SHORTLIST)


def test_the_cheapest_of_all_is_chosen_by_least_cost() -> None:
    replicas = [a_replica(f"p-{i}") for i in range(5)]
    prices_s = {"p-0": 3.0, "p-1": 2.0, "p-2": 1.0, "p-3": 1.5, "p-4": 8.0}

    picked = LeastCost().pick(
        a_waiting_call(), replicas, lambda r: prices_s[r.replica_id], random.Random(1)
    )

    assert picked.replica_id == "p-2"


def test_placements_sum_the_seconds_they_say() -> None:
    replica = load(a_replica(), 1000, answers=50)
    replica.network_s = 0.02
    curve, call = replica.pool.curve, a_waiting_call(forecast=a_forecast(10))
    step_s = curve.step_s(2, 1150)

    found = policy("least-tokens").costs_s(0.0, call, replica)

    assert dict(found) == {
        "prefill_backlog": pytest.approx(replica.prefill_clear_s),
        "prefill": pytest.approx(curve.prefill_s(100)),
        "decode": pytest.approx(10 * step_s),
        "in_flight_tokens": pytest.approx((curve.step_s(2, 1050) - curve.step_s(1, 0)) * 50),
        "network": 0.02,
    }


# Filters.


def test_a_replica_without_kv_room_for_a_long_answer_is_refused_unless_it_is_idle() -> None:
    pool = a_pool(kv_blocks=20)  # 320 tokens
    busy, fits, idle = (a_replica(f"p-{i}", pool) for i in range(3))
    load(busy, 100, answers=5)
    load(fits, 20, answers=5)
    call = a_waiting_call(request=a_request(prompt_tokens=200, max_output_tokens=80))

    kept = FitsKvCache().keep(call, pool, [busy, fits, idle])

    assert kept == [fits, idle]


# Orderings.


def order(ordering_policy: str, calls: Sequence[tuple[str, Forecast, float | None]]) -> str:
    """Names of waiting calls in the order in which one replica takes them."""
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), ordering_policy)
    scheduler.arrive("blocker", 0.0)
    for i, (name, forecast, deadline_s) in enumerate(calls):
        scheduler.arrive(name, 0.001 * i, forecast, deadline_s=deadline_s)
    running, names = "blocker", []
    for i in range(len(calls)):
        done = RequestFinished(RequestId(running), 1, 1)
        ((running, _),) = placements(scheduler.at(1.0 + i, done)).items()
        names.append(running)
    return " ".join(names)


def test_fcfs_goes_by_arrival() -> None:
    assert order("fcfs", [(name, a_forecast(9), None) for name in "bac"]) == "b a c"


def test_sjf_goes_by_expected_service() -> None:
    forecasts = {"long": a_forecast(50), "short": a_forecast(5), "middle": a_forecast(30)}

    assert order("sjf", [(n, f, None) for n, f in forecasts.items()]) == "short middle long"


def test_sjf_counts_the_prompt_too() -> None:
    pool = a_pool()
    long, short = a_request(prompt_tokens=9000), a_request(prompt_tokens=100)
    urgencies = [
        ShortestJob().urgency_s(one, a_forecast(5), a_workflow(), pool) for one in (long, short)
    ]

    assert urgencies[0] > 5 * urgencies[1]


def test_edf_goes_by_deadline_and_grants_a_default_without_one() -> None:
    deadlines = {"none": None, "late": 900.0, "soon": 20.0, "past": 0.0}
    calls = [(name, NO_FORECAST, at) for name, at in deadlines.items()]

    assert order("edf", calls) == "past soon none late"
    assert EarliestDeadline().default_slack_s == 300.0


def test_las_lets_a_fresh_workflow_go_before_one_that_was_given_much() -> None:
    scheduler = CheckedScheduler(a_fleet(a_pool(max_sequences=1)), "las")
    old = WorkflowId("old")
    scheduler.arrive("old/0", 0.0, workflow_id=old)
    scheduler.at(1.0, TokensStreamed(((RequestId("old/0"), 1, 300),)))
    scheduler.arrive("old/1", 1.0, workflow_id=old)
    scheduler.arrive("new/0", 2.0)

    assert placements(scheduler.at(3.0, RequestFinished(RequestId("old/0"), 1, 300))) == {
        "new/0": "p-0"
    }


def test_las_gives_way_to_age() -> None:
    ordering, aging = ORDERINGS["las"]
    pool = a_pool()
    given_much = ordering.urgency_s(a_request(), NO_FORECAST, a_workflow(attained_s=5.0), pool)

    assert ordering == LeastAttained()
    assert given_much == 5.0
    assert aging * 50.0 == pytest.approx(given_much)  # 50 s of waiting make up for 5 s of service


@pytest.mark.parametrize(
    ("attained_s", "urgency_s"), [(0.0, 0.0), (1.99, 0.0), (2.0, 20.0), (6.0, 40.0), (14.0, 60.0)]
)
def test_mlfq_sinks_a_level_each_time_service_doubles(attained_s: float, urgency_s: float) -> None:
    workflow = a_workflow(attained_s=attained_s)

    assert FeedbackQueues().urgency_s(a_request(), NO_FORECAST, workflow, a_pool()) == urgency_s


def test_mlfq_is_first_come_first_served_within_a_level() -> None:
    assert order("mlfq", [(name, NO_FORECAST, None) for name in "cab"]) == "c a b"


def test_the_stjf_oracle_goes_by_what_remains_of_the_workflow() -> None:
    remaining = {"long": 3000, "short": 40, "middle": 500}
    calls = [
        (name, a_forecast(40, remaining_tokens=Quantiles.exactly(tokens)), None)
        for name, tokens in remaining.items()
    ]

    assert order("oracle-stjf", calls) == "short middle long"


def test_stjf_counts_a_workflow_as_long_as_its_call_at_least() -> None:
    def urgency_s(forecast: Forecast) -> float:
        return ShortestRemaining().urgency_s(
            a_request(max_output_tokens=500), forecast, a_workflow(), a_pool()
        )

    alone_s = urgency_s(a_forecast(200))
    assert urgency_s(a_forecast(200, remaining_tokens=Quantiles.exactly(3))) == alone_s
    assert urgency_s(a_forecast(200, remaining_tokens=Quantiles.exactly(400))) > 1.5 * alone_s


# Routers.

TWO_MODELS: tuple[Pool, ...] = (a_pool("m", model="m"), a_pool("x", model="x", slowness=5.0))


@pytest.mark.parametrize(
    ("success", "pools"),
    [
        ({M: 0.0, X: 1.0}, ("x",)),
        ({M: 1.0, X: 1.0}, ("m", "x")),
        ({M: 0.0, X: 0.0}, ("m", "x")),
        ({X: 0.4}, ("x",)),
        ({}, ("m", "x")),
    ],
)
def test_the_model_oracle_takes_only_models_that_solve_the_call(
    success: dict[ModelName, float], pools: tuple[str, ...]
) -> None:
    call = a_waiting_call(forecast=Forecast(success=success))

    assert SurestPools().route(call, TWO_MODELS, a_view(), random.Random(1)) == pools


def test_the_model_oracle_waits_for_the_model_rather_than_take_another() -> None:
    pools = (a_pool("m", model="m"), a_pool("x", model="x", max_sequences=1))
    scheduler = CheckedScheduler(a_fleet(*pools), "oracle-model")
    only_x = Forecast(success={M: 0.0, X: 1.0})

    assert placements(scheduler.arrive("a", 0.0, only_x)) == {"a": "x-0"}
    assert scheduler.arrive("b", 0.0, only_x) == []


# Admission.


def test_a_line_is_full_at_its_bound_and_waiting_ends_a_fixed_time_after_arrival() -> None:
    line = BoundedLine(max_waiting=3, max_wait_s=20.0)

    assert [line.refuses(a_request(), n) for n in (0, 2, 3, 4)] == [None, None, *["queue_full"] * 2]
    assert line.expires_s(a_request(arrival_s=7.0)) == 27.0


def test_placements_and_orderings_are_free_to_combine() -> None:
    for placement in PLACEMENTS:
        for ordering in ORDERINGS:
            joined = a_policy(f"{placement}+{ordering}")
            assert joined.scorers == PLACEMENTS[placement][0]
            assert (joined.ordering, joined.aging) == ORDERINGS[ordering]
