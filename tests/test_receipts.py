"""Receipts: what was decided and why, what came of it, and to whom it is shown."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CheckedScheduler, a_fleet, a_forecast, a_policy, a_pool, a_request
from concertmaster.core.actions import Dispatch
from concertmaster.core.errors import InputError
from concertmaster.core.fleet import PoolId, ReplicaId
from concertmaster.core.forecast import Forecast, Quantiles
from concertmaster.core.request import ModelName, RequestId
from concertmaster.core.scheduler import Scheduler
from concertmaster.core.service import Stand
from concertmaster.core.weighing import MOST_CANDIDATES, MOST_KEPT, Candidate, Weighed
from concertmaster.gateway import receipts as receipts_module
from concertmaster.gateway.exchange import Exchange
from concertmaster.gateway.receipt import Attempt, Record, record_of
from concertmaster.gateway.receipt_fields import Fields, fields_in, receipt_of
from concertmaster.gateway.receipt_sheet import packed, sheet_of
from concertmaster.predictors.chances import Chances
from concertmaster.state.database import Database
from concertmaster.state.key_file import KeyFile
from concertmaster.state.keys import new_key
from concertmaster.state.receipts import SCHEMA, ReceiptFile, Row
from gateway_rig import CHAT, a_body, hangs, over_engines, over_upstreams, play, until

SRC = str(Path(__file__).parents[1] / "src")
MARKER = "zanzibar-7731"
M = ModelName("m")
NOBODY: Any = None


def weighing(fleet: Any = None, of: str = "least-tokens", **changes: Any) -> CheckedScheduler:  # noqa: ANN401
    checked = CheckedScheduler(fleet or a_fleet(replicas=3), a_policy(of, **changes))
    checked.core = Scheduler(checked.fleet, checked.policy, checked.core._routing._rng, weighs=True)
    return checked


def taken(scheduler: CheckedScheduler, name: str) -> Weighed:
    assert scheduler.core.weighing is not None
    found = scheduler.core.weighing.take(RequestId(name))
    assert found is not None
    return found


# What is weighed.


def test_what_was_weighed_is_handed_out_once() -> None:
    scheduler = weighing()
    (dispatch,) = scheduler.arrive("r1", forecast=a_forecast(40))
    assert isinstance(dispatch, Dispatch)

    weighed = taken(scheduler, "r1")

    assert sorted(one.replica_id for one in weighed.candidates) == ["p-0", "p-1", "p-2"]
    assert weighed.candidates[0].replica_id == dispatch.replica_id
    assert list(weighed.costs_s(weighed.candidates[0])) == list(weighed.scorers)
    assert weighed.candidates[0].cost_s == dispatch.cost_s
    assert weighed.pools == ("p",)
    replica = scheduler.replica(dispatch.replica_id)
    assert weighed.kv_tokens == replica.kv.reserved_blocks * replica.kv.block_tokens > 0
    assert scheduler.core.weighing is not None
    assert scheduler.core.weighing.take(RequestId("r1")) is None


def test_a_single_candidate_is_not_compared_but_its_service_is_known() -> None:
    scheduler = weighing(a_fleet())
    scheduler.arrive("r1")

    (only,) = taken(scheduler, "r1").candidates

    assert (only.replica_id, only.cost_s) == ("p-0", None)
    assert only.stand.service().token_s > 0


@pytest.mark.parametrize("of", ["least-tokens", "random", "round-robin", "power-of-two", "swarmx"])
def test_weighing_changes_no_decision(of: str) -> None:
    fleet = a_fleet(a_pool("p"), a_pool("q", model="n"), replicas=12)
    plain = CheckedScheduler(fleet, a_policy(of))
    weighed = weighing(fleet, of)
    plain.core = plain.fresh()

    for i in range(40):
        facts = {"forecast": a_forecast(10 + i), "prompt_tokens": 100 + 7 * i}
        mine = plain.arrive(f"r{i}", 0.01 * i, **facts)  # type: ignore[arg-type]
        theirs = weighed.arrive(f"r{i}", 0.01 * i, **facts)  # type: ignore[arg-type]
        assert [(one.replica_id, one.cost_s) for one in mine if isinstance(one, Dispatch)] == [
            (one.replica_id, one.cost_s) for one in theirs if isinstance(one, Dispatch)
        ]


def test_few_candidates_are_kept_and_the_chosen_one_is_among_them() -> None:
    scheduler = weighing(a_fleet(replicas=30), "random")
    for i in range(20):
        (dispatch,) = scheduler.arrive(f"r{i}")
        assert isinstance(dispatch, Dispatch)
        candidates = taken(scheduler, f"r{i}").candidates
        assert dispatch.replica_id in [one.replica_id for one in candidates]
        assert len(candidates) <= MOST_CANDIDATES


def test_what_nobody_asks_for_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = weighing(a_fleet(a_pool(max_sequences=1000)), window_s=1e9)
    monkeypatch.setattr("concertmaster.core.weighing.MOST_KEPT", 10)
    for i in range(25):
        scheduler.arrive(f"r{i}")
    assert scheduler.core.weighing is not None
    assert list(scheduler.core.weighing._kept) == [f"r{i}" for i in range(15, 25)]
    assert MOST_KEPT > 10


@pytest.mark.parametrize("asked", [False, True])
def test_chances_that_no_decision_asked_for_are_not_worked_out(*, asked: bool) -> None:
    exchange = Exchange(a_request(), NOBODY, b"", b"", model_named="", streams=False)
    chances = Chances([M], lambda: [0.7])
    exchange.forecast = Forecast(success=chances)
    if asked:
        assert chances[M] == 0.7
    record = record_of(exchange, (), policy="p", ended_s=1.0, arrived_unix_s=0.0)

    assert sheet_of(record, [M]).successes == [0.7 if asked else None]
    assert chances.read is asked


# Regret.


def a_stand(backlog_s: float = 0.0, pace: float = 1.0) -> Stand:
    """Ten prompt tokens take 1.1 ms, and each token of an answer 10 ms, both times the pace."""
    return Stand(a_pool(), 10, 0, 0, 0, backlog_s, 0.0, pace)


def a_record(
    stands: list[Stand], *, took_s: float = 5.0, status: int = 200, median: float = 100.0
) -> Record:
    names = [ReplicaId(f"p-{i}") for i in range(len(stands))]
    candidates = [Candidate(name, (), one) for name, one in zip(names, stands, strict=True)]
    dispatch = Dispatch(RequestId("r1"), names[0], 1, 0, 0.5, len(names))
    return Record(
        request_id="r1",
        workflow_id="w",
        policy="p",
        app="",
        role="",
        stage=None,
        service_class="interactive",
        asked=(),
        prompt_tokens=10,
        max_output_tokens=1000,
        deadline_s=None,
        streams=False,
        forecast=Forecast(output_tokens=Quantiles.exactly(median)),
        attempts=(Attempt(1.0, M, dispatch, Weighed((PoolId("p"),), (), candidates, 64)),),
        status=status,
        reason="",
        output_tokens=90,
        arrived_s=0.5,
        first_token_s=1.2,
        ended_s=1.0 + took_s,
        arrived_unix_s=1_700_000_000.0,
        attempt=1,
    )


def regret_of(record: Record) -> Fields | None:
    regret: Fields | None = receipt_of(record, [M])["regret"]
    return regret


def test_regret_is_surprise_and_what_was_forgone() -> None:
    chosen, other = a_stand(1.0, pace=3.0), a_stand(0.5, pace=2.0)
    forecasts_s = [one.service().first_s + 100 * one.service().token_s for one in (chosen, other)]
    assert forecasts_s == pytest.approx([4.0, 2.5], abs=0.05)

    regret = regret_of(a_record([chosen, other], took_s=5.0))

    assert regret == pytest.approx(
        {
            "service_s": 5.0,
            "forecast_s": forecasts_s[0],
            "best_forecast_s": forecasts_s[1],
            "best_replica": "p-1",
            "surprise_s": 5.0 - forecasts_s[0],
            "forgone_s": forecasts_s[0] - forecasts_s[1],
            "regret_s": 5.0 - forecasts_s[1],
        }
    )


seconds = st.floats(0.0, 100.0)
some_stands = st.lists(st.builds(a_stand, seconds, st.floats(0.25, 8)), min_size=1, max_size=5)


@given(some_stands, seconds, st.floats(1.0, 5000.0))
def test_the_parts_of_regret_add_up_and_nothing_forgone_is_negative(
    stands: list[Stand], took_s: float, median: float
) -> None:
    regret = regret_of(a_record(stands, took_s=took_s, median=median))

    assert regret is not None
    assert regret["regret_s"] == pytest.approx(regret["surprise_s"] + regret["forgone_s"], abs=5e-6)
    assert regret["forgone_s"] >= 0.0
    assert regret["service_s"] == pytest.approx(took_s, abs=1e-6)


def test_there_is_no_regret_of_what_was_not_served_or_not_forecast() -> None:
    record = a_record([a_stand()])
    assert regret_of(record._replace(status=502)) is None
    assert regret_of(record._replace(ended_s=None)) is None
    assert regret_of(record._replace(attempts=())) is None
    assert regret_of(record._replace(forecast=Forecast())) is None
    assert receipt_of(record._replace(ended_s=None), [M])["outcome"] is None


# Over HTTP.


def test_a_receipt_says_what_was_decided_and_what_came_of_it() -> None:
    async def main() -> None:
        async with over_engines(2) as (rig, _):
            reply = await rig.call(
                {"max_tokens": 8, "ignore_eos": True, "stream": True},
                x_concertmaster_workflow_id="w1",
                x_concertmaster_role="coder",
                x_request_id="mine/1",
            )
            assert reply.status == 200
            found = (await rig.ask("GET", "/v1/decisions/mine/1")).json
            assert (found["id"], found["workflow_id"], found["role"]) == ("mine/1", "w1", "coder")
            assert found["policy"] == "least-tokens"
            (attempt,) = found["attempts"]
            assert attempt["replica"] == reply.headers["x-concertmaster-replica"]
            assert (attempt["model"], attempt["with_room"]) == ("m", 2)
            assert {one["replica"] for one in attempt["candidates"]} == {"p-0", "p-1"}
            assert [one["chosen"] for one in attempt["candidates"]].count(True) == 1
            assert attempt["reserved_kv_tokens"] > 0
            outcome = found["outcome"]
            assert (outcome["status"], outcome["output_tokens"]) == (200, 8)
            assert 0 < outcome["first_token_s"] <= outcome["duration_s"]
            for i in range(12):
                await rig.call({"max_tokens": 8, "ignore_eos": True}, x_request_id=f"r{i}")
            second = (await rig.ask("GET", "/v1/decisions/r11")).json
            assert second["forecast"]["models"][0]["output_tokens"]["p50"] == 8
            assert second["regret"]["forgone_s"] >= 0

    play(main())


def test_a_call_under_way_and_one_that_was_refused_have_receipts_too() -> None:
    async def main() -> None:
        async with over_upstreams(hangs) as (rig, upstream):
            wire = await rig.wire()
            body = json.dumps(a_body()).encode()
            wire.send(
                b"POST %b HTTP/1.1\r\nx-request-id: slow\r\ncontent-length: %d\r\n\r\n%b"
                % (CHAT.encode(), len(body), body)
            )
            await until(lambda: upstream.heard)
            under_way = (await rig.ask("GET", "/v1/decisions/slow")).json
            assert (under_way["outcome"], under_way["regret"]) == (None, None)
            assert under_way["attempts"][0]["replica"] == "p-0"
            await wire.close()
            await until(lambda: not rig.gateway.open_exchanges)
            left = (await rig.ask("GET", "/v1/decisions/slow")).json
            assert left["outcome"]["status"] == 499
            await rig.call({"model": "nobody" * 1000}, x_request_id="no")
            refused = (await rig.ask("GET", "/v1/decisions/no")).json
            assert (refused["outcome"]["status"], refused["outcome"]["reason"]) == (
                404,
                "model_not_found",
            )
            assert len(refused["models"][0]) <= 128
            assert refused["attempts"] == []

    play(main())


def test_receipts_of_a_workflow_come_newest_first_and_bounded() -> None:
    async def main() -> None:
        async with over_upstreams() as (rig, _):
            for i in range(5):
                await rig.call({}, x_concertmaster_workflow_id="w 1", x_request_id=f"r{i}")
            path = "/v1/decisions?workflow=w%201"
            listed = (await rig.ask("GET", f"{path}&limit=3")).json
            assert [one["id"] for one in listed["data"]] == ["r4", "r3", "r2"]
            for query, status in (("", 400), ("?workflow=w&limit=0", 400), ("?workflow=no", 200)):
                assert (await rig.ask("GET", f"/v1/decisions{query}")).status == status
            reply = await rig.ask("GET", f"{path}&limit=1e9")
            assert reply.error["message"] == "limit: expected a number from 1 to 100, found '1e9'"
            assert (await rig.ask("GET", "/v1/decisions/unknown")).status == 404

    play(main())


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_tenants_see_their_own_receipts_only(tmp_path: Path, kept: str) -> None:
    secrets = {}
    with closing(KeyFile(tmp_path / "keys.sqlite")) as store:
        for tenant in ("a", "b"):
            key, secrets[tenant] = new_key(tenant, now_s=1.0)
            store.create(key)
    settings: Any = {"keys": str(tmp_path / "keys.sqlite")}
    if kept == "file":
        settings["receipts"] = str(tmp_path / "receipts.sqlite")

    async def main() -> None:
        async with over_upstreams(**settings) as (rig, _):
            for tenant, secret in secrets.items():
                headers = {"x_api_key": secret, "x_concertmaster_workflow_id": "w"}
                await rig.call({}, **headers, x_request_id=f"of-{tenant}")
                await rig.call({}, **headers, x_request_id="shared")
            for tenant, secret in secrets.items():
                other = "b" if tenant == "a" else "a"
                for name, status in ((tenant, 200), (other, 404)):
                    reply = await rig.ask("GET", f"/v1/decisions/of-{name}", x_api_key=secret)
                    assert reply.status == status
                reply = await rig.ask("GET", "/v1/decisions?workflow=w", x_api_key=secret)
                assert [one["id"] for one in reply.json["data"]] == ["shared", f"of-{tenant}"]
                spoofed = await rig.ask(
                    "GET",
                    f"/v1/decisions/of-{other}",
                    x_api_key=secret,
                    x_concertmaster_tenant=other,
                )
                assert spoofed.status == 404
            assert (await rig.ask("GET", "/v1/decisions/of-a")).status == 401

    play(main())


def test_no_prompt_is_in_a_receipt(tmp_path: Path) -> None:
    path = tmp_path / "receipts.sqlite"

    async def main() -> None:
        async with over_engines(receipts=str(path)) as (rig, _):
            said = [{"role": "user", "content": f"tell of {MARKER}"}]
            await rig.call({"messages": said, "max_tokens": 2}, x_request_id="r1")
            await rig.call({"messages": said, "max_tokens": 0}, x_request_id="r2")
            reply = await rig.ask("GET", "/v1/decisions/r1")
            assert reply.status == 200
            assert MARKER.encode() not in reply.body

    play(main())
    for file in tmp_path.iterdir():
        assert MARKER.encode() not in file.read_bytes()


# On the disk.


def test_receipts_outlive_the_gateway(tmp_path: Path) -> None:
    settings: Any = {"receipts": str(tmp_path / "receipts.sqlite")}

    async def first() -> None:
        async with over_upstreams(**settings) as (rig, _):
            await rig.call({}, x_request_id="r1", x_concertmaster_workflow_id="w")

    async def second() -> None:
        async with over_upstreams(**settings) as (rig, _):
            assert (await rig.ask("GET", "/v1/decisions/r1")).json["outcome"]["status"] == 200
            listed = (await rig.ask("GET", "/v1/decisions?workflow=w")).json["data"]
            assert [one["id"] for one in listed] == ["r1"]

    play(first())
    play(second())


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.1, 10)), max_size=5),
    st.floats(0, 1e5),
    st.sampled_from([200, 502]),
)
def test_what_is_written_down_is_what_would_have_been_said(
    stands: list[tuple[float, float]], median: float, status: int
) -> None:
    record = a_record(
        [a_stand(*one) for one in stands or [(0.0, 1.0)]], median=median, status=status
    )
    for one in (record, record._replace(attempts=(), ended_s=None, forecast=Forecast(), stage=3)):
        assert fields_in(packed(sheet_of(one, [M]))) == receipt_of(one, [M])


def test_a_receipt_on_the_disk_is_a_third_of_its_json() -> None:
    record = a_record([a_stand(float(i)) for i in range(5)])
    assert 3 * len(packed(sheet_of(record, [M]))) < len(json.dumps(receipt_of(record, [M])))


def test_receipts_that_an_earlier_version_wrote_are_read_beside_those_of_this_one(
    tmp_path: Path,
) -> None:
    path, record = tmp_path / "receipts.sqlite", a_record([a_stand()])
    first = SCHEMA._replace(migrations=SCHEMA.migrations[:1])
    with closing(Database(path, first)) as old, old.transaction():
        body = json.dumps(receipt_of(record, [M])).encode()
        old.write("INSERT INTO receipts VALUES (1, 'r0', 'w', '', ?)", body)
    with closing(ReceiptFile(path, most=10)) as store:
        store.add([Row("r1", "w", "", packed(sheet_of(record, [M])))])
        newer, older = store.of_workflow("w", None, 10)
        assert fields_in(newer) == fields_in(older) == receipt_of(record, [M])
    with pytest.raises(InputError, match="expected a version up to 1, found 2"):
        Database(path, first)


def test_memory_and_file_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts_module, "RECENT", 3)
    path = tmp_path / "receipts.sqlite"

    async def main() -> None:
        async with over_upstreams(receipts=str(path), receipts_kept=4) as (rig, _):
            receipts = rig.gateway.metrics.witnesses[1]
            assert isinstance(receipts, receipts_module.Receipts)
            receipts._most = 3
            for i in range(10):
                await rig.call({}, x_request_id=f"r{i}")
            assert len(receipts._recent) == 3
            assert not receipts._open
            await receipts.flush()
            assert (await rig.ask("GET", "/v1/decisions/r6")).status == 200
            assert (await rig.ask("GET", "/v1/decisions/r5")).status == 404
            assert await rig.metric('concertmaster_receipts_total{outcome="written"}') == 10

    play(main())
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM receipts").fetchone() == (4,)


def test_a_disk_that_fails_costs_receipts_and_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(receipts_module, "MOST_PENDING", 5)
    healthy = ReceiptFile.add
    fails = [True]

    def add(store: ReceiptFile, rows: Any) -> None:  # noqa: ANN401
        if fails[0]:
            raise sqlite3.OperationalError("database or disk is full")
        healthy(store, rows)

    monkeypatch.setattr(ReceiptFile, "add", add)

    async def main() -> None:
        path = str(tmp_path / "receipts.sqlite")
        async with over_upstreams(may_log=True, receipts=path) as (rig, _):
            receipts = rig.gateway.metrics.witnesses[1]
            assert isinstance(receipts, receipts_module.Receipts)
            for i in range(8):
                assert (await rig.call({}, x_request_id=f"r{i}")).status == 200
                await receipts.flush()
            assert receipts.counts == {"taken": 8, "written": 0, "dropped": 3}
            fails[0] = False
            await receipts.flush()
            assert receipts.counts["written"] == 5
            receipts._recent.clear()
            assert (await rig.ask("GET", "/v1/decisions/r3")).status == 200
            assert (await rig.ask("GET", "/v1/decisions/r2")).status == 404

    play(main())
    assert len([one for one in caplog.messages if "receipts cannot be written" in one]) == 1


CHILD = """
import itertools, sys
from pathlib import Path
from concertmaster.predictors.chances import Chances
from concertmaster.state.database import Database
from concertmaster.state.receipts import SCHEMA, ReceiptFile, Row
store = ReceiptFile(Path(sys.argv[1]), most=50)
for number in itertools.count(int(sys.argv[2])):
    store.add([Row(f"r{number}-{part}", "w", "", b"{}") for part in range(3)])
    print(number, flush=True)
