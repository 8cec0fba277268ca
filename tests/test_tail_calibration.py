"""Composed laws of completion, noted when a call is routed, against what came."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import pytest

from builders import a_call, a_fleet, a_plan, a_pool, a_workload
from concertmaster.core.fleet import Pool, PoolId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.policy import Policy, Router, View
from concertmaster.core.queue import Waiting
from concertmaster.core.request import Request, RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.core.service import service_on
from concertmaster.core.sketch import Measure, Sketch, add, affine
from concertmaster.physics.fast import FastEngine
from concertmaster.policies.catalog import policy
from concertmaster.predictors.interface import NO_PROMPT, Completion, Prompt
from concertmaster.sim.driver import Simulation
from concertmaster.sim.engines import engine_settings
from concertmaster.workload.plan import Workload

LEVELS = (0.5, 0.9)
CALLS, WARM_UP = 3000, 300


@dataclass(frozen=True)
class Notes:
    """A router that writes down the law of each call's completion as it arrives."""

    inner: Router
    laws: dict[RequestId, tuple[bool, Sketch]] = field(default_factory=dict)

    def route(
        self, call: Waiting, pools: Sequence[Pool], view: View, rng: random.Random
    ) -> tuple[PoolId, ...]:
        if call.request.request_id not in self.laws:
            self.laws[call.request.request_id] = composed(call, pools[0], view)
        return self.inner.route(call, pools, view, rng)


def composed(call: Waiting, pool: Pool, view: View) -> tuple[bool, Sketch]:
    """Return whether the call must wait, and the law of its seconds to completion."""
    tokens, crew = call.output_sketch(pool.model.name), view.crew(pool)
    assert crew is not None
    room = view.room(call, pool)
    if room:
        best = min(room, key=lambda one: (len(one.in_flight), one.replica_id))
        return False, service_on(view.now_s, call, best).law(tokens)
    prefill_s = pool.curve.prefill_s(call.request.prompt_tokens)
    service = affine(tokens, crew.step_s, prefill_s)
    return True, reduce(add, view.wait(call, crew).parts, service)


class TrueLaw:
    """A predictor that knows the law from which lengths are drawn, and no more."""

    reads_prompts = False

    def __init__(self, law: Quantiles) -> None:
        self._forecast = Forecast(output_tokens=law)

    def predict(self, request: Request, prompt: Prompt = NO_PROMPT) -> Forecast:
        return self._forecast

    def learn(
        self,
        request: Request,
        completion: Completion,
        prompt: Prompt = NO_PROMPT,
        forecast: Forecast | None = None,
    ) -> None:
        """Nothing is left to learn."""

    def close(self, workflow_id: object, success: float | None = None) -> None:
        """Nor here."""


def lengths(rng: random.Random, count: int) -> list[int]:
    return [max(1, min(2000, round(rng.lognormvariate(4.6, 0.8)))) for _ in range(count)]


def lone_calls(rate_rps: float, rng: random.Random) -> Workload:
    plans, now_s = [], 0.0
    for i, tokens in enumerate(lengths(rng, CALLS)):
        now_s += rng.expovariate(rate_rps)
        call = a_call(
            prompt_tokens=rng.randrange(50, 400), output_tokens=tokens, max_output_tokens=2000
        )
        plans.append(a_plan(f"w{i}", call, arrival_s=now_s))
    return a_workload(*plans)


def coverage(rate_rps: float) -> dict[bool, tuple[int, list[float]]]:
    """Count calls and the shares of them that ended by each level, by whether they waited."""
    rng = random.Random(11)
    base = policy("swarmx")
    notes = Notes(base.router)
    noting: Policy = replace(base, router=notes)
    fleet = a_fleet(a_pool(max_sequences=8), replicas=4)
    law = Quantiles.of_samples([float(one) for one in lengths(rng, 20_000)])
    records = Simulation(
        Scheduler(fleet, noting, rng),
        lone_calls(rate_rps, rng),
        TrueLaw(law),
        lambda pool: FastEngine(pool.curve, engine_settings(pool)),
    ).run(policy="swarmx", seed=0)
    ended: dict[bool, list[list[bool]]] = {False: [], True: []}
    for one in records.calls[WARM_UP:]:
        waits, sketch = notes.laws[one.request_id]
        assert one.finished_s is not None
        took_s = one.finished_s - one.arrival_s
        ended[waits].append([took_s <= Measure.quantile(level).of(sketch) for level in LEVELS])
    return {
        waits: (len(kept), [sum(column) / len(kept) for column in zip(*kept, strict=True)])
        for waits, kept in ended.items()
        if kept
    }


def test_calls_end_by_the_composed_levels_about_as_often_as_these_say() -> None:
    found = coverage(rate_rps=18.0)

    assert set(found) == {False, True}
    for calls, shares in found.values():
        assert calls > 500
        assert shares[0] == pytest.approx(0.5, abs=0.08)
        assert shares[1] == pytest.approx(0.9, abs=0.04)
