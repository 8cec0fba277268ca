"""Calls and decisions by label, and that no caller can make labels."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from builders import a_fleet, a_pool
from concertmaster.core.actions import Dispatch
from concertmaster.core.fleet import ReplicaId
from concertmaster.core.request import RequestId
from concertmaster.gateway.tally import DECISIONS, MOST_NAMES, bounded, choice_of, labels_of
from gateway_rig import Rig, cuts, exactly, hangs, over_engines, over_upstreams, play, until

METRICS = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scraped(rig: Rig) -> Series:
    text = (await rig.ask("GET", "/metrics")).body.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def calls_of(series: Series) -> dict[tuple[str, ...], float]:
    order = ("model_name", "target_model_name", "class", "outcome")
    return {
        tuple(dict(labels)[name] for name in order): value
        for (name, labels), value in series.items()
        if name == "concertmaster_calls_total"
    }


def decisions_of(series: Series) -> dict[str, float]:
    return {
        dict(labels)["reason"]: value
        for (name, labels), value in series.items()
        if name == "concertmaster_decisions_total" and value
    }


# What is counted.


def test_calls_count_by_what_was_asked_for_what_served_and_what_came_of_it() -> None:
    async def main() -> None:
        async with over_engines(2) as (rig, _):
            await rig.call({**exactly(4), "stream": True})
            await rig.call({**exactly(4), "model": "auto"}, x_concertmaster_class="batch")
            await rig.call({"model": "unheard-of"})
            series = await scraped(rig)
            assert calls_of(series) == {
                ("m", "m", "interactive", "served"): 1,
                ("auto", "m", "batch", "served"): 1,
                ("other", "none", "interactive", "rejected"): 1,
            }
            assert decisions_of(series) == {"least_cost": 2, "model_not_found": 1}
            stood = "concertmaster_queue_duration_seconds_count"
            assert series[stood, (("outcome", "dispatched"),)] == 2
            assert series[stood, (("outcome", "rejected"),)] == 1
            assert series["concertmaster_time_per_output_token_seconds_count", ()] == 1

    play(main())


def test_retries_failures_and_callers_that_leave_are_told_apart() -> None:
    async def main() -> None:
        async with over_upstreams(cuts, cuts) as (rig, _):
            assert (await rig.call({})).status == 502
            series = await scraped(rig)
            assert calls_of(series) == {("m", "m", "interactive", "failed"): 1}
            counts = decisions_of(series)
            assert (counts["retried"], counts["engine_error"]) == (2, 1)
        async with over_upstreams(hangs) as (rig, upstream):
            call = asyncio.ensure_future(rig.call({}))
            await until(lambda: upstream.heard)
            call.cancel()
            await until(lambda: not rig.gateway.open_exchanges)
            series = await scraped(rig)
            assert calls_of(series) == {("m", "m", "interactive", "cancelled"): 1}
            assert decisions_of(series) == {"only_choice": 1}

    play(main())


def test_lengths_are_held_against_their_forecasts() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _):
            for _ in range(12):
                await rig.call(exactly(8))
            series = await scraped(rig)
            assert series["concertmaster_output_tokens_forecast_ratio_count", ()] > 0
            assert series["concertmaster_output_tokens_forecast_ratio_bucket", (("le", "1.0"),)] > 0

    play(main())


@pytest.mark.parametrize(
    ("attempt", "candidates", "cost_s", "choice"),
    [
        (2, 5, 1.0, "retried"),
        (1, 1, None, "only_choice"),
        (1, 5, 1.0, "least_cost"),
        (1, 5, None, "picked"),
    ],
)
def test_a_decision_has_one_reason(
    attempt: int, candidates: int, cost_s: float | None, choice: str
) -> None:
    dispatch = Dispatch(RequestId("r"), ReplicaId("p"), attempt, 0, 0.0, candidates, cost_s)
    assert choice_of(dispatch) == choice
    assert f"| `{choice}` |" in METRICS


def test_every_reason_of_a_decision_is_documented_and_there_from_the_start() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            series = await scraped(rig)
            reasons = {
                dict(labels)["reason"]
                for name, labels in series
                if name == "concertmaster_decisions_total"
            }
            assert reasons == set(DECISIONS)

    play(main())
    for reason in DECISIONS:
        assert f"| `{reason}` |" in METRICS, reason


# What callers cannot do.


hostile = st.text(max_size=40).filter(lambda text: text.isprintable() and text.isascii())


def test_hostile_names_and_ids_make_no_labels() -> None:
    async def labels(rig: Rig) -> set[Any]:
        return {
            (name, labels)
            for name, labels in await scraped(rig)
            if dict(labels).get("model_name") != "other"
        }

    async def main() -> None:
        fleet = a_fleet(a_pool("p"), a_pool("q", model="n"))
        async with over_engines(fleet=fleet) as (rig, _):
            for model in ("m", "n", "auto", "unknown"):
                await rig.call({**exactly(2), "model": model})
            before = await labels(rig)
            for i in range(120):
                await rig.call(
                    {"model": f'x{i}"}}\n# {i}'},
                    x_concertmaster_workflow_id=f"w{i}",
                    x_concertmaster_role=f"role{i}",
                    x_request_id=f"r{i}",
                )
                ids = {"x_concertmaster_workflow_id": f"v{i}", "x_concertmaster_role": f"r{i}"}
                await rig.call({**exactly(2), "user": f"u{i}"}, **ids)
            assert await labels(rig) == before
            assert len(calls_of(await scraped(rig))) == 4

    play(main())


@given(st.lists(hostile, max_size=50), st.integers(0, 20), hostile)
def test_labels_are_as_many_as_the_bound_and_one_more(
    names: list[str], most: int, asked: str
) -> None:
    labels = labels_of(names, most=most)

    assert len(set(labels.values()) - {"other"}) <= most
    assert bounded(asked, labels) in {*labels.values(), "other"}
    assert MOST_NAMES == 1000


def test_no_metric_has_a_label_that_a_caller_fills_freely() -> None:
    async def main() -> None:
        async with over_engines() as (rig, _):
            await rig.call(exactly(2), x_concertmaster_workflow_id="w")
            names = {name for _, labels in await scraped(rig) for name, _ in labels}
            assert not [name for name in names if re.search("workflow|session|request_id", name)]

    play(main())