"""


def test_kill_9_loses_no_receipt_that_was_written_and_leaves_no_half_batch(tmp_path: Path) -> None:
    path, number = tmp_path / "receipts.sqlite", -1
    for most in (1, 5, 20):
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", CHILD, str(path), str(number + 2)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": SRC},
        )
        assert child.stdout is not None
        with child, child.stdout as said:
            for _ in range(most):
                number = int(said.readline())
            child.send_signal(signal.SIGKILL)
            for line in said:
                number = int(line)
        with closing(ReceiptFile.existing(path)) as store:
            for part in range(3):
                assert store.find(f"r{number}-{part}", None) == b"{}"
            unacknowledged = [store.find(f"r{number + 1}-{part}", None) for part in range(3)]
            assert len(set(unacknowledged)) == 1
            assert len(store.of_workflow("w", None, 1000)) <= 50
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_is_not_there_or_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        ReceiptFile.existing(tmp_path / "none.sqlite")
    KeyFile(tmp_path / "keys.sqlite").close()
    with pytest.raises(InputError, match="expected a file of receipts"):
        ReceiptFile.existing(tmp_path / "keys.sqlite")


def test_owners_are_kept_apart_and_the_latest_of_an_id_counts(tmp_path: Path) -> None:
    with closing(ReceiptFile(tmp_path / "r.sqlite", most=10)) as store:
        store.add([Row("r", "w", "a", b"1"), Row("r", "w", "b", b"2"), Row("r", "w", "a", b"3")])
        assert [store.find("r", owner) for owner in ("a", "b", "c", None)] == [
            b"3",
            b"2",
            None,
            b"3",
        ]
        assert store.of_workflow("w", "a", 10) == [b"3", b"1"]
        assert store.of_workflow("w", None, 2) == [b"3", b"2"]


def test_asking_waits_for_what_was_not_written_yet(tmp_path: Path) -> None:
    async def main() -> None:
        async with over_upstreams(receipts=str(tmp_path / "r.sqlite")) as (rig, _):
            await rig.call({}, x_request_id="r1")
            receipts = rig.gateway.metrics.witnesses[1]
            assert isinstance(receipts, receipts_module.Receipts)
            receipts._recent.clear()
            replies = await asyncio.gather(*(rig.ask("GET", "/v1/decisions/r1") for _ in range(5)))
            assert {reply.status for reply in replies} == {200}

    play(main())
